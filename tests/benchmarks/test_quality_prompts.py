"""The text recommender as a case: which prompts are on which side, training, retraining, caches."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

import ucan_fast as uf
from benchmarks.quality import tables, text_case, text_cell
from benchmarks.quality.case import lora_weights
from benchmarks.quality.edits import prepare, scores
from benchmarks.quality.text_case import (
    SCENARIOS,
    Profile,
    load_log,
    make_case,
    make_data,
    make_request,
    text_recommender,
)
from benchmarks.quality.text_model import new_adapter, on_frozen_trunk, trunk_of
from ucan_fast import recsys

ITEMS = 40
BLOCKS = 3
TINY = Profile(
    name="tiny",
    users=8,
    never_trained=3,
    train_targets=4,
    test_targets=2,
    history=2,
    candidates=4,
    title_tokens=3,
    max_tokens=256,
    blocks=1,
    batch_size=5,
    epochs=2,
    lr=1e-2,
    warmup=2,
)


@pytest.fixture(scope="module")
def log() -> recsys.InteractionLog:
    """14 users with 9 items each, of which the profile wants 11 users and 8 items."""
    random = np.random.default_rng(0)
    users, items, times = [], [], []
    for user in range(14):
        users += [str(user)] * 9
        items += [str(i) for i in random.choice(ITEMS, 9, replace=False)]
        times += list(range(9))
    # Some are shorter than the cut, so that prompts differ in length.
    titles = {str(i): f"Film {chr(65 + i % 26)} number {i}" for i in range(ITEMS)}
    titles |= {str(i): f"M{i}" for i in range(0, ITEMS, 3)}
    genres = {str(i): ("Horror",) if i % 4 == 0 else ("Drama",) for i in range(ITEMS)}
    return recsys.InteractionLog.from_rows(users, items, times, titles, genres)


@pytest.fixture(scope="module")
def tokenizer(log) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE as SmolLM2's, trained on the titles and the prompt."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*log.titles, recsys.build_prompt(["A"], ["A"]).text], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def llama(vocabulary: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def build(log, tokenizer):
    def build(cache, profile=TINY, **options):
        return text_recommender(
            "tiny",
            log,
            cache=cache,
            profile=profile,
            base=lambda: (llama(len(tokenizer)), tokenizer),
            **{"recipe": "all"} | options,
        )

    return build


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def recommender(build, cache):
    return build(cache)


def texts(recommender, prompts, group: int | None = None) -> set[str]:
    """The prompts (of a group) as a person would read them, answers included."""
    found = set()
    for batch in prompts:
        columns = (batch[name] for name in ("input_ids", "attention_mask", "token_groups"))
        for tokens, mask, groups in zip(*columns, strict=True):
            if group is None or (groups[mask.bool()] == group).all():
                found.add(recommender.tokenizer.decode(tokens[mask.bool()]))
    return found


# ------------------------------------------------------------------------------------- model


def test_the_cut_model_answers_as_the_whole_one():
    torch.manual_seed(1)
    whole, answers = llama(100), [7, 3, 50]
    tokens, mask = torch.randint(0, 100, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad():
        wanted = whole(input_ids=tokens, attention_mask=mask).logits[..., answers]
        cut = on_frozen_trunk(llama(100), 2, answers)
        first = cut(input_ids=tokens, attention_mask=mask).logits
        again = cut(input_ids=tokens[:, 2:], attention_mask=mask[:, 2:]).logits
    real = mask.bool()
    torch.testing.assert_close(first[real], wanted[real])
    # Row 0 is the same prompt with less padding, so it is remembered; the others are new.
    torch.testing.assert_close(again[0, 3:], first[0, 5:])
    assert len(trunk_of(cut).known) == 3 + 2


def test_the_last_positions_alone_are_those_of_the_full_pass():
    torch.manual_seed(1)
    model = new_adapter(on_frozen_trunk(llama(100), 2, [7, 3, 50]), "all", 0).eval()
    with torch.no_grad():
        for weight in lora_weights(model).values():
            weight.normal_(std=0.1)
    tokens, mask = torch.randint(0, 100, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5] = 0
    found = []
    for options in ({}, {"last_rows": 3}):
        model.zero_grad()
        logits = model(
            input_ids=tokens, attention_mask=mask, logits_to_keep=3, use_cache=False, **options
        ).logits
        assert logits.shape == (3, 3, 3)
        logits.square().sum().backward()
        found.append([logits, *(w.grad.clone() for w in lora_weights(model).values())])
    for all_positions, last in zip(*found, strict=True):
        torch.testing.assert_close(last, all_positions, rtol=1e-4, atol=1e-4)
        assert all_positions.abs().max() > 1e-2


def test_adapters_are_in_the_last_blocks_alone_and_train_there():
    cut = on_frozen_trunk(llama(100), 2, [1, 2, 3])
    model = new_adapter(cut, "all", 0)
    assert len(lora_weights(model)) == 2 * 2 * 7
    assert not any("trunk" in name for name in lora_weights(model))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(lora_weights(model))
    assert len(lora_weights(new_adapter(llama(100), "q/v", 0))) == 2 * 2 * BLOCKS
    with torch.inference_mode():
        tokens = torch.randint(0, 100, (2, 6))
        model(input_ids=tokens)
    # What was remembered in inference mode can be trained on.
    model.train()
    model(input_ids=tokens, labels=tokens.clamp_max(2)).loss.backward()
    assert all(p.grad is not None for p in lora_weights(model).values())


def test_every_block_must_not_be_frozen():
    with pytest.raises(ValueError, match="3 of 3 blocks"):
        on_frozen_trunk(llama(100), BLOCKS, [1])


# -------------------------------------------------------------------------------------- data


def test_prompts_of_training_test_and_never_trained_users_do_not_overlap(log):
    data = make_data(log, TINY, seed=0)
    assert (len(data.train), len(data.test)) == (8 * 4, 8 * 2)
    assert len(data.holdout) == 3 * 6
    assert not set(data.train_rows) & set(data.test_rows)
    tuned = {case.user for case in data.train}
    assert tuned == {case.user for case in data.test}
    assert not tuned & {case.user for case in data.holdout}
    for cases, rows in ((data.train, data.train_rows), (data.test, data.test_rows)):
        for case, row in zip(cases, rows, strict=True):
            assert (case.user, case.candidates[case.target]) == (log.user[row], log.item[row])
            mine = set(log.item[log.user == case.user])
            assert mine & set(case.candidates) == {log.item[row]}
    for user in tuned:
        last_trained = data.train_rows[log.user[data.train_rows] == user].max()
        assert (data.test_rows[log.user[data.test_rows] == user] > last_trained).all()


def test_all_targets_and_all_users_where_the_profile_names_no_number(log):
    profile = dataclasses.replace(TINY, users=None, train_targets=None)
    data = make_data(log, profile, seed=0)
    assert len({case.user for case in data.train}) == 14 - 3
    assert len(data.train) == 11 * (9 - 1 - 2)  # not the first, not the test ones


def test_too_few_users_are_refused(log):
    with pytest.raises(uf.UcanError, match="14 users have at least 8 interactions"):
        make_data(log, dataclasses.replace(TINY, users=12), seed=0)


def test_data_sets_are_loaded_by_name(tmp_path):
    rows = [f"{user}\t{item}\t{user}" for user in range(6) for item in range(6)]
    (tmp_path / "pantry_interactions.tsv").write_text(
        "\n".join(["user\titem\tposition", *rows, *rows[:3]]) + "\n"
    )
    items = [f"{item}\tGreen tea {item}" for item in range(6)]
    (tmp_path / "pantry_items.tsv").write_text("\n".join(["item\ttitle", *items]) + "\n")
    log = load_log("pantry", tmp_path, tmp_path)
    assert (len(log), log.n_users, log.n_items) == (36, 6, 6)  # the repeated pairs are gone
    with pytest.raises(uf.UcanError, match="ml-latest-small is not shipped"):
        load_log("ml-latest-small", None, tmp_path)
    with pytest.raises(uf.UcanError, match="'beauty' is unknown"):
        load_log("beauty", tmp_path, tmp_path)


# ----------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_groups_and_labels_of_a_batch(recommender, tokens):
    cases = recommender.data.train[:7]
    prompts = recommender.prompts(cases, 0, tokens)
    assert [len(batch["input_ids"]) for batch in prompts] == [5, 2]
    row = 0
    for batch in prompts:
        mask, groups = batch["attention_mask"].bool(), batch["token_groups"]
        answer = torch.zeros_like(mask)
        answer[:, -2:] = True
        assert torch.equal(groups == 0, mask if tokens == "all" else answer)
        assert (groups[groups != 0] == -1).all()
        assert (batch["labels"][~answer] == -100).all()
        for labels in batch["labels"][:, -2:].tolist():
            # The head has four letters, then EOS.
            assert labels == [cases[prompts.order[row]].target, 4]
            row += 1
    assert sorted(prompts.order) == list(range(7))


def test_an_unknown_choice_of_tokens_is_refused(recommender):
    with pytest.raises(uf.UcanError, match="'titles'"):
        recommender.prompts(recommender.data.train, 0, "titles")


def test_ranks_are_those_of_the_whole_model(recommender, build, cache, tmp_path):
    """The package's own ranking of prompts, on the model with all its blocks and head."""
    whole = build(tmp_path, dataclasses.replace(TINY, blocks=None, epochs=1))
    assert trunk_of(whole.model) is None
    for made in (whole, recommender):
        with torch.no_grad():
            for name, weight in lora_weights(made.model).items():
                last = ".layers.0." in name if made is recommender else ".layers.2." in name
                torch.manual_seed(sum(map(ord, name.rpartition(".layers.")[2][2:])))
                weight.copy_(torch.randn_like(weight) * 0.3 * last)
    cases = whole.data.train
    wanted = recsys.prompt_ranks(
        whole.model,
        whole.tokenizer,
        whole.data.log,
        cases,
        title_tokens=TINY.title_tokens,
        letters=recsys.LETTERS[: TINY.candidates],
    )
    assert len(set(wanted.tolist())) == TINY.candidates
    prompts = whole.prompts(cases, 1)
    assert prompts.order != sorted(prompts.order)
    assert torch.equal(whole.ranks(prompts), wanted)
    assert recommender.data.train == cases
    assert torch.equal(recommender.ranks(recommender.prompts(cases, 1)), wanted)
    # The shared one as it was trained.
    text_case._train_or_load(recommender, recommender.data.train, cache)


