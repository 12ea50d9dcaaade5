"""SmolLM2-135M with LoRA on ranking prompts (LlamaRec's layout), as a case of the comparison.

What is deleted are training prompts: an interaction is forgotten as an answer. Prompts of other
interactions whose history names the item stay as they are.

    recommender = text_recommender("ml-100k", profile=REDUCED, recipe="all", cache=cache)
    case = make_case(recommender, make_request(recommender, "genre"))

Sizes are those of a :class:`Profile`: ``FULL`` is LlamaRec's (meant for a GPU), ``REDUCED`` fits
two CPU cores by fewer and shorter prompts and adapters in the last blocks only (text_model.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import ucan_fast as uf
from ucan_fast import recsys
from ucan_fast.batches import eval_mode
from ucan_fast.files import atomic_directory
from ucan_fast.metrics import ranking_metrics, target_ranks

from ..model.models import quantise_nf4, real_smollm2, smollm2_tokenizer
from .case import Batch, Case, as_before, lora_weights
from .text_model import RECIPES, new_adapter, on_frozen_trunk, trunk_of

SCENARIOS = ("interactions", "users", "one-percent", "one-user", "genre")
#: Which tokens of a prompt are in its group. Losses and gradients see the answer alone either way.
TOKENS = ("all", "answer")
KS = (1, 5, 10)
# The letter and EOS are the last two tokens of every row; the letter is predicted before them.
_ANSWER = 2


@dataclass(frozen=True)
class Profile:
    """Sizes.

    Attributes:
        name: as files and tables call it.
        users: that the adapter is trained on; None: all but the never trained.
        never_trained: users whose prompts are the ``holdout`` of a case.
        train_targets: of each user, the last interactions before the test ones that prompts are
            trained on; None: all but the first.
        test_targets: of each user, the last interactions; never trained on.
        history, candidates, title_tokens, max_tokens: see ``recsys.training_cases`` and
            ``recsys.prompt_batches``.
        blocks: adapters sit in this many last blocks, and the head has the answers only; None:
            all blocks, whole head.
        batch_size, epochs, lr, warmup: of AdamW without weight decay; ``warmup`` steps up, then
            linearly down to 0.
        lora_b_lr_ratio: B learns faster than A by this (LoRA+, arXiv 2402.12354).
        evaluated: at most this many prompts of a side are ranked; None: all.
    """

    name: str
    users: int | None
    never_trained: int
    train_targets: int | None
    test_targets: int
    history: int
    candidates: int
    title_tokens: int
    max_tokens: int
    blocks: int | None
    batch_size: int
    epochs: int
    lr: float
    warmup: int
    lora_b_lr_ratio: float = 1.0
    evaluated: int | None = None


#: LlamaRec's sizes and schedule (arXiv 2311.02089 and its code); it also stops early, we do not.
FULL = Profile(
    name="full",
    users=None,
    never_trained=40,
    train_targets=None,
    test_targets=2,
    history=20,
    candidates=20,
    title_tokens=32,
    max_tokens=1536,
    blocks=None,
    batch_size=16,
    epochs=1,
    lr=1e-4,
    warmup=100,
    evaluated=2000,
)
#: For two CPU cores.
REDUCED = Profile(
    name="reduced",
    users=24,
    never_trained=12,
    train_targets=8,
    test_targets=2,
    history=3,
    candidates=10,
    title_tokens=5,
    max_tokens=256,
    blocks=2,
    batch_size=8,
    epochs=16,
    lr=2e-3,
    warmup=24,
    lora_b_lr_ratio=4.0,
)
PROFILES = {profile.name: profile for profile in (FULL, REDUCED)}


@dataclass(frozen=True)
class Recipe:
    """How an adapter is made; with the prompts, all that its weights depend on.

    Attributes:
        projections: ``"q/v"``, as LlamaRec, or ``"all"``.
        quantise: ``"nf4"``: the base's linear layers through bitsandbytes; None: fp32.
    """

    profile: Profile
    projections: str = "q/v"
    quantise: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.projections not in RECIPES:
            raise uf.UcanError(
                f"recipe {self.projections!r} is unknown; known: {', '.join(RECIPES)}."
            )
        if self.quantise not in (None, "nf4"):
            raise uf.UcanError(f"quantise is 'nf4' or None, not {self.quantise!r}.")


@dataclass(frozen=True)
class Data:
    """Prompts of one data set.

    Attributes:
        log: where items and titles are from.
        train, test: prompts of the users that the adapter is trained on.
        holdout: prompts of users that it never saw.
        train_rows, test_rows: the interaction (row of the log) that each asks for.
    """

    log: recsys.InteractionLog
    train: list[recsys.PromptCase]
    test: list[recsys.PromptCase]
    holdout: list[recsys.PromptCase]
    train_rows: np.ndarray
    test_rows: np.ndarray


def load_log(name: str, folder: Path | None, cache: Path) -> recsys.InteractionLog:
    """A data set's interactions, the first of every pair, 5-core.

    Args:
        name: ``"ml-100k"``, ``"ml-latest-small"`` (what LlamaRec calls ML-100k) or ``"pantry"``.
        folder: its files; ml-100k is fetched into the cache where it is None.

    Raises:
        UcanError: the data cannot be had, or the name is unknown.
    """
    if name == "ml-100k":
        log = recsys.load_movielens_100k(folder, cache_dir=cache)
    elif name not in ("ml-latest-small", "pantry"):
        raise uf.UcanError(f"data set {name!r} is unknown: ml-100k, ml-latest-small or pantry.")
    elif folder is None:
        raise uf.UcanError(f"{name} is not shipped and not fetched: give the folder of its files.")
    elif name == "pantry":
        log = recsys.load_pantry(folder)
    else:
        # One rating of some copies is damaged.
        log = recsys.load_movielens_latest_small(folder, skip_bad_ratings=True)
    return recsys.k_core(recsys.deduplicate(log), 5)


def make_data(log: recsys.InteractionLog, profile: Profile, seed: int) -> Data:
    """Prompts with random candidates, drawn alike for all items as LlamaRec does.

    Raises:
        UcanError: too few users with enough interactions.
    """
    wanted = 2 if profile.train_targets is None else profile.train_targets + profile.history
    count = np.bincount(log.user, minlength=log.n_users)
    able = np.flatnonzero(count >= wanted + profile.test_targets)
    users = np.random.default_rng(seed).permutation(able)
    trained = len(users) - profile.never_trained if profile.users is None else profile.users
    if trained < 2 or len(users) < trained + profile.never_trained:
        raise uf.UcanError(
            f"{len(users)} users have at least {wanted + profile.test_targets} interactions; "
            f"profile {profile.name!r} needs {trained} and {profile.never_trained} never trained."
        )
    tuned, never = users[:trained], users[trained:][: profile.never_trained]

    def prompts(chosen: np.ndarray) -> tuple[list[recsys.PromptCase], np.ndarray]:
        cases = recsys.training_cases(
            log,
            users=np.sort(chosen),
            candidates=profile.candidates,
            history=profile.history,
            seed=seed,
        )
        first = np.cumsum(count) - count
        rows = np.flatnonzero(np.isin(log.user, chosen))
        return cases, rows[rows > first[log.user[rows]]]

    from_end = np.cumsum(count)[log.user] - 1 - np.arange(len(log))
    is_test = from_end < profile.test_targets
    is_train = ~is_test
    if profile.train_targets is not None:
        is_train &= from_end < profile.test_targets + profile.train_targets
    cases, rows = prompts(tuned)
    train, test = np.flatnonzero(is_train[rows]), np.flatnonzero(is_test[rows])
    others, other_rows = prompts(never)
    return Data(
        log,
        [cases[i] for i in train],
        [cases[i] for i in test],
        [others[i] for i in np.flatnonzero((is_train | is_test)[other_rows])],
        rows[train],
        rows[test],
    )


class Prompts(Sequence):
    """Batches of prompts with their answers, of similar length each; a prompt has one group.

    Attributes:
        order: the prompt (its place in ``cases``) of each row, over all batches.
    """

    def __init__(
        self,
        recommender: TextRecommender,
        cases: Sequence[recsys.PromptCase],
        group: int | Sequence[int],
        tokens: str = "all",
    ) -> None:
        if tokens not in TOKENS:
            raise uf.UcanError(f"tokens must be one of {', '.join(TOKENS)}, not {tokens!r}.")
        self.tokens, self.labels = tokens, recommender.labels
        self.cases = list(cases)
        groups = [group] * len(self.cases) if isinstance(group, int) else list(group)
        alone = recommender.tokenised(self.cases, 1)
        lengths = [batch["input_ids"].shape[1] for batch in alone]
        self.order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._groups = torch.tensor([groups[i] for i in self.order])
        self._batches = recommender.tokenised(
            [self.cases[i] for i in self.order], recommender.recipe.profile.batch_size
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch = self._batches[index]
        members = batch["attention_mask"].bool()
        if self.tokens == "answer":
            members &= batch["labels"] != -100
        start = index % len(self) * self._batches.batch_size
        group = self._groups[start : start + len(members)].unsqueeze(1)
        batch["token_groups"] = torch.where(members, group, -1)
        batch["labels"] = self.labels(batch["labels"])
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


@dataclass
class TextRecommender:
    """A base with an adapter, and its prompts.

    Attributes:
        name: data set and recipe.
        answers: tokens of the letters in order, then EOS.
        base: what identifies the base in caches.
        initial: the adapter's matrices before any training, by name.
    """

    name: str
    recipe: Recipe
    data: Data
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    answers: list[int]
    base: str
    initial: dict[str, torch.Tensor]

    @property
    def _cut(self) -> bool:
        return self.recipe.profile.blocks is not None

    @property
    def letters(self) -> list[int]:
        """Columns of the logits that stand for the candidates."""
        count = self.recipe.profile.candidates
        return list(range(count)) if self._cut else self.answers[:count]

    def tokenised(self, cases: Sequence[recsys.PromptCase], size: int) -> recsys.PromptBatches:
        """The prompts as ``recsys.prompt_batches`` makes them in this profile."""
        profile = self.recipe.profile
        return recsys.prompt_batches(
            self.tokenizer,
            self.data.log,
            cases,
            batch_size=size,
            max_tokens=profile.max_tokens,
            title_tokens=profile.title_tokens,
        )

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Labels for the model's head: places among the answers where the head has no others."""
        if not self._cut:
            return tokens
        answers = torch.tensor(self.answers)
        place = (tokens.unsqueeze(-1) == answers).to(torch.int64).argmax(-1)
        return torch.where(tokens == -100, tokens, place)

    def prompts(
        self,
        cases: Sequence[recsys.PromptCase],
        group: int | Sequence[int],
        tokens: str = "all",
    ) -> Prompts:
        """Batches of these prompts, all in one group or each in its own."""
        return Prompts(self, cases, group, tokens)

    def ranks(self, prompts: Prompts) -> torch.Tensor:
        """Rank of the right candidate among its prompt's own: int64 ``[cases]``, 1 is best."""
        ranks = torch.zeros(len(prompts.order), dtype=torch.int64)
        start = 0
        with eval_mode(self.model), torch.no_grad():
            for batch in prompts:
                logits, labels = _answer_logits(self.model, batch)
                scores = logits[:, 0, self.letters]
                letter = torch.tensor(self.letters, device=labels.device)
                target = (labels[:, :1] == letter).to(torch.int64).argmax(1)
                rows = prompts.order[start : start + len(scores)]
                ranks[rows] = target_ranks(scores.float(), target).cpu()
                start += len(scores)
        return ranks


