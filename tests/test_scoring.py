"""make_plan against a slow literal implementation of the method, and what it refuses."""

from __future__ import annotations

import itertools
import math
import random
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plan_helpers import (
    assert_same_bits,
    batches,
    layer_names,
    random_stats,
    randomize,
    snapshot,
    tiny_llama,
    weight,
)
from torch import nn

from ucan_fast import (
    ActivationStats,
    Moments,
    UcanConfig,
    UcanError,
    UcanWarning,
    accelerate,
    collect,
    make_plan,
)
from ucan_fast.adapter import active_context, fingerprint

# The method, literally: loops over Python floats ----------------------------------------------


def literal_moments(tokens: list[list[float]]) -> tuple[int, list[float], list[float]]:
    """Number of tokens, Σ|h|, Σh² of each neuron."""
    n = len(tokens[0])
    return (
        len(tokens),
        [math.fsum(abs(token[j]) for token in tokens) for j in range(n)],
        [math.fsum(token[j] * token[j] for token in tokens) for j in range(n)],
    )


def literal_scores(layers: list[dict], config: UcanConfig):
    """R, U, S of every layer. A layer: ``f`` and ``r`` as literal_moments gives, ``w``."""
    risks, utilities = [], []
    for layer in layers:
        (n_f, abs_f, sq_f), (n_r, abs_r, sq_r), w = layer["f"], layer["r"], layer["w"]

        def a(count, absolute, square):
            return math.sqrt(square / count) if config.statistic == "rms" else absolute / count

        a_f = [a(n_f, x, y) for x, y in zip(abs_f, sq_f, strict=True)]
        a_r = [a(n_r, x, y) for x, y in zip(abs_r, sq_r, strict=True)]
        risk = []
        for j in range(len(w)):
            if config.contrast == "symmetric":
                total = a_f[j] + a_r[j]
                c = (a_f[j] - a_r[j]) / total if total else 0.0
            elif config.contrast == "difference":
                c = a_f[j] - a_r[j]
            elif config.contrast == "ratio":
                c = a_f[j] / max(a_r[j], 1.1754943508222875e-38) - 1
            elif config.contrast == "zscore":
                v_f = max(sq_f[j] / n_f - (abs_f[j] / n_f) ** 2, 0.0)
                v_r = max(sq_r[j] / n_r - (abs_r[j] / n_r) ** 2, 0.0)
                error = math.sqrt(v_f / n_f + v_r / n_r)
                c = (a_f[j] - a_r[j]) / error if error else 0.0
            else:
                c = a_f[j] / max(a_f) if max(a_f) else 0.0
            risk.append(max(c, 0.0))
        risks.append(risk)
        raw = [w[j] * math.sqrt(sq_r[j] / n_r) for j in range(len(w))]
        utilities.append([u / max(raw) if max(raw) else 0.0 for u in raw])
    if config.normalization == "layer":
        risks = [[r / max(layer) if max(layer) else 0.0 for r in layer] for layer in risks]
    elif config.normalization == "global":
        top = max(max(layer) for layer in risks)
        risks = [[r / top if top else 0.0 for r in layer] for layer in risks]
    weight_of_utility = config.utility_weight
    if config.fusion == "protect":
        scores = [
            [r * (1 - u) ** weight_of_utility for r, u in zip(rs, us, strict=True)]
            for rs, us in zip(risks, utilities, strict=True)
        ]
    else:
        scores = [
            [r - weight_of_utility * u for r, u in zip(rs, us, strict=True)]
            for rs, us in zip(risks, utilities, strict=True)
        ]
    return risks, utilities, scores


def literal_threshold(scores: list[list[float]], config: UcanConfig) -> float:
    if config.risk_threshold is not None:
        t = config.risk_threshold
    else:
        ordered = sorted(itertools.chain(*scores))
        position = (1 - config.fraction) * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        t = ordered[below] + (position - below) * (ordered[above] - ordered[below])
    least = config.min_score
    if least is None:
        least = 0.05 if config.contrast == "symmetric" else 0.0
    return max(t, least)


