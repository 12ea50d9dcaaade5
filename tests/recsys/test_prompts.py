"""Ranking prompts with a real fast tokenizer, and the verbaliser against the full logits."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from ucan_fast.errors import UcanError
from ucan_fast.metrics import target_ranks
from ucan_fast.recsys import (
    LETTERS,
    InteractionLog,
    Verbalizer,
    build_prompt,
    held_out_cases,
    leave_one_out,
    letter_token_ids,
    prompt_batches,
    prompt_ranks,
    training_cases,
)

TITLES = {
    "0": "The Matrix (1999)",
    "1": "Amélie (2001)",
    "2": "Se7en (1995)",
    "3": "Alien (1979)",
    "4": "Heat (1995)",
    "5": "A B C D E F G H I J (1990)",
    **{str(i): f"Film {i} ({1950 + i})" for i in range(6, 40)},
}


def byte_level(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE as of GPT-2 and SmolLM2, trained on the titles."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompt = build_prompt(list(TITLES.values()), list(TITLES.values())[:20])
    tokenizer.train_from_iterator([*TITLES.values(), prompt.text], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def metaspace() -> transformers.PreTrainedTokenizerFast:
    """A Llama-like tokenizer: a letter that stands alone becomes "▁A", after a newline "A"."""
    prompt = build_prompt(["A"], ["A"] * 20).text
    characters = sorted({"▁", *"".join(TITLES.values()), *prompt})
    pieces = ["<unk>", "<s>", "</s>", *characters, *(f"▁{letter}" for letter in LETTERS)]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", letter) for letter in LETTERS],
        unk_token="<unk>",
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    """Every item has a title; user 0's history is items 0..4, the others have random ones."""
    random = np.random.default_rng(0)
    users, items = ["0"] * 6, list("012345")
    for user in range(1, 8):
        mine = random.choice(40, size=5 + user, replace=False)
        users += [str(user)] * len(mine)
        items += [str(i) for i in mine]
    users += ["9"] * 40  # so that the catalogue is whole
    items += [str(i) for i in range(40)]
    return InteractionLog.from_rows(users, items, range(len(users)), TITLES)


# --------------------------------------------------------------------------------------- layout


def test_the_prompt_to_the_character():
    prompt = build_prompt(["Heat", "Alien"], ["Se7en", "Amélie", "Heat"])
    assert prompt.text == (
        "### Instruction:\n"
        "Given user history in chronological order, recommend an item from the candidate pool "
        "with its index letter.\n\n"
        "### Input:\n"
        "User history: (1) Heat \n (2) Alien; \n "
        "Candidate pool: (A) Se7en \n (B) Amélie \n (C) Heat\n\n"
        "### Response:\n"
    )
    assert [prompt.text[a:b] for a, b in prompt.history] == ["Heat", "Alien"]
    assert [prompt.text[a:b] for a, b in prompt.candidates] == ["Se7en", "Amélie", "Heat"]


def test_prompt_refusals():
    with pytest.raises(UcanError, match="0 history"):
        build_prompt([], ["a"])
    with pytest.raises(UcanError, match="0 candidate"):
        build_prompt(["a"], [])
    with pytest.raises(UcanError, match="21 candidates but 20 letters"):
        build_prompt(["a"], ["b"] * 21)


# ---------------------------------------------------------------------------------------- cases


def small(log: InteractionLog) -> np.ndarray:
    return np.arange(8)  # all but the user who has everything


def test_training_cases_are_every_prefix(log):
    cases = training_cases(log, users=small(log), candidates=10, history=3)
    expected = []
    for user in range(8):
        rows = np.flatnonzero(log.user == user)
        expected += [
            (user, tuple(log.item[rows[max(0, n - 3) : n]].tolist()), int(log.item[rows[n]]))
            for n in range(1, len(rows))
        ]
    assert [(c.user, c.history, c.candidates[c.target]) for c in cases] == expected
    for case in cases:
        mine = set(log.item[log.user == case.user].tolist())
        assert len(set(case.candidates)) == 10
        assert set(case.candidates) & mine == {case.candidates[case.target]}
    assert len({case.target for case in cases}) > 5  # shuffled: the answer is no fixed letter


