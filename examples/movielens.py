"""Three deletion requests on MovieLens ml-100k, from the data to a table of what was forgotten.

A small Llama is pre-trained as a next-item recommender on two thirds of the users, then fine-tuned
with LoRA on the others until it has plainly memorised their histories (trained once, then cached).
The provider of the adapter is asked to delete, each time from the same adapter:

1. all interactions with films of one genre,
2. a random quarter of the fine-tuned users,
3. one single user.

Each request is answered by `ucan_fast.unlearn`: forward passes over the data to be deleted, and
attenuated adapter weights. Run with `--help` for the options.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Idle threads that spin for work make this tens of times slower where the cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import ucan_fast as uf
from ucan_fast import recsys
from ucan_fast.files import atomic_directory, atomic_write
from ucan_fast.metrics import drop, ranking_metrics

BUILD = Path(__file__).resolve().parents[1] / "build"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NEGLIGIBLE = 0.01  # a smaller share of neurons counts as next to nothing
ROWS = {  # states of the report, as the table calls them
    "before": "before",
    "U-CAN": "U-CAN",
    "uniform": "uniform shrink (control)",
    "random": "random neurons (control)",
}
CURVE_STRENGTHS = (1.0, 2.0, 4.0, 8.0, 32.0)
CURVE_SCALES = (0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Recipe:
    """How the recommender is trained; part of the cache's key."""

    seed: int = 0
    users: int | None = None  # None: all
    pretrain_share: float = 2 / 3
    layers: int = 4
    hidden: int = 128
    intermediate: int = 384
    heads: int = 4
    max_length: int = 100
    batch_size: int = 16
    pretrain_epochs: int = 12
    pretrain_lr: float = 2e-3
    lora_rank: int = 16
    lora_alpha: int = 32
    finetune_epochs: int = 36
    finetune_lr: float = 2e-3
    lora_b_lr_ratio: float = 8.0  # LoRA+ (arXiv 2402.12354): B learns faster than A


FAST = Recipe(
    users=90,
    layers=2,
    hidden=32,
    intermediate=64,
    heads=2,
    max_length=30,
    pretrain_epochs=4,
    finetune_epochs=25,
    finetune_lr=8e-3,
)


@dataclass
class Data:
    """Histories without and with only each user's last item, and who is in the fine-tuning set."""

    train: recsys.InteractionLog
    test: recsys.InteractionLog
    base_users: np.ndarray
    tuned_users: np.ndarray
    vocabulary: recsys.ItemVocabulary

    def batches(self, recipe: Recipe, users: np.ndarray, **options) -> list[dict]:
        """Sequences of these users, shortest first."""
        return recsys.sequence_batches(
            self.train,
            vocabulary=self.vocabulary,
            users=users,
            batch_size=recipe.batch_size,
            max_length=recipe.max_length,
            sort_by_length=True,
            **options,
        )


@dataclass
class Request:
    """One deletion request: which rows of the fine-tuning data are to be forgotten."""

    name: str
    title: str
    forget_train: np.ndarray
    forget_test: np.ndarray


# ------------------------------------------------------------------------------ data and model


def load_data(recipe: Recipe, path: Path | None, cache: Path) -> Data:
    log = recsys.k_core(recsys.deduplicate(recsys.load_movielens_100k(path, cache_dir=cache)), 5)
    # What the model never sees need not be deleted: keep the last films of every user only.
    from_end = np.cumsum(np.bincount(log.user))[log.user] - np.arange(len(log))
    log = log.rows(from_end <= recipe.max_length + 1)
    parts = recsys.leave_one_out(log)
    users = np.random.default_rng(recipe.seed).permutation(log.n_users)[: recipe.users]
    split = round(recipe.pretrain_share * len(users))
    base, tuned = np.sort(users[:split]), np.sort(users[split:])
    # Only the last item of a user is held out: the demo tunes nothing on validation items.
    train = parts.train.join(parts.validation)
    return Data(train, parts.test, base, tuned, recsys.ItemVocabulary(log.n_items))


