"""Use of the bits of a code: entropy, dead bits, the share of the more frequent value."""

import math

import torch
from torch import Tensor

DEAD_SHARE = 0.01  # a bit is dead if it has its less frequent value in less than this share of the messages


def binary_entropy(p: Tensor) -> Tensor:
    """`-p log₂ p - (1-p) log₂(1-p)` of shares p, in bits."""
    return (0 - torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)) / math.log(2)


def bit_statistics(ones: Tensor, messages: int) -> dict[str, float]:
    """Use of the bits.

    Args:
        ones: (K,), how many of the messages have a 1 in each bit.
        messages: their number.

    Returns:
        "bit_entropy" and "bit_entropy_min": mean and minimum over the bits; "dead_bits": a share of
        the bits; "bit_majority": mean share of the more frequent value.
    """
    p = ones.double() / messages
    entropy = binary_entropy(p)
    return {
        "bit_entropy": entropy.mean().item(),
        "bit_entropy_min": entropy.min().item(),
        "dead_bits": (torch.minimum(p, 1 - p) < DEAD_SHARE).double().mean().item(),
        "bit_majority": torch.maximum(p, 1 - p).mean().item(),
    }


def transmitted_bits(ones: Tensor, cross_entropy: Tensor, messages: int) -> float:
    """`Σ_k max(0, H(p_k) - CE_k)`, how many of the K bits of a message reach the student.

    H is a bit's entropy, CE the cross-entropy of its prediction, so their difference is a lower bound of the
    information about the bit in the student's logit. It is 0 for a bit that is nearly constant, and for one
    that the student does not predict better than by its frequency. Bits that repeat each other all count.

    Args:
        ones: (K,), how many of the messages have a 1 in each bit.
        cross_entropy: (K,), summed over the messages, in bits.
        messages: their number.
    """
    entropy = binary_entropy(ones.double() / messages)
    return (entropy - cross_entropy.double() / messages).clamp(min=0).sum().item()