def literal_factors(scores, t: float, config: UcanConfig) -> list[list[float]]:
    largest = max(itertools.chain(*scores))
    beta = 1.0 if config.strength == "auto" else config.strength
    result = []
    for layer in scores:
        factors = []
        for s in layer:
            if s <= t:
                factors.append(1.0)
                continue
            u = (s - t) / (largest - t)
            gamma = {
                "exponential": math.exp(-beta * u),
                "inverse": 1 / (1 + beta * u),
                "linear": max(1 - beta * u, 0.0),
                "hard": 0.0,
            }[config.decay]
            factors.append(max(gamma, config.floor))
        result.append(factors)
    return result


def norm(values) -> float:
    return math.sqrt(math.fsum(v * v for v in values))


def literal_weight_norms(a: list[list[float]], b: list[list[float]], site: str) -> list[float]:
    columns = lambda m: list(zip(*m, strict=True))  # noqa: E731
    if site == "input":
        return [norm(column) for column in columns(a)]
    if site == "rank":
        return [norm(row) * norm(column) for row, column in zip(a, columns(b), strict=True)]
    return [norm(row) for row in b]


# A model of three bare layers and random data -------------------------------------------------


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(7, 5), nn.Linear(4, 6), nn.Linear(9, 3)


@pytest.fixture(scope="module")
def bare():
    """The model, its statistics, and the same data for the literal implementation."""
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["one", "two", "three"])
    model = get_peft_model(Bare(), config)
    randomize(model, seed=3)
    draw = random.Random(7)
    stats = ActivationStats({}, fingerprint(model, "default"))
    literal = {site: [] for site in ("input", "rank", "output")}
    for name in layer_names(model):
        a, b = weight(model, name, "A").tolist(), weight(model, name, "B").tolist()
        stats.layers[name] = {}
        for site, n in (("input", len(a[0])), ("rank", len(a)), ("output", len(b))):
            loud_f = [draw.uniform(0.2, 1) for _ in range(n)]
            loud_r = [draw.uniform(0.2, 1) for _ in range(n)]
            loud_f[1] = loud_r[1] = 0.0  # never fires
            f = literal_moments([[draw.gauss(0, x) for x in loud_f] for _ in range(6)])
            r = literal_moments([[draw.gauss(0, x) for x in loud_r] for _ in range(11)])
            stats.layers[name][site] = Moments(
                *(torch.tensor([x, y], dtype=torch.float64) for x, y in zip(f, r, strict=True))
            )
            w = literal_weight_norms(a, b, site)
            literal[site].append({"f": f, "r": r, "w": w})
    return model, stats, literal


def flat(nested) -> list[float]:
    return list(itertools.chain(*nested))


def compare(bare, config: UcanConfig) -> None:
    model, stats, literal = bare
    risk, utility, score = literal_scores(literal[config.site], config)
    t = literal_threshold(score, config)
    factors = literal_factors(score, t, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UcanWarning)
        plan = make_plan(model, stats, config)
    close(plan.flat_risk, flat(risk), 1e-12)
    close(plan.flat_utility, flat(utility), 1e-12)
    close(plan.flat_score, flat(score), 1e-12)
    assert plan.threshold == pytest.approx(t, rel=1e-12, abs=1e-14)
    close(plan.flat_factors, flat(factors), 2e-7)
    for index, name in enumerate(layer_names(model)):
        close(plan.factors[name], factors[index], 2e-7)


def close(got: torch.Tensor, expected: list[float], relative: float) -> None:
    # Not pytest.approx: this is asked thousands of times.
    assert got.numel() == len(expected)
    wrong = [
        pair
        for pair in zip(got.tolist(), expected, strict=True)
        if not abs(pair[0] - pair[1]) <= relative * abs(pair[1]) + 1e-14
    ]
    assert not wrong


