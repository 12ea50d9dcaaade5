"""The command line: ``ucan-fast unlearn | collect | audit | doctor``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import UcanError, UcanWarning

DONE, REFUSED, USAGE = 0, 1, 2

ADAPTER_STATS = "ucan_statistics.safetensors"
ADAPTER_PLAN = "ucan_plan.safetensors"

_SETS = """\
Sets are JSON lines: {"text": ...}, or {"prompt": ..., "completion": ...}, or {"input_ids": [...]},
each with an optional "token_groups" (0 forget, 1 retain, -1 ignored, one per token).

Exit code: 0 done, 1 refused (nothing was written), 2 wrong usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 refused, 2 wrong usage.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UcanWarning)
        warnings.showwarning = _show_warning
        try:
            return arguments.run(arguments)
        except UcanError as error:
            print(f"ucan-fast {arguments.command}: refused: {error}", file=sys.stderr)
            return REFUSED


def _unlearn(arguments: argparse.Namespace) -> int:
    from .files import atomic_directory, check_output_folder
    from .stats import ActivationStats
    from .unlearn import unlearn

    check_output_folder(arguments.out, arguments.overwrite)
    if (arguments.retain is None) == (arguments.bank is None):
        return _usage("unlearn", "give exactly one of --retain and --bank")
    config = _config(arguments)
    bank = None if arguments.bank is None else ActivationStats.load(arguments.bank)
    previous = None
    if arguments.previous is not None:
        previous = ActivationStats.load(Path(arguments.previous) / ADAPTER_STATS)
    model, tokenizer = _load(arguments)
    result = unlearn(
        model,
        forget=_read(arguments, arguments.forget, model, tokenizer),
        retain=_read(arguments, arguments.retain, model, tokenizer),
        bank=bank,
        calibration=_read(arguments, arguments.calibration, model, tokenizer),
        config=config,
        evaluate=not arguments.no_evaluate,
        progress=_progress(arguments),
        previous=previous,
    )
    if not result.plan.attenuated:
        raise UcanError(f"the plan changes nothing, so nothing was written. {result.plan.note}")
    with atomic_directory(arguments.out, arguments.overwrite) as folder:
        model.save_pretrained(folder)
        result.stats.save(folder / ADAPTER_STATS)
        result.plan.save(folder / ADAPTER_PLAN, include_original=arguments.keep_original)
        result.report.save(folder)
    print(result.plan.summary())
    _print_metrics(result.report.metrics, result.report.notes)
    print(f"unlearned adapter and report: {arguments.out}")
    return DONE


def _collect(arguments: argparse.Namespace) -> int:
    from .collect import collect

    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise UcanError(f"{out} exists already; choose another file or pass --overwrite.")
    model, tokenizer = _load(arguments)
    stats = collect(
        model,
        _read(arguments, arguments.data, model, tokenizer),
        group=arguments.group,
        sites=arguments.sites,
        progress=_progress(arguments),
    )
    stats.save(out)
    print(
        f"{stats.tokens(arguments.group)} {arguments.group} tokens over "
        f"{len(stats.layers)} layers, sites {', '.join(stats.sites)}: {out}"
    )
    return DONE


def _audit(arguments: argparse.Namespace) -> int:
    from .audit import audit
    from .files import atomic_write

    if arguments.out is not None and Path(arguments.out).exists() and not arguments.overwrite:
        raise UcanError(f"{arguments.out} exists already; pass --overwrite to replace it.")
    unlearned = Path(arguments.unlearned)
    if not unlearned.is_dir():
        raise UcanError(f"{unlearned} is no folder with an unlearned adapter.")
    model, tokenizer = _load(arguments)
    plan = unlearned / ADAPTER_PLAN
    findings = audit(
        model,
        unlearned,
        forget=_read(arguments, arguments.forget, model, tokenizer),
        retain=_read(arguments, arguments.retain, model, tokenizer),
        plan=plan if plan.exists() else None,
        progress=_progress(arguments),
    )
    print(findings)
    if arguments.out is not None:
        atomic_write(arguments.out, (findings.to_json() + "\n").encode())
        print(f"written: {arguments.out}")
    return DONE if findings.passed else REFUSED


