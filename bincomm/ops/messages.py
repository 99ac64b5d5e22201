"""Messages: the signs of logits, packed 32 bits a word."""

import torch
from torch import Tensor

from bincomm.ops import reference
from bincomm.ops.library import BACKEND, define, use_triton

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def pack_signs(logits: Tensor) -> Tensor:
    """The message of logits: one bit `1[a > 0]` each.

    Args:
        logits: (..., K) fp32, fp16, bf16 or fp64; any strides.

    Returns:
        (..., ⌈K/32⌉) int32. Bit `j` of word `w` is the sign of logit `32w + j`; unused bits are 0. No
        gradient. A NaN becomes a 0: check for NaN before you store messages.

    Raises:
        TypeError: `logits` is not a floating-point tensor.
        ValueError: `logits` has no dimension.
    """
    check_logits("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., K), got a tensor without dimensions")
    if BACKEND == "reference" or logits.dtype == torch.float64:
        return reference.pack_signs(logits)
    return torch.ops.bincomm.pack_signs(logits)


def unpack_signs(messages: Tensor, bits: int) -> Tensor:
    """The bits of messages.

    Args:
        messages: (..., ⌈K/32⌉) int32, as from `pack_signs`.
        bits: K.

    Returns:
        (..., K) bool.

    Raises:
        TypeError: `messages` is not int32.
        ValueError: `bits` do not fit the number of words.
    """
    if messages.dtype != torch.int32:
        raise TypeError(f"messages: expected int32 words, got {messages.dtype}")
    if messages.dim() == 0 or bits < 0 or messages.shape[-1] != -(-bits // 32):
        raise ValueError(
            f"messages: {bits} bits need shape (..., {-(-bits // 32)}), got {tuple(messages.shape)}"
        )
    if BACKEND == "reference":
        return reference.unpack_signs(messages, bits)
    return torch.ops.bincomm.unpack_signs(messages, bits)


def check_logits(argument: str, x: Tensor) -> None:
    """Raise TypeError naming the argument unless `x` is a tensor of logits."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument}: expected a tensor of logits, got {type(x).__name__}")
    if x.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{argument}: expected logits in fp32, fp16, bf16 or fp64, got {x.dtype}")


define(
    "pack_signs(Tensor logits) -> Tensor",
    cpu="C++",
    pytorch=reference.pack_signs,
    fake=lambda logits: logits.new_empty(
        (*logits.shape[:-1], (logits.shape[-1] + 31) // 32), dtype=torch.int32
    ),
)
define(
    "unpack_signs(Tensor messages, int bits) -> Tensor",
    cpu="C++",
    pytorch=reference.unpack_signs,
    fake=lambda messages, bits: messages.new_empty((*messages.shape[:-1], bits), dtype=torch.bool),
)
use_triton("pack_signs", "messages", "launch_pack_signs")
use_triton("unpack_signs", "messages", "launch_unpack_signs")
