"""Group ``deletion``: one deletion request, answered in five ways, and a plain pass beside them.

The peers are written as their authors' code has them (locuslab/open-unlearning for gradient
ascent and GradDiff), with plain torch and PEFT: AdamW on the adapter, the model's own loss. They
are given what makes them faster: no gradient clipping, no schedule, no evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel

import ucan_fast as uf

from .. import peers
from ..measure import Profile, Result, Skipped, case_name
from . import demo
from .models import Batch, Unavailable, attended_tokens, lora_layers
from .passes import (
    accelerate_all,
    exact_model,
    forward_options,
    logits_reference,
    plain_pass,
)
from .timing import Run, Whole, measure_whole

GROUP = "deletion"
BASELINE = "ucan_fast, both sets"
#: Less work than any answer, but a peer's: what ours is measured by in :func:`against_forward`.
FORWARD = "peft, plain forward, both sets"
#: One pass over the request's own tokens, which every answer but a lookup starts with.
FLOOR = "peft, plain forward, forget set"
CANDIDATES = (
    BASELINE,
    "ucan_fast, bank",
    "gradient ascent, 1 epoch",
    "GradDiff, 1 epoch",
    "retrain the adapter",
    FORWARD,
    FLOOR,
)
#: A fixed strength, so that nothing is searched; something is selected whatever the data are.
CONFIG = uf.UcanConfig(strength=2.0, min_score=0.0)
LEARNING_RATE = 1e-5
_BETAS, _EPS = (0.9, 0.999), 1e-8
#: Of 1 - γ, fp32 sums against fp64 ones: near the threshold both are differences of near values.
PLAN_TOLERANCE = 1e-4
#: Of an update by Adam in fp32 against fp64: where a gradient is all but 0, its sign is noise.
UPDATE_TOLERANCE = 1e-2
SEED = 0


@dataclass(frozen=True)
class Task:
    """One request.

    Attributes:
        forget: its sequences, every counted token in group 0.
        retain: all other sequences.
        paired: a retain batch for each forget batch, of as many sequences, for GradDiff.
        everything: all sequences, for the bank.
        epochs: of retraining.
        slice: the retain batches that retraining is timed on; default: one epoch of them.
    """

    forget: list[Batch]
    retain: list[Batch]
    paired: list[Batch]
    everything: list[Batch]
    epochs: int = 1
    slice: list[Batch] = field(default_factory=list)


def run(profile: Profile, device: torch.device) -> Iterator[tuple[list[Result], list[Skipped]]]:
    """One user and 1 % of the users, on the demo's model and data."""
    shapes = {
        request: {"model": demo.NAME, "blocks": 4, "rank": 16, "request": request}
        for request in ("one user", "1 % of users")
    }
    try:
        data = demo.load_demo()
    except Unavailable as reason:
        yield (
            [],
            [
                Skipped(GROUP, case_name(shape, "float32", "float32"), name, str(reason))
                for shape in shapes.values()
                for name in CANDIDATES
            ],
        )
        return
    model = data.model(device)
    for request, shape in shapes.items():
        users = data.data.tuned_users
        count = 1 if request == "one user" else max(1, round(len(users) / 100))
        task = demo_task(data, count, device, slices=2 if profile.name == "quick" else 0)
        shape |= {"forget_tokens": attended_tokens(task.forget), "users": len(users)}
        measured = measure_task(model, task, GROUP, shape, device, profile)
        yield [*measured, *against_forward(measured)], []


def against_forward(results: Sequence[Result]) -> list[Result]:
    """Our times once more, in the group ``..._forward``, as ratios to PEFT's plain pass.

    Where our own pass over both sets is the baseline, what makes all of ours slower leaves every
    ratio of ours as it was, and :mod:`benchmarks.compare` would not see it.
    """
    return [
        replace(
            result,
            group=f"{result.group}_forward",
            baseline=FORWARD,
            extra={key: value for key, value in result.extra.items() if key != "slope"},
        )
        for result in results
        if result.name == FORWARD or result.name.startswith("ucan_fast")
    ]


