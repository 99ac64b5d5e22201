"""Build a program that runs a kernel's own source on the CPU (fibers.h), under sanitizers."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

FLAGS = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(source: str, folder: Path, *includes: Path) -> Path:
    """Compile C++ `source` in `folder`, with fibers.h and the folders `includes`; return the program."""
    (folder / "program.cpp").write_text(source)
    folders = [f"-I{path}" for path in (Path(__file__).parent, *includes)]
    command = [shutil.which("g++") or "g++", *FLAGS, *folders, "program.cpp", "-o", "program"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{process.stderr}")
    return folder / "program"


def _reason_to_skip():
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


REASON = _reason_to_skip()
NEEDS_COMPILER = pytest.mark.skipif(bool(REASON), reason=REASON)
