"""`fuzz_operations.py` itself: it finds nothing in a few trials, and would tell."""

import fuzz_operations
import pytest
import torch

import bincomm


@pytest.mark.slow
def test_a_few_trials_find_nothing(capsys):
    assert fuzz_operations.main(["--trials", "200", "--seed", "7"]) == 0
    assert capsys.readouterr().out == "200 trials from seed 7: no findings\n"


def test_a_finding_is_printed_with_its_seed(monkeypatch, capsys):
    seed = next(seed for seed in range(100) if fuzz_operations.trial(seed)[0] == "messages")
    monkeypatch.setattr(bincomm, "pack_signs", lambda logits: torch.ones(1, dtype=torch.int32))
    assert fuzz_operations.main(["--trials", "1", "--seed", str(seed)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(f"messages, seed {seed}: the messages differ\n")
    assert f"repeat: python tests/fuzz_operations.py --seed {seed} --trials 1\n" in shown
