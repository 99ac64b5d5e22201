"""The operations on several ranks: together they are one rank with all images."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bincomm
from bincomm.ops.clip import clip_gradients_

pytestmark = pytest.mark.slow
COUNTS = [(6, 6), (5, 5, 5), (3, 9)]  # images of each rank


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank computed; one group of processes serves all tests, because it takes long to start."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(compute_on_ranks, 3, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def compute_on_ranks(rank, world, folder):
    two = dist.new_group([0, 1])
    results = {"clip": clip_sharded(world)}
    if rank < 2:
        results["sign_bce"] = bce_in_parallel(rank, two)
    for counts in COUNTS:
        if rank < len(counts):
            results[counts] = rate_in_parallel(rank, counts, two if len(counts) == 2 else dist.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()


def test_sign_bce_in_parallel_is_that_of_all_images(results):
    """Two ranks with 4 images each, averaged by DistributedDataParallel, against one with 8."""
    network, images, teacher = bce_inputs()
    bincomm.sign_bce(network(images), teacher).backward()
    for rank in range(2):
        for gradient, parameter in zip(results[rank]["sign_bce"], network.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-8)


def bce_inputs():
    torch.manual_seed(0)
    return nn.Linear(8, 40), torch.randn(3, 8, 8), torch.randn(2, 8, 40)


def bce_in_parallel(rank, group):
    network, images, teacher = bce_inputs()
    parallel = DistributedDataParallel(network, process_group=group)
    own = slice(4 * rank, 4 * rank + 4)
    bincomm.sign_bce(parallel(images[:, own]), teacher[:, own]).backward()
    return [p.grad for p in network.parameters()]


@pytest.mark.parametrize("counts", COUNTS)
def test_coding_rate_in_parallel_is_that_of_all_images(results, counts):
    """Ranks with a part of the images each, averaged by DistributedDataParallel, against one with all."""
    network, images = rate_inputs(sum(counts))
    expected = bincomm.coding_rate(network(images), diagnostics=True)
    (expected.rate * torch.tensor([1.0, 2.0])).sum().backward()
    for rank in range(len(counts)):
        assert len(results[rank][counts]) == 2  # eager and compiled
        for result in results[rank][counts]:
            torch.testing.assert_close(result["rate"], expected.rate.detach(), rtol=1e-5, atol=0)
            torch.testing.assert_close(result["ceiling"], expected.ceiling, rtol=1e-6, atol=0)
            torch.testing.assert_close(result["exact"].float(), expected.rate.detach(), rtol=1e-5, atol=0)
            for gradients in (result["gradients"], result["exact_gradients"]):
                for gradient, parameter in zip(gradients, network.parameters(), strict=True):
                    assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


def rate_inputs(n):
    torch.manual_seed(0)
    return nn.Linear(8, 40), torch.randn(2, n, 8)


def rate_in_parallel(rank, counts, group):
    weights = torch.tensor([1.0, 2.0])

    def rates(logits):
        return bincomm.coding_rate(logits, group=group, diagnostics=True)

    results = []
    for function in (rates, torch.compile(rates, fullgraph=True, backend="aot_eager")):
        network, images = rate_inputs(sum(counts))
        parallel = DistributedDataParallel(network, process_group=group)
        own = images[:, sum(counts[:rank]) : sum(counts[: rank + 1])]
        result = function(parallel(own))
        (result.rate * weights).sum().backward()
        # The definition adds up the same sums.
        exact_network = rate_inputs(sum(counts))[0].double()
        parallel = DistributedDataParallel(exact_network, process_group=group)
        exact = bincomm.coding_rate(parallel(own.double()), group=group)
        (exact * weights).sum().backward()
        results.append(
            {
                "rate": result.rate.detach(),
                "ceiling": result.ceiling,
                "gradients": [p.grad for p in network.parameters()],
                "exact": exact.detach(),
                "exact_gradients": [p.grad.float() for p in exact_network.parameters()],
            }
        )
    return results


def test_sharded_gradients_are_clipped_by_their_full_norm(results):
    gradients = full_gradients()
    norm = clip_gradients_(gradients, 1.0)
    for rank in range(3):
        is_sharded, sharded_norm, sharded = results[rank]["clip"]
        assert is_sharded == [True, True, True, False]
        torch.testing.assert_close(sharded_norm, norm)
        for gradient, expected in zip(sharded, gradients, strict=True):
            torch.testing.assert_close(gradient, expected)


def full_gradients():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    network(torch.randn(4, 5)).mul(100).sum().backward()
    return [p.grad for p in network.parameters()]


def clip_sharded(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    gradients = full_gradients()
    mesh = init_device_mesh("cpu", (world,))
    sharded = [distribute_tensor(g.clone(), mesh, [Shard(0)]) for g in gradients[:2]]
    sharded += [distribute_tensor(gradients[2].clone(), mesh, [Replicate()]), gradients[3].clone()]
    norm = clip_gradients_(sharded, 1.0)
    is_sharded = [isinstance(g, DTensor) for g in sharded]
    return is_sharded, norm, [g.full_tensor() if isinstance(g, DTensor) else g for g in sharded]
