"""Two layers whose every number is written out by hand.

Layer ``one`` has 4 neurons, layer ``two`` has 3. There are 2 forget tokens and 4 retain tokens
(and padding); the absolute values that each neuron shows are

    neuron      forget    mean  mean sq  retain        mean  mean sq
    one, 0      1, 7      4     25       0, 0, 0, 2    0.5   1
    one, 1      3, 3      3     9        1, 1, 1, 1    1     1        zero variance in both sets
    one, 2      0, 0      0     0        0, 0, 0, 0    0     0        never fires
    one, 3      2, 2      2     4        1, 3, 3, 9    4     25
    two, 0      2, 14     8     100      1, 1, 7, 7    4     25
    two, 1      1, 7      4     25       0, 0, 0, 0    0     0        fires on forget tokens only
    two, 2      1, 1      1     1        2, 2, 14, 14  8     100

so the root mean squares are 5, 3, 0, 2 | 10, 5, 1 (forget) and 1, 1, 0, 5 | 5, 0, 10 (retain).
Columns of A have the norms 5, 13, 10, 4 | 5, 13, 5.
"""

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ucan_fast import ActivationStats, Moments, UcanConfig, UcanWarning, collect, make_plan, ops
from ucan_fast.adapter import fingerprint
from ucan_fast.plan import select

ONE, TWO = "base_model.model.one", "base_model.model.two"

FORGET = {
    "one": [[1, 3, 0, -2], [-7, 3, 0, 2]],
    "two": [[2, 1, 1], [14, -7, -1]],
}
RETAIN = {
    "one": [[0, 1, 0, 1], [0, -1, 0, 3], [0, 1, 0, -3], [2, 1, 0, 9]],
    "two": [[1, 0, 2], [1, 0, -2], [7, 0, 14], [-7, 0, 14]],
}
A = {
    # columns (3, 4), (5, 12), (6, 8), (0, -4) | (-3, 4), (12, -5), (0, 5)
    "one": [[3, 5, 6, 0], [4, 12, 8, -4]],
    "two": [[-3, 12, 0], [4, -5, 5]],
}
B = {
    # rows of norm 5, 13, 10 | 5, 1; N = 3 and 2
    "one": [[3, 4], [-5, 12], [8, 6]],
    "two": [[0, -5], [1, 0]],
}
SCALING = 0.5


class Toy(nn.Module):
    """Two layers side by side, each reading its own row of a table: nothing else happens."""

    def __init__(self) -> None:
        super().__init__()
        padding = {"one": [100] * 4, "two": [100] * 3}
        for name in ("one", "two"):
            rows = torch.tensor(FORGET[name] + RETAIN[name] + [padding[name]], dtype=torch.float32)
            self.register_buffer(f"table_{name}", rows)
        self.one = nn.Linear(4, 3)
        self.two = nn.Linear(3, 2)

    def forward(self, input_ids, attention_mask=None):
        return self.one(self.table_one[input_ids]), self.two(self.table_two[input_ids])


def toy_model() -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=2 * SCALING, target_modules=["one", "two"])
    model = get_peft_model(Toy(), config)
    for name in ("one", "two"):
        set_weights(model, name, A[name], B[name])
    return model


def set_weights(model, name, a, b) -> None:
    layer = model.get_submodule(f"base_model.model.{name}")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor(a, dtype=torch.float32))
        layer.lora_B["default"].weight.copy_(torch.tensor(b, dtype=torch.float32))


def weights(model, name) -> tuple[list, list]:
    layer = model.get_submodule(f"base_model.model.{name}")
    return layer.lora_A["default"].weight.tolist(), layer.lora_B["default"].weight.tolist()


