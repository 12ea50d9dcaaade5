"""Goals against results: what counts as reached."""

from __future__ import annotations

import pytest

from benchmarks.quality import goals


def row(at_5=1.0, at_half=1.0, seconds=0.5, forget=30.0, curves=()):
    return {
        "at_budget": {"0.5": [at_half, "between"], "5": [at_5, "between"]},
        "seconds": seconds,
        "drops": {"forget": forget},
        "curves": curves,
    }


def case(scenario="genre", data_set="ml-100k", seed=0, **methods):
    return {
        "data_set": data_set,
        "scenario": scenario,
        "seed": seed,
        "methods": {
            goals.SHRINKING: row(2.0),
            "U-CAN, input": row(3.2),
            "U-CAN, mlp": row(3.9),
            goals.BEST: row(20.0),
            goals.DESCENT: row(curves=[[[1, 0.2, {"forget": 10.0}], [2, 0.6, {"forget": 31.0}]]]),
            **methods,
        },
    }


def preset(forget=90.0, retain=0.4, seconds=0.9, data_set="ml-100k", seed=0):
    best = {"drops": {"forget": forget, "retain": retain}, "seconds": seconds}
    document = {"data_set": data_set, "scenario": "one-user", "seed": seed}
    return {**document, "presets": {"best": best}}


def cells(documents, delivered=()):
    lines = goals.section(documents, delivered).splitlines()
    assert lines[2 + len(goals.GOALS)] == ""
    lines = lines[2 : 2 + len(goals.GOALS)]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines]


def test_reached_and_missed():
    found = cells([case(), case("one-user")], [preset()])
    assert [cell for (cell,) in found] == [
        "1.60 (3.2 / 2.0 %)",
        "**missed:** 1.95 (3.9 / 2.0 %)",
        "10.00 (20.0 / 2.0 %)",
        "0.50 s / 0.58 s",
        "not run",
        "**missed:** 1 %",
        "0.50 s",
        "90 %",
        "0.4 %",
        "0.9 s",
    ]


def test_presets_are_held_to_what_they_did_with_their_search():
    """The mean over the seeds; another scenario's request is none of this."""
    other = {**preset(0.0, 50.0, 50.0), "scenario": "genre"}
    found = cells(
        [case("one-user")], [preset(70.0, 0.4, 3.0), preset(80.0, 0.8, 0.2, seed=1), other]
    )
    assert [cell for (cell,) in found][-3:] == [
        "**missed:** 75 %",
        "**missed:** 0.6 %",
        "**missed:** 1.6 s",
    ]


def test_the_genre_as_delivered_is_held_against_gradient_descent_too():
    """Its search included; of a request without curves there is nothing to hold it against."""
    delivered = [
        {**preset(31.0, seconds=seconds, seed=seed), "scenario": "genre"}
        for seed, seconds in ((0, 0.5), (1, 0.7), (2, 9.0))
    ]
    (found,) = cells([case(), case(seed=1)], delivered)[4]
    assert found == "**missed:** 0.5 s / 0.6 s; 0.7 s / 0.6 s"
    assert cells([case()], delivered)[4] == ["0.5 s / 0.6 s"]
    assert cells([case()], delivered[2:])[4] == ["not run"]


def test_ratios_are_of_the_means_over_seeds():
    documents = [case(), case(seed=1, **{goals.SHRINKING: row(0.1), "U-CAN, input": row(1.0)})]
    assert cells(documents)[0] == ["2.00 (2.1 / 1.1 %)"]


def test_no_gain_by_shrinking_is_no_division_by_zero():
    found = cells([case(**{goals.SHRINKING: row(-0.5)})])
    assert found[0] == ["inf (3.2 / -0.5 %)"]


@pytest.mark.parametrize(
    ("wanted", "seconds", "there"),
    [(5.0, 0.1, True), (10.0, 0.2, True), (12.0, 0.2 + 0.4 * 2 / 21, True), (50.0, 0.9, False)],
)
def test_the_time_of_gradient_descent_is_that_of_its_fastest_setting(wanted, seconds, there):
    slow = [[1, 0.2, {"forget": 10.0}], [2, 0.6, {"forget": 31.0}]]
    fast = [[1, 0.4, {"forget": 12.0}], [2, 0.9, {"forget": 20.0}]]
    document = case(**{goals.DESCENT: row(curves=[slow, fast])})
    assert goals.descents_time(document, wanted) == (pytest.approx(seconds), there)


def test_between_two_states_forgetting_is_a_straight_line():
    curve = [[1, 1.0, {"forget": -2.0}], [2, 3.0, {"forget": 8.0}], [3, 4.0, {"forget": 8.0}]]
    document = case(**{goals.DESCENT: row(curves=[curve])})
    assert goals.descents_time(document, 3.0) == (pytest.approx(2.0), True)
    assert goals.descents_time(document, 8.0) == (3.0, True)
    assert goals.descents_time(document, 9.0) == (4.0, False)


def test_the_slowest_seed_decides_against_gradient_descent():
    late = case(seed=1, **{goals.BEST: row(20.0, seconds=0.7)})
    assert cells([case(), late])[3] == ["**missed:** 0.50 s / 0.58 s; 0.70 s / 0.58 s"]


def test_what_was_not_run_says_so():
    bare = case(data_set="bare")
    del bare["methods"][goals.DESCENT], bare["methods"]["U-CAN, mlp"]
    found = cells([case(), case("users", "pantry"), bare])
    assert [row[1] for row in found] == ["not run"] * 10
    missing = [row[2] == "not run" for row in found]
    assert missing == [False, True, False, *[True] * 7]
    assert goals.section([]) == ""