def _doctor(arguments: argparse.Namespace) -> int:
    from importlib import metadata

    import torch

    from . import native
    from .kernels import availability
    from .ops import backends_in_use
    from .ops.backend import requested_backend

    native.load()
    versions = {"ucan_fast": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "transformers", "peft", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    facts: dict[str, Any] = {
        "versions": versions,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device",
        "UCAN_FAST_BACKEND": requested_backend(),
        "operators": backends_in_use(),
        "native extension": native.status(),
        "triton kernels": availability(),
    }
    if arguments.json:
        print(json.dumps(facts, indent=2, default=str))
        return DONE
    for title, value in facts.items():
        if not isinstance(value, dict):
            print(f"{title}: {value}")
            continue
        print(f"{title}:")
        for key, text in value.items():
            print(f"  {key:<14} {text}")
    return DONE


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="ucan-fast",
        description="One-shot unlearning for LoRA adapters: forward passes, no training.",
        epilog=_SETS,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"ucan-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    unlearn = commands.add_parser(
        "unlearn",
        help="attenuate what an adapter knows of a forget set",
        description="Write an unlearned copy of a PEFT adapter, with a deletion report.",
        epilog=_SETS,
        formatter_class=formatter,
    )
    _model_arguments(unlearn)
    unlearn.add_argument("--forget", required=True, metavar="JSONL", help="the forget set D_f")
    unlearn.add_argument("--retain", metavar="JSONL", help="the retain set D_r")
    unlearn.add_argument(
        "--bank", metavar="FILE", help="statistics of all data, from 'collect'; replaces --retain"
    )
    unlearn.add_argument(
        "--calibration",
        metavar="JSONL",
        help="retain data for the strength search (default: a sample of --retain)",
    )
    unlearn.add_argument(
        "--previous",
        metavar="DIR",
        help="output of the last request: its forget set is included in this one. --adapter stays "
        "the original adapter",
    )
    unlearn.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    unlearn.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    unlearn.add_argument("--config", metavar="FILE", help="a UcanConfig as JSON")
    for name, kind in (
        ("site", str),
        ("contrast", str),
        ("decay", str),
        ("fraction", float),
        ("max-retain-loss-increase", float),
        ("seed", int),
    ):
        unlearn.add_argument(f"--{name}", type=kind, help=f"sets {name.replace('-', '_')}")
    unlearn.add_argument("--strength", type=_strength, help="a number, or 'auto' (default)")
    unlearn.add_argument("--no-evaluate", action="store_true", help="skip metrics and controls")
    unlearn.add_argument(
        "--keep-original",
        action="store_true",
        help="store the overwritten weights in the plan, so that undo works from the file. They "
        "hold what was to be forgotten",
    )
    unlearn.set_defaults(run=_unlearn)

    collect = commands.add_parser(
        "collect",
        help="measure activation statistics once, as a bank for later requests",
        description="Run all data through the adapter once and save the statistics.",
        epilog=_SETS,
        formatter_class=formatter,
    )
    _model_arguments(collect)
    collect.add_argument("--data", required=True, metavar="JSONL", help="the data set")
    collect.add_argument("--group", choices=("retain", "forget"), default="retain")
    collect.add_argument(
        "--sites", nargs="+", metavar="SITE", help="input rank output layer mlp (default: first 3)"
    )
    collect.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    collect.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    collect.set_defaults(run=_collect)

    audit = commands.add_parser(
        "audit",
        help="check an unlearned adapter against the original and its report",
        description="Compare an unlearned adapter with the original: is it exactly what its plan "
        "and report say, and how far did predictions move? (Membership-inference attacks are not "
        "part of it.)",
        epilog=_SETS,
        formatter_class=formatter,
    )
    _model_arguments(audit, "the ORIGINAL adapter")
    audit.add_argument("--unlearned", required=True, metavar="DIR", help="output of 'unlearn'")
    audit.add_argument("--forget", required=True, metavar="JSONL", help="the forget set D_f")
    audit.add_argument("--retain", metavar="JSONL", help="the retain set D_r")
    audit.add_argument("--out", metavar="FILE", help="write the findings as JSON")
    audit.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    audit.set_defaults(run=_audit)

    doctor = commands.add_parser("doctor", help="which backends work here, and why not the rest")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _model_arguments(parser: argparse.ArgumentParser, adapter: str = "a PEFT adapter") -> None:
    parser.add_argument("--base", required=True, help="base model: a folder or a hub name")
    parser.add_argument("--adapter", required=True, help=f"{adapter}: a folder or a hub name")
    parser.add_argument("--tokenizer", help="default: the base model's")
    parser.add_argument(
        "--dtype", default="auto", help="of the base: auto, float32, bfloat16 or float16"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there)")
    parser.add_argument("--batch-size", type=_positive, default=8)
    parser.add_argument("--max-length", type=_positive, default=1024, help="in tokens")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )
    from transformers.utils import logging

    from .accelerate import accelerate

    if not _progress(arguments):
        logging.disable_progress_bar()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if arguments.dtype != "auto" and arguments.dtype not in dtypes:
        raise UcanError(f"--dtype must be auto or one of {', '.join(dtypes)}.")
    try:
        config = AutoConfig.from_pretrained(arguments.base)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        base = kind.from_pretrained(
            arguments.base, dtype=dtypes.get(arguments.dtype, "auto"), device_map=None
        ).to(device)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UcanError(f"cannot load the base model {arguments.base}: {error}") from error
    try:
        model = PeftModel.from_pretrained(base, arguments.adapter)
        # Again, for what from_pretrained does not return: weights that the adapter lacks are
        # PEFT's fresh initialisation, and only warned of.
        missing = model.load_adapter(arguments.adapter, model.active_adapter).missing_keys
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UcanError(f"cannot load the adapter {arguments.adapter}: {error}") from error
    if missing:
        raise UcanError(
            f"cannot load the adapter {arguments.adapter}: it has no weights for {missing[0]}"
            + (f" and {len(missing) - 1} more." if missing[1:] else ".")
        )
    tokenizer = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or arguments.base)
    except Exception as error:
        # Any failure is fine as long as no line of the sets needs one (input_ids).
        if arguments.tokenizer:
            raise UcanError(f"cannot load the tokenizer {arguments.tokenizer}: {error}") from error
    model.eval()
    accelerate(model)
    return model, tokenizer