BATCHES = [
    # tokens 0 and 1 are forgotten, 2 to 5 retained, 6 is padding (its group does not matter)
    {
        "input_ids": torch.tensor([[0, 2, 3], [4, 6, 6]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "token_groups": torch.tensor([[0, 1, 1], [1, 0, 1]]),
    },
    {
        "input_ids": torch.tensor([[6, 1, 5, 6]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1]]),
        "token_groups": torch.tensor([[1, 0, 1, -1]]),
    },
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return toy_model()


@pytest.fixture(scope="module")
def stats(model) -> ActivationStats:
    return collect(model, BATCHES, sites=["input", "rank", "output", "layer"])


def approx(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


def approx32(expected):
    return pytest.approx(expected, rel=3e-7, abs=1e-12)


# Moments -----------------------------------------------------------------------------------


def test_counts(stats):
    for layer in stats.layers.values():
        for moments in layer.values():
            assert moments.count.tolist() == [2, 4]


def test_input_moments(stats):
    one, two = stats.layers[ONE]["input"], stats.layers[TWO]["input"]
    assert one.abs_sum.tolist() == [[8, 6, 0, 4], [2, 4, 0, 16]]
    assert one.sq_sum.tolist() == [[50, 18, 0, 8], [4, 4, 0, 100]]
    assert two.abs_sum.tolist() == [[16, 8, 2], [16, 0, 32]]
    assert two.sq_sum.tolist() == [[200, 50, 2], [100, 0, 400]]


def test_rank_moments(stats):
    # z = x Aᵀ. Layer one, forget: (3 + 15, 4 + 36 + 8) = (18, 48) and (-21 + 15, -28 + 36 - 8)
    # = (-6, 0); retain: (5, 12 - 4) = (5, 8), (-5, -12 - 12) = (-5, -24), (5, 12 + 12) = (5, 24),
    # (6 + 5, 8 + 12 - 36) = (11, -16).
    one = stats.layers[ONE]["rank"]
    assert one.abs_sum.tolist() == [[24, 48], [26, 72]]
    assert one.sq_sum.tolist() == [
        [18**2 + 6**2, 48**2],
        [25 + 25 + 25 + 121, 64 + 576 + 576 + 256],
    ]
    # Layer two, forget: (-6 + 12, 8 - 5 + 5) = (6, 8), (-42 - 84, 56 + 35 - 5) = (-126, 86);
    # retain: (-3, 4 + 10), (-3, 4 - 10), (-21, 28 + 70), (21, -28 + 70).
    two = stats.layers[TWO]["rank"]
    assert two.abs_sum.tolist() == [[132, 94], [48, 14 + 6 + 98 + 42]]
    assert two.sq_sum.tolist() == [
        [36 + 126**2, 64 + 86**2],
        [9 + 9 + 441 + 441, 14**2 + 6**2 + 98**2 + 42**2],
    ]


def test_output_moments(stats):
    # δ = s z Bᵀ with s = 0.5. Layer two: rows of B are (0, -5), (1, 0), so δ = (-2.5 z_1, 0.5 z_0):
    # forget (-20, 3), (-215, -63); retain (-35, -1.5), (15, -1.5), (-245, -10.5), (-105, 10.5).
    two = stats.layers[TWO]["output"]
    assert two.abs_sum.tolist() == [[235, 66], [400, 24]]
    assert two.sq_sum.tolist() == [
        [20**2 + 215**2, 9 + 63**2],
        [35**2 + 15**2 + 245**2 + 105**2, 2 * 1.5**2 + 2 * 10.5**2],
    ]
    # Layer one: 0.5 (3 z_0 + 4 z_1), 0.5 (-5 z_0 + 12 z_1), 0.5 (8 z_0 + 6 z_1):
    # forget z = (18, 48): (123, 243, 216); (-6, 0): (-9, 15, -24)
    # retain z = (5, 8): (23.5, 35.5, 44); (-5, -24): (-55.5, -131.5, -92);
    # (5, 24): (55.5, 131.5, 92); (11, -16): (-15.5, -123.5, -4)
    one = stats.layers[ONE]["output"]
    assert one.abs_sum.tolist() == [[132, 258, 240], [150, 422, 232]]
    assert one.sq_sum[0].tolist() == [123**2 + 81, 243**2 + 225, 216**2 + 576]


def test_layer_moments_include_the_base(model, stats):
    for name, key in (("one", ONE), ("two", TWO)):
        layer = model.get_submodule(key)
        x = torch.tensor(FORGET[name], dtype=torch.float32)
        y = layer(x).detach().double()
        torch.testing.assert_close(
            stats.layers[key]["layer"].abs_sum[0], y.abs().sum(0), rtol=1e-6, atol=1e-6
        )


# Risk --------------------------------------------------------------------------------------

TINY = 2.0**-126  # the smallest normal fp32 number: what a ratio is divided by instead of 0

RISK = {
    # (a_f - a_r) / (a_f + a_r): 3.5/4.5, 2/4, 0/0, -2/6 | 4/12, 4/4, -7/9
    ("mean_abs", "symmetric"): [7 / 9, 1 / 2, 0, 0, 1 / 3, 1, 0],
    # 4/6, 2/4, 0/0, -3/7 | 5/15, 5/5, -9/11
    ("rms", "symmetric"): [2 / 3, 1 / 2, 0, 0, 1 / 3, 1, 0],
    ("mean_abs", "difference"): [3.5, 2, 0, 0, 4, 4, 0],
    ("rms", "difference"): [4, 2, 0, 0, 5, 5, 0],
    # 4/0.5 - 1, 3/1 - 1, 0/tiny - 1, 2/4 - 1 | 8/4 - 1, 4/tiny - 1, 1/8 - 1
    ("mean_abs", "ratio"): [7, 2, 0, 0, 1, 4 / TINY, 0],
    ("rms", "ratio"): [4, 2, 0, 0, 1, 5 / TINY, 0],
    # Variances, mean sq - mean²: forget 9, 0, 0, 0 | 36, 9, 0; retain 0.75, 0, 0, 9 | 9, 0, 36.
    # Squared standard errors v_f/2 + v_r/4: 4.6875, 0, 0, 2.25 | 20.25, 4.5, 9, and their roots
    # 5√3/4, 0, 0, 1.5 | 4.5, 3/√2, 3. Neuron (one, 1) has no error: 0 by definition.
    ("mean_abs", "zscore"): [3.5 * 4 / (5 * sqrt(3)), 0, 0, 0, 4 / 4.5, 4 * sqrt(2) / 3, 0],
    ("rms", "zscore"): [4 * 4 / (5 * sqrt(3)), 0, 0, 0, 5 / 4.5, 5 * sqrt(2) / 3, 0],
    # a_f over the largest a_f of the layer: 4 and 8; 5 and 10
    ("mean_abs", "none"): [1, 3 / 4, 0, 1 / 2, 1, 1 / 2, 1 / 8],
    ("rms", "none"): [1, 3 / 5, 0, 2 / 5, 1, 1 / 2, 1 / 10],
}
PER_LAYER = {
    ("mean_abs", "symmetric"): [1, 9 / 14, 0, 0, 1 / 3, 1, 0],
    ("rms", "symmetric"): [1, 3 / 4, 0, 0, 1 / 3, 1, 0],
    ("mean_abs", "difference"): [1, 4 / 7, 0, 0, 1, 1, 0],
    ("rms", "difference"): [1, 1 / 2, 0, 0, 1, 1, 0],
    ("mean_abs", "ratio"): [1, 2 / 7, 0, 0, TINY / 4, 1, 0],
    ("rms", "ratio"): [1, 1 / 2, 0, 0, TINY / 5, 1, 0],
    # layer two: (4/4.5) / (4√2/3) = 3/(4.5 √2) = √2/3, and the same for rms
    ("mean_abs", "zscore"): [1, 0, 0, 0, sqrt(2) / 3, 1, 0],
    ("rms", "zscore"): [1, 0, 0, 0, sqrt(2) / 3, 1, 0],
    ("mean_abs", "none"): [1, 3 / 4, 0, 1 / 2, 1, 1 / 2, 1 / 8],
    ("rms", "none"): [1, 3 / 5, 0, 2 / 5, 1, 1 / 2, 1 / 10],
}
OVERALL = {
    # the largest of all is 1, 1, 4, 5, 4/tiny, 5/tiny, 4√2/3, 5√2/3, 1, 1
    ("mean_abs", "symmetric"): [7 / 9, 1 / 2, 0, 0, 1 / 3, 1, 0],
    ("rms", "symmetric"): [2 / 3, 1 / 2, 0, 0, 1 / 3, 1, 0],
    ("mean_abs", "difference"): [7 / 8, 1 / 2, 0, 0, 1, 1, 0],
    ("rms", "difference"): [4 / 5, 2 / 5, 0, 0, 1, 1, 0],
    ("mean_abs", "ratio"): [7 * TINY / 4, TINY / 2, 0, 0, TINY / 4, 1, 0],
    ("rms", "ratio"): [4 * TINY / 5, 2 * TINY / 5, 0, 0, TINY / 5, 1, 0],
    # 2.8/√3 / (4√2/3) = 2.1/√6 and 3.2/√3 / (5√2/3) = 1.92/√6
    ("mean_abs", "zscore"): [2.1 / sqrt(6), 0, 0, 0, sqrt(2) / 3, 1, 0],
    ("rms", "zscore"): [1.92 / sqrt(6), 0, 0, 0, sqrt(2) / 3, 1, 0],
    ("mean_abs", "none"): [1, 3 / 4, 0, 1 / 2, 1, 1 / 2, 1 / 8],
    ("rms", "none"): [1, 3 / 5, 0, 2 / 5, 1, 1 / 2, 1 / 10],
}


def quiet_plan(model, stats, **choices):
    """A plan with a given strength, so that nothing is searched for and nothing warns."""
    return make_plan(model, stats, UcanConfig(**{"strength": 2.0, **choices}))


def relative_only(expected):
    """Without an absolute tolerance, which would hide the tiny numbers of the ratio contrast."""
    return pytest.approx(expected, rel=1e-12, abs=1e-60)


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
@pytest.mark.parametrize(("statistic", "contrast"), list(RISK))
def test_risk(model, stats, statistic, contrast):
    for normalization, table in (("none", RISK), ("layer", PER_LAYER), ("global", OVERALL)):
        plan = quiet_plan(
            model, stats, statistic=statistic, contrast=contrast, normalization=normalization
        )
        assert plan.flat_risk.tolist() == relative_only(table[statistic, contrast])
        assert plan.risk[ONE].tolist() == approx32(table[statistic, contrast][:4])
        # 2^128, the ratio of a neuron that only fires on forget tokens, is beyond fp32
        expected = [float("inf") if v >= 2.0**128 else v for v in table[statistic, contrast][4:]]
        assert plan.risk[TWO].tolist() == approx32(expected)


# Utility and score -------------------------------------------------------------------------

# w times the root mean square on the retain set: 5·1, 13·1, 10·0, 4·5 | 5·5, 13·0, 5·10,
# over the largest of the layer, 20 and 50.
UTILITY = [0.25, 0.65, 0, 1, 0.5, 0, 1]


@pytest.mark.parametrize("statistic", ["mean_abs", "rms"])
@pytest.mark.parametrize("contrast", ["symmetric", "none"])
def test_utility_does_not_depend_on_the_contrast(model, stats, statistic, contrast):
    plan = quiet_plan(model, stats, statistic=statistic, contrast=contrast)
    assert plan.flat_utility.tolist() == approx(UTILITY)
    assert plan.utility[ONE].tolist() == approx32(UTILITY[:4])


SCORES = [
    # (contrast, fusion, λ, S by hand)
    ("symmetric", "protect", 1, [7 / 9 * 0.75, 0.5 * 0.35, 0, 0, 1 / 3 * 0.5, 1, 0]),
    ("symmetric", "protect", 2, [7 / 9 * 0.5625, 0.5 * 0.1225, 0, 0, 1 / 12, 1, 0]),
    ("symmetric", "protect", 0.5, [7 / 9 * sqrt(3) / 2, 0.5 * sqrt(0.35), 0, 0, sqrt(2) / 6, 1, 0]),
    ("symmetric", "protect", 0, [7 / 9, 1 / 2, 0, 0, 1 / 3, 1, 0]),
    # Two neurons have U = 1: λ = 0 must leave their risk (0⁰ = 1), λ > 0 must erase it.
    ("none", "protect", 0, [1, 3 / 4, 0, 1 / 2, 1, 1 / 2, 1 / 8]),
    ("none", "protect", 1, [3 / 4, 3 / 4 * 0.35, 0, 0, 1 / 2, 1 / 2, 0]),
    ("none", "protect", 3, [0.75**3, 0.75 * 0.35**3, 0, 0, 1 / 8, 1 / 2, 0]),
    ("symmetric", "subtract", 1, [7 / 9 - 0.25, -0.15, 0, -1, 1 / 3 - 0.5, 1, -1]),
    ("symmetric", "subtract", 2, [7 / 9 - 0.5, 0.5 - 1.3, 0, -2, 1 / 3 - 1, 1, -2]),
    ("symmetric", "subtract", 0, [7 / 9, 1 / 2, 0, 0, 1 / 3, 1, 0]),
    ("difference", "protect", 1, [3.5 * 0.75, 2 * 0.35, 0, 0, 2, 4, 0]),
    ("difference", "subtract", 1, [3.25, 1.35, 0, -1, 3.5, 4, -1]),
]


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
@pytest.mark.parametrize(("contrast", "fusion", "utility_weight", "expected"), SCORES)
def test_score(model, stats, contrast, fusion, utility_weight, expected):
    plan = quiet_plan(model, stats, contrast=contrast, fusion=fusion, utility_weight=utility_weight)
    assert plan.flat_score.tolist() == approx(expected)
    assert plan.score[TWO].tolist() == approx32(expected[4:])


# Selection ---------------------------------------------------------------------------------

# S of the default choices, sorted: 0, 0, 0, 1/6, 0.175, 7/12, 1. The quantile q lies at 6 q.
SCORE = [7 / 12, 0.175, 0, 0, 1 / 6, 1, 0]
SELECTION = [
    # choices, t, neurons selected (0 to 3 of layer one, 4 to 6 of layer two)
    ({"fraction": 0.5}, 1 / 6, [0, 1, 5]),  # at 3: the value itself, which is not above itself
    ({"fraction": 0.25}, 91 / 240, [0, 5]),  # at 4.5: halfway between 0.175 and 7/12
    ({"fraction": 0.15}, 0.625, [5]),  # at 5.1: 7/12 + 0.1 · 5/12
    ({"fraction": 0.4}, 1 / 6 + 0.6 * (0.175 - 1 / 6), [0, 1, 5]),  # at 3.6
    ({"fraction": 0.45}, 1 / 6 + 0.3 * (0.175 - 1 / 6), [0, 1, 5]),  # at 3.3
    ({"fraction": 0.6}, 0.4 / 6, [0, 1, 4, 5]),  # at 2.4: 0 + 0.4 · 1/6
    ({"fraction": 0.6, "min_score": 0.17}, 0.17, [0, 1, 5]),
    ({"fraction": 0.6, "min_score": 0.01}, 0.4 / 6, [0, 1, 4, 5]),  # never below the quantile
    ({"fraction": 0.9}, 0.05, [0, 1, 4, 5]),  # at 0.6: 0, raised to min_score
    ({"fraction": 0.9, "min_score": 0}, 0, [0, 1, 4, 5]),
    ({"fraction": 1}, 0.05, [0, 1, 4, 5]),  # at 0
    ({"fraction": 1, "min_score": 0}, 0, [0, 1, 4, 5]),
    ({"fraction": 0.15, "min_score": 0.6}, 0.625, [5]),
    ({"fraction": 0.25, "min_score": 0.6}, 0.6, [5]),
    ({"risk_threshold": 0.2}, 0.2, [0, 5]),
    ({"risk_threshold": 0.2, "fraction": 1}, 0.2, [0, 5]),  # the fraction does not count then
    ({"risk_threshold": 0.17}, 0.17, [0, 1, 5]),
    ({"risk_threshold": 0.01}, 0.05, [0, 1, 4, 5]),
    ({"risk_threshold": 0.01, "min_score": 0}, 0.01, [0, 1, 4, 5]),
    ({"risk_threshold": 0.2, "min_score": 0.7}, 0.7, [5]),
    ({"risk_threshold": -1, "min_score": -0.5}, -0.5, [0, 1, 2, 3, 4, 5, 6]),
]


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
@pytest.mark.parametrize(("choices", "threshold", "selected"), SELECTION)
def test_selection(model, stats, choices, threshold, selected):
    plan = quiet_plan(model, stats, **choices)
    assert plan.flat_score.tolist() == approx(SCORE)
    assert plan.threshold == approx(threshold)
    assert (plan.flat_factors < 1).nonzero().flatten().tolist() == selected
    assert plan.selected == plan.attenuated == len(selected)


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
@pytest.mark.parametrize("contrast", ["difference", "ratio", "zscore", "none"])
def test_min_score_is_zero_for_the_other_contrasts(model, stats, contrast):
    plan = quiet_plan(model, stats, contrast=contrast, risk_threshold=-5.0)
    assert plan.threshold == 0
    assert plan.selected == int((plan.flat_score > 0).sum())


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"fraction": 0}, "largest score 1 is not above the quantile of fraction=0"),
        ({"risk_threshold": 1.0}, "largest score 1 is not above risk_threshold=1"),
        ({"risk_threshold": 2.0}, "largest score 1 is not above risk_threshold=2"),
        ({"min_score": 1.0}, r"indistinguishable .*largest score 1, at most min_score=1"),
        ({"min_score": 1.5}, r"indistinguishable .*largest score 1, at most min_score=1.5"),
    ],
)
def test_nothing_selected_says_why(model, stats, choices, match):
    with pytest.warns(UcanWarning, match=match):
        plan = quiet_plan(model, stats, **choices)
    assert plan.selected == plan.attenuated == 0
    assert plan.flat_factors.tolist() == [1.0] * 7
    assert plan.note in plan.summary()
    with torch.no_grad():
        before = weights(model, "one"), weights(model, "two")
        plan.apply(model)
        assert (weights(model, "one"), weights(model, "two")) == before
        plan.undo(model)


