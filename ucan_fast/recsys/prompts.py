"""Ranking prompts in the layout of LlamaRec: a history, 20 lettered candidates, one letter.

The layout is LlamaRec's (arXiv 2311.02089, template "alpaca_short"): history of at most 20 items,
titles cut at 32 tokens, at most 1,536 tokens with padding and truncation on the left, and a loss on
the last two tokens alone, the letter and EOS. Where a model was tuned on it, it must be met to the
character.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..adapter import module_device
from ..batches import eval_mode
from ..errors import UcanError
from ..metrics import target_ranks
from .data import InteractionLog, _row_mask
from .ranking import Verbalizer
from .sequences import _user_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LETTERS",
    "Prompt",
    "PromptBatches",
    "PromptCase",
    "build_prompt",
    "held_out_cases",
    "letter_token_ids",
    "prompt_batches",
    "prompt_ranks",
    "training_cases",
]

LETTERS = "ABCDEFGHIJKLMNOPQRST"
_INSTRUCTION = (
    "Given user history in chronological order, recommend an item from the candidate pool with "
    "its index letter."
)
_BETWEEN = " \n "


class Prompt(NamedTuple):
    """A prompt up to where the letter goes, and where in it the titles stand.

    `history` and `candidates` are (start, end) character positions in `text`, one per title.
    """

    text: str
    history: list[tuple[int, int]]
    candidates: list[tuple[int, int]]


@dataclass(frozen=True)
class PromptCase:
    """One prompt as dense item ids: what was seen, what may be recommended, what is right.

    `target` is an index into `candidates`. `history_forget` (one per history item) and `forget`
    (the target interaction) say which interactions are to be forgotten.
    """

    user: int
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    target: int
    history_forget: tuple[bool, ...]
    forget: bool


def build_prompt(
    history_titles: Sequence[str], candidate_titles: Sequence[str], letters: str = LETTERS
) -> Prompt:
    """The prompt's text, ending in the newline after which the model answers with a letter.

    History titles come oldest first and are numbered from 1; candidates get `letters` in order.
    UcanError: no history, no candidates, or more candidates than letters.
    """
    if not history_titles or not candidate_titles:
        raise UcanError(
            f"build_prompt: {len(history_titles)} history and {len(candidate_titles)} candidate "
            "titles; a prompt needs at least one of each."
        )
    if len(candidate_titles) > len(letters):
        raise UcanError(
            f"build_prompt: {len(candidate_titles)} candidates but {len(letters)} letters; pass "
            "fewer candidates or more letters."
        )
    text = f"### Instruction:\n{_INSTRUCTION}\n\n### Input:\nUser history: "
    text, history = _listed(text, [str(n + 1) for n in range(len(history_titles))], history_titles)
    text, candidates = _listed(f"{text}; \n Candidate pool: ", letters, candidate_titles)
    return Prompt(f"{text}\n\n### Response:\n", history, candidates)


def training_cases(
    log: InteractionLog,
    *,
    forget: np.ndarray | None = None,
    users: np.ndarray | None = None,
    only_forget: bool = False,
    candidates: int = 20,
    history: int = 20,
    seed: int = 0,
) -> list[PromptCase]:
    """A case for every interaction of `log` but a user's first: predict it from those before.

    Each has the last `history` items before the target, and the target among `candidates` - 1
    random items that the user has nowhere in `log`, shuffled. The draw depends on `seed` and the
    target's row alone, so the cases of a forget set are the very prompts that a bank of all cases
    holds. `forget` is bool, one per row; `only_forget` keeps cases whose target or history has a
    forgotten interaction. `users` as in `sequence_batches`.

    UcanError: a mask that does not fit, a catalogue too small for the negatives, or no case left.
    """
    if only_forget and forget is None:
        raise UcanError("training_cases: only_forget needs the mask forget=.")
    if candidates < 2 or history < 1:
        raise UcanError(
            f"training_cases: {candidates} candidates and a history of {history}; at least 2 and "
            "1 are needed."
        )
    forget = np.zeros(len(log), dtype=bool) if forget is None else _row_mask(forget, log, "forget")
    wanted = _user_mask(users, log)
    count = np.bincount(log.user, minlength=log.n_users)
    end = np.cumsum(count)
    cases = []
    for user in np.flatnonzero(wanted & (count >= 2)):
        first, last = end[user] - count[user], end[user]
        others = np.setdiff1d(np.arange(log.n_items), log.item[first:last])
        if len(others) < candidates - 1:
            raise UcanError(
                f"training_cases: user {log.user_ids[user]!r} has all but {len(others)} of the "
                f"{log.n_items} items, too few for {candidates - 1} negatives; use fewer "
                "candidates."
            )
        for row in range(first + 1, last):
            seen = slice(max(first, row - history), row)
            if only_forget and not (forget[row] or forget[seen].any()):
                continue
            random = np.random.default_rng((seed, row))
            pool = random.choice(others, size=candidates - 1, replace=False)
            target = int(random.integers(candidates))
            pool = np.insert(pool, target, log.item[row])
            cases.append(_case(log, seen, forget, pool, target, bool(forget[row])))
    if not cases:
        raise UcanError(
            "training_cases: no case is left; "
            + ("no prompt contains a forget row." if only_forget else "no user has two rows.")
        )
    return cases


def held_out_cases(
    train_log: InteractionLog,
    heldout_log: InteractionLog,
    candidates: np.ndarray,
    *,
    forget: np.ndarray | None = None,
    train_forget: np.ndarray | None = None,
    history: int = 20,
) -> tuple[list[PromptCase], np.ndarray]:
    """Cases for held-out interactions whose candidates a retriever has chosen.

    `candidates` is int `[len(heldout_log), n]`, dense item ids, best first; they are shown in that
    order. As in LlamaRec, only rows whose target was retrieved (and whose user has a history in
    `train_log`) become cases. `forget` marks rows of `heldout_log`, `train_forget` of `train_log`.

    Returns the cases and the rows of `heldout_log` (int64) that they belong to; all other rows keep
    the retriever's own rank in an overall score. UcanError: shapes or ids do not fit.
    """
    candidates = np.asarray(candidates)
    if candidates.ndim != 2 or len(candidates) != len(heldout_log):
        raise UcanError(
            f"held_out_cases: candidates have shape {candidates.shape}; expected one row of item "
            f"ids for each of the {len(heldout_log)} held-out interactions."
        )
    if train_log.user_ids != heldout_log.user_ids or train_log.item_ids != heldout_log.item_ids:
        raise UcanError(
            "held_out_cases: the two logs do not share their ids; cut both out of one log."
        )
    if candidates.size and not (candidates.min() >= 0 and candidates.max() < heldout_log.n_items):
        raise UcanError(
            f"held_out_cases: candidates reach from {candidates.min()} to {candidates.max()}; item "
            f"ids are 0..{heldout_log.n_items - 1}."
        )
    forget = _mask_or_none(forget, heldout_log, "forget")
    train_forget = _mask_or_none(train_forget, train_log, "train_forget")
    count = np.bincount(train_log.user, minlength=train_log.n_users)
    end = np.cumsum(count)
    hit = candidates == heldout_log.item[:, None]
    rows = np.flatnonzero(hit.any(axis=1) & (count[heldout_log.user] > 0))
    cases = []
    for row in rows:
        user = heldout_log.user[row]
        seen = slice(max(end[user] - count[user], end[user] - history), end[user])
        target = int(hit[row].argmax())
        cases.append(
            _case(train_log, seen, train_forget, candidates[row], target, bool(forget[row]))
        )
    return cases, rows


def letter_token_ids(tokenizer: PreTrainedTokenizerBase, letters: str = LETTERS) -> list[int]:
    """The token that each letter is after the prompt's last newline.

    Taken from a tokenised prompt, since a tokenizer of the Llama family gives a letter that stands
    alone another token ("▁A") than the one it learned after a newline ("A"). UcanError: the
    tokenizer is not a fast one, or a letter is not one token of its own there.
    """
    _needs_fast(tokenizer)
    prompt = build_prompt(["A film"], ["A film"], letters)
    return [_tokenise(tokenizer, prompt.text, letter)[0][-1] for letter in letters]


class PromptBatches(Sequence):
    """Batches of tokenised prompts, made when they are asked for; may be read any number of times.

    See `prompt_batches`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        log: InteractionLog,
        cases: Sequence[PromptCase],
        *,
        batch_size: int,
        max_tokens: int,
        title_tokens: int,
        letters: str,
        answer: bool,
        other_group: int,
    ) -> None:
        _needs_fast(tokenizer)
        if tokenizer.eos_token_id is None:
            raise UcanError(
                "prompt_batches: the tokenizer has no eos_token, which ends every answer; set it."
            )
        if batch_size < 1 or max_tokens < 4 or title_tokens < 1:
            raise UcanError(
                f"prompt_batches: batch_size {batch_size}, max_tokens {max_tokens} and "
                f"title_tokens {title_tokens} must be at least 1, 4 and 1."
            )
        self.tokenizer, self.log, self.cases = tokenizer, log, cases
        self.batch_size, self.max_tokens, self.title_tokens = batch_size, max_tokens, title_tokens
        self.letters, self.answer, self.other_group = letters, answer, other_group
        # An empty text shows which special tokens the tokenizer puts around any text.
        around = tokenizer("")["input_ids"]
        begins = bool(around) and around[0] == tokenizer.bos_token_id
        self._prefix = around[:1] if begins else []
        self._titles: dict[int, str] = {}
        letter_token_ids(tokenizer, letters)  # refuses an unfit tokenizer now, not in mid-run

    def __len__(self) -> int:
        return -(-len(self.cases) // self.batch_size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = index * self.batch_size
        rows = [self._row(case) for case in self.cases[start : start + self.batch_size]]
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        width = max(len(ids) for ids, _, _ in rows)

        def padded(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[fill] * (width - len(v)) + v for v in values], device="cpu")

        ids, labels, groups = (list(column) for column in zip(*rows, strict=True))
        batch = {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "token_groups": padded(groups, -1),
        }
        if self.answer:
            batch["labels"] = padded(labels, -100)
        return batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[i] for i in range(len(self)))

    def _row(self, case: PromptCase) -> tuple[list[int], list[int], list[int]]:
        prompt = build_prompt(
            [self._title(item) for item in case.history],
            [self._title(item) for item in case.candidates],
            self.letters,
        )
        # Without the answer the text is tokenised with it all the same and cut, so that the model
        # is asked on exactly the tokens that it was trained on.
        ids, offsets = _tokenise(self.tokenizer, prompt.text, self.letters[case.target])
        groups = [self.other_group] * len(ids)
        at = 0
        for (start, end), forgotten in zip(prompt.history, case.history_forget, strict=True):
            while offsets[at][1] <= start:
                at += 1
            while offsets[at][0] < end:
                if offsets[at][1] > offsets[at][0]:
                    groups[at] = 0 if forgotten else 1
                at += 1
        labels = [-100] * (len(ids) - 1) + ids[-1:]
        if self.answer:
            ids, labels = (
                [*ids, self.tokenizer.eos_token_id],
                [*labels, self.tokenizer.eos_token_id],
            )
            groups = groups[:-1] + [0 if case.forget else 1] * 2
        else:
            ids, labels, groups = ids[:-1], labels[:-1], groups[:-1]
        room = self.max_tokens - len(self._prefix)
        prefix = self._prefix
        return (
            prefix + ids[-room:],
            [-100] * len(prefix) + labels[-room:],
            [self.other_group] * len(prefix) + groups[-room:],
        )

    def _title(self, item: int) -> str:
        if item not in self._titles:
            title = " ".join(self.log.titles[item].split())
            spans = self.tokenizer(title, add_special_tokens=False, return_offsets_mapping=True)
            offsets = spans["offset_mapping"]
            if len(offsets) > self.title_tokens:
                title = title[: offsets[self.title_tokens - 1][1]].rstrip()
            self._titles[item] = title
        return self._titles[item]