# ---------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_case_has_every_prompt_on_its_side(recommender, cache, scenario):
    request = make_request(recommender, scenario, genre="Horror")
    case = make_case(recommender, request, cache=cache)
    data, log = recommender.data, recommender.data.log
    everything = texts(recommender, recommender.prompts(data.train, 1))
    forget, retain = texts(recommender, case.forget, 0), texts(recommender, case.retain, 1)
    assert texts(recommender, case.retain, 0) == texts(recommender, case.forget) == forget
    assert forget | retain == everything
    assert not forget & retain
    assert len(forget) == request.forget_train.sum()
    assert all((batch["token_groups"] != 1).all() for batch in case.forget)
    assert all((batch["token_groups"] != 0).all() for batch in case.calibration)
    assert all((batch["token_groups"] != 1).all() for batch in case.holdout)
    assert texts(recommender, case.calibration) < retain
    assert not texts(recommender, case.holdout) & everything

    users = {side: {data.train[i].user for i in case.sides[side]} for side in case.sides}
    assert not users["calibration"] & users["retain"]
    places = sorted(i for side in case.sides.values() for i in side)
    assert places == list(range(len(data.train)))
    gone = request.forget_train
    if scenario == "genre":
        assert [("Horror" in log.genres[log.item[r]]) for r in data.train_rows] == gone.tolist()
        assert [
            ("Horror" in log.genres[log.item[r]]) for r in data.test_rows
        ] == request.forget_test.tolist()
    elif scenario == "interactions":
        assert gone.sum() == round(len(gone) / 4)
        assert not request.forget_test.any()
    else:
        assert not users["forget"] & (users["calibration"] | users["retain"])
        assert len(users["forget"]) == {"users": 2, "one-percent": 1, "one-user": 1}[scenario]
        assert {data.test[i].user for i in np.flatnonzero(request.forget_test)} == users["forget"]


