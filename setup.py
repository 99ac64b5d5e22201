"""Build bincomm and its extension `bincomm._C`.

The metadata is in pyproject.toml; this file only builds. C++ is always compiled, CUDA if nvcc is found:

    BINCOMM_CUDA=auto|0|1   auto (default) builds CUDA if possible and prints why not; 1 makes that an error
    TORCH_CUDA_ARCH_LIST    GPU architectures, like "8.0;9.0+PTX"; default: ARCHITECTURES, if nvcc has them
    MAX_JOBS                compiler processes; default: one per usable CPU, fewer where memory is short

The extension is written against PyTorch's stable ABI: one binary serves torch 2.11 and every later release.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11.0
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
MEMORY_PER_JOB = 2 << 30  # bytes; one nvcc process with its four device passes peaks near 1.5 GiB


def output_of(*command: str | Path) -> str:
    """What a command prints to stdout and stderr."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def find_cuda(torch_cuda: str | None) -> tuple[str | None, str]:
    """Return (CUDA home, nvcc version) or (None, why CUDA code is not built)."""
    choice = os.environ.get("BINCOMM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"BINCOMM_CUDA={choice!r}: expected auto, 0 or 1")
    if choice == "0":
        return None, "BINCOMM_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home or "/usr/local/cuda", "bin", "nvcc")
    if not home and (on_path := shutil.which("nvcc")):
        nvcc = Path(on_path)
    if torch_cuda is None:
        reason = "this torch has no CUDA support"
    elif not Path(nvcc).exists():
        reason = f"nvcc was not found{' on PATH or' if not home else ''} at {nvcc}"
    else:
        release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
        version = release.group(1) if release else "unknown"
        if version.split(".")[0] == torch_cuda.split(".")[0]:
            # The nvcc on PATH may be a wrapper script, whose folder is not the toolkit's: ask it.
            top = re.search(
                r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE
            )
            return os.path.realpath(top.group(1)) if top else str(nvcc.resolve().parent.parent), version
        reason = f"nvcc is CUDA {version}, torch needs CUDA {torch_cuda}: the major versions must agree"
    if choice == "1":
        raise SystemExit(f"BINCOMM_CUDA=1 asks for the CUDA kernels, but {reason}")
    return None, reason


def supported_architectures(cuda_home: str) -> str:
    """The default architectures that this nvcc supports; the last one also as PTX for future GPUs."""
    nvcc = os.path.join(cuda_home, "bin", "nvcc")
    listed = output_of(nvcc, "--list-gpu-arch")
    known = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}\n" in listed]
    return ";".join(known) + "+PTX"


def limit_jobs() -> None:
    """A compiler process for each CPU that this process may use, and MEMORY_PER_JOB of memory for each of
    them, unless MAX_JOBS is set."""
    if "MAX_JOBS" in os.environ:
        return
    cpus, memory = group_limits()
    if hasattr(os, "sched_getaffinity"):
        cpus = min(cpus, len(os.sched_getaffinity(0)))
    available = re.search(r"MemAvailable:\s*(\d+) kB", text_of("/proc/meminfo"))
    if available:
        memory = min(memory, int(available.group(1)) * 1024)
    os.environ["MAX_JOBS"] = str(max(1, int(min(cpus, memory / MEMORY_PER_JOB, os.cpu_count() or 1))))