def prompt_batches(
    tokenizer: PreTrainedTokenizerBase,
    log: InteractionLog,
    cases: Sequence[PromptCase],
    *,
    batch_size: int = 16,
    max_tokens: int = 1536,
    title_tokens: int = 32,
    letters: str = LETTERS,
    answer: bool = True,
    other_group: int = -1,
) -> PromptBatches:
    """Cases as batches for a causal LM: a sequence of dicts of int64 tensors `[B, T]`.

    `input_ids` and `attention_mask`, padded and truncated on the left (a BOS that the tokenizer
    puts in front stays); `labels`: -100 except at the letter and the EOS behind it; `token_groups`:
    0 at title tokens of forgotten history interactions, 1 at those of other history interactions,
    the target interaction's group (0 or 1) at letter and EOS, `other_group` at everything else
    (instructions, numbers, candidates), -1 at padding. A token that covers the end of a title and
    what follows it belongs to the title. With `answer=False` the prompt ends before
    the letter and there are no labels: for ranking.

    Titles are those of `log`, cut after `title_tokens` tokens. `tokenizer` must be a fast one (for
    its character offsets) with an EOS. UcanError otherwise, or when a letter is not one token.
    """
    return PromptBatches(
        tokenizer,
        log,
        cases,
        batch_size=batch_size,
        max_tokens=max_tokens,
        title_tokens=title_tokens,
        letters=letters,
        answer=answer,
        other_group=other_group,
    )