def test_a_kind_of_item_by_a_function_of_the_log(recommender):
    request = make_request(recommender, "genre", genre=lambda log: log.item < 10)
    asked = recommender.data.log.item[recommender.data.train_rows]
    assert (request.forget_train == (asked < 10)).all()


def test_ranks_and_metrics_of_a_case(recommender, cache):
    request = make_request(recommender, "users")
    case = make_case(recommender, request, cache=cache)
    ranks = case.ranks()
    assert {side: len(r) for side, r in ranks.items()} == {
        side: len(places) for side, places in case.sides.items()
    }
    for of_side in ranks.values():
        assert 1 <= of_side.min() <= of_side.max() <= TINY.candidates
    measured = case.measure()
    for side, other in (("forget", "forget_train"), ("retain", "retain_train")):
        assert measured[f"{other}/recall@1"] == float((ranks[side] == 1).double().mean())
        assert measured[f"{other}/cases"] == len(ranks[side])
    assert measured["forget_test/cases"] + measured["retain_test/cases"] == 16
    assert measured["holdout/recall@10"] == 1.0  # of four candidates


def test_a_request_without_held_out_counterpart_has_no_such_metrics(recommender, cache):
    request = make_request(recommender, "interactions")
    measured = make_case(recommender, request, cache=cache).measure()
    assert measured["forget_test/cases"] == 0
    assert not any(name.startswith("forget_test/recall") for name in measured)