# Decay -------------------------------------------------------------------------------------

# fraction=0.5: t = 1/6, S_max - t = 5/6, so u of 7/12, 0.175, 1 is (5/12)/(5/6) = 0.5,
# (1/120)/(5/6) = 0.01, 1. S_max lies in layer two: layer one alone would have u = 1 for its own.
DECAYS = [
    # choices, factors of (one, 0), (one, 1), (two, 1)
    ({"decay": "exponential", "strength": 2}, [exp(-1), exp(-0.02), exp(-2)]),
    ({"decay": "exponential", "strength": 0.5}, [exp(-0.25), exp(-0.005), exp(-0.5)]),
    ({"decay": "exponential", "strength": 1000}, [exp(-500), exp(-10), 0]),
    ({"decay": "exponential", "strength": 2, "floor": 0.2}, [exp(-1), exp(-0.02), 0.2]),
    ({"decay": "exponential", "strength": 2, "floor": 0.4}, [0.4, exp(-0.02), 0.4]),
    ({"decay": "inverse", "strength": 2}, [1 / 2, 1 / 1.02, 1 / 3]),
    ({"decay": "inverse", "strength": 9}, [1 / 5.5, 1 / 1.09, 1 / 10]),
    ({"decay": "inverse", "strength": 2, "floor": 0.4}, [1 / 2, 1 / 1.02, 0.4]),
    ({"decay": "linear", "strength": 0.8}, [0.6, 0.992, 0.2]),
    ({"decay": "linear", "strength": 2}, [0, 0.98, 0]),  # 1 - 2 is not -1 but 0
    ({"decay": "linear", "strength": 0.8, "floor": 0.4}, [0.6, 0.992, 0.4]),
    ({"decay": "hard", "strength": 2}, [0, 0, 0]),
    ({"decay": "hard", "strength": 0}, [0, 0, 0]),  # β means nothing there
    ({"decay": "hard", "strength": 2, "floor": 0.3}, [0.3, 0.3, 0.3]),
    ({"decay": "linear", "strength": 2, "floor": 1}, [1, 1, 1]),
    ({"decay": "exponential", "strength": 0}, [1, 1, 1]),
    ({"decay": "inverse", "strength": 0}, [1, 1, 1]),
    ({"decay": "linear", "strength": 0}, [1, 1, 1]),
]


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
@pytest.mark.parametrize(("choices", "expected"), DECAYS)
def test_decay(model, stats, choices, expected):
    plan = quiet_plan(model, stats, fraction=0.5, **choices)
    assert plan.flat_factors.dtype == torch.float32
    factors = [1.0] * 7
    factors[0], factors[1], factors[5] = expected
    assert plan.flat_factors.tolist() == approx32(factors)
    assert plan.factors[ONE].tolist() == approx32(factors[:4])
    assert plan.factors[TWO].tolist() == approx32(factors[4:])
    assert plan.strength == choices["strength"]
    # the same through with_strength, from any other plan of the same selection
    again = quiet_plan(model, stats, fraction=0.5, **{**choices, "strength": 7.0})
    assert torch.equal(again.with_strength(choices["strength"]).flat_factors, plan.flat_factors)


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
def test_with_fraction_is_a_plan_of_that_fraction(model, stats):
    plan = quiet_plan(model, stats, fraction=0.5)
    for fraction in (0, 0.15, 0.25, 0.9, 1):
        direct = quiet_plan(model, stats, fraction=fraction)
        derived = plan.with_fraction(fraction)
        assert derived.threshold == direct.threshold
        assert derived.config == direct.config
        assert derived.strength == direct.strength
        assert torch.equal(derived.flat_factors, direct.flat_factors)