def prompt_ranks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    log: InteractionLog,
    cases: Sequence[PromptCase],
    *,
    batch_size: int = 16,
    max_tokens: int = 1536,
    title_tokens: int = 32,
    letters: str = LETTERS,
) -> torch.Tensor:
    """Rank of each case's target among its own candidates: int64 `[cases]` on the CPU, from 1.

    Runs in eval mode without gradients; the model's mode is as before afterwards.
    """
    batches = prompt_batches(
        tokenizer,
        log,
        cases,
        batch_size=batch_size,
        max_tokens=max_tokens,
        title_tokens=title_tokens,
        letters=letters,
        answer=False,
    )
    verbalizer = Verbalizer(model, letter_token_ids(tokenizer, letters))
    ranks = []
    device = module_device(model)
    with eval_mode(model), torch.no_grad():
        for index, batch in enumerate(batches):
            part = cases[index * batch_size : (index + 1) * batch_size]
            scores = verbalizer({name: value.to(device) for name, value in batch.items()})
            # Letters beyond a case's own candidates stand for nothing.
            unused = torch.tensor(
                [[i >= len(case.candidates) for i in range(len(letters))] for case in part],
                device="cpu",
            )
            target = torch.tensor([case.target for case in part], device="cpu")
            ranks.append(target_ranks(scores.cpu(), target, unused))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64, device="cpu")


