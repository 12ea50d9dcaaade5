"""Files appear whole or not at all, and what stood there before survives every failure."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ucan_fast import UcanError, files

FULL = OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with its content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")
    return folder


# ------------------------------------------------------------------ atomic_write


def test_writes_bytes_and_by_function(folder):
    files.atomic_write(folder / "file", b"new")
    files.atomic_write(str(folder / "second"), lambda path: path.write_bytes(b"two"))
    files.atomic_write(folder / "deep" / "er" / "third", b"")
    assert tree(folder) == {
        "file": b"new",
        "second": b"two",
        "deep": None,
        "deep/er": None,
        "deep/er/third": b"",
    }


def test_the_writer_never_sees_the_final_path(folder):
    def writer(path):
        assert path.parent == folder, "another file system could not be renamed from"
        assert path != folder / "file"
        assert (folder / "file").read_bytes() == b"old"
        path.write_bytes(b"new")

    files.atomic_write(folder / "file", writer)
    assert tree(folder) == {"file": b"new"}


def test_a_writer_may_replace_its_temporary_file(folder):
    def writer(path):
        path.unlink()
        path.write_bytes(b"new")

    files.atomic_write(folder / "file", writer)
    assert tree(folder) == {"file": b"new"}


def partly(error):
    def writer(path):
        path.write_bytes(b"half of")
        raise error

    return writer


def test_disk_full_while_writing(folder):
    before = tree(folder)
    for target in ("file", "absent"):
        with pytest.raises(UcanError) as caught:
            files.atomic_write(folder / target, partly(FULL))
        assert "No space left" in str(caught.value)
        assert str(folder / target) in str(caught.value)
        assert tree(folder) == before


def test_safetensors_own_error_type_counts_as_an_io_error(folder):
    class SafetensorError(Exception):
        pass

    with pytest.raises(UcanError, match="No space left"):
        files.atomic_write(folder / "file", partly(SafetensorError("No space left on device")))
    assert tree(folder) == {"file": b"old"}


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_disk_full_at_any_later_step(folder, monkeypatch, step):
    def fail(*_args, **_kwargs):
        raise FULL

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UcanError, match="No space left"):
        files.atomic_write(folder / "file", b"new")
    monkeypatch.undo()
    assert tree(folder) == {"file": b"old"}


@pytest.mark.parametrize("failing", ["second", "a folder", "the last rename"])
def test_several_files_all_or_none(folder, monkeypatch, failing):
    contents = {folder / "file": b"new", folder / "second": partly(FULL), folder / "third": b""}
    said = "second: .*No space left.* Nothing was changed"
    after = {"file": b"old"}
    if failing != "second":
        contents[folder / "second"] = lambda path: path.write_bytes(b"two")
    if failing == "a folder":
        (folder / "third").mkdir()
        after["third"], said = None, "third: it is a folder. Nothing was changed"
    if failing == "the last rename":
        real = os.replace

        def replace(source, target):
            if target.name == "third":
                raise FULL
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        # That cannot be taken back, so it is said.
        after, said = {"file": b"new", "second": b"two"}, "third: .* Beside it file, second: new"
    with pytest.raises(UcanError, match=said):
        files.atomic_writes(contents)
    assert tree(folder) == after


def test_several_files(folder):
    files.atomic_writes({folder / "file": b"new", folder / "deep" / "second": b"two"})
    assert tree(folder) == {"file": b"new", "deep": None, "deep/second": b"two"}


@pytest.mark.parametrize("error", [RuntimeError("a bug"), Killed(), KeyboardInterrupt()])
def test_other_errors_pass_through_and_leave_nothing(folder, error):
    with pytest.raises(type(error)) as caught:
        files.atomic_write(folder / "file", partly(error))
    assert caught.value is error
    assert tree(folder) == {"file": b"old"}


def test_no_folder_can_be_made(folder):
    with pytest.raises(UcanError, match="file"):
        files.atomic_write(folder / "file" / "below", b"new")
    with pytest.raises(UcanError):
        files.atomic_write(folder, b"new")
    assert tree(folder.parent) == {"out": None, "out/file": b"old"}


def test_permissions_are_those_of_an_ordinary_file(folder):
    (folder / "ordinary").write_bytes(b"")
    files.atomic_write(folder / "file", b"new")
    with files.atomic_directory(folder / "made"):
        pass
    (folder / "plain").mkdir()

    def mode(name):
        return stat.S_IMODE((folder / name).stat().st_mode)

    assert mode("file") == mode("ordinary")
    assert mode("made") == mode("plain")


# ------------------------------------------------------------------ atomic_directory


def make_folder(target, fill=lambda temporary: None, overwrite=False, **options):
    with files.atomic_directory(target, overwrite, **options) as temporary:
        fill(temporary)


def test_makes_a_folder_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with files.atomic_directory(target) as temporary:
        assert temporary.parent == target.parent
        assert not target.exists()
        (temporary / "one").write_bytes(b"1")
        (temporary / "sub").mkdir()
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/one": b"1", "a/b/sub": None}


def test_refuses_an_existing_folder_before_any_work(folder):
    ran = []
    with pytest.raises(UcanError, match="exists already"):
        make_folder(folder, ran.append)
    with pytest.raises(UcanError, match="not a folder"):
        make_folder(folder / "file", ran.append, overwrite=True)
    assert not ran
    assert tree(folder.parent) == {"out": None, "out/file": b"old"}


def test_overwrite_replaces_the_whole_folder(folder):
    with files.atomic_directory(folder, overwrite=True) as temporary:
        assert (folder / "file").read_bytes() == b"old"
        (temporary / "new").write_bytes(b"new")
    # Nothing of the old content is mixed in.
    assert tree(folder.parent) == {"out": None, "out/new": b"new"}
    with files.atomic_directory(folder.parent / "fresh", overwrite=True):
        pass
    assert (folder.parent / "fresh").is_dir()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("error", [FULL, RuntimeError("a bug"), Killed(), KeyboardInterrupt()])
def test_a_failure_in_the_block_leaves_everything(folder, overwrite, error):
    target = folder if overwrite else folder.parent / "absent"
    expected = UcanError if error is FULL else type(error)

    def fill(temporary):
        (temporary / "half").write_bytes(b"half")
        raise error

    with pytest.raises(expected):
        make_folder(target, fill, overwrite)
    assert tree(folder.parent) == {"out": None, "out/file": b"old"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_while_renaming_brings_the_old_folder_back(folder, monkeypatch, failing):
    """Rename 1 moves the old folder aside, rename 2 puts the new one in its place."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise FULL
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UcanError, match="No space left"):
        make_folder(folder, lambda temporary: (temporary / "new").write_bytes(b"new"), True)
    monkeypatch.undo()
    assert len(calls) >= failing
    assert tree(folder.parent) == {"out": None, "out/file": b"old"}