STATISTICS = ("mean_abs", "rms")
CONTRASTS = ("symmetric", "difference", "ratio", "zscore", "none")
NORMALIZATIONS = ("none", "layer", "global")
FUSIONS = ("protect", "subtract")


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_literal_scores(bare, statistic, contrast):
    for normalization, fusion, utility_weight in itertools.product(
        NORMALIZATIONS, FUSIONS, (0.0, 1.0, 1.7)
    ):
        compare(
            bare,
            UcanConfig(
                statistic=statistic,
                contrast=contrast,
                normalization=normalization,
                fusion=fusion,
                utility_weight=utility_weight,
                fraction=0.3,
                strength=2.0,
            ),
        )


@pytest.mark.parametrize("decay", ["exponential", "inverse", "linear", "hard"])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_literal_selection_and_decay(bare, contrast, decay):
    selections = [{"fraction": f} for f in (0.0, 0.05, 0.15, 1 / 3, 0.77, 1.0)]
    selections += [{"risk_threshold": t} for t in (-0.5, 0.0, 0.2)]
    selections += [{"min_score": -2.0, "fraction": 0.9, "fusion": "subtract"}, {"min_score": 0.3}]
    for selection, strength, floor in [
        (selection, *pair)
        for selection in selections
        for pair in ((0.0, 0.1), (0.4, 0.0), (3, 0.25))
    ]:
        choices = {**selection, "contrast": contrast, "decay": decay}
        compare(bare, UcanConfig(**choices, strength=strength, floor=floor))


@pytest.mark.parametrize("site", ["input", "rank", "output"])
def test_literal_sites(bare, site):
    for statistic, contrast in itertools.product(STATISTICS, CONTRASTS):
        compare(
            bare,
            UcanConfig(
                site=site, statistic=statistic, contrast=contrast, fraction=0.4, strength=1.5
            ),
        )


def test_the_literal_grid_is_not_vacuous(bare):
    """Every choice changes the plan, so a choice that is ignored would be seen above."""
    model, stats, _ = bare
    base = UcanConfig(strength=2.0, fraction=0.3, contrast="difference", fusion="protect")
    reference = make_plan(model, stats, base)
    for change in (
        {"statistic": "rms"},
        *({"contrast": contrast} for contrast in CONTRASTS if contrast != "difference"),
        {"normalization": "layer"},
        {"normalization": "global"},
        {"fusion": "subtract"},
        {"utility_weight": 0.0},
        {"utility_weight": 1.7},
    ):
        other = make_plan(model, stats, base.replace(**change))
        assert not torch.allclose(other.flat_score, reference.flat_score), change
    for change in (
        {"fraction": 0.4},
        {"risk_threshold": 0.1},
        {"min_score": 0.2},
        {"decay": "inverse"},
        {"decay": "linear"},
        {"decay": "hard"},
        {"floor": 0.5},
        {"strength": 1.0},
    ):
        other = make_plan(model, stats, base.replace(**change))
        assert not torch.allclose(other.flat_factors, reference.flat_factors), change


# strength="auto" ------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["exponential", "inverse", "linear"])
def test_auto_means_one_and_says_so(bare, decay):
    model, stats, _ = bare
    auto = make_plan(model, stats, UcanConfig(decay=decay))
    fixed = make_plan(model, stats, UcanConfig(decay=decay, strength=1.0))
    assert auto.strength == 1.0
    assert torch.equal(auto.flat_factors, fixed.flat_factors)
    assert auto.attenuated > 0
    assert auto.note == "strength=1 was used: 'auto' needs calibration data to search with."
    assert auto.note in auto.summary()
    assert fixed.note == ""


def test_auto_says_so_for_hard_pruning_too(bare):
    model, stats, _ = bare
    plan = make_plan(model, stats, UcanConfig(decay="hard", fraction=0.3))
    assert plan.attenuated > 0
    assert "fraction=0.3 was used: 'auto' needs calibration data to search with" in plan.note


