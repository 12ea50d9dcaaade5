"""The command line: ``ucan-fast unlearn | collect | audit | doctor``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ._version import __version__
from .config import METHODS, PRESETS, READERS, UcanConfig
from .errors import UcanError, UcanWarning, warn

DONE, REFUSED, USAGE, INTERRUPTED = 0, 1, 2, 130

ADAPTER_STATS = "ucan_statistics.safetensors"
ADAPTER_PLAN = "ucan_plan.safetensors"
MAX_LENGTH = 1024
#: Fields of UcanConfig that are options of ``unlearn``, and what their words become.
FIELDS = {
    "method": str,
    "influence_variant": str,
    "influence_steps": int,
    "influence_batches": int,
    "influence_rank": int,
    "influence_blocks": int,
    "site": str,
    "contrast": str,
    "decay": str,
    "fraction": float,
    "max_retain_loss_increase": float,
    "seed": int,
}
# The options that name what a command reads.
_INPUTS = (
    *("base", "adapter", "tokenizer", "forget", "retain", "data", "bank", "calibration"),
    "holdout",
    *("previous", "unlearned", "retrained", "config"),
)

_SETS = """\
Sets are JSON lines: {"text": ...}, or {"prompt": ..., "completion": ...}, or {"input_ids": [...]},
each with an optional "token_groups" (0 forget, 1 retain, -1 ignored, one per token); beside
"input_ids" also an "attention_mask" (tokens of 0 are left out). Other keys are refused.
For encoder-decoder models: {"prompt": ..., "completion": ...} (what the encoder reads, and the
labels), or {"input_ids": [...], "labels": [...]}; "token_groups" are the encoder's tokens', and
"decoder_token_groups" the labels'.

Exit code: 0 done, 1 refused (nothing was written), 2 wrong usage, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 refused, 2 wrong usage, 130 interrupted.
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
        except KeyboardInterrupt:
            print(f"ucan-fast {arguments.command}: interrupted", file=sys.stderr)
            return INTERRUPTED


def _unlearn(arguments: argparse.Namespace) -> int:
    start = _start(arguments)
    if unread := _unread(arguments, start):
        return _usage("unlearn", unread)
    config = _config(arguments, start)
    several = config.influence_steps > 1  # they run retain data, beside a bank too
    given = (arguments.retain is not None) + (arguments.bank is not None)
    if given == 0 or (given == 2 and not several):
        both = " (several influence steps take both)" if several else ""
        return _usage("unlearn", f"give exactly one of --retain and --bank{both}")

    from .factors import InfluenceFactors
    from .files import atomic_directory, check_output_folder
    from .report import REPORT
    from .stats import ActivationStats
    from .unlearn import unlearn

    ours = (ADAPTER_PLAN, REPORT)
    check_output_folder(arguments.out, arguments.overwrite, only_with=ours)
    _check_apart(arguments)
    measured = ActivationStats if config.method == "attenuate" else InfluenceFactors
    bank = None if arguments.bank is None else measured.load(arguments.bank)
    if several and arguments.retain is None:
        raise UcanError(
            "several influence steps run retain data, which a bank does not hold: give --retain "
            "beside it."
        )
    if arguments.calibration is None and arguments.retain is None and _needs_retain_loss(config):
        raise UcanError(
            f"method {config.method!r} with strength 'auto' measures the retain budget, and a bank "
            "holds nothing to measure it on: give retain data with --calibration, or --strength in "
            "nats."
        )
    previous = None
    if arguments.previous is not None:
        previous = _previous(Path(arguments.previous), measured, several)
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
        holdout=_read(arguments, arguments.holdout, model, tokenizer),
    )
    guidance = result.report.guidance
    if result.plan.is_noop:
        advice = "" if guidance is None else f" Advice: {guidance.text}"
        raise UcanError(
            f"the plan changes nothing, so nothing was written. {result.plan.note}{advice}"
        )
    with atomic_directory(arguments.out, arguments.overwrite, only_with=ours) as folder:
        model.save_pretrained(folder)
        result.stats.save(folder / ADAPTER_STATS)
        result.plan.save(folder / ADAPTER_PLAN, include_original=arguments.keep_original)
        result.report.save(folder)
    print(result.plan.summary())
    if guidance is not None:
        print(f"recommendation: {guidance.recommendation}: {guidance.text}")
    _print_metrics(result.report.metrics, result.report.notes)
    print(f"unlearned adapter and report: {arguments.out}")
    return DONE