def test_someone_made_the_folder_meanwhile(tmp_path):
    """Without overwrite their folder is not replaced, though it was not there at the start."""
    target = tmp_path / "out"

    def fill(temporary):
        (temporary / "mine").write_bytes(b"mine")
        target.mkdir()
        (target / "theirs").write_bytes(b"theirs")

    with pytest.raises(UcanError, match="exists already"):
        make_folder(target, fill)
    assert tree(tmp_path) == {"out": None, "out/theirs": b"theirs"}


MARKS = ("plan", "report")


def never(temporary):
    pytest.fail("refused before the block")


@pytest.mark.parametrize("missing", MARKS)
def test_only_an_earlier_output_is_replaced(folder, missing):
    """One that has every mark, or an empty folder; anything else keeps what it holds."""
    for name in MARKS:
        (folder / name).write_bytes(b"")
    (folder / missing).unlink()
    before = tree(folder.parent)
    with pytest.raises(UcanError, match=f"no earlier output.*no {missing}"):
        files.check_output_folder(folder, True, only_with=MARKS)
    with pytest.raises(UcanError, match="no earlier output"):
        make_folder(folder, never, True, only_with=MARKS)
    assert tree(folder.parent) == before
    (folder / missing).write_bytes(b"")
    with pytest.raises(UcanError, match="exists already"):
        files.check_output_folder(folder, False, only_with=MARKS)
    with files.atomic_directory(folder, overwrite=True, only_with=MARKS) as temporary:
        (temporary / "new").write_bytes(b"new")
    assert tree(folder) == {"new": b"new"}
    (folder / "new").unlink()
    with files.atomic_directory(folder, overwrite=True, only_with=MARKS):
        pass
    assert tree(folder.parent) == {"out": None}


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"

    def fill(temporary):
        target.mkdir()
        (target / "theirs").write_bytes(b"theirs")

    with pytest.raises(UcanError, match="no earlier output"):
        make_folder(target, fill, True, only_with=MARKS)
    assert tree(tmp_path) == {"out": None, "out/theirs": b"theirs"}


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_no_output_folder(folder, there):
    link = folder.parent / "link"
    link.symlink_to(folder if there else folder.parent / "nowhere")
    for overwrite in (False, True):
        with pytest.raises(UcanError, match="symbolic link"):
            make_folder(link, never, overwrite)
    assert link.is_symlink()
    assert tree(folder) == {"file": b"old"}


