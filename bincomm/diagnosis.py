"""What is built, installed and used on this machine, and the consequences of a missing part."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

# All, to register their operations.
from bincomm.ops import (  # noqa: F401
    clip,
    coding_rate,
    discrete_communication,
    hamming,
    library,
    messages,
    sign_bce,
)

PACKAGES = {
    "triton": "the fused kernels for CUDA tensors; without it the slower PyTorch implementation runs",
    "timm": "backbones; without it there is no training",
    "nvidia.dali": "the data pipeline; without it there is no training",
    "jsonargparse": "the command line and recipes; without it there is no training",
    "argcomplete": "completion of commands by the shell; nothing else needs it",
    "safetensors": "export of backbones; without it there is no training",
    "sklearn": "the digits, the data of the first run",
    "matplotlib": "curves and plots; without it there is no training",
    "tensorboard": "a run's event files; without it there is no training",
    "tqdm": "the bar; without it there is no training",
    "PIL": "images that DALI does not take; without it there is no training",
    "yaml": "recipes; without it there is no training",
    "pyarrow": "codes in files and images in Parquet; without it there are no encode, search and codes",
    "faiss": "the index of encode --index; nothing else needs it",
    "onnxscript": "the ONNX files of export; nothing else needs it",
    "onnxruntime": "the check of ONNX files by export; nothing else needs it",
    "scipy": "the page about codes, evaluation on DAVIS, and the sets flowers102 and svhn need it",
    "pycocotools": "evaluate --objects; nothing else needs it",
}
EXTRAS = {"faiss": "eval", "scipy": "eval", "pycocotools": "eval"}  # that bring a package; else train
EXTRAS |= {"onnxscript": "export", "onnxruntime": "export"}
DISTRIBUTIONS = {
    "nvidia.dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
    "sklearn": ("scikit-learn",),
    "PIL": ("pillow",),
    "yaml": ("pyyaml",),
    "faiss": ("faiss-cpu", "faiss-gpu"),
}


def doctor() -> dict[str, Any]:
    """What is built, installed and used.

    Returns:
        "versions", "packages" (name -> version or None), "extension" (what `bincomm._C` was built from, or
        why it is missing), "devices", "kernels" (operation -> device -> what runs there), "environment"
        (variables read) and "notes": one line for each missing part with its consequence.
    """
    report: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "extension": library._C.build_facts() if library._C else {"missing": library._C_ERROR},
        "devices": _devices(),
        "kernels": library.KERNELS,
        "environment": {"BINCOMM_BACKEND": library.BACKEND},
    }
    report["notes"] = _notes(report)
    return report


def describe(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = []
    for section in ("versions", "packages", "extension", "environment"):
        lines.append(section)
        lines += [
            f"  {name:20} {'-' if value in (None, '') else value}" for name, value in report[section].items()
        ]
    lines.append("devices")
    lines += [f"  {device}" for device in report["devices"]]
    lines.append("kernels")
    for name, kernels in report["kernels"].items():
        cells = (f"{device}: {kernel}" for device, kernel in kernels.items())
        lines.append(f"  {name:26} " + "  ".join(cells))
    lines.append("notes" if report["notes"] else "notes: none, nothing is missing")
    lines += [f"  - {note}" for note in report["notes"]]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except ModuleNotFoundError:  # of a parent package
        return None
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "installed"


def _devices() -> list[str]:
    devices = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        line = f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}"
        line += f", {properties.total_memory / 2**30:.0f} GiB"
        if library._C and hasattr(library._C, "device_code"):
            try:
                major, minor, from_ptx = library._C.device_code(index)
                line += f", bincomm's CUDA code: sm_{major}{minor}{' compiled from PTX' if from_ptx else ''}"
            except RuntimeError as error:
                line += f", bincomm's CUDA code fails ({error})"
        devices.append(line)
    return devices


def _notes(report: dict[str, Any]) -> list[str]:
    notes = []
    if library._C is None:
        notes.append(
            f"bincomm._C cannot be imported ({library._C_ERROR}): on the CPU the operations run in PyTorch, "
            "sign_bce several times slower. Build it with a C++ compiler: "
            "pip install --no-build-isolation bincomm, or python setup.py build_ext --inplace in a checkout."
        )
    else:
        facts = report["extension"]
        if facts["no_cuda_reason"]:
            notes.append(
                f"bincomm._C was built without CUDA code: {facts['no_cuda_reason']}. On CUDA tensors "
                "coding_rate runs in PyTorch, more slowly."
            )
        if facts["torch"].split("+")[0] != torch.__version__.split("+")[0]:
            notes.append(
                f"bincomm._C was built with torch {facts['torch']}; the stable ABI lets it run with this one."
            )
    if not torch.cuda.is_available():
        reason = "this torch has no CUDA support" if torch.version.cuda is None else "torch finds no GPU"
        notes.append(f"{reason}: everything runs on the CPU, which is enough for the digits and little more.")
    elif report["kernels"]["sign_bce"]["cuda"] == "PyTorch":
        notes.append("no Triton kernels for CUDA tensors: sign_bce and the messages run in PyTorch there.")
    for package, installed in report["packages"].items():
        if installed is None:
            extra = EXTRAS.get(package, "train")
            what = "triton" if package == "triton" else f"'bincomm[{extra}]'"
            notes.append(f"{package} is not installed: {PACKAGES[package]}. pip install {what}")
    return notes
