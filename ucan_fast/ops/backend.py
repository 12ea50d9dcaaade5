"""Which implementation an operator runs on: the one place that decides.

Asked at every call, in this order: :func:`use_backend` (a with block), ``UCAN_FAST_BACKEND``, else
``auto``. Within :func:`decide_once` the environment is read, and each choice made, once.

============== =================================================================================
``auto``       the fastest that works here for these tensors. CUDA: Triton, and for ``attenuate_``
               the CUDA extension before Triton. CPU: the C++ extension where it has the operator.
               Else the reference.
``reference``  plain PyTorch, the definition of every operator.
``triton``     the Triton kernels (``kernels/``). CPU tensors need ``TRITON_INTERPRET=1``.
``native``     the compiled extension (``csrc/``): C++ for CPU tensors, CUDA for CUDA tensors.
``cuda``       the same, for CUDA tensors only.
============== =================================================================================

============================ ============ ============ ===================
operator                     ``triton``   C++ (CPU)    CUDA extension
============================ ============ ============ ===================
``shrink``                   yes          its moments  no
``expand``                   yes          yes          no
``fused_linear``             yes          no           no
``accumulate_moments``       yes          yes          no
``contrastive_scores``,      yes          no           no
``attenuation_factors``
``attenuate_``               yes          yes          yes
============================ ============ ============ ===================

A backend named by the user is an error, never a silent fallback, where it has the operator and
cannot run it; operators that it does not have go as under ``auto``. An unknown name is an error.

Three operators have calls that another way is part of their definition for, under a named backend
too, since an error would end whole models for one layer or one call of theirs:

- ``fused_linear`` under ``triton``: what TMA refuses (sizes, strides or addresses that are not
  whole 16 bytes; ``kernels.fused_linear.obstacle`` says which) is torch's product of the base and
  then Triton's ``expand``, as in a layer without the opt-in. Addresses change from call to call,
  and nobody knows them while ``torch.compile`` traces. A GPU without TMA is an error.
- ``shrink`` and ``expand`` under ``native``: C++ keeps the product in fp32 or fp64 and has no
  derivative. A narrower z, which ``shrink`` has to round, fp64 beside a narrower z, and calls that
  autograd, ``torch.func`` or a dispatch mode watches are computed by the reference. ``auto`` also
  leaves calls of few rows to it, for speed.

A layer without statistics asks for ``add_lora``, which is ``shrink`` and ``expand``, but under
``auto`` on the CPU, in fp32 or fp64 (bf16 where the processor multiplies it), one ``addmm_`` of
torch's into the base product's memory.

What differentiates or batches calls in another way than ``loss.backward()`` sees only PyTorch's own
operators: where a ``torch.func`` transform is active, or an argument has a forward-mode tangent,
``shrink``, ``expand`` and ``fused_linear`` are the reference, under every backend, ``triton`` by
name too. With moments they are errors there, as where a gradient is recorded. Lazily negated
tensors (``torch._neg_view``) are made plain before a kernel reads them.

``ucan-fast doctor`` shows what each operator runs on, and why not on the others.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad

from .. import kernels, native
from ..errors import UcanError

#: The operators' schemas are registered here; backends of other files add to the same namespace.
LIBRARY = torch.library.Library("ucan_fast", "FRAGMENT")

BACKENDS = ("auto", "reference", "triton", "native", "cuda")

_OPERATORS = (
    *("shrink", "expand", "fused_linear", "accumulate_moments"),
    *("contrastive_scores", "attenuation_factors", "attenuate_"),
)
# By device type: operator -> the extension's. shrink's moments go through accumulate_moments.
_NATIVE = {
    "cpu": {
        "accumulate_moments": "_moments_native_",
        "shrink": "_shrink_native_",
        "expand": "_expand_native_",
        "attenuate_": "_attenuate_native_",
    },
    "cuda": {"attenuate_": "_attenuate_native_"},
}
_ACTIVATIONS = ("shrink", "expand", "fused_linear", "accumulate_moments")
#: Tensors that hold values and nothing else: no subclass with a dispatch of its own.
PLAIN = (torch.Tensor, torch.nn.Parameter)
_NOTHING = contextlib.nullcontext()
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
# What decide_once keeps: environment variables by name, choices by all that they depend on.
_decided: contextvars.ContextVar[dict[str | tuple, str] | None] = contextvars.ContextVar(
    "decided", default=None
)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the with block, operators run on this backend, whatever the environment says.

    Raises:
        UcanError: no such backend.
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def decide_once() -> Iterator[None]:
    """Within the with block the environment is read, and each choice made, once.

    For a pass over a model: to ask for every operator of every layer takes as long as some of the
    operators do on a short sequence. :func:`use_backend` is still obeyed inside.
    """
    token = _decided.set({} if (known := _decided.get()) is None else known)
    try:
        yield
    finally:
        _decided.reset(token)


def setting(name: str) -> str:
    """The environment variable of that name, ``"auto"`` where it is not set or empty."""
    known = _decided.get()
    if known is None:
        return os.environ.get(name) or "auto"
    if name not in known:
        known[name] = os.environ.get(name) or "auto"
    return known[name]


def requested_backend() -> str:
    """The backend asked for by :func:`use_backend` or ``UCAN_FAST_BACKEND``.

    Raises:
        UcanError: it names no backend.
    """
    return _chosen.get() or _checked(setting("UCAN_FAST_BACKEND"), "UCAN_FAST_BACKEND")


def choose(operator: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """``"reference"``, ``"triton"`` or ``"native"``, for one call.

    Args:
        operator: its name.
        device: of the tensors.
        dtypes: of the activations and weights that go in and come out.

    Raises:
        UcanError: a backend was asked for by name and cannot serve this call.
    """
    requested, known = requested_backend(), _decided.get()
    if known is None:
        return _choose(requested, operator, device, *dtypes)
    key = (requested, operator, device, *dtypes)
    if key not in known:
        known[key] = _choose(*key)
    return known[key]


def _choose(requested: str, operator: str, device: torch.device, *dtypes: torch.dtype) -> str:
    if requested == "reference":
        return "reference"
    if requested == "triton":
        chosen, reason = "triton", triton_obstacle(operator, device, *dtypes)
    elif requested == "native" and any(operator in known for known in _NATIVE.values()):
        if device.type == "cuda" and operator not in _NATIVE["cuda"]:
            return _fastest(operator, device, *dtypes)
        chosen, reason = "native", native_obstacle(operator, device)
    elif requested == "cuda" and operator in _NATIVE["cuda"]:
        chosen, reason = "native", native_obstacle(operator, device)
        if device.type != "cuda":
            reason = f"the tensors are on {device}"
    else:
        return _fastest(operator, device, *dtypes)
    if reason:
        raise UcanError(f"backend {requested!r} cannot run {operator}: {reason}.")
    return chosen


#: Elements of x or y up to which PEFT's own kernels are done before ours are launched: 1,024 tokens
#: of 4,096. Eager calls of shrink and expand took 200 µs on an H100 whatever the size, PEFT's 60 to
#: 140, with one CPU of that machine; in a CUDA graph ours take a half to a quarter of PEFT's time.
LAUNCH_BOUND = 1 << 22


def is_launch_bound(x: torch.Tensor, out_features: int) -> bool:
    """Whether, on a GPU, to launch the kernels takes longer than what they save.

    Never where a backend was asked for by name; nor while gradients are recorded, since what
    recomputes a layer for its backward pass must do as its forward pass did; nor on any other
    stream than the default one, where CUDA graphs are warmed up and captured, which are launched as
    a whole; nor in a compiled graph.
    """
    return (
        # First, or a size would be compiled in.
        not torch.compiler.is_compiling()
        and x.is_cuda
        and x.dim() > 0
        and x.numel() <= LAUNCH_BOUND
        and x.numel() // max(x.shape[-1], 1) * out_features <= LAUNCH_BOUND
        and not torch.is_grad_enabled()
        and requested_backend() == "auto"
        and torch.cuda.current_stream(x.device).cuda_stream == 0
    )


def without_autocast(kind: str) -> contextlib.AbstractContextManager:
    """A with block in which autocast to this device type is off.

    Only opened where it is on: torch's own takes as long as a small product.
    """
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, without the microsecond that this takes where nothing is to be done."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def runs_directly(backend: str, *tensors: torch.Tensor | None) -> bool:
    """Whether an operator may run as the function that it is, past PyTorch's dispatcher.

    Which takes tens of microseconds for an operator written in Python, more than the whole forward
    of a small layer. Not under ``torch.compile`` (callers ask that first), nor for fake tensors and
    subclasses, nor where a kernel's gradient is needed: only the reference has one by itself. Nor
    for lazily negated tensors, which a kernel would read with the wrong sign: the dispatcher makes
    them plain. Callers of kernels ask :func:`is_transformed` too.
    """
    kernel = backend == "triton"
    recorded = kernel and torch.is_grad_enabled()
    # A loop: a generator takes longer than what it asks here.
    for t in tensors:
        if t is not None and (
            type(t) not in PLAIN or (recorded and t.requires_grad) or (kernel and t.is_neg())
        ):
            return False
    return True


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether ``torch.func`` or forward-mode AD follows what is done with these tensors.

    Only PyTorch's own operators have a rule for that. Not to be asked under ``torch.compile``,
    whose graph holds the operator itself.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_unobserved(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing but the operator's caller sees what it does with these plain tensors.

    No autograd of either direction, no ``torch.func`` transform, no mode that records calls: code
    without derivatives may run, and a result that was only just made may be overwritten.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def backends_in_use() -> dict[str, str]:
    """For ``doctor``: what each operator runs on here, and why not on something faster.

    Judged for fp32 tensors on the CUDA device where there is one, else on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    requested = requested_backend()
    use = {}
    for operator in _OPERATORS:
        try:
            chosen = choose(operator, device, torch.float32)
        except UcanError as error:
            use[operator] = f"error: {error}"
            continue
        reasons = []
        for other, obstacle in (("native", native_obstacle), ("triton", triton_obstacle)):
            if other == chosen:
                continue
            reason = obstacle(operator, device)
            if reason is None:
                reason = f"{requested} was asked for" if requested != "auto" else "slower here"
            reasons.append(f"not {other}: {reason}")
        use[operator] = f"{chosen} on {device.type} tensors ({'; '.join(reasons)})"
    return use


