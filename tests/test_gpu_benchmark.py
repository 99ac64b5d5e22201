"""`make gpu` without a GPU: no stage can stop another one, and the page is made of the figures there are."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_stages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU"),
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs it with arguments; its status, its page and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "gpu"), *arguments])
        monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
        before = signal.getsignal(signal.SIGTERM)
        status = gpu.main()
        assert signal.getsignal(signal.SIGTERM) == before
        return status, (tmp_path / "gpu.md").read_text(), capsys.readouterr().out

    return run


def write_lines(path, *lines):
    path.write_text("".join(json.dumps({"time": "2026-01-02T03:04:05", **line}) + "\n" for line in lines))


def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_next(run, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.SECONDS, "tests", 0.3)
    status, page, printed = run("--stages", "tests,ceilings")
    assert status == 1
    assert "| tests | ran out of time | 0." in page
    assert "| ceilings | failed with status 1 |" in page
    assert "torch finds no GPU; --dry rehearses without one" in page
    assert "| step | not measured |  |" in page
    assert printed.index("tests ran out of time") < printed.index("ceilings failed")
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines if line["stage"] == "ceilings"] == ["begin", "end"]


def test_what_is_interrupted_leaves_a_page(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path / "gpu"), "--stages", "tests,step"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "tests ..." in process.stdout.readline()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    page = (tmp_path / "gpu.md").read_text()
    assert "| tests | interrupted |" in page
    assert "| step | not measured |  |" in page
    assert page in printed


def test_unknown_stages_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--stages", "tests,other")
    assert "--stages: expected some of ceilings, build, " in capsys.readouterr().err


def test_the_page_has_the_last_run_of_each_stage(tmp_path):
    path = tmp_path / "gpu.jsonl"
    figure = {"stage": "operations", "what": "sign_bce", "direction": "forward"}
    times = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    write_lines(
        path,
        {"stage": "operations", "what": "begin"},
        {**figure, "contender": "bincomm", "graph_us": {**times, "p50": 9.0}, "moved": 100},
        {"stage": "ceilings", "what": "begin"},
        {"stage": "ceilings", "what": "machine", "words": "a GPU"},
        {"stage": "ceilings", "what": "copy", "words": "50 MB/s", "bytes_per_second": 1e8},
        {"stage": "ceilings", "what": "end", "status": "passed", "seconds": 3},
        {"stage": "operations", "what": "begin"},
        {**figure, "contender": "bincomm", "graph_us": times, "moved": 100},
        {**figure, "contender": "peer", "graph_us": {**times, "p50": 5.0}, "moved": 100},
        {**figure, "contender": "other", "graph_us": "operation not permitted"},
        {**figure, "what": "coding_rate", "contender": "bincomm", "error": "the gradient is off"},
    )
    with open(path, "a") as file:
        file.write('{"stage": "operations", "wh')  # the machine went away
    page = gpu.page("gpu", gpu.Lines(path).read())
    assert "`make gpu` on 2026-01-02: a GPU." in page
    assert "| operations | did not end |  |" in page
    peers = "peer: 5 (1 – 3) · 2.5×; other: no graph: operation not permitted"
    assert f"| sign_bce | forward | 2 (1 – 3) | 50% | {peers} |" in page
    assert "| coding_rate | forward | the gradient is off |  |  |" in page
    assert "9" not in page.split("## Operations")[1].replace("fp64", "")
    assert "- copy: 50 MB/s" in page


def test_the_page_of_tests_names_those_that_failed(tmp_path):
    path = tmp_path / "gpu.jsonl"
    write_lines(
        path,
        {"stage": "tests", "what": "begin"},
        {"stage": "tests", "what": "a", "outcome": "passed", "reason": ""},
        {"stage": "tests", "what": "b", "outcome": "failed", "reason": "AssertionError: 1"},
        {"stage": "tests", "what": "c", "outcome": "skipped", "reason": "needs DALI"},
        {"stage": "tests", "what": "end", "status": "failed with status 1", "seconds": 3, "tail": ["x", "y"]},
    )
    section = gpu.page("gpu", gpu.Lines(path).read()).split("## Tests")[1]
    assert section.split("\n\n") == [
        "",
        "1 passed, 1 failed, 1 skipped.",
        "Failed:",
        "- b: AssertionError: 1",
        "Skipped:",
        "- needs DALI",
        "```text\nx\ny\n```\n",
    ]


def test_without_figures_the_page_says_so():
    assert "Not measured yet. `make gpu`" in gpu.page("gpu", {})


def test_every_key_figure_is_measured(tmp_path, monkeypatch):
    """On a CPU with small shapes; what a GPU is asked for is the same."""
    monkeypatch.setattr(gpu_stages, "compile_everything", lambda add: 0)
    figures = []
    assert gpu_stages.operations(lambda **line: figures.append(line), dry=True) == 0
    assert all(line["graph_us"]["p50"] > 0 for line in figures)
    operations = {line["what"].split()[0] for line in figures}
    assert operations == {"sign_bce", "coding_rate", "objective", "clip_gradients_", "hamming_topk"}
    peers = [line for line in figures if line["contender"] != "bincomm"]
    clipped = {"within the limit", "copied, and all clipped"}
    assert {line["direction"] for line in peers} == {"forward", "backward", "both", "search", *clipped}


def test_a_wrong_result_is_no_figure(monkeypatch):
    monkeypatch.setattr(gpu_stages, "key_operations", lambda dry: iter(()))
    monkeypatch.setattr(gpu_stages, "compile_everything", lambda add: 0)
    monkeypatch.setattr("bincomm.hamming_topk", lambda queries, database, k: (queries[:, :1],) * 2)
    monkeypatch.setattr("bincomm.ops.clip.clip_gradients_", lambda gradients, limit: torch.zeros(()))
    figures = []
    assert gpu_stages.operations(lambda **line: figures.append(line), dry=True) == 1
    errors = [line["error"].split(":")[0] for line in figures if "error" in line]
    assert errors == ["Scalars are not close!"] * 2 + ["wrong neighbors"]


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_specialization_compiles(capability, tmp_path):
    """What the launchers ask Triton for, by a driver that launches nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.mock_driver", str(capability)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    names = done.stdout.splitlines()
    assert len(names) > 100
    assert set(names) == {
        "sign_bce_forward_kernel",
        "sign_bce_backward_kernel",
        "sign_bce_reduce_kernel",
        "count_ones_kernel",
        "weigh_rate_kernel",
        "pack_signs_kernel",
        "unpack_signs_kernel",
        "hamming_distance_kernel",
        "hamming_select_kernel",
    }