# Sites: the weights that are measured and scaled ------------------------------------------

# With strength 2, exponential: u = 0.5, 0.01, 1 of the neurons (one, 0), (one, 1), (two, 1).
E1, E002, E2 = exp(-1), exp(-0.02), exp(-2)


def hand_made(model, moments: dict[str, dict[str, Moments]]) -> ActivationStats:
    """Statistics that say what we want of the adapter as it is now."""
    layers = {f"base_model.model.{name}": sites for name, sites in moments.items()}
    return ActivationStats(layers, fingerprint(model, "default"))


def moments(count, abs_sum, sq_sum) -> Moments:
    return Moments(*(torch.tensor(t, dtype=torch.float64) for t in (count, abs_sum, sq_sum)))


def test_input_site_scales_columns_of_a():
    model = toy_model()
    plan = quiet_plan(model, collect(model, BATCHES), fraction=0.5)
    plan.apply(model)
    one, two = weights(model, "one"), weights(model, "two")
    assert one[0] == [
        approx32([3 * E1, 5 * E002, 6, 0]),
        approx32([4 * E1, 12 * E002, 8, -4]),
    ]
    assert two[0] == [approx32([-3, 12 * E2, 0]), approx32([4, -5 * E2, 5])]
    assert (one[1], two[1]) == (B["one"], B["two"])
    plan.undo(model)
    assert weights(model, "one") == (A["one"], B["one"])
    assert weights(model, "two") == (A["two"], B["two"])