def triton_obstacle(operator: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernel cannot serve such a call, or None."""
    reason = kernels.obstacle(device.type)
    if reason is None and operator in _ACTIVATIONS:
        odd = next((dtype for dtype in dtypes if dtype not in _TRITON_DTYPES), None)
        reason = None if odd is None else f"the kernel takes fp32, bf16 and fp16, not {odd}"
    if reason is None and operator == "fused_linear" and _lacks_tma(device):
        major, minor = kernels.TMA_CAPABILITY
        reason = f"TMA needs compute capability {major}.{minor} (Hopper) or later"
    return reason


def native_obstacle(operator: str, device: torch.device) -> str | None:
    """Why the compiled extension cannot serve such a call, or None."""
    kind = device.type
    if kind not in _NATIVE:
        return f"the extension has no code for {kind} tensors"
    if operator not in _NATIVE[kind]:
        return f"it has none for {kind} tensors"
    status = native.status().get("_C_cuda" if kind == "cuda" else "_C", "not built")
    if status != "available":
        return status
    if not hasattr(torch.ops.ucan_fast, _NATIVE[kind][operator]):
        return (
            "the installed extension is older than this code; rebuild it with: "
            "pip install --no-build-isolation --no-deps --force-reinstall ."
        )
    return None


def _lacks_tma(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) < kernels.TMA_CAPABILITY
    )


def _fastest(operator: str, device: torch.device, *dtypes: torch.dtype) -> str:
    kind = device.type
    if operator in _NATIVE.get(kind, ()) and native_obstacle(operator, device) is None:
        return "native"
    # Never the interpreter unless asked for: it is a thousand times slower than the reference.
    if kind != "cpu" and triton_obstacle(operator, device, *dtypes) is None:
        return "triton"
    return "reference"


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise UcanError(f"{where}={name!r} is unknown; use one of {', '.join(BACKENDS)}.")
    return name