def _listed(
    text: str, marks: Sequence[str], titles: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    spans = []
    for index, title in enumerate(titles):
        text += f"{_BETWEEN if index else ''}({marks[index]}) "
        spans.append((len(text), len(text) + len(title)))
        text += title
    return text, spans


def _case(
    log: InteractionLog,
    seen: slice,
    forget: np.ndarray,
    candidates: np.ndarray,
    target: int,
    forget_target: bool,
) -> PromptCase:
    return PromptCase(
        user=int(log.user[seen.start]),
        history=tuple(log.item[seen].tolist()),
        candidates=tuple(candidates.tolist()),
        target=target,
        history_forget=tuple(forget[seen].tolist()),
        forget=forget_target,
    )


def _mask_or_none(mask: np.ndarray | None, log: InteractionLog, name: str) -> np.ndarray:
    return np.zeros(len(log), dtype=bool) if mask is None else _row_mask(mask, log, name)


def _needs_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UcanError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so it cannot say which "
            "characters a token covers; load it with use_fast=True."
        )


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, letter: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and character spans of `text + letter`; the last token is the letter."""
    encoded = tokenizer(
        text + letter, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if not ids or tuple(offsets[-1]) != (len(text), len(text) + len(letter)):
        raise UcanError(
            f"The tokenizer {type(tokenizer).__name__} does not give the letter {letter!r} a token "
            "of its own after a newline; choose other letters (letters=)."
        )
    return ids, offsets
