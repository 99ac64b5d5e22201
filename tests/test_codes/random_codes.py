"""Random codes and labels."""

import torch


def random_code(n, size, seed=0):
    """Bits (n, size) of different shares, some of which depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, size, generator=generator) + torch.linspace(-1, 1, size)
    logits[:, 1::2] += logits[:, ::2][:, : size // 2]
    return logits > 0


def random_labels(n, count, seed=1):
    return torch.randint(0, count, (n,), generator=torch.Generator().manual_seed(seed))
