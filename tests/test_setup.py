"""`make setup`, which may be interrupted, or called twice at once; with a stand-in for Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
# Makes an environment as `python -m venv` does: its python first, its pip last.
PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in
  "-m venv --clear .venv")
    rm -rf .venv; mkdir -p .venv/bin; cp python .venv/bin/python
    test "$INTERRUPTED" && exit 130
    touch .venv/pip;;
  "-m pip"*) test -e .venv/pip;;
  "-c "*) echo timm;;
  *) exit 9;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Begins `make setup` in a folder of its own, which is its attribute `folder`."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    # Not the variables of a `make` that runs these tests.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }

    def begin(**variables):
        command = ["make", "setup", "PYTHON=./python"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment | variables, stderr=subprocess.DEVNULL)

    begin.folder = tmp_path
    return begin


def times_made(folder):
    return (folder / "calls").read_text().splitlines().count("-m venv --clear .venv")


def test_an_interrupted_setup_is_taken_up_again(setup):
    assert setup(INTERRUPTED="yes").wait() != 0
    assert (setup.folder / ".venv/bin/python").exists()
    assert setup().wait() == 0
    assert (setup.folder / ".venv/ready").exists()
    assert times_made(setup.folder) == 2
    assert setup().wait() == 0
    assert times_made(setup.folder) == 2


def test_two_at_once_make_one(setup):
    if shutil.which("flock") is None:
        pytest.skip("flock is not installed")
    assert [process.wait() for process in [setup(), setup()]] == [0, 0]
    assert times_made(setup.folder) == 1