def test_training_cases_do_not_depend_on_who_else_is_asked_for(log):
    forget = np.zeros(len(log), dtype=bool)
    forget[[2, 9]] = True
    everything = training_cases(log, forget=forget, users=small(log), candidates=8, history=2)
    only = training_cases(
        log, forget=forget, users=small(log), candidates=8, history=2, only_forget=True
    )
    assert only == [c for c in everything if c.forget or any(c.history_forget)]
    assert 0 < len(only) < len(everything)
    other = training_cases(log, users=small(log), candidates=8, history=2, seed=1)
    assert [c.candidates for c in other] != [c.candidates for c in everything]


def test_forget_marks_follow_the_interactions(log):
    forget = np.zeros(len(log), dtype=bool)
    forget[[1, 3]] = True  # user 0's second and fourth interaction
    cases = training_cases(log, forget=forget, users=np.array([0]), candidates=5)
    assert [c.forget for c in cases] == [True, False, True, False, False]
    assert [c.history_forget for c in cases][-1] == (False, True, False, True, False)


def test_training_case_refusals(log):
    with pytest.raises(UcanError, match="'9' has all but 0 of the 40 items"):
        training_cases(log)
    with pytest.raises(UcanError, match="needs the mask"):
        training_cases(log, only_forget=True)
    with pytest.raises(UcanError, match="no prompt contains a forget row"):
        training_cases(
            log, forget=np.zeros(len(log), bool), users=small(log), only_forget=True, candidates=5
        )
    with pytest.raises(UcanError, match="1 candidates"):
        training_cases(log, candidates=1)


def test_held_out_cases_keep_the_retrievers_order_and_only_its_hits(log):
    train, _, test = leave_one_out(log)
    candidates = np.tile(np.arange(7, -1, -1), (len(test), 1))  # items 7, 6, ..., 0
    forget = np.zeros(len(test), dtype=bool)
    forget[0] = True
    train_forget = np.zeros(len(train), dtype=bool)
    train_forget[3] = True
    cases, rows = held_out_cases(
        train, test, candidates, forget=forget, train_forget=train_forget, history=2
    )
    assert rows.tolist() == [r for r in range(len(test)) if test.item[r] <= 7]
    assert 0 < len(rows) < len(test)
    first = cases[0]  # user 0: items 0..3 in training, 5 held out
    assert first.history == (2, 3)
    assert first.history_forget == (False, True)
    assert first.forget
    assert first.candidates == (7, 6, 5, 4, 3, 2, 1, 0)
    assert first.candidates[first.target] == 5
    for case, row in zip(cases, rows, strict=True):
        assert case.user == test.user[row]
        assert case.candidates[case.target] == test.item[row]
    with pytest.raises(UcanError, match="one row of item ids for each"):
        held_out_cases(train, test, candidates[:-1])
    with pytest.raises(UcanError, match=r"item ids are 0\.\.39"):
        held_out_cases(train, test, candidates + 40)


# -------------------------------------------------------------------------------------- batches


