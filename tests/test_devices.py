"""Which device a rank takes, and launchers that do not say what the ranks need to know."""

import pytest
import torch

from bincomm.distributed.ranks import join_ranks, refuse_shared_devices


def device_of(monkeypatch, local_rank, visible):
    """The device that a rank takes which sees some GPUs."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with join_ranks("auto") as ranks:
        return str(ranks.device)


@pytest.mark.parametrize(
    ("local_rank", "visible", "device"), [(0, 1, "cuda:0"), (3, 4, "cuda:3"), (2, 1, "cuda:0"), (1, 0, "cpu")]
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(monkeypatch, local_rank, visible, device):
    assert device_of(monkeypatch, local_rank, visible) == device


def test_a_rank_without_a_gpu_among_several_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="device: expected a GPU for each rank .* got 2 for rank 2"):
        device_of(monkeypatch, 2, 2)


def test_one_gpu_for_two_ranks_is_refused():
    refuse_shared_devices([("a", "0", "cuda:0", "1"), ("a", "1", "cuda:0", "2"), ("b", "0", "cuda:0", "1")])
    with pytest.raises(ValueError, match="got the same one for ranks 0 and 2, on a; start fewer"):
        refuse_shared_devices([("a", "", "cuda:0", "1"), ("b", "", "cuda:0", "1"), ("a", "", "cuda:0", "1")])


@pytest.mark.parametrize(
    ("launcher", "variable", "rank"),
    [
        ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_processes_that_do_not_know_each_other_are_told_how(monkeypatch, launcher, variable, rank):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "4")
    words = rf"{launcher} has started 4 processes, .* WORLD_SIZE=\${variable} RANK=\${rank} .*MASTER_ADDR"
    with pytest.raises(ValueError, match=words), join_ranks("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")  # each is a job of its own
    with join_ranks("cpu") as ranks:
        assert ranks.world == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv(variable, "1")
    with join_ranks("cpu") as ranks:
        assert ranks.world == 1