def test_sides_are_cut_to_what_the_profile_evaluates(recommender, cache):
    profile = dataclasses.replace(TINY, evaluated=3)
    made = dataclasses.replace(
        recommender, recipe=dataclasses.replace(recommender.recipe, profile=profile)
    )
    case = make_case(made, make_request(made, "users"), cache=cache)
    assert {len(places) for places in case.sides.values()} == {3}
    # What a method may use is not cut.
    assert len(texts(made, case.forget)) == 8
    assert len(texts(made, case.retain, 1)) == 24


def test_requests_that_cannot_be_are_refused(recommender, cache):
    with pytest.raises(uf.UcanError, match="'taste'"):
        make_request(recommender, "taste")
    with pytest.raises(uf.UcanError, match="no item has the genre 'Opera'"):
        make_request(recommender, "genre", genre="Opera")
    user = recommender.data.log.user[recommender.data.train_rows]
    request = make_request(recommender, "users")
    all_but_one = dataclasses.replace(request, forget_train=user != user[0])
    with pytest.raises(uf.UcanError, match="two are needed"):
        make_case(recommender, all_but_one, cache=cache)


@pytest.mark.parametrize("method", ["attenuate", "influence"])
def test_the_package_unlearns_a_case(recommender, cache, method):
    request = make_request(recommender, "genre", genre="Horror")
    case = make_case(recommender, request, cache=cache)
    before = {name: w.detach().clone() for name, w in lora_weights(case.model).items()}
    options = {"min_score": 0.0} if method == "attenuate" else {}
    result = uf.unlearn(
        case.model,
        forget=case.forget,
        retain=case.retain,
        calibration=case.calibration,
        config=uf.UcanConfig(method=method, strength=0.5, **options),
        evaluate=False,
    )
    now = lora_weights(case.model)
    assert any(not torch.equal(now[name], weight) for name, weight in before.items())
    result.plan.undo(case.model)
    assert all(torch.equal(now[name], weight) for name, weight in before.items())


# ----------------------------------------------------------------------- training and caches


def forbidden(*_args):
    raise AssertionError("it was trained again")


def test_training_lowers_the_loss(build, tmp_path):
    made = build(tmp_path, dataclasses.replace(TINY, epochs=12))
    losses = text_case.json.loads(next(tmp_path.glob("text-*/training.json")).read_text())["losses"]
    assert losses[-1] < 0.5 * losses[0]
    trained = made.ranks(made.prompts(made.data.train, 1)) == 1
    assert float(trained.double().mean()) > 0.5


def test_a_trained_adapter_and_the_trunk_come_from_the_cache(
    recommender, build, cache, monkeypatch
):
    monkeypatch.setattr(text_case, "fit", forbidden)
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", forbidden
    )
    again = build(cache)  # not one block of the base is run
    for name, weight in lora_weights(recommender.model).items():
        assert torch.equal(lora_weights(again.model)[name], weight)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"recipe": "q/v"}, {"profile": dataclasses.replace(TINY, epochs=3)}],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_is_trained_on_its_own(recommender, build, cache, monkeypatch, change):
    monkeypatch.setattr(text_case, "fit", forbidden)
    with pytest.raises(AssertionError, match="trained again"):
        build(cache, **change)


