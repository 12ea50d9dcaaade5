"""Moments and ActivationStats: what was measured, and on which adapter."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .batches import FORGET, RETAIN, group_index
from .errors import UcanError
from .files import read_safetensors, write_safetensors

FORMAT = "ucan_fast.statistics"
FORMAT_VERSION = "1"

#: How far a forget sum may exceed the bank's by rounding (bf16 with other batching), relatively.
_ROUNDING = 1e-2
#: What a Moments counts, in its order, for messages.
_SUMS = ("tokens", "sum of |h|", "sum of h²")


@dataclass
class Moments:
    """Sums over the tokens of both groups, fp64 on the CPU; index 0 forget, 1 retain.

    Attributes:
        count: tokens, ``[2]``.
        abs_sum: Σ|h_j|, ``[2, n]``.
        sq_sum: Σ h_j², ``[2, n]``.
    """

    count: torch.Tensor
    abs_sum: torch.Tensor
    sq_sum: torch.Tensor

    @classmethod
    def zeros(cls, n: int) -> Moments:
        """No token seen yet, n neurons."""
        zeros = torch.zeros(2, n, dtype=torch.float64, device="cpu")
        return cls(zeros.new_zeros(2), zeros, zeros.clone())

    @property
    def n(self) -> int:
        """Number of neurons."""
        return self.abs_sum.shape[1]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """count, abs_sum, sq_sum."""
        return self.count, self.abs_sum, self.sq_sum

    @property
    def finite(self) -> bool:
        """Whether no sum is NaN or Inf."""
        # One number tells it: sums of finite magnitudes do not overflow fp64.
        return math.isfinite(float(self.count.sum() + self.abs_sum.sum() + self.sq_sum.sum()))

    def __add__(self, other: Moments) -> Moments:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Moments(*(mine + theirs for mine, theirs in pairs))

    def row(self, index: int) -> Moments:
        """One group's row of each, ``[1, ...]``."""
        return Moments(*(tensor[index : index + 1] for tensor in self.tensors()))

    def group(self, index: int) -> Moments:
        """The same, with the other group emptied."""
        only = torch.zeros(2, dtype=torch.float64, device="cpu")
        only[index] = 1
        return Moments(
            self.count * only, self.abs_sum * only.unsqueeze(1), self.sq_sum * only.unsqueeze(1)
        )