def train_or_load(recipe: Recipe, data: Data, cache: Path) -> tuple[PeftModel, Path]:
    """The fine-tuned recommender, and the cache folder that holds it (`base/`, `adapter/`)."""
    folder = cache / f"recommender-{cache_key(recipe, data)}"
    if folder.is_dir():
        print(f"recommender: taken from {folder}")
    else:
        with atomic_directory(folder, overwrite=True) as temporary:
            train(recipe, data, temporary, folder)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / "adapter").eval(), folder


def cache_key(recipe: Recipe, data: Data) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode())
    digest.update(f"{torch.__version__} {transformers.__version__} {peft.__version__}".encode())
    for log in (data.train, data.test):
        for column in (log.user, log.item, log.time):
            digest.update(column.tobytes())
    return digest.hexdigest()[:16]


def train(recipe: Recipe, data: Data, folder: Path, final: Path) -> None:
    """Pre-train the base, fine-tune the adapter, write both to `folder` (to become `final`)."""
    torch.manual_seed(recipe.seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=data.vocabulary.size,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=2 * recipe.max_length,
            pad_token_id=data.vocabulary.pad,
            bos_token_id=data.vocabulary.bos,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    groups = [{"params": list(base.parameters()), "lr": recipe.pretrain_lr, "weight_decay": 0.05}]
    batches = data.batches(recipe, data.base_users)
    fit(base, groups, batches, recipe.pretrain_epochs, recipe.seed, "pre-train base")
    base.save_pretrained(folder / "base")

    base.name_or_path = str(final / "base")  # goes into the adapter's configuration
    model = fine_tune(base, recipe, data.batches(recipe, data.tuned_users))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    atomic_write(folder / "recipe.json", json.dumps(dataclasses.asdict(recipe), indent=2).encode())


def fine_tune(base: LlamaForCausalLM, recipe: Recipe, batches: list[dict]) -> PeftModel:
    """The base with an adapter that has learned these sequences by heart."""
    model = get_peft_model(
        base,
        LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=list(PROJECTIONS)
        ),
    )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lr = recipe.finetune_lr
    groups = [
        {"params": [p for name, p in named if "lora_A" in name], "lr": lr},
        {"params": [p for name, p in named if "lora_B" in name], "lr": lr * recipe.lora_b_lr_ratio},
    ]
    fit(model, groups, batches, recipe.finetune_epochs, recipe.seed, "fine-tune LoRA")
    return model