def test_training_that_fails_leaves_nothing_behind(build, tmp_path, monkeypatch):
    monkeypatch.setattr(text_case, "fit", forbidden)
    with pytest.raises(AssertionError, match="trained again"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text-trunks"]


def test_retraining_leaves_the_deleted_prompts_out(recommender, cache, monkeypatch):
    case = make_case(recommender, make_request(recommender, "users"), cache=cache)
    before = {name: w.detach().clone() for name, w in lora_weights(case.model).items()}
    seen = []

    def fit(made, cases):
        seen.extend(cases)
        # From where the first training started, not from what it has learned.
        assert all(torch.equal(w, made.initial[n]) for n, w in lora_weights(made.model).items())
        return real(made, cases)

    real = text_case.fit
    monkeypatch.setattr(text_case, "fit", fit)
    weights, seconds = case.retrain()
    assert seconds > 0
    gone = case.request.forget_train
    assert seen == [c for c, out in zip(recommender.data.train, gone, strict=True) if not out]
    now = lora_weights(case.model)
    assert weights.keys() == now.keys()
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    assert any(not torch.equal(weights[name], weight) for name, weight in before.items())
    assert not case.model.training
    monkeypatch.setattr(text_case, "fit", forbidden)
    again, as_long = case.retrain()
    assert as_long == seconds
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_an_nf4_base_is_trained_and_ranked(build, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    made = build(tmp_path, dataclasses.replace(TINY, epochs=1), quantise="nf4")
    assert {type(m).__name__ for m in made.model.modules() if "Linear4bit" in type(m).__name__}
    prompts = made.prompts(made.data.train, 1)
    ranks = made.ranks(prompts)
    assert 1 <= ranks.min() <= ranks.max() <= TINY.candidates
    # Gradients still pass through the base after it was run without any.
    quantised = [m for m in made.model.modules() if "Linear4bit" in type(m).__name__]
    bases = [m for m in quantised if hasattr(m, "support_avx512bf16_for_cpu")]
    assert bases
    assert not any(m.support_avx512bf16_for_cpu for m in bases)
    factors = uf.collect_factors(made.model, prompts)
    assert all(g.any() for name, g in factors.gradients.items() if name.endswith("lora_B"))


def test_what_cannot_be_trained_is_refused(build, tmp_path):
    with pytest.raises(uf.UcanError, match="'mlp'"):
        build(tmp_path, recipe="mlp")
    with pytest.raises(uf.UcanError, match="'int8'"):
        build(tmp_path, quantise="int8")


# -------------------------------------------------------------------------------------- cells


def test_a_cell_writes_what_tables_read(recommender, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(text_cell, "load_log", lambda *_: None)
    monkeypatch.setattr(
        text_cell,
        "text_recommender",
        lambda name, log, **options: asked.update(options) or recommender,
    )
    out = tmp_path / "tiny.json"
    options = ["--data-set", "ml-100k", "--scenario", "genre", "--coarse", "--genre", "Horror"]
    options += ["--methods", "retraining|uniform|influence$|U-CAN, input$|^SSD|Eraser|GradDiff$"]
    monkeypatch.setenv("UCAN_FAST_CACHE", str(tmp_path))
    before = {n: w.detach().clone() for n, w in lora_weights(recommender.model).items()}
    assert text_cell.main([*options, "--out", str(out)]) == 0
    after = lora_weights(recommender.model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert (asked["recipe"], asked["profile"].name) == ("all", "reduced")
    (found,) = tables.load([out])
    assert found["metric"] == "mrr@10"
    assert 0 < found["mrr@10"]["retain"] <= 1
    assert {name: row.get("error") for name, row in found["methods"].items()} == dict.fromkeys(
        [
            *("retraining", "uniform shrink (control)", "U-CAN, input", "influence", "GradDiff"),
            *("SSD", "LLM-Eraser-style (adapter)"),
        ]
    )
    # The command under the table asks for the same.
    words = shlex.split(found["command"])
    assert words[:3] == ["python", "-m", "benchmarks.quality.text_cell"]
    mine = vars(text_cell.parser().parse_args([*options, "--out", "build/tiny.json"]))
    assert vars(text_cell.parser().parse_args(words[3:])) == mine
    # A later run adds to the file.
    options[-1] = "several steps$"
    assert text_cell.main([*options, "--into", str(out)]) == 0
    (joined,) = tables.load([out])
    assert set(joined["methods"]) == {*found["methods"], "influence, several steps"}
    assert "error" not in joined["methods"]["influence, several steps"]
    assert joined["methods"]["GradDiff"] == found["methods"]["GradDiff"]
    (later,) = joined["later"]
    assert "--into benchmarks/results/text/tiny.json" in later["command"]


def test_a_cell_without_data_says_where_it_is_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UCAN_FAST_CACHE", str(tmp_path))
    assert text_cell.main(["--data-set", "pantry"]) == 1
    assert "pantry" in capsys.readouterr().err


def test_a_q_v_adapter_has_scores_of_its_sites(build, cache):
    made = build(cache, recipe="q/v")
    case = make_case(made, make_request(made, "genre", genre="Horror"), cache=cache)
    prepare(case, ["moments"])
    assert set(scores(case)) == {"input", "contrast"}