def _previous(folder: Path, measured: type, several: bool) -> Any:
    """An earlier request, from the files of its output: its statistics, or with several influence
    steps, which go on from where its plan leads to, both.

    Raises:
        UcanError: a file cannot be read, or the two requests do not go together.
    """
    from .influence import InfluencePlan
    from .plans import load_plan
    from .unlearn import UnlearnResult

    stats = measured.load(folder / ADAPTER_STATS)
    if several:
        plan = load_plan(folder / ADAPTER_PLAN)
        if not isinstance(plan, InfluencePlan):
            raise UcanError(
                f"{folder} was not answered by influence steps, so that several of them cannot go "
                "on from there. Ask for both forget sets in one request, on the original adapter."
            )
        return UnlearnResult(stats, plan, report=None)
    plan = folder / ADAPTER_PLAN
    if plan.exists() and load_plan(plan).config.influence_steps > 1:
        raise UcanError(
            f"{folder} was answered by several influence steps, and one step on the original "
            "adapter would not take them again: answer this request by several steps too "
            "(--preset thorough), or ask for both forget sets in one request."
        )
    return stats


def _needs_retain_loss(config: UcanConfig) -> bool:
    # Attenuation takes a strength of its own where there is nothing to search with.
    return config.auto_strength and config.method != "attenuate"


def _collect(arguments: argparse.Namespace) -> int:
    if arguments.factors is not None and arguments.sites is not None:
        return _usage(
            "collect", "--sites are of activation statistics; leave it out with --factors"
        )
    sizes = {"rank": ("eigenbasis", arguments.rank), "blocks": ("last-blocks", arguments.blocks)}
    for option, (variant, value) in sizes.items():
        if value is not None and arguments.factors != variant:
            return _usage("collect", f"--{option} is for --factors {variant}: leave it out")
    from .collect import collect
    from .factor_pass import collect_factors

    out = Path(arguments.out)
    _check_output_file(arguments, _is_statistics)
    model, tokenizer = _load(arguments)
    data = _read(arguments, arguments.data, model, tokenizer)
    options = {"group": arguments.group, "progress": _progress(arguments)}
    if arguments.factors is not None:
        options |= {name: value for name, (_, value) in sizes.items() if value is not None}
        factors = collect_factors(model, data, variant=arguments.factors, **options)
        factors.save(out)
        print(
            f"{factors.tokens:.0f} {arguments.group} tokens over {len(factors.layers)} layers, "
            f"factors {arguments.factors!r}, {factors.bytes / 2**20:.1f} MiB: {out}"
        )
        return DONE
    stats = collect(model, data, sites=arguments.sites, **options)
    stats.save(out)
    print(
        f"{stats.tokens(arguments.group)} {arguments.group} tokens over "
        f"{len(stats.layers)} layers, sites {', '.join(stats.sites)}: {out}"
    )
    return DONE


def _audit(arguments: argparse.Namespace) -> int:
    from .audit import audit
    from .files import atomic_write
    from .recovery import check_seed

    check_seed(arguments.seed)
    if arguments.out is not None:
        _check_output_file(arguments, _is_findings)
    unlearned = Path(arguments.unlearned)
    if not unlearned.is_dir():
        raise UcanError(f"{unlearned} is no folder with an unlearned adapter.")
    if arguments.retrained is not None and not Path(arguments.retrained).is_dir():
        raise UcanError(f"{arguments.retrained} is no folder with a retrained adapter.")
    model, tokenizer = _load(arguments)
    plan = unlearned / ADAPTER_PLAN
    findings = audit(
        model,
        unlearned,
        forget=_read(arguments, arguments.forget, model, tokenizer),
        retain=_read(arguments, arguments.retain, model, tokenizer),
        plan=plan if plan.exists() else None,
        holdout=_read(arguments, arguments.holdout, model, tokenizer),
        retrained=arguments.retrained,
        relearn_steps=arguments.relearn_steps,
        seed=arguments.seed,
        decode=None if tokenizer is None else partial(tokenizer.decode, skip_special_tokens=True),
        progress=_progress(arguments),
    )
    print(findings)
    if arguments.out is not None:
        atomic_write(arguments.out, (findings.to_json() + "\n").encode())
        print(f"written: {arguments.out}")
    return DONE if findings.passed else REFUSED


def _check_apart(arguments: argparse.Namespace) -> None:
    """Refuse an output folder that is, holds or lies in anything the command reads."""
    for what, path in _existing_inputs(arguments):
        if _within(path, arguments.out) or _within(arguments.out, path):
            raise UcanError(
                f"--out {arguments.out} and --{what} {path} must not be or hold one another: what "
                "is read is never written to. Choose another folder."
            )


