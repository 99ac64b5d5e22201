import math

import pytest
import torch
from torch.library import opcheck

import bincomm
from bincomm.ops import reference


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 33), (1,), (31,), (4, 1000), (0, 40), (3, 0), (700, 250)])
def test_round_trip_and_reference(shape, dtype):
    logits = torch.randn(shape, dtype=dtype)
    words = bincomm.pack_signs(logits)
    assert words.dtype == torch.int32
    assert words.shape == (*shape[:-1], -(-shape[-1] // 32))
    assert torch.equal(words, reference.pack_signs(logits))
    assert torch.equal(bincomm.unpack_signs(words, shape[-1]), logits > 0)
    assert torch.equal(reference.unpack_signs(words, shape[-1]), logits > 0)


def test_the_layout_of_the_bits():
    logits = torch.full((70,), -1.0)
    logits[[0, 31, 32, 69]] = 1.0
    assert bincomm.pack_signs(logits).tolist() == [1 - 2**31, 1, 1 << 5]


def test_what_is_a_one():
    logits = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45])
    assert bincomm.unpack_signs(bincomm.pack_signs(logits), 7).tolist() == [
        False,
        False,
        False,
        True,
        False,
        True,
        False,
    ]


def test_strides_change_nothing():
    logits = torch.randn(6, 80, 5)
    assert torch.equal(bincomm.pack_signs(logits.mT), bincomm.pack_signs(logits.mT.contiguous()))
    words = bincomm.pack_signs(torch.randn(4, 6, 80))
    assert torch.equal(
        bincomm.unpack_signs(words[::2].transpose(0, 1), 80),
        bincomm.unpack_signs(words, 80)[::2].transpose(0, 1),
    )


def test_opcheck():
    opcheck(torch.ops.bincomm.pack_signs, (torch.randn(3, 40),))
    opcheck(torch.ops.bincomm.unpack_signs, (bincomm.pack_signs(torch.randn(3, 40)), 40))


def test_packing_has_no_gradient():
    assert not bincomm.pack_signs(torch.randn(3, 40, requires_grad=True)).requires_grad


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="logits: .*int64"):
        bincomm.pack_signs(torch.arange(3))
    with pytest.raises(ValueError, match="logits"):
        bincomm.pack_signs(torch.tensor(1.0))
    with pytest.raises(TypeError, match="messages: .*float32"):
        bincomm.unpack_signs(torch.randn(3), 96)
    with pytest.raises(ValueError, match=r"messages: 40 bits .*\(\.\.\., 2\).*\(3, 3\)"):
        bincomm.unpack_signs(torch.zeros(3, 3, dtype=torch.int32), 40)
