"""Does every backend select the same neurons? Asked on the demo's three requests.

    python -m benchmarks.check_plans                        reference against triton
    python -m benchmarks.check_plans --backends reference auto --device cuda

Without a GPU the Triton kernels run in Triton's interpreter: half an hour of one core and more. The
demo's recommender is trained first if it is not in the cache (see examples/movielens.py).

Prints one line per request and site, lists every neuron that one plan selects and the other does
not, and exits with 1 if one of them is further from the threshold than rounding can explain.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Decided when the kernels are decorated, so before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import movielens

import ucan_fast as uf
from ucan_fast import ops

#: A score may move by this much between fp32 kernels that add in another order.
ROUNDING = 1e-5


def main(arguments: list[str] | None = None) -> int:
    """Compare the plans; 0 if they select the same neurons up to ties within rounding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs=2, default=["reference", "triton"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sites", nargs="+", default=["input", "rank", "output", "mlp"])
    parser.add_argument("--fast", action="store_true", help="the demo's tiny model")
    demo = movielens.parse([])
    parser.add_argument("--cache", type=Path, default=demo.cache)
    parser.add_argument("--data", type=Path, default=None)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", uf.UcanWarning)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

    recipe = movielens.FAST if options.fast else movielens.Recipe()
    data = movielens.load_data(recipe, options.data, options.cache)
    requests = movielens.make_requests(data, demo.genre, demo.seed)
    model, _ = movielens.train_or_load(recipe, data, options.cache)
    model.to(options.device)
    print(uf.accelerate(model))
    everything = data.batches(recipe, data.tuned_users)

    plans: dict[str, dict[tuple[str, str], uf.AttenuationPlan]] = {}
    for backend in options.backends:
        start = time.perf_counter()
        with ops.use_backend(backend):
            bank = uf.collect(model, everything)
            for request in requests:
                forget = data.batches(
                    recipe, data.tuned_users, forget=request.forget_train, only_forget_users=True
                )
                stats = bank.with_forget(uf.collect(model, forget, group="forget"))
                for site in options.sites:
                    config = uf.UcanConfig(site=site, strength=2.0)
                    plan = uf.make_plan(model, stats, config)
                    plans.setdefault(backend, {})[request.title, site] = plan
        print(f"{backend}: {time.perf_counter() - start:.0f} s on {options.device}")

    one, other = (plans[backend] for backend in options.backends)
    print(f"{'request':<22}{'site':<8}{'selected':>9}{'differ':>8}{'of them not ties':>18}")
    unexplained = 0
    for (title, site), plan in one.items():
        differing, far = compare(plan, other[title, site])
        unexplained += far
        selected = int((plan.flat_factors < 1).sum())
        print(f"{title:<22}{site:<8}{selected:>9}{len(differing):>8}{far:>18}")
        for line in differing:
            print(f"    {line}")
    return int(unexplained > 0)


def compare(one: uf.AttenuationPlan, other: uf.AttenuationPlan) -> tuple[list[str], int]:
    """The neurons that only one plan selects, and how many of them are no ties."""
    lines, far = [], 0
    names = [
        f"{group[0]}[{j}]" for group, n in zip(one.groups, one.sizes, strict=True) for j in range(n)
    ]
    differ = (one.flat_factors < 1) != (other.flat_factors < 1)
    for index in differ.nonzero().flatten().tolist():
        gaps = [float(p.flat_score[index] - p.threshold) for p in (one, other)]
        tie = max(map(abs, gaps)) <= ROUNDING
        far += not tie
        lines.append(
            f"{'tie' if tie else 'NOT A TIE'}: {names[index]}, score minus threshold "
            f"{gaps[0]:+.2e} and {gaps[1]:+.2e}"
        )
    return lines, far


if __name__ == "__main__":
    sys.exit(main())
