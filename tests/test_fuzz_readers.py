"""The script that tries damaged files runs; `make test-fuzz` runs it for longer."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_one_case_of_each_kind():
    script = Path(__file__).parent / "fuzz_readers.py"
    for seed in ("2", "3", "4", "5"):
        done = subprocess.run([sys.executable, script, "--seed", seed], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 cases, 0 findings" in done.stdout
