"""Build a program that runs a kernel's own source on the CPU (fibers.h), under sanitizers."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(source: str, folder: Path, *includes: Path) -> Path:
    """The program compiled in `folder` from C++ `source`, which finds fibers.h and what is in `includes`."""
    (folder / "program.cpp").write_text(source)
    folders = [f"-I{path}" for path in (Path(__file__).parent, *includes)]
    command = [shutil.which("g++") or "g++", *FLAGS, *folders, "program.cpp", "-o", "program"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return folder / "program"


def _what_is_missing():
    if not shutil.which("g++"):
        return "there is no g++"
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = build("#include <source_location>\nint main() {}", Path(folder))
        except RuntimeError as error:
            return f"g++ cannot build for C++20 with its sanitizers: {str(error).splitlines()[-1]}"
        if subprocess.run([program], capture_output=True).returncode:
            return "g++'s sanitizers do not run here"
    return ""


_MISSING = _what_is_missing()
NEEDS_COMPILER = pytest.mark.skipif(bool(_MISSING), reason=_MISSING)