def attended(batch: dict, row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()


def test_batches_end_in_letter_and_eos_and_only_these_are_learned(tokenizer, log):
    cases = training_cases(log, users=np.arange(4), candidates=20)
    batches = prompt_batches(tokenizer, log, cases, batch_size=4)
    assert len(batches) == -(-len(cases) // 4)
    seen = 0
    for batch in batches:
        assert all(value.dtype == torch.int64 for value in batch.values())
        assert len({value.shape for value in batch.values()}) == 1
        for row in range(len(batch["input_ids"])):
            case = cases[seen]
            ids = attended(batch, row)
            text = build_prompt(
                [log.titles[i] for i in case.history], [log.titles[i] for i in case.candidates]
            ).text
            letter = LETTERS[case.target]
            assert tokenizer.decode(ids[:-1]) == text + letter
            assert ids[-1] == tokenizer.eos_token_id
            width = batch["input_ids"].shape[1]
            assert batch["input_ids"][row].tolist() == [0] * (width - len(ids)) + ids  # left
            assert batch["labels"][row].tolist() == [-100] * (width - 2) + ids[-2:]
            seen += 1
    assert seen == len(cases)
    assert torch.equal(batches[-1]["input_ids"], list(batches)[-1]["input_ids"])  # read twice
    with pytest.raises(IndexError):
        batches[len(batches)]


def spelled(tokenizer, batch: dict, row: int, group: int) -> str:
    ids = batch["input_ids"][row][batch["token_groups"][row] == group]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("bos", [False, True])
def test_groups_mark_forgotten_titles_other_titles_and_the_answer(log, bos):
    tokenizer = byte_level(bos)
    forget = np.zeros(len(log), dtype=bool)
    forget[[1, 3, 5]] = True  # Amélie, Alien; the last target
    cases = training_cases(log, forget=forget, users=np.array([0]), candidates=5)[-2:]
    (batch,) = prompt_batches(tokenizer, log, cases, batch_size=2)

    def words(row, group):
        return spelled(tokenizer, batch, row, group).replace(" ", "").replace(";", "")

    # The fourth case predicts Heat, which stays; the fifth predicts item 5, which is forgotten.
    assert words(0, 0) == "Amélie(2001)Alien(1979)"
    assert words(0, 1) == f"TheMatrix(1999)Se7en(1995){LETTERS[cases[0].target]}</s>"
    assert words(1, 0) == f"Amélie(2001)Alien(1979){LETTERS[cases[1].target]}</s>"
    assert words(1, 1) == "TheMatrix(1999)Se7en(1995)Heat(1995)"
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert set(batch["token_groups"][padding].tolist()) == {-1}
    if bos:
        assert attended(batch, 0)[0] == tokenizer.bos_token_id
        first = int(batch["attention_mask"][0].argmax())
        assert batch["token_groups"][0, first] == -1
        assert batch["labels"][0, first] == -100

    (other,) = prompt_batches(tokenizer, log, cases, batch_size=2, other_group=1)
    assert set(other["token_groups"][padding].tolist()) == {-1}
    assert words(0, 0) == spelled(tokenizer, other, 0, 0).replace(" ", "").replace(";", "")
    assert (other["token_groups"][0][batch["attention_mask"][0] == 1] >= 0).all()


def test_titles_are_cut_by_tokens_and_long_prompts_on_the_left(tokenizer, log):
    cases = training_cases(log, users=np.array([0]), candidates=5)[-1:]
    (whole,) = prompt_batches(tokenizer, log, cases)
    (cut,) = prompt_batches(tokenizer, log, cases, title_tokens=2)
    assert cut["input_ids"].shape[1] < whole["input_ids"].shape[1]
    text = tokenizer.decode(cut["input_ids"][0])
    for item in cases[0].history:
        offsets = tokenizer(log.titles[item], return_offsets_mapping=True)["offset_mapping"]
        start = log.titles[item][: offsets[1][1]].rstrip()
        assert f") {start} \n" in text or f") {start};" in text
        assert log.titles[item] not in text
    (short,) = prompt_batches(tokenizer, log, cases, max_tokens=50)
    for name in ("input_ids", "labels", "token_groups"):
        assert short[name][0].tolist() == whole[name][0, -50:].tolist()

    with_bos = byte_level(bos=True)
    (short,) = prompt_batches(with_bos, log, cases, max_tokens=50)
    (whole,) = prompt_batches(with_bos, log, cases)
    assert short["input_ids"][0].tolist() == [1, *whole["input_ids"][0, -49:].tolist()]


def test_without_the_answer_the_prompt_is_the_same_but_for_the_end(tokenizer, log):
    cases = training_cases(log, users=np.array([2]), candidates=20)
    full = prompt_batches(tokenizer, log, cases, batch_size=3)[0]
    asked = prompt_batches(tokenizer, log, cases, batch_size=3, answer=False)[0]
    assert "labels" not in asked
    assert torch.equal(asked["input_ids"], full["input_ids"][:, :-2])
    assert torch.equal(asked["token_groups"], full["token_groups"][:, :-2])
    assert tokenizer.decode(asked["input_ids"][0]).endswith("### Response:\n")


def test_letter_ids_come_from_the_prompt_not_from_the_letter_alone(log):
    llama_like = metaspace()
    ids = letter_token_ids(llama_like)
    assert llama_like.convert_ids_to_tokens(ids) == list(LETTERS)
    alone = [llama_like(letter, add_special_tokens=False)["input_ids"][-1] for letter in LETTERS]
    assert llama_like.convert_ids_to_tokens(alone) == [f"▁{letter}" for letter in LETTERS]
    cases = training_cases(log, users=np.array([1]), candidates=20)
    batch = prompt_batches(llama_like, log, cases, batch_size=len(cases))[0]
    # The ids are the very tokens that training teaches.
    assert batch["input_ids"][:, -2].tolist() == [ids[case.target] for case in cases]
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {2}  # no pad: EOS


def test_tokenizers_that_cannot_serve_are_refused(tokenizer, log):
    class Slow:
        is_fast = False

    with pytest.raises(UcanError, match="Slow is not a fast tokenizer"):
        letter_token_ids(Slow())
    merged = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    merged.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    merged = transformers.PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<unk>")
    with pytest.raises(UcanError, match="does not give the letter 'A' a token of its own"):
        letter_token_ids(merged)
    no_eos = byte_level()
    no_eos.eos_token = None
    cases = training_cases(log, users=np.array([1]), candidates=20)
    with pytest.raises(UcanError, match="no eos_token"):
        prompt_batches(no_eos, log, cases)
    with pytest.raises(UcanError, match="batch_size 0"):
        prompt_batches(tokenizer, log, cases, batch_size=0)


# ------------------------------------------------------------------------------------ verbaliser


def llama(vocabulary: int = 400) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.3,
    )
    return transformers.Gemma2ForCausalLM(config).eval()


def cohere() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CohereConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.0625,
        pad_token_id=0,
        eos_token_id=2,
    )
    return transformers.CohereForCausalLM(config).eval()


