"""What docs/launching.md names: the script for Slurm is rehearsed, manifest and image are read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_run import OPTIONS
from torch.distributed.run import get_args_parser

from bincomm import cli
from bincomm.configuration import configure

ROOT = Path(__file__).parent.parent

# Two tasks on one machine, which get the signals that it gets; its status is the highest of theirs.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
tasks = []
for task in "01":
    place = {{"SLURM_NTASKS": "2", "SLURM_PROCID": task, "SLURM_LOCALID": task}}
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | place))
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> requeued
"""


@pytest.fixture
def slurm(tmp_path):
    """Start the script in a folder where Slurm's commands are these."""
    commands = {"srun": SRUN, "scontrol": SCONTROL}
    commands["bincomm"] = f'#!/bin/bash\nexec "{sys.executable}" -m bincomm.cli "$@"\n'
    for name, text in commands.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
    }

    def start(*options):
        command = ["bash", str(ROOT / "examples" / "slurm.sh"), *options]
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    return start


@pytest.mark.long
def test_a_job_of_slurm_is_saved_and_requeued_when_its_time_is_over(slurm, tmp_path):
    options = [f"--{key}={value}" for key, value in OPTIONS.items() if key != "max_steps"]
    options += ["--threads=1", "--output=run", "--device=cpu"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    job = slurm(*options, "--max_steps=4000")
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert job.poll() is None
            time.sleep(0.1)
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
        assert job.wait(timeout=60) == cli.SAVED
    finally:
        job.kill()
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    checkpoints = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoints]
    assert max(steps) >= 10


def documents(path):
    return list(yaml.safe_load_all((ROOT / path).read_text()))


def test_the_manifest_starts_a_rank_for_each_gpu_on_pods_that_find_each_other():
    service, job = documents("examples/kubernetes.yaml")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    options = get_args_parser().parse_args(container["args"])
    assert int(options.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert options.rdzv_endpoint == f"{name}-0.{service['metadata']['name']}:29400"
    assert [options.training_script, *options.training_script_args[:1]] == ["bincomm", "pretrain"]
    keys = dict(each.removeprefix("--").split("=") for each in options.training_script_args[1:])
    configure(**keys)
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_an_image_is_made_from_what_is_in_the_repository_by_another_user_than_root():
    text = (ROOT / "Dockerfile").read_text()
    (base,) = [line.split()[1] for line in text.splitlines() if line.startswith("FROM ")]
    assert base.partition(":")[2] not in ("", "latest")
    assert text.index("USER bincomm") < text.index("ENTRYPOINT")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "**/*.so"} <= set(ignored)