def test_no_configuration_means_the_defaults(bare):
    model, stats, _ = bare
    plan = make_plan(model, stats)
    assert plan.config == UcanConfig()
    assert torch.equal(plan.flat_factors, make_plan(model, stats, UcanConfig()).flat_factors)


# Warnings -------------------------------------------------------------------------------------


def test_a_plan_that_changes_nothing_warns(bare):
    model, stats, _ = bare
    with pytest.warns(UcanWarning, match=r"changes nothing: nothing is selected.*fraction=0"):
        make_plan(model, stats, UcanConfig(fraction=0.0))
    with pytest.warns(
        UcanWarning, match="changes nothing: strength=0 with floor=0 leaves every factor at 1"
    ):
        plan = make_plan(model, stats, UcanConfig(strength=0.0))
    assert plan.selected > 0
    assert plan.attenuated == 0
    with pytest.warns(UcanWarning, match="changes nothing"):
        make_plan(model, stats, UcanConfig(floor=1.0))


def test_a_plan_for_the_same_set_twice_says_indistinguishable():
    model = tiny_llama(layers=1)
    retain = collect(model, [{"input_ids": torch.arange(12).view(2, 6)}])
    forget = collect(model, [{"input_ids": torch.arange(12).view(2, 6)}], group="forget")
    with pytest.warns(UcanWarning, match="D_f and D_r are indistinguishable to this method"):
        plan = make_plan(model, retain + forget)
    assert plan.selected == 0
    assert "indistinguishable" in plan.summary()
    assert "0 of " in plan.summary()


def test_more_than_half_warns(bare):
    model, stats, _ = bare
    with pytest.warns(UcanWarning, match=r"attenuates \d+ of 20 neurons, more than half"):
        plan = make_plan(
            model, stats, UcanConfig(contrast="none", utility_weight=0, fraction=0.8, strength=1)
        )
    assert plan.attenuated > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(model, stats, UcanConfig(strength=1.0))