def _check_output_file(
    arguments: argparse.Namespace, is_earlier_output: Callable[[Path], bool]
) -> None:
    """Refuse an output file that exists, unless it is an earlier output that may be replaced."""
    out = Path(arguments.out)
    # A rename would replace the link and leave the file it points to.
    if out.is_symlink():
        raise UcanError(f"{out} is a symbolic link; give the file itself.")
    if not out.exists():
        return
    if not out.is_file():
        raise UcanError(f"{out} is a folder; --out is a file.")
    if not arguments.overwrite:
        raise UcanError(f"{out} exists already; choose another file or pass --overwrite.")
    for what, path in _existing_inputs(arguments):
        if _within(out, path):
            raise UcanError(
                f"--out {out} is or belongs to --{what} {path}, where nothing is replaced. Choose "
                "another file."
            )
    if not is_earlier_output(out):
        raise UcanError(
            f"{out} is no earlier output of ucan-fast {arguments.command}, so it is not replaced; "
            "move it away or choose another file."
        )


def _is_statistics(path: Path) -> bool:
    from . import factors, stats
    from .files import safetensors_kind

    # Not loaded: one of another version, or a damaged one, must be replaceable too.
    with contextlib.suppress(UcanError):
        return safetensors_kind(path) in (factors.FORMAT, stats.FORMAT)
    return False


def _is_findings(path: Path) -> bool:
    try:
        return {"checks", "fingerprints", "passed"} <= set(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _existing_inputs(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    given = [(what, getattr(arguments, what, None)) for what in _INPUTS]
    return [(what, path) for what, path in given if path is not None and Path(path).exists()]


def _within(inner: str | Path, outer: str | Path) -> bool:
    """Whether ``inner`` is ``outer`` or lies in it, whatever names and links lead there."""
    try:
        if not Path(outer).exists():
            return False
        # A link lies both where it is and where it leads.
        places = (Path(inner).resolve(), Path(os.path.abspath(inner)))
        chain = (p for place in places for p in (place, *place.parents))
        return any(p.exists() and p.samefile(outer) for p in chain)
    except (OSError, RuntimeError) as error:
        raise UcanError(f"cannot tell whether {inner} lies in {outer}: {error}") from error


def _doctor(arguments: argparse.Namespace) -> int:
    from importlib import metadata

    import torch

    from . import native
    from .kernels import availability
    from .ops import backends_in_use
    from .ops.backend import requested_backend
    from .ops.fused_linear import fused_linear_switch

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
        "UCAN_FAST_FUSED_LINEAR": f"{fused_linear_switch()} (auto: where it was measured to win)",
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
            print(f"  {key:<20} {text}")
    return DONE


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="ucan-fast",
        description="One-shot unlearning for LoRA adapters: U-CAN by forward passes alone, "
        "influence steps with backward passes too.",
        epilog=_SETS,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"ucan-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    unlearn = commands.add_parser(
        "unlearn",
        help="remove what an adapter knows of a forget set",
        description="Write an unlearned copy of a PEFT adapter, with a deletion report.",
        epilog=_SETS,
        formatter_class=formatter,
    )
    _model_arguments(unlearn)
    unlearn.add_argument("--forget", required=True, metavar="JSONL", help="the forget set D_f")
    unlearn.add_argument("--retain", metavar="JSONL", help="the retain set D_r")
    unlearn.add_argument(
        "--bank",
        metavar="FILE",
        help="statistics of all data, from 'collect'; replaces --retain (several influence steps "
        "take both: they run --retain)",
    )
    unlearn.add_argument(
        "--calibration",
        metavar="JSONL",
        help="retain data for the strength search (default: a sample of --retain; with several "
        "influence steps a part of it that they do not run)",
    )
    unlearn.add_argument(
        "--holdout",
        metavar="JSONL",
        help="data the adapter never saw: with --method influence or gates the forget set is made "
        "no less likely than these",
    )
    unlearn.add_argument(
        "--previous",
        metavar="DIR",
        help="output of the last request: its forget set is included in this one. --adapter stays "
        "the original adapter. The requests must not overlap: a token in both would be counted, "
        "and taken out of the bank, twice",
    )
    unlearn.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    unlearn.add_argument(
        "--overwrite", action="store_true", help="replace --out if it is an earlier output"
    )
    start = unlearn.add_mutually_exclusive_group()
    start.add_argument("--config", metavar="FILE", help="a UcanConfig as JSON")
    start.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="paper: U-CAN, forward passes only (default). best: the influence step within 1 %% of "
        "retain loss, one backward pass over the forget set. thorough: up to twenty such steps, "
        "each of which runs retain data as well",
    )
    for name, kind in FIELDS.items():
        only = f" (--method {' or '.join(READERS[name])} alone)" if name in READERS else ""
        unlearn.add_argument(f"--{_option(name)}", type=kind, help=f"sets {name}{only}")
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
    collect.add_argument(
        "--factors",
        nargs="?",
        const="all",
        metavar="VARIANT",
        help="measure gradients and Kronecker factors instead, for unlearn --method influence: "
        "all (default), b-only, last-blocks, eigenbasis or diagonal; for --method gates: diagonal",
    )
    collect.add_argument(
        "--rank", type=_positive, help="eigenpairs kept of --factors eigenbasis (default: 32)"
    )
    collect.add_argument(
        "--blocks", type=_positive, help="blocks that --factors last-blocks takes (default: 2)"
    )
    collect.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    collect.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    collect.set_defaults(run=_collect)

    audit = commands.add_parser(
        "audit",
        help="check an unlearned adapter against the original and its report, and attack it",
        description="Compare an unlearned adapter with the original: is it exactly what its plan "
        "and report say, and how far did predictions move? Then try to get the forgotten back: by "
        "membership inference (with --holdout), by relearning, by rounding the adapter's weights. "
        "What these find does not change the exit code, and that they find nothing is no proof.",
        epilog=_SETS,
        formatter_class=formatter,
    )
    _model_arguments(audit, "the ORIGINAL adapter")
    audit.add_argument("--unlearned", required=True, metavar="DIR", help="output of 'unlearn'")
    audit.add_argument("--forget", required=True, metavar="JSONL", help="the forget set D_f")
    audit.add_argument("--retain", metavar="JSONL", help="the retain set D_r")
    audit.add_argument(
        "--holdout",
        metavar="JSONL",
        help="data of the same kind as --forget that the adapters never saw: can an attacker tell "
        "the two apart? (Of lines with token_groups the tokens of group 0.)",
    )
    audit.add_argument(
        "--retrained",
        metavar="DIR",
        help="an adapter trained without the forget set, as the reference",
    )
    audit.add_argument(
        "--relearn-steps",
        type=_not_negative,
        default=10,
        metavar="N",
        help="steps of training on a tenth of the forget sequences, to see whether the others come "
        "back (default: 10; 0: do not try)",
    )
    audit.add_argument("--seed", type=int, default=0, help="which tenth (default: 0)")
    audit.add_argument("--out", metavar="FILE", help="write the findings as JSON")
    audit.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    audit.set_defaults(run=_audit)

    doctor = commands.add_parser("doctor", help="which backends work here, and why not the rest")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _option(field: str) -> str:
    return field.replace("_", "-")