def padded(side: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 400, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.int64)
    for row, length in enumerate([9, 4, 1]):
        mask[row, length:] = 0
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "token_groups": mask}


def slice_of_full_logits(model: nn.Module, batch: dict, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = []
    for row, mask in enumerate(batch["attention_mask"].tolist()):
        last = max(place for place, on in enumerate(mask) if on)
        rows.append(logits[row, last, ids])
    return torch.stack(rows)


IDS = [7, 300, 42, 399, 5]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("adapted", [False, True])
def test_verbalizer_equals_the_slice_of_the_full_logits(build, side, adapted):
    model = build()
    if adapted:
        target = ["q_proj", "down_proj"] if build is llama else ["c_attn"]
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=4,
                target_modules=target,
                init_lora_weights=False,
                fan_in_fan_out=build is gpt2,
            ),
        ).eval()
    verbalizer = Verbalizer(model, IDS)
    batch = padded(side)
    with torch.no_grad():
        got = verbalizer(batch)
    assert verbalizer.full_head is None
    assert got.shape == (3, 5)
    assert got.dtype == torch.float32
    assert torch.allclose(got, slice_of_full_logits(model, batch, IDS), atol=1e-5)


def test_verbalizer_multiplies_only_the_letters_rows():
    model = llama()
    calls = []
    verbalizer = Verbalizer(model, IDS)
    with torch.no_grad():
        verbalizer(padded("left"))  # the first batch is also checked against the full head
        # From here on the whole head must not run at all.
        model.lm_head.forward = lambda hidden: calls.append(hidden.shape)
        again = verbalizer(padded("left"))
    assert calls == []
    assert again.shape == (3, 5)