# ------------------------------------------------------------------ our safetensors files


def sample() -> dict[str, torch.Tensor]:
    return {
        "b": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
        "a": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }


def test_a_folder_is_no_file_of_ours(tmp_path):
    with pytest.raises(UcanError, match="is a folder; name the file in it"):
        files.read_safetensors(tmp_path, "kind", "1")


def test_our_files_come_back_as_they_were(tmp_path):
    path = tmp_path / "file"
    files.write_safetensors(path, "kind", "1", {"note": "ünïcode"}, sample())
    metadata, tensors = files.read_safetensors(path, "kind", "1")
    assert metadata == {"note": "ünïcode", "format": "kind", "version": "1"}
    assert set(tensors) == set(sample())
    for name, value in sample().items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_what_was_read_is_no_view_of_the_file(tmp_path):
    path = tmp_path / "file"
    files.write_safetensors(path, "kind", "1", {}, sample())
    _, tensors = files.read_safetensors(path, "kind", "1")
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    assert torch.equal(tensors["b"], sample()["b"])


def rearranged(tensors, metadata):
    """Changes that leave every byte of the tensors alone."""
    swapped = {**tensors, "b": tensors["b"].reshape(2, 3)}
    renamed = {{"b": "c"}.get(name, name): value for name, value in tensors.items()}
    retyped = {**tensors, "a": tensors["a"].view(torch.int16)}
    return {
        "shape": (swapped, metadata),
        "name": (renamed, metadata),
        "dtype": (retyped, metadata),
        "metadata": (tensors, {**metadata, "note": "other"}),
        "no checksum": (tensors, {k: v for k, v in metadata.items() if k != "sha256"}),
        "a tensor less": ({k: v for k, v in tensors.items() if k != "empty"}, metadata),
    }


@pytest.mark.parametrize(
    "change", ["shape", "name", "dtype", "metadata", "no checksum", "a tensor less"]
)
def test_the_checksum_covers_more_than_bytes(tmp_path, change):
    path = tmp_path / "file"
    files.write_safetensors(path, "kind", "1", {"note": "mine"}, sample())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    _, tensors = files.read_safetensors(path, "kind", "1")
    tensors, metadata = rearranged(tensors, metadata)[change]
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    with pytest.raises(UcanError, match=r"file is truncated or corrupt: .* checksum"):
        files.read_safetensors(path, "kind", "1")