def _read(
    arguments: argparse.Namespace, path: str | None, model: Any, tokenizer: Any
) -> list | None:
    from .jsonl import read_jsonl

    if path is None:
        return None
    return read_jsonl(
        path,
        tokenizer,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        vocabulary=model.get_input_embeddings().weight.shape[0],
    )


def _config(arguments: argparse.Namespace):
    from .config import UcanConfig

    config = UcanConfig()
    if arguments.config is not None:
        try:
            config = UcanConfig.from_json(Path(arguments.config).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UcanError(f"cannot read {arguments.config}: {error}") from error
    names = ("site", "contrast", "decay", "fraction", "max_retain_loss_increase", "seed")
    changes = {n: getattr(arguments, n) for n in (*names, "strength")}
    return config.replace(**{n: value for n, value in changes.items() if value is not None})


def _print_metrics(metrics: dict[str, dict[str, float | None]], notes: dict[str, str]) -> None:
    if not metrics:
        return
    names = list(dict.fromkeys(name for state in metrics.values() for name in state))
    print(f"{'':<26}" + "".join(f"{state:>12}" for state in metrics))
    for name in names:
        values = [state.get(name) for state in metrics.values()]
        print(f"{name:<26}" + "".join(f"{'n/a' if v is None else f'{v:.4g}':>12}" for v in values))
    for key, text in notes.items():
        print(f"{key}: {text}")


def _progress(arguments: argparse.Namespace) -> bool:
    return not arguments.quiet and sys.stderr.isatty()


def _strength(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _usage(command: str, message: str) -> int:
    print(f"ucan-fast {command}: {message}; see ucan-fast {command} --help", file=sys.stderr)
    return USAGE


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, UcanWarning):
        print(f"warning: {message}", file=sys.stderr)