@dataclass
class ActivationStats:
    """Moments of every measured layer and site, additive over tokens and therefore subtractive.

    Attributes:
        layers: ``layers[name][site] -> Moments``, keyed by ``model.named_modules()`` names.
        fingerprint: of the adapter the statistics were taken on (the origin).
        context: of the other adapters that were active with it, "" where there were none: they
            change what its neurons see.
    """

    layers: dict[str, dict[str, Moments]] = field(default_factory=dict)
    fingerprint: str = ""
    context: str = ""

    def __repr__(self) -> str:
        return (
            f"ActivationStats({len(self.layers)} layers, sites {', '.join(self.sites) or 'none'}, "
            f"{self.tokens('forget')} forget and {self.tokens('retain')} retain tokens, "
            f"fingerprint {self.fingerprint[:12]})"
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that were measured."""
        first = next(iter(self.layers.values()), {})
        return tuple(first)

    def tokens(self, group: str) -> int:
        """Tokens of one group (``"forget"`` or ``"retain"``), the largest count of any layer."""
        index = FORGET if group == "forget" else RETAIN
        counts = [m.count for _, _, m in self._items()]
        return int(torch.stack(counts)[:, index].max()) if counts else 0

    def __add__(self, other: ActivationStats) -> ActivationStats:
        """Statistics of both token sets together.

        Raises:
            UcanError: the two describe different adapters, layers or sites.
        """
        self._check_same(other, "add")
        return self._combine(other, lambda mine, theirs: mine + theirs)

    def __sub__(self, other: ActivationStats) -> ActivationStats:
        """Statistics without the tokens of ``other``, group by group.

        Raises:
            UcanError: different adapters, or ``other`` holds tokens that are not in here.
        """
        self._check_same(other, "subtract")
        return self._combine(other, lambda mine, theirs: self._without(mine, theirs))

    def with_forget(self, forget: ActivationStats) -> ActivationStats:
        """A bank of *all* data, split: ``forget`` as measured, ``retain = bank - forget``.

        Exact when the forget tokens ran in the same context (the same sequences) as in the bank:
        to about 1e-16 where whole batches are forgotten or the model is fp64, to about 1e-7 where
        a batch mixes both groups (fp32 partial sums then cover other tokens).
        Tokens that ``forget`` counts as retain are in the bank already and are left out.

        Args:
            forget: ``collect(model, forget_batches, group="forget")`` on the bank's adapter; for
                a later request, the sum over all forget sets so far.

        Raises:
            UcanError: another adapter, an empty forget set, forget tokens inside the bank, or a
                forget set that is not contained in the bank.
        """
        self._check_same(forget, "subtract")
        if self.tokens("forget"):
            raise UcanError(
                "the bank must hold all data as retain tokens, but it already counts "
                f"{self.tokens('forget')} forget tokens; collect it with group='retain'."
            )
        if not forget.tokens("forget"):
            raise UcanError("the forget statistics hold no forget token; nothing to unlearn.")

        def split(bank: Moments, request: Moments) -> Moments:
            ours, gone = bank.row(RETAIN), request.row(FORGET)
            pairs = zip(gone.tensors(), self._without(ours, gone).tensors(), strict=True)
            return Moments(*(torch.cat(pair) for pair in pairs))

        return self._combine(forget, split)

    def select(self, sites: Iterable[str]) -> ActivationStats:
        """Only these sites.

        Raises:
            UcanError: one of them was not measured.
        """
        sites = tuple(sites)
        missing = [site for site in sites if site not in self.sites]
        if missing:
            raise UcanError(
                f"the statistics hold no {', '.join(map(repr, missing))} moments (they have "
                f"{', '.join(self.sites) or 'nothing'}); collect with sites including them."
            )
        layers = {
            name: {site: moments[site] for site in sites} for name, moments in self.layers.items()
        }
        return ActivationStats(layers, self.fingerprint, self.context)

    def only(self, group: str) -> ActivationStats:
        """One group alone, the other emptied."""
        index = group_index(group)
        layers = {
            name: {site: moments.group(index) for site, moments in sites.items()}
            for name, sites in self.layers.items()
        }
        return ActivationStats(layers, self.fingerprint, self.context)

    def all_reduce(self) -> ActivationStats:
        """The sum over all processes of ``torch.distributed`` (itself where there is none).

        Raises:
            UcanError: the processes hold different layers or adapters.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return self
        shape = (self.fingerprint, self.context, [(n, s, m.n) for n, s, m in self._items()])
        shapes = [None] * dist.get_world_size()
        dist.all_gather_object(shapes, shape)
        if any(s != shapes[0] for s in shapes):
            raise UcanError("all_reduce: the processes measured different layers or adapters.")
        flat = torch.cat([t.reshape(-1) for _, _, m in self._items() for t in m.tensors()])
        if dist.get_backend() == "nccl":
            flat = flat.cuda()
        dist.all_reduce(flat)
        flat = flat.cpu()
        total, start = ActivationStats({}, self.fingerprint, self.context), 0
        for name, site, moments in self._items():
            parts = []
            for tensor in moments.tensors():
                parts.append(flat[start : start + tensor.numel()].reshape(tensor.shape).clone())
                start += tensor.numel()
            total.layers.setdefault(name, {})[site] = Moments(*parts)
        return total

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            UcanError: it could not be written; what stood there before is untouched.
        """
        tensors, names = {}, []
        for index, (name, site, moments) in enumerate(self._items()):
            names.append([name, site])
            for key, tensor in zip(("count", "abs_sum", "sq_sum"), moments.tensors(), strict=True):
                tensors[f"{index}.{key}"] = tensor
        metadata = {
            "fingerprint": self.fingerprint,
            "context": self.context,
            "layers": json.dumps(names),
        }
        write_safetensors(path, FORMAT, FORMAT_VERSION, metadata, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ActivationStats:
        """Read what :meth:`save` wrote.

        Raises:
            UcanError: the file is missing, truncated, corrupt or of another kind.
        """
        metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
        stats = cls({}, metadata.get("fingerprint", ""), metadata.get("context", ""))
        try:
            for index, (name, site) in enumerate(json.loads(metadata["layers"])):
                parts = [tensors[f"{index}.{key}"] for key in ("count", "abs_sum", "sq_sum")]
                moments = Moments(*(part.to(torch.float64) for part in parts))
                n = moments.abs_sum.shape[-1]
                if [tuple(t.shape) for t in moments.tensors()] != [(2,), (2, n), (2, n)]:
                    raise ValueError(f"moments of {name} have wrong shapes")
                if not all(torch.isfinite(t).all() and (t >= 0).all() for t in moments.tensors()):
                    raise ValueError(f"moments of {name} are not finite and non-negative")
                stats.layers.setdefault(name, {})[site] = moments
        except (KeyError, ValueError, TypeError) as error:
            raise UcanError(f"{path} is damaged: {error}; collect it again.") from error
        return stats

    def check_finite(self) -> None:
        """Refuse NaN and Inf.

        Raises:
            UcanError: names every layer whose activations were not finite (at most five).
        """
        if not self.layers or self._joined().finite:
            return
        # The sum over all layers may overflow where no layer's does.
        bad = [f"{name} ({site})" for name, site, moments in self._items() if not moments.finite]
        if bad:
            more = f" and {len(bad) - 5} more" if bad[5:] else ""
            raise UcanError(
                f"NaN or Inf activations in {', '.join(bad[:5])}{more}; nothing was recorded. "
                "Check the model's weights and dtype (fp16 overflows beyond 65504)."
            )

    def _items(self) -> Iterable[tuple[str, str, Moments]]:
        for name, sites in self.layers.items():
            for site, moments in sites.items():
                yield name, site, moments

    def _check_same(self, other: ActivationStats, verb: str) -> None:
        if self.fingerprint != other.fingerprint:
            raise UcanError(
                f"cannot {verb} statistics of different adapters (fingerprints "
                f"{self.fingerprint[:12]} and {other.fingerprint[:12]}). Statistics belong to the "
                "adapter before any attenuation: undo the applied plan, then collect again."
            )
        if self.context != other.context:
            raise UcanError(
                f"cannot {verb} statistics taken with different other adapters active beside this "
                "one: its neurons saw other inputs. Activate the same adapters, in the state they "
                "had when the bank was taken."
            )
        mine = {(name, site): m.n for name, site, m in self._items()}
        theirs = {(name, site): m.n for name, site, m in other._items()}
        if set(mine) != set(theirs):
            name, site = sorted(set(mine) ^ set(theirs))[0]
            raise UcanError(
                f"cannot {verb} statistics of different layers or sites: {name} ({site}) is only "
                "in one of them. Collect both with the same sites."
            )
        for key, n in mine.items():
            if n != theirs[key]:
                raise UcanError(
                    f"cannot {verb}: {key[0]} has {n} neurons here, {theirs[key]} there."
                )

    def _joined(self, like: ActivationStats | None = None) -> Moments:
        """All layers side by side, in the order of ``like``: one count per column, and all neurons.

        Arithmetic on that is one operation for all layers, where a model has hundreds.
        """
        moments = [self.layers[name][site] for name, site, _ in (like or self)._items()]
        return Moments(
            torch.stack([m.count for m in moments], 1),
            torch.cat([m.abs_sum for m in moments], 1),
            torch.cat([m.sq_sum for m in moments], 1),
        )

    def _combine(
        self, other: ActivationStats, rule: Callable[[Moments, Moments], Moments]
    ) -> ActivationStats:
        result = ActivationStats({}, self.fingerprint, self.context)
        if not self.layers:
            return result
        combined = rule(self._joined(), other._joined(self))
        sizes = [m.n for _, _, m in self._items()]
        parts = zip(
            combined.count.unbind(1),
            combined.abs_sum.split(sizes, 1),
            combined.sq_sum.split(sizes, 1),
            strict=True,
        )
        for (name, site, _), tensors in zip(self._items(), parts, strict=True):
            result.layers.setdefault(name, {})[site] = Moments(*tensors)
        return result

    def _without(self, total: Moments, part: Moments) -> Moments:
        """``total - part``, both joined.

        Raises:
            UcanError: the part is no part; the first layer where it is not is named.
        """
        rests, bad = [], []
        sizes = torch.tensor([m.n for _, _, m in self._items()], device="cpu")
        for what, mine, theirs in zip(_SUMS, total.tensors(), part.tensors(), strict=True):
            rest = mine - theirs
            slack = 0.0 if what == _SUMS[0] else _ROUNDING
            short = rest < -slack * mine
            if short.any():
                ends = sizes.cumsum(0) if slack else torch.arange(1, len(sizes) + 1, device="cpu")
                first = short.any(0).nonzero()[0]
                bad.append((int(torch.searchsorted(ends, first, right=True)), what))
            rests.append(rest.clamp_min(0))
        if bad:
            index, what = min(bad, key=lambda entry: entry[0])
            name, site, _ = list(self._items())[index]
            raise UcanError(
                f"{name} ({site}): the forget set is not contained in the bank (its {what} exceeds "
                "the bank's). The bank must cover all data, the forget tokens included, run in the "
                "same sequences, and requests in a row must not overlap: a token deleted twice "
                "would be taken from it twice."
            )
        return Moments(*rests)