# Two neurons a layer, counts 2 and 4. a_f = 3, 1 | 1, 4 and a_r = 1, 1 | 0, 6; the symmetric
# contrast is 1/2, 0 | 1, -1/5. Root mean squares on the retain set: 1, 2 | 0, 8.
PAIR = {
    "one": ([2, 4], [[6, 2], [4, 4]], [[18, 2], [4, 16]]),
    "two": ([2, 4], [[2, 8], [0, 24]], [[2, 32], [0, 256]]),
}


def test_rank_site_uses_both_matrices_and_scales_columns_of_b():
    model = toy_model()
    # |A row| = 5, 2 | 13, 1 and |B column| = 5, 1 | 3, 2 give w = 25, 2 | 39, 2;
    # w · rms = 25, 4 | 0, 16; U = 1, 0.16 | 0, 1; S = 1/2 · 0, 0 | 1, 0
    set_weights(model, "one", [[3, 0, 4, 0], [0, 0, 0, 2]], [[3, 0], [4, 0], [0, -1]])
    set_weights(model, "two", [[5, 12, 0], [0, 0, 1]], [[3, 0], [0, -2]])
    before = {name: weights(model, name) for name in ("one", "two")}
    stats = hand_made(model, {name: {"rank": moments(*PAIR[name])} for name in PAIR})
    plan = quiet_plan(model, stats, site="rank", utility_weight=0.0)
    assert plan.flat_utility.tolist() == approx([1, 0.16, 0, 1])
    assert plan.flat_risk.tolist() == approx([1 / 2, 0, 1, 0])
    protecting = quiet_plan(model, stats, site="rank")
    assert protecting.flat_score.tolist() == approx([0, 0, 1, 0])
    # t = 0.2, λ = 0: u = (0.5 - 0.2)/0.8 = 3/8, and 1
    plan = quiet_plan(model, stats, site="rank", utility_weight=0.0, risk_threshold=0.2)
    assert plan.flat_factors.tolist() == approx32([exp(-0.75), 1, E2, 1])
    plan.apply(model)
    one, two = weights(model, "one"), weights(model, "two")
    assert (one[0], two[0]) == (before["one"][0], before["two"][0])
    f = exp(-0.75)
    assert one[1] == [approx32([3 * f, 0]), approx32([4 * f, 0]), [0, -1]]
    assert two[1] == [approx32([3 * E2, 0]), [0, -2]]


