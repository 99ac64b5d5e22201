import json
import subprocess
import sys

import pytest

import bincomm
from bincomm import cli


def test_doctor_tells_what_runs_where(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "sign_bce_backward" in text
    assert bincomm.doctor()["extension"].get("compiler", "is missing") in text
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"]["coding_rate_factor"]["cpu"] == "C++"
    assert report["kernels"]["coding_rate_backward"]["cpu"] == "C++, BLAS"
    assert report["kernels"]["sign_bce"]["cpu"] == "C++"


def test_help_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "pretrain" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["pretrian"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err
    assert cli.main(["doctor", "--jason"]) == 2


def test_help_of_pretrain_explains_every_key():
    found = subprocess.run(
        [sys.executable, "-m", "bincomm.cli", "pretrain", "--help"], capture_output=True, text=True
    )
    assert found.returncode == 0
    assert "--reset_every" in found.stdout
    assert "draw the head anew every so many epochs" in found.stdout


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m bincomm.cli doctor | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert found.stdout.split() == ["141"]
    assert found.stderr == ""


def test_numbers_and_names_that_are_none(capsys):
    for arguments in (["search", "codes", "--query=a", "--k=1.5"], ["evaluate", "runs/x", "--threads=0"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "expected a whole number of at least 1, got" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "", "--data=digits"])
    assert "expected a path or a name, got an empty string" in capsys.readouterr().err
