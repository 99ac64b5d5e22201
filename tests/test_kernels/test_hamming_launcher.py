"""The launcher under Triton's interpreter; on a GPU, tests/test_gpu runs it through the operations."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("these tests need Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from bincomm.kernels import hamming  # noqa: E402
from bincomm.ops import reference  # noqa: E402

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize(("n", "m", "words"), [(1, 1, 1), (33, 70, 2), (64, 32, 3), (5, 40, 32), (0, 3, 1)])
def test_distances_of_all_pairs(n, m, words):
    a, b = (torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int32) for rows in (n, m))
    assert torch.equal(hamming.hamming_distance(a, b), reference.hamming_distance(a, b))


def test_strides():
    a, b = (torch.randint(-(2**31), 2**31, (3, 80), dtype=torch.int32) for _ in range(2))
    found = hamming.hamming_distance(a.mT[::2], b.mT)
    assert torch.equal(found, reference.hamming_distance(a.mT[::2], b.mT))