def _model_arguments(parser: argparse.ArgumentParser, adapter: str = "a PEFT adapter") -> None:
    parser.add_argument("--base", required=True, help="base model: a folder or a hub name")
    parser.add_argument("--adapter", required=True, help=f"{adapter}: a folder or a hub name")
    parser.add_argument("--tokenizer", help="default: the base model's")
    parser.add_argument(
        "--dtype", default="auto", help="of the base: auto, float32, bfloat16 or float16"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there)")
    parser.add_argument("--batch-size", type=_positive, default=8)
    parser.add_argument(
        "--max-length",
        type=_positive,
        help=f"in tokens; longer sequences lose their beginning (default: {MAX_LENGTH}, or as many "
        "as the model has positions for)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )
    from transformers.utils import logging

    from .accelerate import accelerate
    from .loading import ADAPTER_FILES, BASE_FILES, check_base, check_loaded, refused_as

    if not _progress(arguments):
        logging.disable_progress_bar()
    device = _device(arguments.device)
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if arguments.dtype != "auto" and arguments.dtype not in dtypes:
        raise UcanError(f"--dtype must be auto or one of {', '.join(dtypes)}.")
    with refused_as(f"the base model {arguments.base}", BASE_FILES):
        config = AutoConfig.from_pretrained(arguments.base)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        base, loading = kind.from_pretrained(
            arguments.base,
            dtype=dtypes.get(arguments.dtype, "auto"),
            device_map=None,
            # To be told which: without it only the log says so.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        check_base(loading, arguments.base)
        base = base.to(device)
    with refused_as(f"the adapter {arguments.adapter}", ADAPTER_FILES):
        model = PeftModel.from_pretrained(base, arguments.adapter)
        # Again, for what from_pretrained does not return: weights that the adapter lacks are
        # PEFT's fresh initialisation, and only warned of.
        loaded = model.load_adapter(arguments.adapter, model.active_adapter)
    check_loaded(loaded, arguments.adapter)
    _check_not_unlearned(arguments, model)
    _limit_length(arguments, config, base)
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


def _device(name: str | None):
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type == "meta":
            raise UcanError("--device meta holds no values to measure; give cpu or cuda.")
        torch.empty(0, device=device)
    except UcanError:
        raise
    except Exception as error:
        # Every device type fails in its own way where it is missing (cuda: an AssertionError).
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UcanError(f"--device {device} cannot be used here: {reason}") from error
    return device


def _check_not_unlearned(arguments: argparse.Namespace, model: Any) -> None:
    """Refuse an output of ours as the original: its statistics would describe another adapter."""
    from .adapter import fingerprint
    from .plans import load_plan

    plan = Path(arguments.adapter) / ADAPTER_PLAN
    if not plan.exists():
        return
    if load_plan(plan).applied_fingerprint == fingerprint(model, model.active_adapter):
        raise UcanError(
            f"{arguments.adapter} is an unlearned adapter already (its {ADAPTER_PLAN} says so), "
            "and plans do not stack. Give the original adapter with --adapter; for a further "
            "request on it also --previous with the output of the last one."
        )


def _limit_length(arguments: argparse.Namespace, config: Any, base: Any) -> None:
    """--max-length, at most what the model has positions for."""
    text = config.get_text_config()
    # MPT has a name of its own.
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    limits += [
        # RoBERTa and its kin count positions from behind the padding's.
        module.num_embeddings - module.padding_idx - 1
        for name, module in base.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    limits = [limit for limit in limits if isinstance(limit, int) and limit >= 1]
    limit = min(limits, default=arguments.max_length or MAX_LENGTH)
    if arguments.max_length is not None and arguments.max_length > limit:
        warn(
            f"--max-length {arguments.max_length} is more than the model's {limit} positions; "
            f"{limit} is used.",
        )
    arguments.max_length = min(arguments.max_length or MAX_LENGTH, limit)


def _read(
    arguments: argparse.Namespace, path: str | None, model: Any, tokenizer: Any
) -> list | None:
    from .adapter import base_config
    from .jsonl import read_jsonl

    if path is None:
        return None
    return read_jsonl(
        path,
        tokenizer,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        encoder_decoder=bool(getattr(base_config(model), "is_encoder_decoder", False)),
    )


def _unread(arguments: argparse.Namespace, start: UcanConfig) -> str:
    """What is wrong with options that the chosen method, or its fixed strength, does not read."""
    method = arguments.method or start.method
    given = [
        name
        for name in FIELDS
        if getattr(arguments, name) is not None and method not in READERS.get(name, (method,))
    ]
    if given:
        chosen = f" (--preset {arguments.preset})" if method == start.method else ""
        readers = sorted({reader for name in given for reader in READERS[name]})
        return (
            f"method {method!r}{chosen if arguments.preset else ''} does not read "
            f"{', '.join(f'--{_option(name)}' for name in given)}, which is for method "
            f"{' or '.join(map(repr, readers))}: leave it out"
        )
    # Not of an unknown method, which is told as such.
    stale = start.unread_by(method) if method in METHODS else []
    if stale:
        source = f"--config {arguments.config}"
        if not arguments.config:
            source = f"--preset {arguments.preset}"
        fields = ", ".join(f"{name}={getattr(start, name)!r}" for name in stale)
        return f"{source} sets {fields}, which --method {method} does not read: leave one out"
    strength = start.strength if arguments.strength is None else arguments.strength
    if arguments.max_retain_loss_increase is not None and strength != "auto":
        return (
            "--max-retain-loss-increase is the budget that --strength auto searches in; with a "
            f"strength of {strength:g} nothing is searched: leave one out, or give --strength auto"
        )
    return ""


def _config(arguments: argparse.Namespace, start: UcanConfig) -> UcanConfig:
    changes = {name: getattr(arguments, name) for name in (*FIELDS, "strength")}
    changes = {name: value for name, value in changes.items() if value is not None}
    return start.replace(**changes)


def _start(arguments: argparse.Namespace) -> UcanConfig:
    """The preset or the file that the other options change."""
    if arguments.config is None:
        return UcanConfig.preset(arguments.preset or "paper")
    try:
        # -sig: what editors on Windows begin a file with is read over.
        return UcanConfig.from_json(Path(arguments.config).read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UcanError(f"cannot read {arguments.config}: {error}") from error
    except UcanError as error:
        raise UcanError(f"{arguments.config}: {error}") from error


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


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def _usage(command: str, message: str) -> int:
    print(f"ucan-fast {command}: {message}; see ucan-fast {command} --help", file=sys.stderr)
    return USAGE


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, UcanWarning):
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
