"""One cell of the comparison on text prompts, with SmolLM2-135M; its results go to one JSON file.

    python -m benchmarks.quality.text_cell --data-set ml-100k --scenario genre --out FILE

Without ``--scenario`` the adapter is trained and kept for the cells that need it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import transformers

from ..measure import describe_environment
from ..model.models import cache_folder
from .cell import add_common, common_words, compare, measure, parse
from .recommender import DATA_SETS
from .text_case import PROFILES, SCENARIOS, load_log, make_case, make_request, text_recommender
from .text_model import RECIPES


def parser() -> argparse.ArgumentParser:
    """The command line of a cell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.text_cell", description=__doc__.split("\n")[0]
    )
    add_common(parser, DATA_SETS, SCENARIOS)
    parser.add_argument("--profile", choices=PROFILES, default="reduced", help="sizes")
    parser.add_argument("--recipe", choices=RECIPES, default="all", help="layers with LoRA")
    parser.add_argument("--quantise", choices=["nf4"], help="the base, through bitsandbytes")
    parser.add_argument("--genre", default="Thriller", help="of the genre scenario")
    parser.add_argument("--device", default="cpu")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or measure all methods."""
    start = time.perf_counter()
    environment = describe_environment()
    cache = cache_folder()
    folder = DATA_SETS[options.data_set].folder
    folder = options.data / folder if folder and options.data else None
    recommender = text_recommender(
        options.data_set,
        load_log(options.data_set, folder, cache),
        cache=cache,
        profile=PROFILES[options.profile],
        recipe=options.recipe,
        quantise=options.quantise,
        seed=options.seed,
        device=options.device,
    )
    if options.scenario is None:
        return None
    request = make_request(recommender, options.scenario, genre=options.genre, seed=options.seed)
    case = make_case(recommender, request, cache=cache, seed=options.seed)
    case.coarse = options.coarse
    found = compare(case, options.methods)
    return {
        "environment": environment,
        "command": shlex.join(["python", "-m", "benchmarks.quality.text_cell", *_words(options)]),
        "model": f"SmolLM2-135M, {options.recipe} projections"
        + (", NF4 base" if options.quantise else ""),
        "data_set": options.data_set,
        "scenario": options.scenario,
        "title": request.title,
        "coarse": options.coarse,
        "share": 1.0,
        "recipe": dataclasses.asdict(recommender.recipe),
        "never_seen_alike": True,
        "interactions": {
            "forget": int(request.forget_train.sum()),
            "users": len(set(recommender.data.log.user[recommender.data.train_rows].tolist())),
        },
        "total_seconds": time.perf_counter() - start,
        **found,
    }


def _words(options: argparse.Namespace) -> list[str]:
    words = [
        *common_words(options, "text"),
        "--profile",
        options.profile,
        "--recipe",
        options.recipe,
    ]
    words += ["--quantise", options.quantise] if options.quantise else []
    words += ["--genre", options.genre] if options.scenario == "genre" else []
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where data or base cannot be had."""
    options = parse(parser(), arguments)
    transformers.utils.logging.disable_progress_bar()
    return measure(options, run)


if __name__ == "__main__":
    sys.exit(main())