def test_verbalizer_follows_weights_that_change_in_place_and_has_gradients():
    model = llama()
    verbalizer = Verbalizer(model, IDS)
    batch = padded("right")
    with torch.no_grad():
        before = verbalizer(batch)
        model.lm_head.weight.mul_(2.0)
        assert torch.allclose(verbalizer(batch), 2 * before, atol=1e-5)
    verbalizer(batch).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def biased() -> nn.Module:
    model = llama()
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(16, 400, bias=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
        model.lm_head.bias.copy_(torch.arange(400.0))
    return model


def test_verbalizer_adds_the_heads_bias():
    model = biased()
    verbalizer = Verbalizer(model, IDS)
    with torch.no_grad():
        got = verbalizer(padded("left"))
    assert verbalizer.full_head is None
    assert torch.allclose(got, slice_of_full_logits(model, padded("left"), IDS), atol=1e-4)


def adapted_head() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(llama(), config).eval()


def hooked_head() -> nn.Module:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 3)
    return model


def prompt_tuned() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(llama(), config).eval()


class Squared(transformers.LlamaForCausalLM):
    """Changes its logits in a way that no configuration tells."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits**2
        return output


def squared() -> nn.Module:
    model = llama()
    model.__class__ = Squared
    return model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (adapted_head, "not a plain Linear"),
        (hooked_head, "forward hooks"),
        (gemma2, "final_logit_softcapping"),
        (cohere, "logit_scale"),
        (squared, "differ from those of the bare lm_head"),
    ],
)
def test_verbalizer_falls_back_to_the_full_head(build, reason, side):
    model = build()
    verbalizer = Verbalizer(model, IDS)
    batch = padded(side)
    with torch.no_grad():
        got = verbalizer(batch)
    assert reason in verbalizer.full_head
    assert torch.allclose(got, slice_of_full_logits(model, batch, IDS), atol=1e-5)


def test_the_full_head_sees_the_last_positions_only_where_the_model_can():
    model = adapted_head()
    shapes = []
    model.get_base_model().lm_head.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    with torch.no_grad():
        Verbalizer(model, IDS)(padded("left"))
    assert shapes == [(3, 1, 400)]


def test_verbalizer_knows_methods_that_act_outside_of_the_backbone():
    assert "outside of the backbone" in Verbalizer(prompt_tuned(), IDS).full_head


def test_verbalizer_keeps_a_training_models_mode_and_is_not_misled_by_its_dropout():
    model = gpt2().train()  # dropout 0.1
    verbalizer = Verbalizer(model, IDS)
    verbalizer(padded("left"))
    assert model.training
    assert verbalizer.full_head is None


def test_verbalizer_refusals():
    with pytest.raises(UcanError, match="pass the ids of the letters"):
        Verbalizer(llama(), [400])
    with pytest.raises(UcanError, match="pass the ids of the letters"):
        Verbalizer(llama(), [])
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UcanError, match="encoder-decoder"):
        Verbalizer(t5, [3])
    batch = padded("left")
    batch["attention_mask"][1] = 0
    with pytest.raises(UcanError, match="no attended token"):
        Verbalizer(llama(), IDS)(batch)


def test_prompt_ranks_equal_the_slice_of_the_full_logits(tokenizer, log):
    model = llama(len(tokenizer)).train()
    cases = training_cases(log, users=np.arange(3), candidates=6)
    got = prompt_ranks(model, tokenizer, log, cases, batch_size=4)
    with torch.device("meta"):  # as after torch.set_default_device("cuda")
        assert torch.equal(prompt_ranks(model, tokenizer, log, cases, batch_size=4), got)
    assert model.training
    model.eval()
    ids = letter_token_ids(tokenizer)[:6]
    expected = []
    for case in cases:
        (batch,) = prompt_batches(tokenizer, log, [case], answer=False)
        scores = slice_of_full_logits(model, batch, ids)
        expected += target_ranks(scores, torch.tensor([case.target])).tolist()
    assert got.tolist() == expected
    assert len(set(expected)) > 1
    assert max(expected) <= 6
