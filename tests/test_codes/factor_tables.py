"""Factors and bits whose information is known."""

import itertools
import math

import torch


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def all_combinations(*values, times=1):
    """(n, F): each combination of the factors' values, equally often."""
    return torch.tensor(list(itertools.product(*(range(v) for v in values)))).repeat(times, 1)


def random_bits(images, bits, p=0.5):
    return torch.rand(images, bits) < p


def brute_force_information(bits, factor):
    """From the definition, pair by pair, in bits."""
    information = 0.0
    for b, v in itertools.product((False, True), set(factor.tolist())):
        both = ((bits == b) & (factor == v)).double().mean().item()
        apart = (bits == b).double().mean().item() * (factor == v).double().mean().item()
        information += both * math.log2(both / apart) if both else 0.0
    return information