def demo_task(data: demo.Demo, users: int, device: torch.device, *, slices: int) -> Task:
    """The request of so many random users.

    Args:
        slices: batches that retraining is timed on, evenly taken from short to long; 0: all.
    """
    tuned = data.data.tuned_users
    generator = np.random.default_rng(SEED)
    chosen = np.sort(generator.choice(tuned, users, replace=False))
    others = np.setdiff1d(tuned, chosen)
    size = data.recipe.batch_size
    pairs = np.sort(generator.choice(others, users, replace=False))
    retain = data.of_users(others, device, forget=False)
    return Task(
        forget=data.of_users(chosen, device, forget=True),
        retain=retain,
        paired=data.of_users(pairs, device, forget=False, batch_size=min(users, size)),
        everything=data.everything(device),
        epochs=data.recipe.finetune_epochs,
        slice=evenly(retain, slices) if slices else [],
    )


def evenly(batches: Sequence[Batch], count: int) -> list[Batch]:
    """``count`` of them, the middle one of each of as many equal stretches."""
    step = len(batches) / count
    return [batches[int((i + 0.5) * step)] for i in range(count)]


def measure_task(
    model: PeftModel,
    task: Task,
    group: str,
    shape: dict[str, Any],
    device: torch.device,
    profile: Profile,
    names: Sequence[str] = CANDIDATES,
) -> list[Result]:
    """The named candidates, checked and interleaved.

    Raises:
        CheckFailed: a plan or an update is not what it should be.
    """
    chosen = [c for c in candidates(model, task) if c.name in names]
    return measure_whole(
        chosen,
        lambda _seed: (task,),
        group=group,
        shape=shape,
        dtype="float32",
        adapter_dtype="float32",
        baseline=BASELINE,
        reference=plan_reference(model),
        device=device,
        profile=profile,
    )


def candidates(model: PeftModel, task: Task) -> list[Whole]:
    """All ways to answer the request; each takes ``(task,)`` and leaves the model as it was."""
    forget, retain = attended_tokens(task.forget), attended_tokens(task.retain)
    ours = {"accelerated": True, "undone": "outside the timed part"}
    trained = {
        "optimizer": f"AdamW, lr {LEARNING_RATE:g}, no clipping, no schedule",
        "undone": "outside the timed part",
        "starts_from": "the adapter at hand: its values do not change the time",
    }
    steps = len(task.slice or task.retain)
    scale = task.epochs * len(task.retain) / steps
    retrained = {
        **trained,
        "timed_steps": steps,
        "all_steps": task.epochs * len(task.retain),
        "extrapolated": scale != 1,
        "extrapolation": f"time of {steps} of the {len(task.retain)} batches of an epoch, evenly "
        f"taken from short to long, times {scale:g} for {task.epochs} epochs",
    }
    bank: list[uf.ActivationStats] = []
    options = forward_options(model, task.forget[:1])
    logits = logits_reference(model, exact=True)
    return [
        Whole(
            BASELINE,
            _ours(model, lambda t: {"forget": t.forget, "retain": t.retain}),
            forget + retain,
            tolerance=PLAN_TOLERANCE,
            extra=ours,
        ),
        Whole(
            "ucan_fast, bank",
            _ours(model, lambda t: {"forget": t.forget, "bank": _bank(model, t, bank)}),
            forget,
            tolerance=PLAN_TOLERANCE,
            extra={**ours, "bank": "collected once, before"},
        ),
        Whole(
            "gradient ascent, 1 epoch",
            _training(model, ascent_steps),
            forget,
            reference=update_reference(model, ascent_steps),
            tolerance=UPDATE_TOLERANCE,
            extra=trained,
        ),
        Whole(
            "GradDiff, 1 epoch",
            _training(model, difference_steps),
            forget + attended_tokens(task.paired),
            reference=update_reference(model, difference_steps),
            tolerance=UPDATE_TOLERANCE,
            extra={**trained, "epoch": "over D_f, one retain sequence per forget sequence"},
        ),
        Whole(
            "retrain the adapter",
            _training(model, retraining_steps),
            task.epochs * retain,
            scale=scale,
            reference=update_reference(model, retraining_steps),
            tolerance=UPDATE_TOLERANCE,
            extra=retrained,
        ),
        Whole(
            FORWARD,
            lambda t: plain_pass(model, options)(_both(t)),
            forget + retain,
            reference=lambda t: logits(_both(t)),
            extra={"forward_options": options},
        ),
        Whole(
            FLOOR,
            lambda t: plain_pass(model, options)(t.forget),
            forget,
            reference=lambda t: logits(t.forget),
            extra={"forward_options": options},
        ),
    ]


