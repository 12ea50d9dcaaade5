"""What the retain budget is measured on, and which tokens of which batches count where."""

from __future__ import annotations

import warnings

import helpers_models as hm
import pytest
import torch
from trained_model import (
    MEMBERS,
    assert_same_weights,
    by_heart,
    forget_batches,
    mean_nll,
    mixed_batches,
    not_memorised,
    random_batches,
    retain_batches,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import calibration, job
from ucan_fast.batches import FORGET, RETAIN, holding

STEPS = uf.UcanConfig.preset("thorough", influence_steps=2)
GRADIENTS = {
    "best": uf.UcanConfig.preset("best"),
    "gates": uf.UcanConfig(method="gates"),
    "thorough": STEPS,
}


def unscored(batch: dict) -> dict:
    return {**batch, "labels": torch.full_like(batch["input_ids"], -100)}


# Tokens count in their own group, wherever they are passed.


def test_tokens_of_the_other_group_are_found_and_nothing_else_is_marked():
    model, batches = trained(), [*mixed_batches()[:2], retain_batches()[0]]
    found = list(holding(model, iter(batches), "forget", RETAIN))
    assert len(found) == 2, "the third is a forget batch: nothing in it says otherwise"
    for one, batch in zip(found, batches, strict=False):
        assert torch.equal(one["input_ids"], batch["input_ids"])
        expected = (batch["token_groups"] == RETAIN) & batch["attention_mask"].bool()
        assert torch.equal(one["token_groups"] == RETAIN, expected)
        assert set(one["token_groups"].unique().tolist()) <= {-1, RETAIN}
    assert len(list(holding(model, batches, "retain", FORGET))) == 2


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_forget_tokens_among_the_retain_batches_are_forgotten(name):
    """Passed apart or all together, it is the same request."""
    mixed, retain = mixed_batches(), retain_batches(count=32, size=8, seed=9)
    groups = [batch["token_groups"] for batch in mixed]
    apart = [
        {**b, "token_groups": g.where(g == FORGET, -1)} for b, g in zip(mixed, groups, strict=True)
    ]
    others = [
        {**b, "token_groups": g.where(g == RETAIN, -1)} for b, g in zip(mixed, groups, strict=True)
    ]
    options = {"config": GRADIENTS[name], "evaluate": False, "calibration": retain_batches(seed=4)}
    one = uf.unlearn(trained(), forget=apart, retain=[*retain, *others], **options)
    half = len(mixed) // 2
    for forget, rest in (
        (mixed, retain),
        ([*apart[:half]], [*retain, *others[:half], *mixed[half:]]),
    ):
        other = uf.unlearn(trained(), forget=forget, retain=rest, **options)
        for count in ("forget_tokens", "retain_tokens"):
            assert other.report.request[count] == one.report.request[count]
        assert other.plan.strength == pytest.approx(one.plan.strength, rel=1e-3)


def pairs(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(2, hm.VOCAB, (8, 6), generator=generator),
        "attention_mask": torch.ones(8, 6, dtype=torch.long),
        "labels": torch.randint(2, hm.VOCAB, (8, 5), generator=generator),
    }


@pytest.mark.parametrize("name", ["best", "thorough"])
def test_one_side_of_an_encoder_decoder_batch_may_be_marked(name):
    """Its labels are then the group's that it was passed as, and not both."""
    forget, retain = pairs(0), [pairs(seed) for seed in (1, 2, 3)]
    encoder = torch.ones(8, 6, dtype=torch.long)
    encoder[:, 2:] = 0
    half = {**forget, "token_groups": encoder}
    whole = {**half, "decoder_token_groups": torch.zeros(8, 5, dtype=torch.long)}
    found = []
    for batch in (half, whole):
        model = hm.lora(hm.t5())
        for p in model.parameters():
            p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        result = uf.unlearn(
            model, forget=[batch], retain=retain, config=GRADIENTS[name], evaluate=False
        )
        found.append((result.report.request, result.plan.strength))
    assert found[0][0]["forget_tokens"] == 8 * (4 + 5)
    assert found[0][0]["retain_tokens"] == 8 * 2 + 3 * 8 * (6 + 5)
    assert found[0] == found[1]


def test_retain_tokens_beside_forget_ones_are_run_and_measured_with_a_bank_too(monkeypatch):
    forget, retain = mixed_batches(), retain_batches(count=24, size=4, seed=9)
    model = trained()
    everything = [{**b, "token_groups": torch.ones_like(b["token_groups"])} for b in forget]
    bank = uf.collect_factors(model, [*everything, *retain])
    seen, real = [], calibration.split

    def spied(model, batches, seed):
        seen.append(len(batches))
        return real(model, batches, seed)

    monkeypatch.setattr(job, "split", spied)
    for options in ({"bank": bank}, {}):
        uf.unlearn(trained(), forget=forget, retain=retain, config=STEPS, evaluate=False, **options)
    assert seen == [len(retain) + len(forget)] * 2


class Stream(torch.utils.data.IterableDataset):
    """Batches without a length, any number of times."""

    def __init__(self, batches: list[dict]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("name", list(GRADIENTS))
def test_retain_data_need_no_length(name, banked):
    forget, retain = forget_batches(), retain_batches(count=24, size=4)
    options = {"config": GRADIENTS[name], "evaluate": False}
    options["bank"] = uf.collect_factors(trained(), [*forget, *retain]) if banked else None
    found = []
    for data in (retain, torch.utils.data.DataLoader(Stream(retain), batch_size=None)):
        result = uf.unlearn(trained(), forget=forget, retain=data, **options)
        found.append((result.report.request, result.plan.strength))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_forget_tokens_beside_a_bank_are_not_lost_silently(name):
    forget, retain = forget_batches(), retain_batches(count=24, size=4)
    bank = uf.collect_factors(trained(), [*forget, *retain])
    options = {"forget": forget, "bank": bank, "config": GRADIENTS[name], "evaluate": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uf.unlearn(trained(), retain=retain, **options)
    groups = torch.ones_like(retain[3]["input_ids"])
    groups[0, :3] = 0
    retain[3] = {**retain[3], "token_groups": groups}
    with pytest.warns(uf.UcanWarning, match="Beside a bank only those of forget= are forgotten"):
        uf.unlearn(trained(), retain=retain, **options)


def test_sequences_count_where_they_hold_a_token_of_the_group():
    forget, retain = forget_batches(count=8), retain_batches(count=16)
    groups = torch.ones_like(retain[0]["input_ids"])
    groups[2, 1] = 0
    retain[0] = {**retain[0], "token_groups": groups}
    config = GRADIENTS["best"]
    request = uf.unlearn(
        trained(), forget=forget, retain=retain, config=config, evaluate=False
    ).report.request
    assert request["forget_sequences"] == 8 + 1


# The part that is kept for the budget.


@pytest.mark.parametrize("choose", [calibration.sample, calibration.split])
def test_batches_without_a_scored_token_are_not_chosen(choose):
    model, retain = trained(), retain_batches(count=24, size=4)
    mixed = [unscored(b) if i % 2 else b for i, b in enumerate(retain)]
    scored = {id(b) for b in mixed[::2]}
    for seed in range(5):
        found = choose(model, mixed, seed)
        batches = [*found[0], *found[1]] if isinstance(found, tuple) else found
        assert {id(b) for b in batches} == scored


def test_where_nothing_is_scored_it_is_said():
    retain = [unscored(batch) for batch in retain_batches()]
    with pytest.raises(uf.UcanError, match="no retain token of the retain batches is scored"):
        calibration.split(trained(), retain, 0)
    assert len(calibration.sample(trained(), retain, 0)) == 1
    assert calibration.sample(trained(), [], 0) == []
    assert calibration.split(trained(), [], 0) == ([], [])


@pytest.mark.parametrize("name", list(GRADIENTS))
@pytest.mark.parametrize("key", ["attention_mask", "labels"])
def test_a_bad_batch_is_named_by_its_place_among_the_retain_batches(name, key):
    retain = retain_batches(count=24, size=4)
    retain[3] = dict(retain[3])
    if key == "labels":
        retain[3]["labels"] = retain[3]["input_ids"].float()
    else:
        retain[3]["attention_mask"] = retain[3]["attention_mask"][:, 1:]
    model = trained()
    before = weights(model)
    with pytest.raises(uf.UcanError, match=rf"^batch 3: .*{key}"):
        uf.unlearn(model, forget=mixed_batches(), retain=retain, config=GRADIENTS[name])
    assert_same_weights(model, before)


@pytest.mark.parametrize("value", [None, torch.ones(2), "much"])
def test_a_calibration_function_that_gives_no_number_is_named(value):
    options = {"forget": forget_batches(), "retain": retain_batches()}
    with pytest.raises(uf.UcanError, match=r"calibration= returned .*must return one number"):
        uf.unlearn(trained(), calibration=lambda model: value, **options)


def test_a_set_without_a_token_is_named():
    for config in (uf.UcanConfig(), *GRADIENTS.values()):
        with pytest.raises(uf.UcanError, match=r"no forget batch with a token|forget set is empty"):
            uf.unlearn(not_memorised(), forget=[], retain=random_batches(1), config=config)


@pytest.mark.parametrize("name", ["attenuate", "best", "gates", "thorough"])
def test_a_budget_of_next_to_nothing_is_said(name, monkeypatch):
    monkeypatch.setattr(job, "BY_HEART", 0.6)
    config = GRADIENTS.get(name, uf.UcanConfig(site="mlp"))
    forget, *retain = random_batches(MEMBERS)
    data = {"forget": [forget], "retain": retain, "config": config, "evaluate": False}
    with pytest.warns(uf.UcanWarning, match=r"retain budget: it is . % of next to nothing") as seen:
        report = uf.unlearn(by_heart(), calibration=retain, **data).report
    assert 0.2 < report.search.loss_before < 0.6, "the case is one of that kind"
    assert f"cost {report.search.loss_before:.2g} nats" in report.notes["retain budget"]
    assert all(w.filename == __file__ for w in seen if "next to nothing" in str(w.message))

    def own(model):
        return mean_nll(model, retain, "retain")

    def quiet(model, **options):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*next to nothing")
            return uf.unlearn(model, **{**data, **options})

    # Not of a loss that is no NLL, nor where nothing is searched, nor where they cost more.
    quiet(by_heart(), calibration=own)
    if name != "thorough":
        given = config.replace(strength=0.01)
        quiet(by_heart(), calibration=retain, config=given, evaluate=True)
    monkeypatch.setattr(job, "BY_HEART", 0.2)
    quiet(by_heart(), calibration=retain)
