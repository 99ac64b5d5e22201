"""The `bincomm` operator library: which kernels exist, which one runs, and why.

PyTorch's dispatcher chooses by device: `bincomm._C` registers its kernels for CPU, `bincomm.kernels` (Triton)
for CUDA, and every operation has a PyTorch implementation for other devices and for missing kernels.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch.autograd import forward_ad

BACKENDS = ("auto", "native", "reference")
BACKEND = os.environ.get("BINCOMM_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ValueError(f"BINCOMM_BACKEND={BACKEND!r}: expected one of {', '.join(BACKENDS)}")

LIBRARY = torch.library.Library("bincomm", "DEF")

# operation -> device -> what runs there; filled in by the operations, read by `bincomm doctor`.
KERNELS: dict[str, dict[str, str]] = {}


def load(module: str) -> tuple[ModuleType | None, str]:
    """Import a module of kernels: (module, "") or (None, the reason)."""
    try:
        return importlib.import_module(module), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


_C, _C_ERROR = load("bincomm._C")


def has_cuda_code() -> bool:
    """Whether `bincomm._C` was built with its CUDA kernels."""
    return _C is not None and bool(_C.build_facts()["cuda"])


def define(
    schema: str,
    *,
    cpu: str | None,
    cuda: str | None = "PyTorch",
    pytorch: Callable,
    fake: Callable | None = None,
) -> None:
    """Declare an operation with its PyTorch implementation and, if PyTorch is to trace it, its shape rule.

    `cpu` and `cuda` name what runs there: "C++" and "CUDA" are kernels of `_C`, "BLAS" what the PyTorch
    implementation calls by intention, "PyTorch" that implementation in place of a kernel (for Triton
    see `use_triton`), None that the operation is not used there.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _fallback(name, pytorch), "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"bincomm::{name}", fake, lib=LIBRARY)
    # The dispatcher knows; _C may be of an older build.
    has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"bincomm::{name}")
    where = {
        device: "PyTorch" if kernel in ("C++", "CUDA") and not has(device.upper()) else kernel
        for device, kernel in (("cpu", cpu), ("cuda", cuda))
        if kernel is not None
    }
    if where:
        KERNELS[name] = where


def use_triton(
    name: str,
    module: str,
    function: str,
    unless: Callable[..., bool] | None = None,
    pytorch: Callable | None = None,
) -> None:
    """Use a Triton launcher of `bincomm.kernels` for CUDA tensors; it is imported at its first call. Where
    `unless` is true of the arguments, the PyTorch implementation runs."""
    if importlib.util.find_spec("triton") is None:
        return
    launcher = functools.cache(
        lambda: getattr(importlib.import_module(f"bincomm.kernels.{module}"), function)
    )

    def launch(*args):
        return launcher()(*args)

    if unless is None or pytorch is None:
        LIBRARY.impl(name, launch, "CUDA")
    else:
        LIBRARY.impl(name, lambda *args: pytorch(*args) if unless(*args) else launch(*args), "CUDA")
    KERNELS[name]["cuda"] = "Triton"


def _fallback(name: str, pytorch: Callable) -> Callable:
    """The PyTorch implementation; with BINCOMM_BACKEND=native it refuses to replace a missing kernel."""
    if BACKEND != "native":
        return pytorch

    def refuse_fallback(*args):
        tensors = (a[0] if isinstance(a, list) else a for a in args)
        device = next(a.device.type for a in tensors if isinstance(a, torch.Tensor))
        if name not in KERNELS or KERNELS[name].get(device, "PyTorch") != "PyTorch":
            return pytorch(*args)
        reason = f" ({_C_ERROR})" if device == "cpu" and _C_ERROR else ""
        raise RuntimeError(
            f"BINCOMM_BACKEND=native, but {name} has no native kernel for {device} here{reason}"
        )

    return refuse_fallback


def refuse_tangent(argument: str, x: torch.Tensor) -> None:
    """Raise if a forward-mode derivative is requested: PyTorch would return 0 for a custom operator."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{argument}: this operation has no forward-mode derivative; use its definition, by "
            "BINCOMM_BACKEND=reference or tensors in fp64"
        )


def uses_reference(x: torch.Tensor) -> bool:
    """Whether the definition runs: with BINCOMM_BACKEND=reference, and for fp64, which no kernel takes."""
    return BACKEND == "reference" or x.dtype == torch.float64