def _both(task: Task) -> list[Batch]:
    return [*task.forget, *task.retain]


# ucan_fast


def _bank(model: PeftModel, task: Task, kept: list[uf.ActivationStats]) -> uf.ActivationStats:
    if not kept:
        kept.append(uf.collect(model, task.everything, sites=("input",)))
    return kept[0]


def _ours(model: PeftModel, sets: Callable[[Task], dict[str, Any]]) -> Callable[..., Run]:
    def bind(task: Task) -> Run:
        arguments = sets(task)
        applied: list[uf.AttenuationPlan] = []

        def run() -> uf.UnlearnResult:
            result = uf.unlearn(model, **arguments, config=CONFIG, evaluate=False)
            applied.append(result.plan)
            return result

        def undo() -> None:
            while applied:
                applied.pop().undo(model)
            uf.restore(model)

        def attenuation(result: uf.UnlearnResult) -> dict[str, torch.Tensor]:
            # 1 - γ: an error in what is attenuated shows, however little that is.
            return {name: 1 - factors for name, factors in result.plan.factors.items()}

        return Run(run, lambda: accelerate_all(model), undo, attenuation)

    return bind


def plan_reference(model: PeftModel) -> Callable[[Task], dict[str, torch.Tensor]]:
    """1 - γ of every layer's inputs, from an fp64 model, hooks, and a loop over the layers."""

    def reference(task: Task) -> dict[str, torch.Tensor]:
        right = exact_model(model, exact=True)
        layers = lora_layers(right)
        totals = [
            peers.new_totals(layer.in_features, layer.lora_A["default"].weight.device)
            for _, layer in layers
        ]
        counts = torch.zeros(2, dtype=torch.float64)
        groups: list[torch.Tensor] = []

        def hook(total: torch.Tensor) -> Callable[..., None]:
            def before_a(_module: torch.nn.Module, arguments: tuple) -> None:
                x = arguments[0]
                total.add_(peers.reference_moments(x.reshape(-1, x.shape[-1]), groups[0]))

            return before_a

        for (_, layer), total in zip(layers, totals, strict=True):
            layer.lora_A["default"].register_forward_pre_hook(hook(total))
        for batch in _both(task):
            here = torch.where(batch["attention_mask"].bool(), batch["token_groups"], -1)
            groups[:] = [here.reshape(-1)]
            counts += torch.stack([(here == g).sum() for g in (0, 1)]).cpu()
            with torch.no_grad():
                right(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    use_cache=False,
                )
        norms = [layer.lora_A["default"].weight.norm(dim=0).cpu() for _, layer in layers]
        sizes = [len(norm) for norm in norms]
        moments = torch.cat([total.cpu() for total in totals], dim=2)
        bounds = [0, *itertools.accumulate(sizes)]
        arguments = (moments, counts.expand(len(layers), 2), torch.cat(norms).detach(), bounds)
        strength = float(CONFIG.strength)
        scores = peers.scores_per_layer(*arguments, threshold=0.0, strength=strength)["score"]
        threshold = float(scores.quantile(1 - CONFIG.fraction))
        found = peers.scores_per_layer(*arguments, threshold=threshold, strength=strength)
        factors = found["γ"].split(sizes)
        return {name: 1 - f for (name, _), f in zip(layers, factors, strict=True)}

    return reference