def group_limits(root: str = "/") -> tuple[float, float]:
    """CPUs and bytes of memory that Linux's control groups give this process, as containers and schedulers
    limit them; infinity without a limit."""
    cpus, memory = [math.inf], [math.inf]
    for line in text_of(f"{root}/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)  # no controllers: version 2 of control groups
        for folder in (Path(path), *Path(path).parents):  # a limit of any of them holds
            group = f"{root}/sys/fs/cgroup/{controllers}{folder}"
            quota, _, period = text_of(f"{group}/cpu.max").partition(" ")
            if not quota:
                quota, period = (text_of(f"{group}/cpu.cfs_{name}_us") for name in ("quota", "period"))
            if quota.strip().isdigit() and period.strip().isdigit():  # neither max nor -1
                cpus.append(int(quota) / int(period))
            limit = (text_of(f"{group}/memory.max") or text_of(f"{group}/memory.limit_in_bytes")).strip()
            if limit.isdigit():
                memory.append(int(limit))
    return min(cpus), min(memory)


def text_of(path: str) -> str:
    """What a file holds; "" where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def one_word(compiler: str, folder: Path) -> str:
    """A compiler by a command of one word, which is all that torch and nvcc take: where there are several, as
    in "ccache g++", a script in a folder."""
    words = shlex.split(compiler)
    if len(words) < 2:
        return compiler
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / re.sub(r"\W+", "-", compiler)
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def extension() -> tuple[list[Extension], type[build_ext]]:
    """The extension to build, and the command that builds it."""
    try:
        import pybind11
        import torch
    except ImportError as error:
        raise SystemExit(
            f"bincomm is compiled against the torch it will run with, but `import {error.name}` failed.\n"
            "Install torch first and build without isolation:\n"
            "    pip install torch 'setuptools>=70.1' ninja pybind11\n"
            "    pip install --no-build-isolation bincomm"
        ) from error
    cuda_home, cuda = find_cuda(torch.version.cuda)
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # read by torch.utils.cpp_extension when it is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", supported_architectures(cuda_home))
    else:
        print(f"bincomm: building without CUDA kernels: {cuda}")
    limit_jobs()
    from torch.utils import cpp_extension

    def text(value: str) -> str:
        return '"' + value.replace('"', "'") + '"'

    define = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("BINCOMM_CUDA_VERSION", text(cuda if cuda_home else "")),
        ("BINCOMM_CUDA_ARCHITECTURES", text(os.environ["TORCH_CUDA_ARCH_LIST"] if cuda_home else "")),
        ("BINCOMM_NO_CUDA_REASON", text("" if cuda_home else cuda)),
        ("BINCOMM_TORCH_VERSION", text(torch.__version__)),
    ]
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    flags.append("-g0")  # Python's own flags have -g: half of the binary, with paths of the building machine
    options: dict[str, Any] = {
        "sources": sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp")),
        "depends": sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.*h")),
        "include_dirs": [pybind11.get_include()],
        "define_macros": define,
        "extra_compile_args": {"cxx": flags},
        "extra_link_args": ["-Wl,--as-needed"],  # libtorch_python and libtorch_cuda are not used
    }
    if cuda_home:
        options["sources"] += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cu"))
        options["define_macros"] = [*define, ("USE_CUDA", "1")]
        options["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20", "--threads=2"]
        built = cpp_extension.CUDAExtension("bincomm._C", **options)
        # The runtime is linked statically: the binary then needs nothing of the toolkit it was built with.
        built.libraries.remove("cudart")
        built.libraries += ["cudart_static", "rt", "dl"]
    else:
        built = cpp_extension.CppExtension("bincomm._C", **options)

    class Build(cpp_extension.BuildExtension):
        """BuildExtension that lets a machine without a C++ compiler install the rest."""

        def run(self):
            compiler = cpp_extension.get_cxx_compiler()
            words = shlex.split(compiler)  # CXX may be "ccache g++"
            if not words or shutil.which(words[0]) is None:
                if os.environ.get("BINCOMM_CUDA") == "1":
                    raise SystemExit(f"BINCOMM_CUDA=1: there is no C++ compiler ({compiler}) to build with")
                print(
                    f"bincomm: no C++ compiler ({compiler}) was found: bincomm._C is not built, operations\n"
                    "bincomm: run in PyTorch, more slowly; see `bincomm doctor`"
                )
                self.extensions = []
                return
            for variable in ("CC", "CXX"):
                if variable in os.environ:
                    os.environ[variable] = one_word(os.environ[variable], Path(self.build_temp).absolute())
            super().run()

    return [built], Build.with_options(no_python_abi_suffix=False)


modules, builder = extension()
setup(
    license="Apache-2.0",  # not in pyproject.toml, where old and new setuptools expect different forms
    packages=find_packages(include=["bincomm", "bincomm.*"]),
    package_dir={"bincomm.kernels": "kernels"},  # in a checkout: bincomm/kernels/__init__.py
    ext_modules=modules,
    cmdclass={"build_ext": builder},
)
