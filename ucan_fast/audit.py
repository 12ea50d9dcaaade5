"""audit: is an unlearned adapter what its plan says, how far did it move, what can be inferred?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .adapter import fingerprint, remove_layers, resolve_adapter, tuner_layers, unwrap
from .batches import reusable
from .errors import UcanError
from .evaluation import Loss, forget_shift, group_loss
from .interrupts import finished
from .loading import load_beside
from .membership import ATTACKS, Auc, Decode, auc, privleak, sequence_scores
from .plans import load_plan
from .progress import Progress
from .recovery import PRECISIONS, Relearning, check_seed, relearn, rounded_losses
from .report import DISCLAIMER, REPORT, json_values
from .reversible import ReversiblePlan

#: Of an NLL: what differs by less of it counts as the same.
MARGIN = 0.01
_HARDLY_DEARER = "they cost the unlearned adapter no more than the original, or hardly more"

# The name in PEFT of every adapter but the original.
_NAMES = {"unlearned": "ucan_fast_audited", "retrained": "ucan_fast_retrained"}


@dataclass
class Audit:
    """Findings. States are ``original``, ``unlearned`` and, where one was given, ``retrained``.

    Only ``checks`` decide whether an audit passes: how much knowledge may be left is not for this
    package to say.

    Attributes:
        checks: what was checked -> (passed, in words).
        metrics: state -> metric -> value.
        fingerprints: of the adapters, by state.
        membership: state -> attack -> AUC, forget set against never-seen data.
        privleak: attack -> %, the unlearned adapter's AUC against the retrained one's.
        relearning: state -> what a few steps on a part of the forget set bring back of the rest
            (``original``: 0 steps).
        rounding: ``original`` and ``unlearned`` -> precision -> forget NLL (nats per token) with
            A and B rounded to it; ``unrounded``: as they are.
        notes: figure -> why it is missing, or what to know about it.
    """

    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    membership: dict[str, dict[str, Auc]] = field(default_factory=dict)
    privleak: dict[str, float] = field(default_factory=dict)
    relearning: dict[str, Relearning] = field(default_factory=dict)
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(passed for passed, _ in self.checks.values())

    def to_json(self) -> str:
        """Everything, as JSON."""
        values = {
            **dataclasses.asdict(self),
            "meanings": self.meanings,
            "passed": self.passed,
            "disclaimer": DISCLAIMER,
        }
        return json.dumps(json_values(values), indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [
            f"{'pass' if passed else 'FAIL'}  {name}: {text}"
            for name, (passed, text) in self.checks.items()
        ]
        lines.append(f"{'':<26}" + "".join(f"{state:>12}" for state in self.metrics))
        for name in self.metrics["original"]:
            values = [of_state[name] for of_state in self.metrics.values()]
            shown = [f"{'n/a' if v is None else f'{v:.4g}':>12}" for v in values]
            lines.append(f"{name:<26}" + "".join(shown))
        lines += [f"{name}: {text}" for name, text in self.meanings.items()]
        lines += [f"{name}: {text}" for name, text in self.notes.items()]
        return "\n".join([*lines, DISCLAIMER])

    @property
    def meanings(self) -> dict[str, str]:
        """Every figure of the attacks and of what comes back, with a sentence on what it means."""
        found = {}
        for state, attacks in self.membership.items():
            for name, area in attacks.items():
                found[f"membership/{state}/{name}"] = f"{area}: {area.meaning}"
        for name, value in self.privleak.items():
            areas = [self.membership[state][name] for state in ("unlearned", "retrained")]
            found[f"privleak/{name}"] = f"{value:+.1f} %: {_privleak_meaning(value, *areas)}"
        if "unlearned" in self.relearning:
            found["relearning"] = self._relearning_meaning()
        for precision in PRECISIONS if self.rounding else ():
            found[f"rounding/{precision}"] = self._rounding_meaning(precision)
        return found

    def _relearning_meaning(self) -> str:
        ours, known = self.relearning["unlearned"], self.relearning["original"].nll_before
        text = (
            f"{ours.steps} steps on {ours.trained} forget sequences: NLL of the other "
            f"{ours.others} {ours.nll_before:.4g} -> {ours.nll_after:.4g} nats (original "
            f"{known:.4g}); " + _returned(known, ours.nll_before, ours.nll_after)
        )
        if ours.auc_after is not None:
            text += f"; AUC of the loss {ours.auc_before} -> {ours.auc_after}"
        theirs = self.relearning.get("retrained")
        if theirs is None:
            return text + (
                ". Without a retrained adapter nothing tells remembering from learning anew"
            )
        return text + (
            f". The retrained adapter's: {theirs.nll_before:.4g} -> {theirs.nll_after:.4g}; "
            + _beside_retrained(ours, theirs)
        )

    def _rounding_meaning(self, precision: str) -> str:
        known, ours = self.rounding["original"], self.rounding["unlearned"]
        text = (
            f"forget NLL {ours['unrounded']:.4g} -> {ours[precision]:.4g} nats, the original's "
            f"{known['unrounded']:.4g} -> {known[precision]:.4g}; "
        )
        gap, left = (ours[p] - known[p] for p in ("unrounded", precision))
        if not (math.isfinite(gap) and math.isfinite(left)):
            return text + "not comparable"
        if gap <= MARGIN * known["unrounded"]:
            return text + f"{_HARDLY_DEARER}: there is next to nothing that rounding could undo"
        cost = known[precision] - known["unrounded"]
        if cost > gap / 2:
            return text + (
                f"rounding costs the original {cost:.4g} nats itself, unlearning {gap:.4g}: "
                "nothing tells what is left"
            )
        share = 100 * left / gap
        if share < 0.5:
            return text + "nothing is left of what lies between them: rounded, it is not unlearned"
        if share > 105:
            return text + "more lies between them than before"
        return text + f"{share:.0f} % is left of what lies between them"


def audit(
    model: nn.Module,
    unlearned: str | os.PathLike,
    *,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]] | None = None,
    plan: str | os.PathLike | None = None,
    holdout: Iterable[Mapping[str, Any]] | None = None,
    retrained: str | os.PathLike | None = None,
    relearn_steps: int = 10,
    seed: int = 0,
    decode: Decode | None = None,
    progress: Progress = None,
) -> Audit:
    """Compare an unlearned adapter with the original one that ``model`` carries.

    Checks that the two differ; with a plan also that it was made for the original, and that the
    original edited by it *is* the unlearned adapter, bit by bit. Then tries to get the forgotten
    back: by membership inference (:mod:`ucan_fast.membership`), by relearning and by rounding the
    adapter's weights (:mod:`ucan_fast.recovery`). What cannot be computed is said in ``notes``.

    A sample of the attacks is one sequence. With few of them the interval of an AUC is wide, and
    one user's deletion is one sequence, of which there is none. That an attack fails is no proof
    that none succeeds.

    Args:
        model: the base model with the original adapter. It is the same afterwards.
        unlearned: folder of the unlearned adapter.
        forget, retain: batches to measure the adapters on. ``forget`` is needed several times.
        plan: the plan file that came with it.
        holdout: data of the same kind as ``forget`` that no adapter ever saw, for membership
            inference; of batches with ``token_groups`` the tokens of group 0.
        retrained: folder of an adapter trained without the forget set, as the reference.
        relearn_steps: steps of training on a tenth of the forget sequences; 0: do not try.
        seed: which tenth.
        decode: text of token ids (``tokenizer.decode``), for the attack "zlib".

    Raises:
        UcanError: an adapter cannot be loaded, does not fit the model, or needs another base than
            the original (see :func:`ucan_fast.loading.load_beside`), the retrained one is the
            original, ``relearn_steps`` is no whole number of at least 0, or ``seed`` none of 64
            bits.
    """
    if not isinstance(relearn_steps, int) or isinstance(relearn_steps, bool) or relearn_steps < 0:
        raise UcanError(
            f"relearn_steps must be a whole number of at least 0, not {relearn_steps!r}."
        )
    check_seed(seed)
    model = unwrap(model)
    adapter = resolve_adapter(model, None)
    forget = reusable(forget, "forget")
    holdout = None if holdout is None else reusable(holdout, "holdout")
    findings = Audit()
    original = fingerprint(model, adapter)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_loaded(model, adapter, unlearned, _NAMES["unlearned"]))
        edited = fingerprint(model, _NAMES["unlearned"])
        findings.fingerprints = {"original": original, "unlearned": edited}
        findings.checks["adapters differ"] = (
            edited != original,
            "the unlearned adapter has other weights than the original"
            if edited != original
            else "the unlearned adapter IS the original",
        )
        if plan is not None:
            loaded = load_plan(plan)
            findings.checks["plan"] = _check_plan(model, adapter, loaded, edited)
        report = Path(unlearned) / REPORT
        if report.exists():
            findings.checks["report"] = _check_report(report, original, edited)
        states = {"original": adapter, "unlearned": _NAMES["unlearned"]}
        if retrained is not None:
            stack.enter_context(_loaded(model, adapter, retrained, _NAMES["retrained"]))
            states["retrained"] = _NAMES["retrained"]
            findings.fingerprints["retrained"] = fingerprint(model, _NAMES["retrained"])
            if findings.fingerprints["retrained"] == original:
                raise UcanError(
                    f"the retrained adapter {retrained} is the original one; as a reference give "
                    "an adapter that was trained without the forget set."
                )
        audited = _Audited(model, states, forget, progress)
        before = audited.measure(findings, retain)
        audited.infer_membership(findings, holdout, decode)
        audited.relearn(findings, holdout, relearn_steps, seed)
        audited.round(findings, before)
    return findings


@dataclass
class _Audited:
    """The model with all its adapters, the original active."""

    model: nn.Module
    states: dict[str, str]
    forget: Iterable[Mapping[str, Any]]
    progress: Progress

    @contextlib.contextmanager
    def active(self, state: str) -> Iterator[None]:
        try:
            self.model.set_adapter(self.states[state])
            yield
        finally:
            with finished():
                self.model.set_adapter(self.states["original"])

    def measure(
        self, findings: Audit, retain: Iterable[Mapping[str, Any]] | None
    ) -> dict[str, Loss]:
        """Fills ``metrics``; the forget loss of every state."""
        edits = {state: partial(self.active, state) for state in self.states if state != "original"}
        before, shifts = forget_shift(self.model, self.forget, edits, self.progress)
        metrics: dict[str, dict[str, float]] = {
            "original": {
                "forget/kl": 0.0,
                "forget/prediction_shift": 0.0,
                "forget/perplexity": before.perplexity,
            }
        }
        for state, shift in shifts.items():
            metrics[state] = {
                "forget/kl": shift.kl,
                "forget/prediction_shift": shift.prediction_shift,
                "forget/perplexity": shift.loss.perplexity,
            }
        if retain is not None:
            retain = reusable(retain, "retain")
            for state, values in metrics.items():
                with self.active(state):
                    loss = group_loss(self.model, retain, "retain", self.progress)
                values["retain/loss"] = loss.mean
        # nan means that nothing was scored.
        findings.metrics = {
            state: {name: None if value != value else value for name, value in values.items()}
            for state, values in metrics.items()
        }
        return {"original": before, **{state: shift.loss for state, shift in shifts.items()}}

    def infer_membership(
        self,
        findings: Audit,
        holdout: Iterable[Mapping[str, Any]] | None,
        decode: Decode | None,
    ) -> None:
        if holdout is None:
            findings.notes["membership"] = "not computed: no holdout set (data never seen)"
            return
        options = {"decode": decode, "progress": self.progress}
        for state in self.states:
            with self.active(state):
                members = sequence_scores(self.model, self.forget, **options)
                others = sequence_scores(self.model, holdout, **options)
            try:
                findings.membership[state] = {
                    name: auc(members.scores[name], others.scores[name]) for name in ATTACKS
                }
            except UcanError as error:
                findings.notes[f"membership/{state}"] = f"not computed: {error}"
        if decode is None:
            findings.notes["zlib"] = "no text at hand: token ids are compressed instead"
        if "retrained" not in self.states:
            findings.notes["privleak"] = "not computed: no retrained adapter"
        elif {"unlearned", "retrained"} <= set(findings.membership):
            ours, theirs = (findings.membership[state] for state in ("unlearned", "retrained"))
            findings.privleak = {
                name: privleak(ours[name].value, theirs[name].value) for name in ATTACKS
            }

    def relearn(
        self,
        findings: Audit,
        holdout: Iterable[Mapping[str, Any]] | None,
        steps: int,
        seed: int,
    ) -> None:
        if not steps:
            findings.notes["relearning"] = "not tried (0 steps)"
            return
        for state in self.states:
            try:
                with self.active(state):
                    findings.relearning[state] = relearn(
                        self.model,
                        self.forget,
                        holdout=holdout,
                        # Of the original only what it knows of the same sequences is wanted.
                        steps=0 if state == "original" else steps,
                        seed=seed,
                        progress=self.progress,
                    )
            except UcanError as error:
                findings.notes["relearning"] = f"not computed for {state}: {error}"
                return

    def round(self, findings: Audit, before: dict[str, Loss]) -> None:
        if not before["original"].tokens:
            findings.notes["rounding"] = "not computed: no position of the forget set is scored"
            return
        for state in ("original", "unlearned"):
            with self.active(state):
                rounded = rounded_losses(self.model, self.forget, progress=self.progress)
            losses = {"unrounded": before[state], **rounded}
            findings.rounding[state] = {name: loss.mean for name, loss in losses.items()}


def _returned(known: float, before: float, after: float) -> str:
    """How much of the rise from ``known`` to ``before`` is gone again at ``after``."""
    if not all(map(math.isfinite, (known, before, after))):
        return "not comparable"
    if after > before + MARGIN * before:
        return "the steps made them dearer, and so tell nothing of what is hidden: try fewer"
    if before - known <= MARGIN * known:
        return f"{_HARDLY_DEARER}: there is next to nothing that could come back"
    share = 100 * (before - after) / (before - known)
    if share >= 99.5:
        return "all of the rise is back"
    return f"{share:.0f} % of the rise is back" if share >= 0.5 else "nothing of the rise is back"


def _beside_retrained(ours: Relearning, theirs: Relearning) -> str:
    """What the same steps on both adapters say.

    By the levels, not by how far they fell: what was driven far beyond the retrained adapter's
    falls fast, and may still be known no better than there.
    """
    figures = (ours.nll_before, ours.nll_after, theirs.nll_before, theirs.nll_after)
    if not all(map(math.isfinite, figures)):
        return "not comparable"
    margin = MARGIN * theirs.nll_before
    if ours.nll_before < theirs.nll_before - margin:
        return (
            "before any step the unlearned one knows them better than the retrained one, so it has "
            "not forgotten them as retraining does"
        )
    if any(r.nll_after > r.nll_before + MARGIN * r.nll_before for r in (ours, theirs)):
        return "the steps did harm, and so tell nothing of what is hidden"
    if ours.nll_after > ours.nll_before - MARGIN * ours.nll_before:
        return "the steps hardly moved the unlearned one, and so tell nothing of what is hidden"
    if ours.nll_after < theirs.nll_after - margin:
        return (
            "after the same steps the unlearned one knows them better than the retrained one, a "
            "sign that knowledge was hidden, not removed"
        )
    return (
        "after the same steps the unlearned one knows them no better than the retrained one, which "
        "never knew them"
    )


def _privleak_meaning(value: float, ours: Auc, theirs: Auc) -> str:
    if ours.low <= theirs.high and theirs.low <= ours.high:
        return "no clear difference from the retrained adapter (the intervals overlap)"
    if value < 0:
        return "the forget set is more exposed than after retraining"
    return "the forget set is less exposed than after retraining (over-forgetting)"


@contextlib.contextmanager
def _loaded(model: nn.Module, adapter: str, folder: str | os.PathLike, name: str) -> Iterator[None]:
    """Another adapter beside the original; afterwards the model is as it was."""
    # PEFT changes these when it loads an adapter and when it switches to another.
    training = [module for module in model.modules() if module.training]
    layers = {n for n, _ in tuner_layers(model)}
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        load_beside(model, adapter, folder, name)
        yield
    finally:
        with finished():
            if name in model.peft_config:
                model.delete_adapter(name)
            # An adapter of further layers has wrapped those too.
            remove_layers(model, [n for n, _ in tuner_layers(model) if n not in layers])
            model.set_adapter(adapter)
            for parameter, wanted in gradients:
                parameter.requires_grad_(wanted)
            for module in training:
                module.training = True


def _check_plan(
    model: nn.Module, adapter: str, plan: ReversiblePlan, edited: str
) -> tuple[bool, str]:
    original = fingerprint(model, adapter)
    if plan.fingerprint != original:
        return False, (
            f"the plan was made for an adapter {plan.fingerprint[:12]}, the original is "
            f"{original[:12]}"
        )
    plan.apply(model, adapter)
    try:
        same = plan.applied_fingerprint == edited
    finally:
        plan.undo(model, adapter)
    if same:
        return True, "the original edited by the plan is the unlearned adapter, bit by bit"
    return False, "the original edited by the plan is another adapter than the unlearned one"


def _check_report(path: Path, original: str, edited: str) -> tuple[bool, str]:
    try:
        report = json.loads(path.read_text())
        stated = report["fingerprint_before"], report["fingerprint_after"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return False, f"{path.name} cannot be read: {error!r}"
    if stated == (original, edited):
        return True, "the deletion report names these two adapters"
    return False, "the deletion report names other adapters than these two"