# Gradient methods: a step is what its loss consists of, (weight of the NLL, batch)

Steps = list[list[tuple[float, Batch]]]


def ascent_steps(task: Task) -> Steps:
    """Gradient ascent: L = -NLL(D_f)."""
    return [[(-1.0, batch)] for batch in task.forget]


def difference_steps(task: Task) -> Steps:
    """GradDiff: L = -NLL(D_f) + NLL(D_r)."""
    pairs = zip(task.forget, itertools.cycle(task.paired), strict=False)
    return [[(-1.0, forget), (1.0, retain)] for forget, retain in pairs]


def retraining_steps(task: Task) -> Steps:
    """The ordinary loss on D_r, for the batches that are timed."""
    return [[(1.0, batch)] for batch in (task.slice or task.retain)]


def scored(batch: Batch) -> torch.Tensor:
    """Labels of the tokens that are in a group."""
    return batch["labels"].masked_fill(batch["token_groups"] < 0, -100)


def _training(model: PeftModel, steps: Callable[[Task], Steps]) -> Callable[..., Run]:
    def bind(task: Task) -> Run:
        wanted = [
            [
                (
                    weight,
                    {
                        "input_ids": batch["input_ids"],
                        "attention_mask": batch["attention_mask"],
                        "labels": scored(batch),
                    },
                )
                for weight, batch in step
            ]
            for step in steps(task)
        ]
        parameters = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]

        def run() -> None:
            optimizer = torch.optim.AdamW(
                parameters, lr=LEARNING_RATE, betas=_BETAS, eps=_EPS, weight_decay=0.0
            )
            model.train()
            for step in wanted:
                loss = sum(weight * model(**batch, use_cache=False).loss for weight, batch in step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        def update(_result: None) -> list[torch.Tensor]:
            return [
                (p.detach().double() - old.double()) / LEARNING_RATE
                for p, old in zip(parameters, before, strict=True)
            ]

        def undo() -> None:
            model.eval()
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)

        return Run(run, undo=undo, result=update)

    return bind


def update_reference(
    model: PeftModel, steps: Callable[[Task], Steps]
) -> Callable[[Task], list[torch.Tensor]]:
    """The change of every parameter in units of the learning rate: NLL and Adam written out."""

    def reference(task: Task) -> list[torch.Tensor]:
        right = exact_model(model, exact=True)
        parameters = [p for p in right.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        first = [torch.zeros_like(p) for p in before]
        second = [torch.zeros_like(p) for p in before]
        for number, step in enumerate(steps(task), 1):
            loss = sum(weight * nll(right, batch) for weight, batch in step)
            with torch.no_grad():
                for p, g, m, v in zip(
                    parameters, torch.autograd.grad(loss, parameters), first, second, strict=True
                ):
                    m.mul_(_BETAS[0]).add_((1 - _BETAS[0]) * g)
                    v.mul_(_BETAS[1]).add_((1 - _BETAS[1]) * g.square())
                    mean, square = m / (1 - _BETAS[0] ** number), v / (1 - _BETAS[1] ** number)
                    p.sub_(LEARNING_RATE * mean / (square.sqrt() + _EPS))
        return [
            (p.detach() - old) / LEARNING_RATE for p, old in zip(parameters, before, strict=True)
        ]

    return reference


def nll(model: PeftModel, batch: Batch) -> torch.Tensor:
    """Mean over the scored tokens of -log p(token | those before it)."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    targets = scored(batch)[:, 1:]
    counted = targets >= 0
    log_p = F.log_softmax(logits[:, :-1], -1)
    chosen = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -chosen[counted].mean()
