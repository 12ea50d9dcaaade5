"""Ranges by kind of request, and the goals' requests seed by seed."""

from __future__ import annotations

from benchmarks.quality import seeds
from benchmarks.quality.summary import FIFTH, SHRINKING, STEP, STEPS


def row(at_5: float, forget: float = 50.0, retain: float = 1.0, at_half: float = 1.0):
    budgets = {"0.5": [at_half, "first"], "1": [at_5 / 2, "between"], "5": [at_5, "between"]}
    return {"at_budget": budgets, "drops": {"forget": forget, "retain": retain}}


def cell(scenario: str, seed: int = 0, *, step=60.0, steps=70.0, shrunk=4.0, **more):
    methods = {
        "retraining": row(0.0, 80.0, -3.0),
        STEPS: row(steps, 75.0),
        FIFTH: row(steps + 1),
        STEP: row(step, at_half=20.4),
        "U-CAN, input": row(6.0),
        "U-CAN, mlp": row(9.0),
        SHRINKING: row(shrunk),
    }
    found = {
        "data_set": "ml-100k",
        "scenario": scenario,
        "seed": seed,
        "cases": {"forget": 50, "retain": 1000},
        "recall@10": {"forget": 0.5, "retain": 0.2},
        "scores": {"contrast": {"excess": 0.0512}},
        "before": {"forget_train/recall@10": 0.5},
        "methods": methods,
    }
    return {**found, **more}


def rows(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    split = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in split}


def test_ranges_are_over_the_cells_of_a_kind():
    passed = cell("users", 1, step=90.4, shrunk=2.6)
    passed["methods"][STEPS] = row(70.0, 60.0)
    # Between several steps and those on a fifth: the first are passed, by what is no variant.
    documents = [cell("genre"), cell("users"), passed, cell("users", 2, step=70.5)]
    found = rows(seeds.by_kind(documents))
    assert list(found) == ["users", "genre"]
    assert found["genre"] == [*("1", "80", "-3", "-5", "60", "9", "4", "0")]
    # Less retraining's: 60 and 75 of 80. A fifth of D_r that forgets more passes nothing.
    assert found["users"] == [
        *("3", "80", "-3", "-20 to -5", "60 to 90", "9", "3 to 4"),
        f"2 ({STEP} 2)",
    ]


def test_what_passes_several_steps_is_named_with_all_that_tie():
    tied, failed = cell("taste", step=90.0), cell("taste", 1)
    tied["methods"]["NPO"] = row(90.0)
    tied["methods"]["GradDiff"] = {"error": "ValueError: x"}
    failed["methods"][STEPS] = {"error": "ValueError: x"}
    assert rows(seeds.by_kind([tied, failed]))["taste"][-1] == "1 (NPO 1, influence 1)"


def test_a_method_that_failed_leaves_its_figure_out():
    document = cell("genre")
    for name in ("retraining", "U-CAN, mlp"):
        document["methods"][name] = {"error": "ValueError: x"}
    assert rows(seeds.by_kind([document]))["genre"] == [*("1", "-", "-", "-", "60", "-", "4", "0")]
    assert rows(seeds.of_genre([document]))["ml-100k, seed 0"][-2:] == ["-", "60.0 (15.0x)"]


def test_the_genre_by_seed_has_no_ratio_to_less_than_a_hit():
    # A hit is 100 / (50 cases at a recall of 0.5) = 4 %.
    documents = [cell("genre", 0), cell("genre", 1, shrunk=3.9), cell("users", 2)]
    found = rows(seeds.of_genre(documents))
    assert found == {
        "ml-100k, seed 0": ["0.051", "4.0", "4.0", "6.0 (1.5x)", "9.0 (2.2x)", "60.0 (15.0x)"],
        "ml-100k, seed 1": ["0.051", "4.0", "3.9", "6.0", "9.0", "60.0"],
    }
    nothing = cell("genre") | {"recall@10": {"forget": 0.0, "retain": 0.2}}
    assert rows(seeds.of_genre([nothing]))["ml-100k, seed 0"][1:4] == ["-", "4.0", "6.0"]
    assert seeds.of_genre(documents[2:]) == ""


def test_one_users_by_seed_with_what_best_delivers():
    best = {"drops": {"forget": 91.6, "retain": 3.94}}
    delivered = [
        {
            "data_set": "ml-100k",
            "scenario": scenario,
            "seed": seed,
            "presets": {"best": drops},
            "before": {"forget_train/recall@10": before},
        }
        for scenario, seed, drops, before in (
            ("one-user", 1, best, 0.5),
            ("one-user", 2, best, 0.48),
            ("genre", 1, {"drops": {}}, 0.5),
        )
    ]
    documents = [*(cell("one-user", seed) for seed in range(3)), cell("genre", 1)]
    found = rows(seeds.of_one_user(documents, delivered))
    shared = ["4.00", "0.50", "20 / 30 / 60", "35.0 / 70.0", "80"]
    assert found == {
        "ml-100k, seed 0": [*shared, "not run"],
        "ml-100k, seed 1": [*shared, "92, 3.9"],
        "ml-100k, seed 2": [*shared, "another adapter"],
    }
    assert seeds.of_one_user(documents[3:], delivered) == ""