def _answer_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[B, 2, V]`` that predict letter and EOS, and their labels ``[B, 2]``."""
    device = next(model.parameters()).device
    options = {} if trunk_of(model) is None else {"last_rows": _ANSWER + 1}
    logits = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        logits_to_keep=_ANSWER + 1,
        use_cache=False,
        **options,
    ).logits
    return logits[:, :-1], batch["labels"][:, -_ANSWER:].to(device)


# ---------------------------------------------------------------------------------- training


def text_recommender(
    name: str,
    log: recsys.InteractionLog,
    *,
    cache: Path,
    profile: Profile = REDUCED,
    recipe: str = "q/v",
    quantise: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    base: Callable[[], tuple[LlamaForCausalLM, PreTrainedTokenizerBase]] | None = None,
) -> TextRecommender:
    """SmolLM2 with an adapter trained on a log's prompts; from the cache where it is there.

    Args:
        name: of the data set, as files are called.
        log: all its interactions.
        cache: folder for the base, trained adapters and what the trunk makes of the prompts.
        recipe: ``"q/v"`` (LlamaRec's) or ``"all"`` projections.
        quantise: ``"nf4"``: base through bitsandbytes.
        base: another base and its tokenizer; the default is SmolLM2-135M-Instruct.

    Raises:
        Unavailable: the base cannot be had, or there is no bitsandbytes.
        UcanError: the log is too small for the profile.
    """
    chosen = Recipe(profile, recipe, quantise, seed)
    model, tokenizer = base() if base else (real_smollm2(cache), smollm2_tokenizer(cache))
    data = make_data(log, profile, seed)
    letters = recsys.letter_token_ids(tokenizer, recsys.LETTERS[: profile.candidates])
    answers = [*letters, tokenizer.eos_token_id]
    identity = _identity(model, chosen)
    if quantise:
        quantise_nf4(model, torch.device("cpu"))
    if profile.blocks is not None:
        model = on_frozen_trunk(model, profile.blocks, answers)
        trunk_of(model).load(_trunk_file(cache, identity))
    model = new_adapter(model.to(device), recipe, seed)
    initial = {key: weight.detach().clone() for key, weight in lora_weights(model).items()}
    made = TextRecommender(
        f"{name}-{profile.name}", chosen, data, tokenizer, model, answers, identity, initial
    )
    _remember(made, cache)
    _train_or_load(made, data.train, cache)
    return made


def _train_or_load(
    recommender: TextRecommender, cases: Sequence[recsys.PromptCase], cache: Path
) -> float:
    """The adapter trained on these prompts, out of the cache or into it; seconds of training."""
    model = recommender.model
    folder = cache / f"text-{_cache_key(recommender, cases)}"
    if not folder.is_dir():
        with atomic_directory(folder, overwrite=True) as temporary:
            start = time.perf_counter()
            with torch.no_grad():
                for name, weight in lora_weights(model).items():
                    weight.copy_(recommender.initial[name])
            found = dataclasses.asdict(recommender.recipe) | {"prompts": len(cases)}
            found |= {"losses": fit(recommender, cases), "seconds": time.perf_counter() - start}
            model.save_pretrained(temporary / "adapter", save_embedding_layers=False)
            (temporary / "training.json").write_text(json.dumps(found, indent=2))
    # The file's bits, also after training.
    set_peft_model_state_dict(model, load_peft_weights(str(folder / "adapter"), device="cpu"))
    model.eval()
    return json.loads((folder / "training.json").read_text())["seconds"]


def fit(recommender: TextRecommender, cases: Sequence[recsys.PromptCase]) -> list[float]:
    """Train the model's adapter in place; returns the mean loss of every epoch, in nats."""
    recipe, model = recommender.recipe, recommender.model
    profile = recipe.profile
    prompts = recommender.prompts(cases, 1)
    named = lora_weights(model)
    groups = [
        {"params": [p for n, p in named.items() if ".lora_A." in n], "lr": profile.lr},
        {
            "params": [p for n, p in named.items() if ".lora_B." in n],
            "lr": profile.lr * profile.lora_b_lr_ratio,
        },
    ]
    steps = profile.epochs * len(prompts)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def share(step: int) -> float:
        return min((step + 1) / max(profile.warmup, 1), (steps - step) / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses = []
    with torch.random.fork_rng(), tqdm(total=steps, unit="step", mininterval=10) as bar:
        torch.manual_seed(recipe.seed)  # dropout
        model.train()
        for epoch in range(profile.epochs):
            total = 0.0
            for index in torch.randperm(len(prompts), generator=generator).tolist():
                logits, labels = _answer_logits(model, prompts[index])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(named.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                total += loss.item()
                bar.update()
            losses.append(total / len(prompts))
            bar.set_description(f"epoch {epoch + 1}: {losses[-1]:.3f} nats", refresh=False)
    model.eval()
    return losses


def _remember(recommender: TextRecommender, cache: Path) -> None:
    """Run all prompts through the trunk, once for all recipes."""
    trunk = trunk_of(recommender.model)
    if trunk is None:
        return
    before = len(trunk.known)
    data = recommender.data
    for batch in tqdm(recommender.prompts([*data.train, *data.test, *data.holdout], 1), "trunk"):
        trunk(batch["input_ids"], batch["attention_mask"])
    if len(trunk.known) > before:
        trunk.save(_trunk_file(cache, recommender.base))


def _trunk_file(cache: Path, identity: str) -> Path:
    return cache / "text-trunks" / f"{identity}.safetensors"


def _identity(base: LlamaForCausalLM, recipe: Recipe) -> str:
    """Of base and trunk: weights (by their sums), cut, quantisation, versions."""
    digest = hashlib.sha256(f"{recipe.quantise} {recipe.profile.blocks}".encode())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    for name, weight in base.named_parameters():
        digest.update(
            f"{name} {tuple(weight.shape)} {float(weight.detach().double().sum())!r}".encode()
        )
    return digest.hexdigest()[:16]


def _cache_key(recommender: TextRecommender, cases: Sequence[recsys.PromptCase]) -> str:
    recipe = dataclasses.asdict(recommender.recipe)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    digest.update(f"{recommender.base} {peft.__version__}".encode())
    digest.update(json.dumps(recommender.data.log.titles).encode())
    digest.update(repr(list(cases)).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """What is to be deleted: bool over the training prompts, and its counterpart held out.

    ``items``: the items that it is about; None: any. Never-seen prompts are of the same kind where
    they ask for one of them.
    """

    scenario: str
    title: str
    forget_train: np.ndarray
    forget_test: np.ndarray
    items: frozenset[int] | None = None


def make_request(
    recommender: TextRecommender,
    scenario: str,
    *,
    genre: str | Callable[[recsys.InteractionLog], np.ndarray] = "Thriller",
    seed: int = 0,
) -> Request:
    """A scenario's request.

    Args:
        scenario: one of :data:`SCENARIOS`: 25 % of the training prompts, 25 % or 1 % of the users
            (at least one), one user, or the prompts that ask for an item of a genre.
        genre: as the data spells it; or, for data without genres, a function of the log that
            says which of its rows are meant.

    Raises:
        UcanError: an unknown scenario or genre, or a request for nothing or for everything.
    """
    data = recommender.data
    asked, tested = data.train_rows, data.test_rows
    nothing = np.zeros(len(tested), dtype=bool)
    random = np.random.default_rng(seed)
    users = np.unique(data.log.user[asked])
    if scenario == "interactions":
        train = np.zeros(len(asked), dtype=bool)
        train[random.choice(len(asked), max(1, round(0.25 * len(asked))), replace=False)] = True
        # Of single interactions nothing is held out: every test prompt is on the retain side.
        request = Request(scenario, "25 % of all interactions", train, nothing)
    elif scenario in ("users", "one-percent", "one-user"):
        share = {"users": 0.25, "one-percent": 0.01, "one-user": 0.0}[scenario]
        chosen = random.choice(users, max(1, round(share * len(users))), replace=False)
        title = f"{len(chosen)} of {len(users)} users"
        train, test = (np.isin(data.log.user[rows], chosen) for rows in (asked, tested))
        request = Request(scenario, title, train, test)
    elif scenario == "genre":
        named = isinstance(genre, str)
        mask = recsys.forget_genre(data.log, genre) if named else genre(data.log)
        title = f"items of genre {genre}" if named else "items of one kind"
        items = frozenset(data.log.item[mask].tolist())
        request = Request(scenario, title, mask[asked], mask[tested], items)
    else:
        raise uf.UcanError(f"scenario {scenario!r} is unknown; known: {', '.join(SCENARIOS)}.")
    count = int(request.forget_train.sum())
    if not 0 < count < len(asked):
        raise uf.UcanError(
            f"{request.title}: {count} of {len(asked)} training prompts; nothing to compare."
        )
    return request


# -------------------------------------------------------------------------------------- case


@dataclass(kw_only=True)
class TextCase(Case):
    """A case, and what it was made from."""

    recommender: TextRecommender
    request: Request
    sides: dict[str, list[int]] = field(default_factory=dict)


def make_case(
    recommender: TextRecommender,
    request: Request,
    *,
    cache: Path,
    tokens: str = "all",
    seed: int = 0,
) -> TextCase:
    """A request as a case: its prompts in groups, ranks and metrics.

    Retained prompts are split by user: one third of the users is ``calibration``, the others are
    ``retain`` in ``ranks()`` and ``retain_train`` in ``measure()``. ``case.retain`` has all
    training prompts, the deleted ones in group 0.

    Args:
        cache: where retrained adapters are kept.
        tokens: which tokens statistics are taken of: ``"all"`` of a prompt, as the paper, or
            ``"answer"``, letter and EOS alone. Labels are the answer in both, so losses and
            gradients are of the answer.
        seed: of the split, and of what is left out where a side has more prompts than the
            profile evaluates.

    Raises:
        UcanError: fewer than two users have retained prompts.
    """
    data, limit = recommender.data, recommender.recipe.profile.evaluated
    random = np.random.default_rng(seed)
    kept = np.flatnonzero(~request.forget_train)
    user = data.log.user[data.train_rows]
    users = random.permutation(np.unique(user[kept]))
    if len(users) < 2:
        raise uf.UcanError(f"{request.title}: one user at most is retained; two are needed.")
    tuned_on = np.isin(user[kept], users[: max(1, len(users) // 3)])

    def limited(places: np.ndarray) -> list[int]:
        if limit is not None and len(places) > limit:
            places = np.sort(random.choice(places, limit, replace=False))
        return places.tolist()

    sides = {
        "forget": limited(np.flatnonzero(request.forget_train)),
        "calibration": limited(kept[tuned_on]),
        "retain": limited(kept[~tuned_on]),
    }
    held_out = {
        "forget_test": limited(np.flatnonzero(request.forget_test)),
        "retain_test": limited(np.flatnonzero(~request.forget_test)),
    }

    def prompts(cases: Sequence, places: Iterable[int], group: int) -> Prompts:
        return recommender.prompts([cases[i] for i in places], group, tokens)

    ranked = {side: prompts(data.train, sides[side], 1) for side in sides}
    measured = {"forget_train": ranked["forget"], "retain_train": ranked["retain"]}
    measured |= {name: prompts(data.test, places, 1) for name, places in held_out.items()}
    measured["holdout"] = recommender.prompts(data.holdout, 0, tokens)
    alike = data.holdout
    if request.items is not None:
        alike = [case for case in alike if case.candidates[case.target] in request.items]

    def ranks() -> dict[str, torch.Tensor]:
        return {side: recommender.ranks(chosen) for side, chosen in ranked.items()}

    def measure() -> dict[str, float]:
        found = {}
        for side, chosen in measured.items():
            found[f"{side}/cases"] = float(len(chosen.cases))
            if chosen.cases:
                of_side = ranking_metrics(recommender.ranks(chosen), KS)
                found |= {f"{side}/{name}": value for name, value in of_side.items()}
        return found

    return TextCase(
        name=f"{recommender.name}-{recommender.recipe.seed}-{request.scenario}",
        model=recommender.model,
        forget=prompts(data.train, np.flatnonzero(request.forget_train), 0),
        retain=recommender.prompts(
            data.train, (~request.forget_train).astype(int).tolist(), tokens
        ),
        calibration=prompts(data.train, sides["calibration"], 1),
        holdout=recommender.prompts(alike, 0, tokens),
        ranks=ranks,
        measure=measure,
        retrain=lambda: retrain(recommender, request, cache),
        seed=recommender.recipe.seed,
        # Of few candidates: Recall@10 is 1 of ten, whatever a method does.
        metric=f"mrr@{KS[-1]}",
        recommender=recommender,
        request=request,
        sides=sides,
    )


def retrain(
    recommender: TextRecommender, request: Request, cache: Path
) -> tuple[dict[str, torch.Tensor], float]:
    """The adapter as the same recipe makes it without the deleted prompts.

    Returns:
        The matrices by the names of ``lora_weights``, and the seconds that training took. The
        recommender's model is used for it and is afterwards as it was, bit by bit. A second call
        takes both from the cache.
    """
    gone = request.forget_train
    kept = [prompt for prompt, out in zip(recommender.data.train, gone, strict=True) if not out]
    with as_before(recommender.model) as weights:
        seconds = _train_or_load(recommender, kept, cache)
        return {name: weight.detach().clone() for name, weight in weights.items()}, seconds