def test_exactly_half_does_not_warn(bare):
    model, stats, _ = bare
    ordered = make_plan(model, stats, UcanConfig(contrast="none", strength=1)).flat_score.sort()[0]
    config = UcanConfig(contrast="none", strength=1, risk_threshold=float(ordered[9]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(model, stats, config).attenuated == 10
    with pytest.warns(UcanWarning, match="11 of 20 neurons, more than half"):
        make_plan(model, stats, config.replace(risk_threshold=float(ordered[8])))


# Refusals -------------------------------------------------------------------------------------


def test_statistics_of_another_adapter_are_refused():
    model, other = tiny_llama(layers=1), tiny_llama(layers=1, seed=1)
    stats = random_stats(other)
    with pytest.raises(UcanError, match=r"fingerprint .*Collect statistics on this adapter") as e:
        make_plan(model, stats)
    assert fingerprint(model, "default")[:12] in str(e.value)
    assert fingerprint(other, "default")[:12] in str(e.value)


def test_statistics_from_before_a_training_step_are_refused():
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    with torch.no_grad():
        weight(model, layer_names(model)[0], "B")[1, 1] += 1e-6
    with pytest.raises(UcanError, match="Collect statistics on this adapter"):
        make_plan(model, stats)


def test_statistics_with_another_scaling_are_refused():
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    model.get_submodule(layer_names(model)[0]).scaling["default"] = 0.3
    with pytest.raises(UcanError, match="Collect statistics on this adapter"):
        make_plan(model, stats)


def test_an_attenuated_model_is_refused_with_the_way_out():
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    plan = make_plan(model, stats)
    plan.apply(model)
    with pytest.raises(UcanError, match=r"plan\.undo\(model\)"):
        make_plan(model, stats)
    plan.undo(model)
    make_plan(model, stats)


@pytest.mark.parametrize(
    ("site", "signal", "wanted"),
    [
        ("input", "delta", "input"),
        ("rank", "delta", "rank"),
        ("output", "delta", "output"),
        ("output", "layer", "layer"),
        ("mlp", "delta", "input"),
    ],
)
def test_a_missing_site_is_refused(site, signal, wanted):
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    config = UcanConfig(site=site, output_signal=signal)
    make_plan(model, stats, config)
    for sites in stats.layers.values():
        del sites[wanted]
    with pytest.raises(UcanError, match=f"no '{wanted}' moments of base_model") as caught:
        make_plan(model, stats, config)
    assert f"collect with sites including '{wanted}'" in str(caught.value)


def test_a_missing_layer_is_refused():
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    gone = layer_names(model)[3]
    del stats.layers[gone]
    with pytest.raises(UcanError, match=f"no 'input' moments of {gone} .they have nothing"):
        make_plan(model, stats)


@pytest.mark.parametrize(("index", "what"), [(0, "forget"), (1, "retain")])
def test_an_empty_set_is_refused(index, what):
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    for sites in stats.layers.values():
        for moments in sites.values():
            for tensor in moments.tensors():
                tensor[index] = 0
    with pytest.raises(UcanError, match=f"the {what} set is empty"):
        make_plan(model, stats)


def test_collected_without_a_forget_or_retain_token_is_refused():
    model = tiny_llama(layers=1)
    tokens = [{"input_ids": torch.arange(12).view(2, 6)}]
    with pytest.raises(UcanError, match="the forget set is empty"):
        make_plan(model, collect(model, tokens))
    with pytest.raises(UcanError, match="the retain set is empty"):
        make_plan(model, collect(model, tokens, group="forget"))
    bank, forget = collect(model, tokens), collect(model, tokens, group="forget")
    with pytest.raises(UcanError, match=r"the retain set is empty.*bank holds more"):
        make_plan(model, bank.with_forget(forget))


def test_another_number_of_neurons_is_refused():
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    name = layer_names(model)[1]
    stats.layers[name]["input"] = stats.layers[name]["output"]  # 8 instead of 16
    with pytest.raises(UcanError, match=f"{name} has 16 neurons, its statistics 8"):
        make_plan(model, stats)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = tiny_llama(layers=2)
    name = layer_names(model)[9]
    with torch.no_grad():
        weight(model, name, "A")[1, 2] = value
    with pytest.raises(UcanError, match=f"adapter weights of {name} are not finite"):
        make_plan(model, random_stats(model))


def test_statistics_that_are_not_finite_are_refused_by_name():
    model = tiny_llama(layers=1)
    stats = random_stats(model)
    name = layer_names(model)[2]
    stats.layers[name]["input"].abs_sum[0, 3] = math.nan
    with pytest.raises(UcanError, match=f"statistics of {name} are not finite"):
        make_plan(model, stats)


def test_several_active_adapters_need_a_name():
    model = tiny_llama(layers=1)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    randomize(model, "second", seed=5)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UcanError, match=r"2 adapters are active .* adapter="):
        make_plan(model, random_stats(model))
    stats = random_stats(model)
    with pytest.raises(UcanError, match="different other adapters active"):
        make_plan(model, stats, UcanConfig(site="rank"), adapter="default")
    stats.context = active_context(model, "default")
    assert make_plan(model, stats, UcanConfig(site="rank"), adapter="default").sizes == [4] * 7


def test_a_model_without_an_adapter_is_refused():
    stats = random_stats(tiny_llama(layers=1))
    with pytest.raises(UcanError, match="no LoRA layer"):
        make_plan(nn.Linear(2, 2), stats)


# The model and the statistics are only read -----------------------------------------------------


@pytest.mark.parametrize("site", ["input", "rank", "output", "mlp"])
def test_nothing_is_changed(site):
    model = tiny_llama()
    stats = random_stats(model)
    before, moments = (
        snapshot(model),
        [
            tensor.clone()
            for sites in stats.layers.values()
            for m in sites.values()
            for tensor in m.tensors()
        ],
    )
    make_plan(model, stats, UcanConfig(site=site))
    assert_same_bits(model, before)
    after = [t for sites in stats.layers.values() for m in sites.values() for t in m.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))