def test_output_site_scales_rows_of_b():
    model = toy_model()
    # Rows of B: norms 5, 13, 10 | 5, 1. Root mean squares on the retain set 1, 2, 1.3 | 0, 8:
    # products 5, 26, 13 | 0, 8, so U = 5/26, 1, 1/2 | 0, 1.
    three = ([2, 4], [[6, 2, 1], [4, 4, 2]], [[18, 2, 1], [4, 16, 6.76]])
    stats = hand_made(
        model, {"one": {"output": moments(*three)}, "two": {"output": moments(*PAIR["two"])}}
    )
    plan = quiet_plan(model, stats, site="output", risk_threshold=0.2)
    assert plan.flat_utility.tolist() == approx([5 / 26, 1, 1 / 2, 0, 1])
    # third neuron: a_f = a_r = 1/2, contrast 0. S = 1/2 · 21/26, 0, 0 | 1, 0
    assert plan.flat_score.tolist() == approx([21 / 52, 0, 0, 1, 0])
    # u = (21/52 - 1/5)/(4/5) = 53/208
    f = exp(-2 * 53 / 208)
    assert plan.flat_factors.tolist() == approx32([f, 1, 1, E2, 1])
    plan.apply(model)
    assert weights(model, "one") == (A["one"], [approx32([3 * f, 4 * f]), [-5, 12], [8, 6]])
    assert weights(model, "two") == (A["two"], [approx32([0, -5 * E2]), [1, 0]])


