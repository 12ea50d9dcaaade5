"""The list of mutations keeps up with the code: `python tests/mutations.py` runs it."""

from __future__ import annotations

from mutations import MUTATIONS, ROOT


def test_every_line_to_break_is_there_once():
    for mutation in MUTATIONS:
        found = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        assert found == 1, f"{mutation.name}: its text occurs {found} times in {mutation.file}"
        assert mutation.old != mutation.new, mutation.name


def test_names_are_unique_and_the_tests_exist():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for test in {test for mutation in MUTATIONS for test in mutation.tests}:
        if not test.startswith("-"):
            assert (ROOT / test.split("::")[0]).exists(), test


def test_every_kernel_and_operator_is_broken():
    broken = {mutation.file for mutation in MUTATIONS}
    for folder in ("kernels", "ucan_fast/ops", "csrc"):
        for path in (ROOT / folder).iterdir():
            source = path.read_text(encoding="utf-8") if path.suffix in (".py", ".cpp") else ""
            if "_kernel(" in source or "LIBRARY.impl(" in source or "_cpu(" in source:
                assert path.relative_to(ROOT).as_posix() in broken