def test_plan_covers_every_layer():
    model = tiny_llama()
    plan = make_plan(model, random_stats(model))
    assert list(plan.factors) == layer_names(model)
    assert len(plan.factors) == 14
    for values in (plan.factors, plan.risk, plan.utility, plan.score):
        for name in layer_names(model):
            assert values[name].shape == (weight(model, name, "A").shape[1],)
            assert values[name].dtype == torch.float32


# Batch size and order ---------------------------------------------------------------------------


def rebatched(order, size: int):
    (batch,) = batches(sequences=12)
    rows = [torch.tensor(order[i : i + size]) for i in range(0, 12, size)]
    return [{key: value[row] for key, value in batch.items()} for row in rows]


@pytest.mark.parametrize("site", ["input", "rank", "output", "mlp"])
def test_batch_size_and_order_change_only_what_is_on_the_threshold(site):
    model = tiny_llama()
    config = UcanConfig(site=site, fraction=0.3, min_score=0.0)
    forward = list(range(12))
    shuffled = random.Random(0).sample(forward, 12)
    reference = make_plan(model, collect(model, rebatched(forward, 12)), config)
    assert reference.selected > 3
    for order, size in ((forward, 1), (forward, 5), (forward[::-1], 4), (shuffled, 3)):
        other = make_plan(model, collect(model, rebatched(order, size)), config)
        clear = (reference.flat_score - reference.threshold).abs() >= 1e-5
        mine, theirs = (p.flat_score > p.threshold for p in (reference, other))
        assert torch.equal(mine[clear], theirs[clear])
        torch.testing.assert_close(other.flat_score, reference.flat_score, rtol=0, atol=1e-5)


def test_a_model_on_the_meta_device_is_refused():
    model = tiny_llama()
    stats = collect(model, batches())
    with pytest.raises(UcanError, match=r"_proj .*meta device \(offloaded\)"):
        make_plan(model.to("meta"), stats)


def test_an_accelerated_model_gives_the_same_plan():
    model = tiny_llama()
    plain = make_plan(model, collect(model, batches()), UcanConfig(strength=1.0))
    accelerate(model)
    fused = make_plan(model, collect(model, batches()), UcanConfig(strength=1.0))
    clear = (plain.flat_score - plain.threshold).abs() >= 1e-5
    mine, theirs = (p.flat_score > p.threshold for p in (plain, fused))
    assert torch.equal(mine[clear], theirs[clear])


def test_the_bank_gives_the_same_plan_as_collecting_both_sets():
    model = tiny_llama()
    (batch,) = batches()
    groups = torch.where(batch["attention_mask"].bool(), batch["token_groups"], -1)

    def stats_of(*choices):
        return [collect(model, [{**batch, "token_groups": c}]) for c in choices]

    # Single tokens are forgotten: fp32 sums of other tokens, in the same forward pass.
    both, bank, forget = stats_of(
        groups, torch.where(groups >= 0, 1, -1), torch.where(groups == 0, 0, -1)
    )
    direct = make_plan(model, both, UcanConfig(strength=1.0))
    split = make_plan(model, bank.with_forget(forget), UcanConfig(strength=1.0))
    torch.testing.assert_close(split.flat_score, direct.flat_score, rtol=0, atol=1e-5)
    # Whole batches are forgotten: the very same sums.
    (other,) = batches(seed=1)
    plain = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in (batch, other)]
    forget = collect(model, plain[:1], group="forget")
    retain, bank = collect(model, plain[1:]), collect(model, plain)
    direct = make_plan(model, forget + retain, UcanConfig(strength=1.0))
    split = make_plan(model, bank.with_forget(forget), UcanConfig(strength=1.0))
    torch.testing.assert_close(split.flat_score, direct.flat_score, rtol=0, atol=1e-9)
    torch.testing.assert_close(split.flat_factors, direct.flat_factors, rtol=0, atol=1e-6)