def test_output_signal_layer_reads_the_other_moments():
    model = toy_model()
    quiet = ([2, 4], [[2, 2], [4, 4]], [[2, 2], [4, 4]])
    three = ([2, 4], [[6, 2, 1], [4, 4, 2]], [[18, 2, 1], [4, 16, 6.76]])
    silent = ([2, 4], [[2, 2, 2], [4, 4, 4]], [[2, 2, 2], [4, 4, 4]])
    stats = hand_made(
        model,
        {
            "one": {"output": moments(*silent), "layer": moments(*three)},
            "two": {"output": moments(*quiet), "layer": moments(*PAIR["two"])},
        },
    )
    plan = quiet_plan(model, stats, site="output", output_signal="layer", risk_threshold=0.2)
    assert plan.flat_score.tolist() == approx([21 / 52, 0, 0, 1, 0])
    with pytest.warns(UcanWarning, match="indistinguishable"):
        plan = quiet_plan(model, stats, site="output")
    assert plan.flat_score.tolist() == [0] * 5


class GatedToy(nn.Module):
    """An MLP with 3 intermediate neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(2, 3)
        self.mlp.up_proj = nn.Linear(2, 3)
        self.mlp.down_proj = nn.Linear(3, 2)


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
def test_mlp_site_scales_all_three_matrices():
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(GatedToy(), LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    # Columns of A_down have the norms 5, 13, 10; those of gate and up must not matter.
    set_weights(model, "mlp.down_proj", [[3, 5, 6], [4, 12, 8]], [[1, 2], [3, 4]])
    set_weights(model, "mlp.gate_proj", [[1, 2], [3, 4]], [[1, 2], [3, 4], [5, 6]])
    set_weights(model, "mlp.up_proj", [[5, 6], [7, 8]], [[70, 80], [90, 100], [110, 120]])
    before = {name: weights(model, f"mlp.{name}") for name in targets}
    # a_f = 3, 1, 4 and a_r = 1, 1, 0; contrast 1/2, 0, 1; rms on the retain set 2, 2, 0;
    # w · rms = 10, 26, 0; U = 5/13, 1, 0; S = 1/2 · 8/13, 0, 1.
    of_down = moments([2, 4], [[6, 2, 8], [4, 4, 0]], [[18, 2, 32], [16, 16, 0]])
    others = moments([2, 4], [[9, 1], [1, 9]], [[81, 1], [1, 81]])
    stats = hand_made(
        model,
        {
            "mlp.down_proj": {"input": of_down},
            "mlp.gate_proj": {"input": others},
            "mlp.up_proj": {"input": others},
        },
    )
    plan = quiet_plan(model, stats, site="mlp", risk_threshold=0.2)
    assert list(plan.factors) == ["base_model.model.mlp.down_proj"]
    assert plan.neurons == 3
    assert plan.flat_utility.tolist() == approx([5 / 13, 1, 0])
    assert plan.flat_score.tolist() == approx([4 / 13, 0, 1])
    # u = (4/13 - 1/5)/(4/5) = 7/52, and 1
    f = exp(-2 * 7 / 52)
    assert plan.flat_factors.tolist() == approx32([f, 1, E2])
    plan.apply(model)
    down, gate, up = (weights(model, f"mlp.{n}") for n in ("down_proj", "gate_proj", "up_proj"))
    assert down == (
        [approx32([3 * f, 5, 6 * E2]), approx32([4 * f, 12, 8 * E2])],
        before["down_proj"][1],
    )
    assert gate == (
        before["gate_proj"][0],
        [approx32([1 * f, 2 * f]), [3, 4], approx32([5 * E2, 6 * E2])],
    )
    assert up == (
        before["up_proj"][0],
        [approx32([70 * f, 80 * f]), [90, 100], approx32([110 * E2, 120 * E2])],
    )
    plan.undo(model)
    assert {name: weights(model, f"mlp.{name}") for name in targets} == before


# Degenerate cases --------------------------------------------------------------------------

CONTRASTS = ["symmetric", "difference", "ratio", "zscore", "none"]


def one_layer(abs_f, abs_r, sq_f, sq_r, norms, counts=(2, 4), **choices):
    """R, U, S of one layer straight from the operator."""
    chosen = {
        "statistic": "mean_abs",
        "contrast": "symmetric",
        "normalization": "none",
        "fusion": "protect",
        "utility_weight": 1.0,
        **choices,
    }
    results = ops.contrastive_scores(
        torch.tensor([[abs_f, abs_r], [sq_f, sq_r]], dtype=torch.float64),
        torch.tensor([counts], dtype=torch.float64),
        torch.tensor(norms, dtype=torch.float64),
        torch.tensor([0, len(norms)]),
        **chosen,
    )
    return [r.tolist() for r in results]


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("normalization", ["none", "layer", "global"])
@pytest.mark.parametrize("statistic", ["mean_abs", "rms"])
def test_zero_activations(contrast, normalization, statistic):
    risk, utility, score = one_layer(
        *[[0, 0]] * 4, [5, 3], contrast=contrast, normalization=normalization, statistic=statistic
    )
    assert risk == utility == score == [0, 0]


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_layer_with_all_zero_weights(contrast):
    # No weight, no utility: nothing is protected, and nothing is divided by zero.
    arguments = [8, 2], [2, 8], [50, 2], [4, 100]
    _, utility, score = one_layer(*arguments, [0, 0], contrast=contrast)
    risk, _, _ = one_layer(*arguments, [1, 1], contrast=contrast)
    assert utility == [0, 0]
    assert score == risk
    assert max(score) > 0


def test_all_zero_weights_in_a_plan_change_nothing_but_count_as_selected():
    model = toy_model()
    set_weights(model, "two", [[0] * 3] * 2, [[0] * 2] * 2)
    plan = quiet_plan(model, collect(model, BATCHES), fraction=0.5)
    assert plan.utility[TWO].tolist() == [0, 0, 0]
    # S of layer two is its bare risk now: sorted 0, 0, 0, 0.175, 1/3, 7/12, 1
    assert plan.score[TWO].tolist() == approx32([1 / 3, 1, 0])
    assert plan.threshold == approx(0.175)
    plan.apply(model)
    assert weights(model, "two") == ([[0] * 3] * 2, [[0] * 2] * 2)
    # u of (one, 0): (7/12 - 7/40)/(33/40) = 49/99
    assert weights(model, "one")[0][0][0] == approx32(3 * exp(-98 / 99))
    plan.undo(model)


def test_zero_variance_gives_no_zscore():
    risk, _, _ = one_layer([6, 2], [4, 4], [18, 2], [4, 4], [1, 1], contrast="zscore")
    assert risk == [0, 0]


def test_variance_below_zero_by_rounding_gives_no_zscore():
    # 0.1 + 0.1 + 0.1 squared over 9 exceeds the sum of three 0.1² over 3 in floating point.
    total, squares = 0.1 + 0.1 + 0.1, 3 * (0.1 * 0.1)
    risk, _, _ = one_layer(
        [total], [0], [squares - 1e-17], [0], [1], counts=(3, 3), contrast="zscore"
    )
    assert risk == [0]


def test_all_scores_equal():
    for fraction in (0, 0.15, 0.5, 1):
        threshold, note = select(
            torch.full((5,), 0.4, dtype=torch.float64), UcanConfig(fraction=fraction)
        )
        assert threshold == approx(0.4)
        assert f"largest score 0.4 is not above the quantile of fraction={fraction:g}" in note
    # A threshold below them selects them all, with u = 1 for each.
    score = torch.full((5,), 0.4, dtype=torch.float64)
    threshold, note = select(score, UcanConfig(risk_threshold=0.1))
    assert (threshold, note) == (0.1, "")
    factors = ops.attenuation_factors(score, 0.1, decay="exponential", strength=1.0, floor=0.0)
    assert factors.tolist() == approx32([exp(-1)] * 5)


@pytest.mark.parametrize("decay", ["exponential", "inverse", "linear", "hard"])
def test_all_scores_equal_to_the_threshold(decay):
    score = torch.full((5,), 0.4, dtype=torch.float64)
    factors = ops.attenuation_factors(score, 0.4, decay=decay, strength=1.0, floor=0.0)
    assert factors.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("decay", "at_the_top"),
    [("exponential", exp(-3)), ("inverse", 0.25), ("linear", 0), ("hard", 0)],
)
def test_the_largest_score_has_u_of_one(decay, at_the_top):
    score = torch.tensor([-1.0, 0.2, 0.3, 0.9], dtype=torch.float64)
    factors = ops.attenuation_factors(score, 0.2, decay=decay, strength=3.0, floor=0.0)
    assert factors[3].item() == approx32(at_the_top)
    assert factors[:2].tolist() == [1, 1]


def test_a_single_neuron():
    # n = 1: the quantile of one score is that score, so only a threshold can select it.
    for fraction in (0, 0.15, 1):
        threshold, note = select(
            torch.tensor([0.7], dtype=torch.float64), UcanConfig(fraction=fraction)
        )
        assert threshold == approx(0.7)
        assert "nothing is selected" in note
    assert select(torch.tensor([0.7], dtype=torch.float64), UcanConfig(risk_threshold=0.5)) == (
        0.5,
        "",
    )
    risk, utility, score = one_layer([6], [4], [18], [4], [5])
    # contrast (3 - 1)/4; U is 1 in a layer of one neuron, so it is protected altogether
    assert (risk, utility, score) == ([0.5], [1], [0])
    _, _, score = one_layer([6], [4], [18], [4], [5], utility_weight=0.0)
    assert score == [0.5]


def test_two_neurons_interpolate():
    score = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert select(score, UcanConfig(fraction=0.25))[0] == approx(0.75)
    assert select(score, UcanConfig(fraction=0.75))[0] == approx(0.25)


def test_indistinguishable_sets():
    model = toy_model()
    same = moments([2, 2], [[8, 6, 0, 4]] * 2, [[50, 18, 0, 8]] * 2)
    also = moments([2, 4], [[1, 2, 3], [2, 4, 6]], [[1, 4, 9], [2, 8, 18]])
    stats = hand_made(model, {"one": {"input": same}, "two": {"input": also}})
    for statistic in ("mean_abs", "rms"):
        for contrast in ("symmetric", "difference", "ratio", "zscore"):
            with pytest.warns(UcanWarning, match="D_f and D_r are indistinguishable"):
                plan = quiet_plan(model, stats, contrast=contrast, statistic=statistic)
            assert plan.flat_risk.tolist() == [0] * 7
            assert plan.flat_factors.tolist() == [1] * 7
