"""UcanConfig: every field is checked, and the way through JSON is exact."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from ucan_fast import UcanConfig, UcanError

CHOICES = {
    "method": {"attenuate", "influence", "gates"},
    "site": {"input", "rank", "output", "mlp"},
    "statistic": {"mean_abs", "rms"},
    "contrast": {"symmetric", "difference", "ratio", "zscore", "none"},
    "normalization": {"none", "layer", "global"},
    "fusion": {"protect", "subtract"},
    "decay": {"exponential", "inverse", "linear", "hard"},
    "output_signal": {"delta", "layer"},
    "influence_variant": {"all", "b-only", "last-blocks", "eigenbasis", "diagonal"},
}
# field -> values at and inside its limits, values outside
NUMBERS = {
    "utility_weight": ([0, 0.0, 1, 2.5, 1e6], [-1e-9, -1]),
    "fraction": ([0, 0.0, 0.15, 1, 1.0], [-0.01, 1.0001, 15]),
    "floor": ([0, 0.5, 1, 1.0], [-0.1, 1.1]),
    "max_retain_loss_increase": ([0, 0.05, 3.0], [-0.05]),
    "max_strength": ([0, 32, 1000.0], [-1]),
    "damping": ([0, 0.01, 10], [-1e-9]),
    "retain_gradient_weight": ([0, 1.0, 2], [-0.5]),
    "trust_region": ([0, 0.1, 1, 50.0], [-0.1]),
    "influence_radius": ([1e-12, 5e-4, 1, 50.0], [0, -0.1]),
    "risk_threshold": ([None, -1.0, 0, 0.3, 7], []),
    "min_score": ([None, -1.0, 0, 0.05], []),
    "strength": (["auto", 0, 0.0, 2, 1e9], [-0.1, -1, "Auto", "", "2"]),
}
COUNTS = ("influence_rank", "influence_blocks", "influence_steps")
#: Who reads what not every method reads.
READERS = {
    "site": ["attenuate"],
    "statistic": ["attenuate"],
    "contrast": ["attenuate"],
    "normalization": ["attenuate"],
    "fusion": ["attenuate"],
    "utility_weight": ["attenuate"],
    "fraction": ["attenuate"],
    "risk_threshold": ["attenuate"],
    "min_score": ["attenuate"],
    "decay": ["attenuate"],
    "output_signal": ["attenuate"],
    "floor": ["attenuate", "gates"],
    "damping": ["influence", "gates"],
    "retain_gradient_weight": ["influence", "gates"],
    "trust_region": ["influence", "gates"],
    "influence_variant": ["influence"],
    "influence_rank": ["influence"],
    "influence_blocks": ["influence"],
    "influence_steps": ["influence"],
    "influence_radius": ["influence"],
    "influence_batches": ["influence"],
}
NOT_NUMBERS = ["1", "x", True, False, [1], {}, b"1", 1j, math.nan, math.inf, -math.inf, 10**400]


def test_defaults_are_those_of_the_design():
    assert dataclasses.asdict(UcanConfig()) == {
        "method": "attenuate",
        "site": "input",
        "statistic": "mean_abs",
        "contrast": "symmetric",
        "normalization": "none",
        "fusion": "protect",
        "utility_weight": 1.0,
        "fraction": 0.15,
        "risk_threshold": None,
        "min_score": None,
        "decay": "exponential",
        "strength": "auto",
        "floor": 0.0,
        "max_retain_loss_increase": 0.05,
        "max_strength": 32.0,
        "output_signal": "delta",
        "seed": 0,
        "influence_variant": "all",
        "influence_rank": 32,
        "influence_blocks": 2,
        "damping": 0.01,
        "retain_gradient_weight": 1.0,
        "trust_region": 3.0,
        "influence_steps": 1,
        "influence_radius": 5e-4,
        "influence_batches": 0,
    }


def test_this_file_covers_every_field():
    fields = {field.name for field in dataclasses.fields(UcanConfig)}
    assert fields == {*CHOICES, *NUMBERS, *COUNTS, "seed", "influence_batches"}


def reader(name: str) -> dict[str, str]:
    """A method that reads the field."""
    return {} if name == "method" else {"method": READERS.get(name, ["attenuate"])[0]}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for value in CHOICES[name]:
        assert getattr(UcanConfig(**reader(name), **{name: value}), name) == value
    wrong = ["", "nonsense", next(iter(CHOICES[name])).upper(), None, 1, True, ["none"], math.nan]
    for value in wrong:
        with pytest.raises(UcanError, match=rf"UcanConfig: {name} must be one of .*'") as caught:
            UcanConfig(**{name: value})
        # the message names what was given and everything that would do
        assert repr(value) in str(caught.value)
        assert all(repr(choice) in str(caught.value) for choice in CHOICES[name])


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    inside, outside = NUMBERS[name]
    for value in inside:
        assert getattr(UcanConfig(**reader(name), **{name: value}), name) == value
    nullable = name in ("risk_threshold", "min_score")
    for value in [*outside, *NOT_NUMBERS, *([] if nullable else [None])]:
        with pytest.raises(UcanError, match=f"UcanConfig: {name} must be "):
            UcanConfig(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    assert getattr(UcanConfig(**reader(name), **{name: 1}), name) == 1
    for value in (0, -1, 1.0, True, "2", None):
        with pytest.raises(UcanError, match=f"{name} must be an integer >= 1"):
            UcanConfig(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [{"strength": 0.3}, {"strength": 0}],
)
def test_several_steps_are_searched_for(changes):
    with pytest.raises(UcanError, match=r"influence_steps=3 is for strength='auto', not strength"):
        UcanConfig(**{"method": "influence", "influence_steps": 3, **changes})


def test_batches_of_a_step():
    assert UcanConfig(influence_batches=0).influence_batches == 0
    several = {"method": "influence", "influence_steps": 2}
    assert UcanConfig(**several, influence_batches=7).influence_batches == 7
    with pytest.raises(UcanError, match="influence_batches=7 is for influence_steps > 1"):
        UcanConfig(method="influence", influence_batches=7)
    for value in (-1, 1.0, True, "2", None):
        with pytest.raises(UcanError, match="influence_batches must be an integer >= 0"):
            UcanConfig(influence_batches=value)


def test_auto_is_only_for_strength():
    for name in NUMBERS:
        if name != "strength":
            with pytest.raises(UcanError, match=f"{name} must be"):
                UcanConfig(**{name: "auto"})


def test_seed():
    for value in (0, 1, 12345, -3, -(2**63), 2**64 - 1):
        assert UcanConfig(seed=value).seed == value
        torch.Generator().manual_seed(value)
    for value in (True, 1.0, "1", None, math.nan, -(2**63) - 1, 2**64):
        with pytest.raises(UcanError, match="seed must be an integer"):
            UcanConfig(seed=value)


def test_hard_with_a_threshold_leaves_auto_nothing_to_search():
    with pytest.raises(UcanError, match=r"decay='hard'.*risk_threshold.*strength='auto'"):
        UcanConfig(decay="hard", risk_threshold=0.2)
    # Each of the three on its own, and every pair, is fine.
    UcanConfig(decay="hard", risk_threshold=0.2, strength=1.0)
    UcanConfig(decay="hard")
    UcanConfig(risk_threshold=0.2)
    with pytest.raises(UcanError, match="risk_threshold"):
        UcanConfig(decay="hard").replace(risk_threshold=0.0)


def test_effective_min_score():
    assert UcanConfig().effective_min_score == 0.05
    for contrast in CHOICES["contrast"] - {"symmetric"}:
        assert UcanConfig(contrast=contrast).effective_min_score == 0.0
        assert UcanConfig(contrast=contrast, min_score=0.3).effective_min_score == 0.3
    assert UcanConfig(min_score=0).effective_min_score == 0.0
    assert UcanConfig(min_score=-1).effective_min_score == -1.0


def test_gates_have_sites_and_a_variant_of_their_own():
    config = UcanConfig(method="gates")
    assert (config.effective_site, config.effective_variant) == ("input and output", "diagonal")
    assert UcanConfig(site="mlp").effective_site == "mlp"
    config = UcanConfig(method="influence", influence_variant="b-only")
    assert config.effective_variant == "b-only"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("method", sorted(CHOICES["method"]))
def test_what_a_method_does_not_read_is_refused(name, method):
    """It would change nothing, silently."""
    default = getattr(UcanConfig(), name)
    other = OTHER[name] if name in OTHER else INFLUENCE[name]
    assert UcanConfig(method=method, **{name: default}).method == method
    several = {"influence_steps": 2} if name == "influence_batches" else {}
    if method in READERS[name]:
        config = UcanConfig(**{"method": method, name: other, **several})
        assert getattr(config, name) == other
        return
    readers = " or ".join(map(repr, sorted(READERS[name])))
    with pytest.raises(UcanError) as refused:
        UcanConfig(method=method, **{name: other})
    assert str(refused.value) == (
        f"UcanConfig: method={method!r} does not read {name}={other!r} (for method {readers}): "
        "leave it out."
    )
    # A saved plan that holds it all the same stays readable.
    saved = UcanConfig.from_saved({"method": method, name: other, "seed": 3})
    assert saved == UcanConfig(method=method, seed=3)
    for made in (UcanConfig(method=method).replace, lambda **x: UcanConfig.preset("best", **x)):
        with pytest.raises(UcanError, match="does not read"):
            made(**{"method": method, name: other})
    with pytest.raises(UcanError, match="does not read"):
        UcanConfig.from_json(json.dumps({"method": method, name: other}))


def test_auto_strength():
    assert UcanConfig().auto_strength
    assert not UcanConfig(strength=0).auto_strength
    assert not UcanConfig(strength=2.0).auto_strength


OTHER = {
    "method": "attenuate",
    "site": "mlp",
    "statistic": "rms",
    "contrast": "zscore",
    "normalization": "global",
    "fusion": "subtract",
    "utility_weight": 0.1,
    "fraction": 1 / 3,
    "risk_threshold": 0.7,
    "min_score": 1e-300,
    "decay": "linear",
    "strength": 2,
    "floor": 0.25,
    "max_retain_loss_increase": 0.1,
    "max_strength": 5.5,
    "output_signal": "layer",
    "seed": 2**40,
}
INFLUENCE = {
    "method": "influence",
    "influence_variant": "eigenbasis",
    "influence_rank": 3,
    "influence_blocks": 5,
    "damping": 1e-3,
    "retain_gradient_weight": 0.5,
    "trust_region": 1.25,
    "influence_steps": 7,
    "influence_radius": 1e-5,
    "influence_batches": 9,
}


@pytest.mark.parametrize("config", [UcanConfig(), UcanConfig(**OTHER), UcanConfig(**INFLUENCE)])
def test_json_roundtrip(config):
    text = config.to_json()
    assert json.loads(text) == dataclasses.asdict(config)
    assert UcanConfig.from_json(text) == config


def test_json_fields_that_are_missing_take_their_defaults():
    assert UcanConfig.from_json("{}") == UcanConfig()
    assert UcanConfig.from_json('{"site": "rank", "strength": 3}') == UcanConfig(
        site="rank", strength=3
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"fractoin": 0.1}', r"unknown field 'fractoin'; known are .*fraction"),
        ('{"zzz": 1, "beta": 2}', "unknown field 'beta', 'zzz'"),
        ('{"fraction": NaN}', "fraction must be a number"),
        ('{"fraction": Infinity}', "fraction must be a number"),
        ('{"utility_weight": 1e999}', "utility_weight must be a number"),
        ('{"strength": true}', "strength must be"),
        ('{"site": ["input"]}', "site must be one of"),
        ('{"fraction": 0.1', "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        ("0.15", "must be an object"),
    ],
)
def test_json_refusals(text, match):
    with pytest.raises(UcanError, match=match):
        UcanConfig.from_json(text)


def test_replace():
    config = UcanConfig(site="rank")
    other = config.replace(fraction=0.3, strength=2.0)
    assert (other.site, other.fraction, other.strength) == ("rank", 0.3, 2.0)
    assert (config.fraction, config.strength) == (0.15, "auto")
    with pytest.raises(UcanError, match="unknown field 'fractoin'"):
        config.replace(fractoin=0.3)
    with pytest.raises(UcanError, match="fraction must be"):
        config.replace(fraction=3)


def test_frozen_and_hashable():
    config = UcanConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.fraction = 0.5
    assert hash(config) == hash(UcanConfig())
    assert len({config, UcanConfig(), UcanConfig(seed=1)}) == 2


def test_unknown_keyword_arguments_are_refused_by_python():
    with pytest.raises(TypeError, match="fractoin"):
        UcanConfig(fractoin=0.1)


def test_presets():
    assert UcanConfig.preset("paper") == UcanConfig()
    best = UcanConfig.preset("best", seed=7)
    assert (best.method, best.seed) == ("influence", 7)
    assert best.max_retain_loss_increase < UcanConfig().max_retain_loss_increase
    # A change wins over what the preset says.
    assert UcanConfig.preset("best", max_retain_loss_increase=0.5).max_retain_loss_increase == 0.5
    thorough = UcanConfig.preset("thorough", influence_steps=5)
    assert (thorough.method, thorough.influence_steps) == ("influence", 5)
    assert thorough.max_retain_loss_increase < UcanConfig().max_retain_loss_increase
    with pytest.raises(UcanError, match=r"no preset 'bets'.*'paper', 'best', 'thorough'"):
        UcanConfig.preset("bets")
    with pytest.raises(UcanError, match="unknown field 'stength'"):
        UcanConfig.preset("best", stength=1.0)


def test_all_that_is_not_read_is_named_at_once():
    with pytest.raises(UcanError) as refused:
        UcanConfig(method="gates", site="mlp", influence_rank=3, floor=0.5)
    assert "does not read site='mlp', influence_rank=3 (for method 'attenuate' or 'influence'" in (
        str(refused.value)
    )
    assert str(refused.value).endswith("leave them out.")
    assert UcanConfig(site="mlp", floor=0.5).unread_by("gates") == ["site"]


def test_a_saved_configuration_is_checked_all_the_same():
    assert UcanConfig.from_saved(dataclasses.asdict(UcanConfig(**OTHER))) == UcanConfig(**OTHER)
    for fields, match in (
        ({"method": "nonsense"}, "method must be one of"),
        ({"fractoin": 1}, "unknown field 'fractoin'"),
        ({"fraction": 3}, "fraction must be"),
        ([], "must be an object"),
    ):
        with pytest.raises(UcanError, match=match):
            UcanConfig.from_saved(fields)
