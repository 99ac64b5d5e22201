"""The `bincomm` operator library: which kernels exist, which one runs, and why.

PyTorch's dispatcher chooses by device: `bincomm._C` registers its kernels for CPU, `bincomm.kernels` (Triton)
for CUDA, and every operation has a form in PyTorch for other devices and for where a kernel is missing.
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
    """Import a module of kernels: (module, "") or (None, why it is not there)."""
    try:
        return importlib.import_module(module), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


_C, _C_MISSING = load("bincomm._C")


def has_cuda_code() -> bool:
    """Whether `bincomm._C` was built with its CUDA kernels."""
    return _C is not None and bool(_C.build_facts()["cuda"])


def define(
    schema: str,
    *,
    cpu: str | None,
    cuda: str | None = "PyTorch",
    pytorch_form: Callable,
    fake: Callable | None = None,
) -> None:
    """Declare an operation with its form in PyTorch and, where PyTorch is to trace it, its shape rule.

    `cpu` and `cuda` name what serves tensors there: "C++" and "CUDA" are kernels of `_C`, "BLAS" and
    "foreach" what the form in PyTorch calls by intention, "PyTorch" that form where it only stands in (for
    Triton see `use_triton`), None that it is not used there.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _form(name, pytorch_form), "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"bincomm::{name}", fake, lib=LIBRARY)
    # Asked of the dispatcher, not of _C, which may be of an older build.
    has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"bincomm::{name}")
    where = {
        device: "PyTorch" if kernel in ("C++", "CUDA") and not has(device.upper()) else kernel
        for device, kernel in (("cpu", cpu), ("cuda", cuda))
        if kernel is not None
    }
    if where:
        KERNELS[name] = where


def use_triton(name: str, module: str, function: str) -> None:
    """Let CUDA tensors take a Triton launcher of `bincomm.kernels`, imported at its first call."""
    if importlib.util.find_spec("triton") is None:
        return
    launcher = functools.cache(
        lambda: getattr(importlib.import_module(f"bincomm.kernels.{module}"), function)
    )
    LIBRARY.impl(name, lambda *args: launcher()(*args), "CUDA")
    KERNELS[name]["cuda"] = "Triton"


def _form(name: str, pytorch_form: Callable) -> Callable:
    """The form in PyTorch; under BINCOMM_BACKEND=native it refuses where it would stand in for a kernel."""
    if BACKEND != "native":
        return pytorch_form

    def refuse_stand_in(*args):
        tensors = (a[0] if isinstance(a, list) else a for a in args)
        device = next(a.device.type for a in tensors if isinstance(a, torch.Tensor))
        if name not in KERNELS or KERNELS[name].get(device, "PyTorch") != "PyTorch":
            return pytorch_form(*args)
        why = f" ({_C_MISSING})" if device == "cpu" and _C_MISSING else ""
        raise RuntimeError(f"BINCOMM_BACKEND=native, but {name} has no native kernel for {device} here{why}")

    return refuse_stand_in


def refuse_tangent(argument: str, x: torch.Tensor) -> None:
    """Raise where a forward-mode derivative is asked for: PyTorch takes that of a custom operator to be 0."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{argument}: this operation has no forward-mode derivative; its definition has "
            "(BINCOMM_BACKEND=reference, or fp64)"
        )


def takes_reference(x: torch.Tensor) -> bool:
    """Whether the definition itself is to run: when asked for, and for fp64, which no kernel takes."""
    return BACKEND == "reference" or x.dtype == torch.float64