def fit(
    model: torch.nn.Module,
    groups: list[dict],
    batches: list[dict],
    epochs: int,
    seed: int,
    text: str,
) -> None:
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in groups],
        total_steps=epochs * len(batches),
        pct_start=0.1,
        div_factor=10,
        final_div_factor=10,
        cycle_momentum=False,
    )
    parameters = [p for group in groups for p in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    model.train()
    bar = tqdm(total=epochs * len(batches), desc=text, unit="step")
    for _ in range(epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            batch = {k: v for k, v in batches[index].items() if k != "token_groups"}
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            bar.update()
    bar.close()
    model.eval()


# ---------------------------------------------------------------------------------- requests


def make_requests(data: Data, genre: str, seed: int) -> list[Request]:
    """The three requests; only fine-tuned users' rows count, the adapter saw no others."""
    generator = np.random.default_rng(seed)
    quarter = generator.choice(data.tuned_users, round(len(data.tuned_users) / 4), replace=False)
    one = generator.choice(data.tuned_users, 1)
    name = data.train.user_ids[one[0]]

    def of_users(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.isin(data.train.user, users), np.isin(data.test.user, users)

    by_genre = [
        recsys.forget_genre(log, genre) & np.isin(log.user, data.tuned_users)
        for log in (data.train, data.test)
    ]
    return [
        Request("genre", f"all {genre} films", *by_genre),
        Request("users", f"{len(quarter)} random users", *of_users(quarter)),
        Request("one-user", f"one user (id {name})", *of_users(one)),
    ]


class Measure:
    """Ranking metrics of both sides; after the first call also drops and trade-offs against it."""

    def __init__(self, recipe: Recipe, data: Data, request: Request) -> None:
        self.recipe, self.data, self.request = recipe, data, request
        self.before: dict[str, float] | None = None

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        now = recsys.evaluate_sequences(
            model,
            self.data.train,
            self.data.test,
            self.request.forget_train,
            self.request.forget_test,
            vocabulary=self.data.vocabulary,
            users=self.data.tuned_users,
            max_length=self.recipe.max_length,
        )
        if self.before is None:
            self.before = dict(now)
            return now
        derived = {f"trade_off/{k}": v for k, v in recsys.trade_offs(self.before, now).items()}
        for side in ("forget_train", "retain_train", "retain_test"):
            derived[f"{side}/drop"] = mean_drop(self.before, now, side)
        # A side that ranked nothing in its top 10 before has no relative drop.
        return now | {name: value for name, value in derived.items() if math.isfinite(value)}


def mean_drop(before: dict[str, float], after: dict[str, float], side: str) -> float:
    """Mean relative drop of Recall, MRR and NDCG at 10, in %: one side of the trade-off."""
    names = [f"{side}/{metric}@10" for metric in ("recall", "mrr", "ndcg")]
    return sum(drop(before[name], after[name]) for name in names) / len(names)


def answer(
    model: PeftModel,
    bank: uf.ActivationStats,
    config: uf.UcanConfig,
    recipe: Recipe,
    data: Data,
    request: Request,
) -> uf.UnlearnResult:
    """Unlearn one request in place."""
    forget = data.batches(
        recipe, data.tuned_users, forget=request.forget_train, only_forget_users=True
    )
    return uf.unlearn(
        model,
        forget=forget,
        bank=bank,
        calibration=calibration_batches(recipe, data, request),
        config=config,
        evaluate=Measure(recipe, data, request),
        progress=True,
    )


def calibration_batches(recipe: Recipe, data: Data, request: Request) -> list[dict]:
    """Retained interactions of up to 80 users: what the strength search may not damage."""
    kept = np.isin(data.train.user, data.tuned_users) & ~request.forget_train
    users = np.random.default_rng(recipe.seed).permutation(np.unique(data.train.user[kept]))[:80]
    return data.batches(recipe, users, forget=request.forget_train)


def write_sets(folder: Path, recipe: Recipe, data: Data, request: Request) -> None:
    """The same request for the command line: `forget.jsonl` and `retain.jsonl`."""
    batches = data.batches(recipe, data.tuned_users, forget=request.forget_train)
    for group, name in ((0, "forget.jsonl"), (1, "retain.jsonl")):
        lines = []
        for batch in batches:
            for tokens, mask, groups in zip(
                batch["input_ids"], batch["attention_mask"], batch["token_groups"], strict=True
            ):
                # A token of the other group stays as context, but belongs to the other file.
                groups = groups.where(groups == group, -1)[mask.bool()]
                if (groups == group).any():
                    entry = {"input_ids": tokens[mask.bool()].tolist()}
                    lines.append(json.dumps(entry | {"token_groups": groups.tolist()}) + "\n")
        atomic_write(folder / name, "".join(lines).encode())


# ------------------------------------------------------------------------------------- curves


def trade_off_curves(
    model: PeftModel, result: uf.UnlearnResult, recipe: Recipe, data: Data, request: Request
) -> dict[str, list[tuple[float, float]]]:
    """(retain drop %, forget drop %) of Recall@10 on training interactions, by strength.

    Where the default selects next to nothing, U-CAN's curve is that of min_score=0: what
    insisting would have brought.
    """
    retained = data.tuned_users
    if recipe.users is None:  # the shape of a curve does not need everybody
        forgetters = np.unique(data.train.user[request.forget_train])
        others = np.setdiff1d(data.tuned_users, forgetters)[:100]
        retained = np.union1d(forgetters, others)
    batches = data.batches(recipe, retained, forget=request.forget_train)

    # One pass scores both groups; its cases come in the order of the tokens.
    groups = torch.cat([b["token_groups"][b["token_groups"] >= 0] for b in batches])

    def recalls() -> tuple[float, float]:
        ranks = recsys.next_item_ranks(model, batches, group=None, vocabulary=data.vocabulary)
        forget, retain = (ranking_metrics(ranks[groups == g])["recall@10"] for g in (0, 1))
        return forget, retain

    plans = {}
    for site in ("input", "mlp"):
        config = result.plan.config.replace(site=site, strength=1.0)
        plan = quiet_plan(model, result, config)
        label = f"U-CAN, site {site}"
        if plan.attenuated < NEGLIGIBLE * plan.neurons:
            label += f", min_score=0\n(the default selects {plan.attenuated} of {plan.neurons:,})"
            plan = quiet_plan(model, result, config.replace(min_score=0.0))
        plans[label] = [plan.with_strength(beta) for beta in CURVE_STRENGTHS]
    first = next(iter(plans.values()))
    plans["random neurons (control)"] = [shuffled(plan, recipe.seed) for plan in first]
    edits = {label: [applied(p, model) for p in points] for label, points in plans.items()}
    edits["uniform shrink (control)"] = [rescale_adapter_scale(model, s) for s in CURVE_SCALES]

    forget_before, retain_before = recalls()
    curves = {}
    total = sum(map(len, edits.values()))
    with tqdm(total=total, desc="trade-off curves", leave=False) as bar:
        for label, states in edits.items():
            curves[label] = [(0.0, 0.0)]
            for state in states:
                with state:
                    forget, retain = recalls()
                curves[label].append((drop(retain_before, retain), drop(forget_before, forget)))
                bar.update()
    return curves


def quiet_plan(
    model: PeftModel, result: uf.UnlearnResult, config: uf.UcanConfig
) -> uf.AttenuationPlan:
    with warnings.catch_warnings():
        # That a plan selects nothing is said in the legend of the figure.
        warnings.simplefilter("ignore", uf.UcanWarning)
        return uf.make_plan(model, result.stats, config)


def shuffled(plan: uf.AttenuationPlan, seed: int) -> uf.AttenuationPlan:
    """The same factors on random neurons."""
    order = torch.randperm(plan.neurons, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(plan, flat_factors=plan.flat_factors[order])


@contextlib.contextmanager
def applied(plan: uf.AttenuationPlan, model: PeftModel) -> Iterator[None]:
    plan.apply(model)
    try:
        yield
    finally:
        plan.undo(model)


STYLES = {  # by the beginning of the label; colours that also differ in lightness
    "U-CAN, site input": {"color": "#0b3c8c", "marker": "D"},
    "U-CAN, site mlp": {"color": "#2e9bd6", "marker": "o"},
    "U-CAN as applied": {"color": "#e0a000", "marker": "*"},
    "random": {"color": "#b5b0a5", "marker": "^"},
    "uniform": {"color": "#c8501e", "marker": "s"},
}


def draw(
    path: Path, title: str, curves: dict[str, list[tuple[float, float]]], result: uf.UnlearnResult
) -> None:
    """One figure per request: forgetting against damage, and which neurons were attenuated."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    figure.suptitle(f"Deletion request: {title}", fontsize=13)
    draw_curves(left, curves, result.report)
    if result.plan.attenuated < NEGLIGIBLE * result.plan.neurons:
        draw_scores(right, result.plan)
    else:
        draw_factors(figure, right, result.plan)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def draw_curves(
    axes: plt.Axes, curves: dict[str, list[tuple[float, float]]], report: uf.DeletionReport
) -> None:
    for label, points in curves.items():
        style = next(style for start, style in STYLES.items() if label.startswith(start))
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.8, markersize=5, **style)
    x = [x for points in curves.values() for x, _ in points]
    y = [y for points in curves.values() for _, y in points]
    low, high = min(0, *x), min(max(x), max(y))
    axes.plot([low, high], [low, high], "--", color="0.6", linewidth=1, label="no difference")
    before, after = report.metrics["before"], report.metrics["U-CAN"]
    applied_at = [
        [drop(before[f"{side}_train/recall@10"], after[f"{side}_train/recall@10"])]
        for side in ("retain", "forget")
    ]
    style = STYLES["U-CAN as applied"] | {"linestyle": "", "markersize": 16, "zorder": 5}
    axes.plot(*applied_at, label="U-CAN as applied", markeredgecolor="black", **style)
    axes.set_xlabel("damage: drop of Recall@10 on retained interactions (%)")
    axes.set_ylabel("forgetting: drop of Recall@10 on deleted interactions (%)")
    axes.set_title("Forgetting against damage, as the strength grows", fontsize=11)
    axes.grid(color="0.92")
    axes.legend(fontsize=9, loc="upper left")


def draw_factors(figure: plt.Figure, axes: plt.Axes, plan: uf.AttenuationPlan) -> None:
    """Each layer's factors, smallest first, on an axis of 0 to 100 % of its neurons."""
    names = list(plan.factors)
    places = np.linspace(0, 1, 401)
    rows = [
        np.quantile(np.sort(plan.factors[name].numpy()), places, method="nearest") for name in names
    ]
    image = axes.imshow(
        rows, aspect="auto", cmap="inferno", vmin=0, vmax=1, extent=(0, 100, len(names) - 0.5, -0.5)
    )
    share = max(float((factors != 1).float().mean()) for factors in plan.factors.values())
    axes.set_xlim(0, min(100, 100 * share + 2))
    label_layers(axes, names)
    axes.set_xlabel("the layer's neurons, most attenuated first (%)")
    axes.set_title(
        f"{plan.attenuated:,} of {plan.neurons:,} neurons attenuated (site {plan.config.site})",
        fontsize=11,
    )
    figure.colorbar(image, ax=axes, label="factor γ (1 = untouched, 0 = removed)")


def draw_scores(axes: plt.Axes, plan: uf.AttenuationPlan) -> None:
    """(Next to) nothing was attenuated: every layer's largest score against what it takes."""
    names = list(plan.score)
    axes.barh(range(len(names)), [float(plan.score[name].max()) for name in names], color="#0b3c8c")
    axes.axvline(plan.threshold, color="#c8501e", linewidth=2, label="selected above this")
    axes.set_ylim(len(names) - 0.4, -2.6)  # room for the legend
    axes.legend(fontsize=9, loc="upper left")
    label_layers(axes, names)
    axes.set_xlabel("largest score S of the layer's neurons")
    axes.set_title(
        f"{plan.attenuated} of {plan.neurons:,} neurons attenuated: the scores are too small",
        fontsize=11,
    )


def label_layers(axes: plt.Axes, names: Sequence[str]) -> None:
    parts = [name.split(".") for name in names]
    labels = [f"block {p[p.index('layers') + 1]} {p[-1].removesuffix('_proj')}" for p in parts]
    axes.set_yticks(range(len(names)), labels, fontsize=8)


# ------------------------------------------------------------------------------------ summary


def table_rows(report: uf.DeletionReport) -> dict[str, dict[str, float | None]]:
    """The table's figures, straight from the report."""
    rows = {}
    for state, label in ROWS.items():
        metrics = report.metrics.get(state)
        if metrics is None:  # controls of a plan that changes nothing
            rows[label] = {}
            continue
        before = state == "before"
        rows[label] = {
            "recall forget": metrics.get("forget_train/recall@10"),
            "recall retain": metrics.get("retain_train/recall@10"),
            "forget drop": 0.0 if before else metrics.get("forget_train/drop"),
            "retain drop": 0.0 if before else metrics.get("retain_train/drop"),
            "strict": None if before else metrics.get("trade_off/strict_train"),
            "paper": None if before else metrics.get("trade_off/paper"),
            "KL": metrics.get("forget/kl"),
            "perplexity": metrics.get("forget/perplexity"),
            "seconds": edit_seconds(report) if state == "U-CAN" else None,
        }
    return rows


def edit_seconds(report: uf.DeletionReport) -> float:
    """Everything but measuring how well it went."""
    return sum(seconds for step, seconds in report.seconds.items() if step != "evaluate")


COLUMNS = {  # key: heading in two lines, digits
    "recall forget": ("Recall@10", "deleted", 3),
    "recall retain": ("Recall@10", "kept", 3),
    "forget drop": ("forget", "drop %", 1),
    "retain drop": ("retain", "drop %", 1),
    "strict": ("trade-off", "strict", 1),
    "paper": ("trade-off", "paper", 1),
    "KL": ("KL", "nats", 3),
    "perplexity": ("perplexity", "deleted", 1),
    "seconds": ("time", "s", 1),
}
LEGEND = """\
Recall@10: share of training interactions whose film is among the 10 best-ranked, deleted / kept.
forget / retain drop: mean relative loss of Recall, MRR and NDCG@10 on deleted / kept interactions.
trade-off: forget drop minus retain drop; higher is better. "strict" has both on training
interactions, "paper" has the retain drop on held-out ones: that rewards shrinking anything, and is
noisy here (one film per user).
KL, perplexity: on deleted interactions. Controls are set to the retain loss that U-CAN reached."""


def table(title: str, rows: dict[str, dict[str, float | None]]) -> str:
    lines = [title]
    for line in (0, 1):
        lines.append(f"{'':25}" + "".join(f"{heading[line]:>11}" for heading in COLUMNS.values()))
    for label, values in rows.items():
        cells = [number(values.get(key), digits) for key, (_, _, digits) in COLUMNS.items()]
        lines.append(f"{label:25}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def verdict(report: uf.DeletionReport, rows: dict[str, dict[str, float | None]]) -> str:
    """What happened, in words."""
    change = report.change
    attenuated = f"{change['attenuated']:,} of {change['neurons']:,} neurons"
    if change["attenuated"] < NEGLIGIBLE * change["neurons"]:
        return (
            f"Next to nothing was changed ({attenuated}). The largest score is "
            f"{change['largest_score']:.3f}, selection starts above {change['threshold']:.3f}:\n"
            "deleted and kept interactions excite almost the same neurons, activations hardly "
            "tell them\napart, and the data are NOT forgotten. Retrain, or use a gradient-based "
            "method."
        )
    strict = {label: rows[label].get("strict") for label in rows if label != ROWS["before"]}
    gain = strict.pop(ROWS["U-CAN"])
    known = {label: value for label, value in strict.items() if value is not None}
    if gain is None or not known:
        return f"No verdict: too few cases to compare U-CAN ({attenuated}) with its controls."
    best = max(known, key=known.get)
    difference, noise = gain - known[best], sampling_noise(report)
    if abs(difference) <= noise:
        word = "is not clearly different from"
    else:
        word = "beats" if difference > 0 else "loses to"
    return (
        f"U-CAN {word} its best control, {best.removesuffix(' (control)')}: strict trade-off "
        f"{gain:.1f} against {known[best]:.1f},\n"
        f"where differences up to {noise:.1f} may be chance. It attenuated {attenuated}, with "
        f"strength {change['strength']:.2f}."
    )


def sampling_noise(report: uf.DeletionReport) -> float:
    """Two standard errors of the deleted interactions' Recall@10, in % of it."""
    before = report.metrics["before"]
    recall, cases = before["forget_train/recall@10"], before["forget_train/cases"]
    return 200 * math.sqrt((1 - recall) / (recall * cases)) if recall else math.inf


def describe(data: Data, request: Request) -> str:
    rows = int(request.forget_train.sum())
    share = rows / np.isin(data.train.user, data.tuned_users).sum()
    users = len(np.unique(data.train.user[request.forget_train]))
    return (
        f"Delete {request.title}: {rows:,} interactions ({100 * share:.1f} % of the fine-tuning "
        f"data) of {users} user{'s' if users > 1 else ''}"
    )


# --------------------------------------------------------------------------------------- main


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with ml-100k, or a recbole wheel (default: an installed recbole, else it is "
        "downloaded once with pip into the cache)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("UCAN_FAST_CACHE") or BUILD / "demo-cache"),
        help="where data and trained models are kept (default: $UCAN_FAST_CACHE, else %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=BUILD / "demo", help="where results go (default: %(default)s)"
    )
    parser.add_argument("--genre", default="Horror", help="genre to delete (default: %(default)s)")
    parser.add_argument(
        "--site",
        default="input",
        choices=("input", "rank", "output", "mlp"),
        help="which neurons are attenuated (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="a tiny model on a few users: seconds, for tests only"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    # PEFT asks a question that transformers renamed; nothing a user of either could do.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    start = time.perf_counter()
    recipe = dataclasses.replace(FAST if options.fast else Recipe(), seed=options.seed)
    data = load_data(recipe, options.data, options.cache)
    requests = make_requests(data, options.genre, options.seed)
    model, folder = train_or_load(recipe, data, options.cache)
    print(f"recommender ready after {time.perf_counter() - start:.0f} s")
    origin = {name: p.detach().clone() for name, p in model.named_parameters()}
    print(f"{len(data.tuned_users)} fine-tuned users, {data.vocabulary.n_items:,} films")

    bank_batches = data.batches(recipe, data.tuned_users)
    bank_start = time.perf_counter()
    bank = uf.collect(model, bank_batches, progress=True)
    bank_seconds = time.perf_counter() - bank_start
    print(f"bank: statistics of all fine-tuning data, once, in {bank_seconds:.1f} s")

    config = uf.UcanConfig(site=options.site, seed=options.seed)
    summary, texts = {}, []
    for request in requests:
        place = options.out / request.name
        print(f"\n{describe(data, request)} ...")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", uf.UcanWarning)  # the verdict says it in words
            result = answer(model, bank, config, recipe, data, request)
        result.report.save(place)
        write_sets(place, recipe, data, request)
        model.save_pretrained(place / "adapter", save_embedding_layers=False)
        result.plan.undo(model)
        check_restored(model, origin)
        curves = trade_off_curves(model, result, recipe, data, request)
        check_restored(model, origin)
        draw(place / "trade-off.png", request.title, curves, result)

        rows = table_rows(result.report)
        said = verdict(result.report, rows)
        throughput = f"Statistics pass: {result.report.samples_per_second:.0f} sequences/s."
        body = "\n".join([table(describe(data, request), rows), said, throughput])
        texts.append(body.replace("\n", "\n  "))
        summary[request.name] = {"title": request.title, "rows": rows, "verdict": said}

    text = "\n\n".join([memorised(result.report), *texts, LEGEND])
    atomic_write(options.out / "summary.txt", text.encode())
    atomic_write(options.out / "summary.json", json.dumps(summary, indent=2).encode())
    print(f"\nmodel: {folder}\nreports, adapters and figures: {options.out}")
    print("the first request on the command line:\n" + command_line(folder, options.out))
    print(f"whole run: {time.perf_counter() - start:.0f} s\n\n{text}")


def memorised(report: uf.DeletionReport) -> str:
    before = report.metrics["before"]
    return (
        f"The adapter before any deletion: Recall@10 {before['retain_train/recall@10']:.3f} on the "
        "interactions it was fine-tuned on,\n"
        f"{before['retain_test/recall@10']:.3f} on the same users' held-out last films."
    )


def command_line(model: Path, out: Path) -> str:
    sets = out / "genre"
    options = {
        "--base": model / "base",
        "--adapter": model / "adapter",
        "--forget": sets / "forget.jsonl",
        "--retain": sets / "retain.jsonl",
        "--out": out / "by-cli",
    }
    words = [str(word) for option in options.items() for word in option]
    return "  ucan-fast unlearn " + shlex.join(words)


def check_restored(model: PeftModel, origin: dict[str, torch.Tensor]) -> None:
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, origin[name])]
    if changed:
        raise RuntimeError(f"{len(changed)} weights are not as trained, first {changed[0]}")


if __name__ == "__main__":
    try:
        main()
    except uf.UcanError as error:
        sys.exit(f"error: {error}")
