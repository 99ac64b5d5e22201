"""Linear probe: softmax regression by SGD on frozen features, its learning rate swept."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bincomm.evaluation.labelled import check_alike, check_labelled

# For features of mean 0 and mean square norm 1 beside a bias of 1, where the loss has a curvature of at most
# 1: SGD with momentum 0.9 is then stable up to 3.8, and up to hundreds where the variance is spread over many
# directions.
LEARNING_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
MOMENTUM = 0.9
HELD_OUT = 10  # one image in so many chooses the learning rate


class LinearProbe(NamedTuple):
    """Share of queries classified rightly, and the learning rate the classifier was trained with."""

    accuracy: float
    learning_rate: float


def linear_probe(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> LinearProbe:
    """Share of queries that softmax regression, trained on the features of the gallery, classifies rightly.

    The protocol of DINO (arXiv 2104.14294): SGD with momentum 0.9, no weight decay, cosine to 0, the learning
    rate swept; on cached features, so without augmentation. The learning rate taken is the one whose
    classifier, trained on nine tenths of the gallery, has the lowest cross-entropy on the other tenth, drawn
    by class; the share it gets right is too coarse where that tenth is small. The classifier is then trained
    anew on all of the gallery. Choosing by the queries instead would flatter.

    From all features the gallery's mean is first subtracted, and they are divided by one number, the root of
    the mean square norm that is left, so that one grid of rates fits every backbone. The classifiers there
    are stay the same; but a mean that outweighs the differences, as that of an untrained network's features
    does, would keep gradient descent from finding the good ones.

    Args:
        gallery: (N, D) features, gallery_labels: (N,) class indices.
        queries: (M, D) features, query_labels: (M,) class indices; a class that the gallery lacks is missed.
        learning_rates: for features of mean 0 and mean square norm 1; all are trained at once, in fp32.
        epochs: passes over the gallery.
        batch_size: images per step.
        seed: of the tenth and of the order of images. The global generators are left alone.

    Raises:
        ValueError: no gallery or query images, different numbers of features and labels, numbers of
            features per image that differ, values that are not finite, or no learning rate.
    """
    check_labelled("gallery", gallery, gallery_labels)
    check_labelled("queries", queries, query_labels)
    check_alike(gallery, queries)
    if len(learning_rates) == 0:
        raise ValueError("learning_rates: expected at least one, got none")
    mean = gallery.mean(0, dtype=torch.float64)
    gallery, queries = ((x - mean).float() for x in (gallery, queries))
    scale = float(torch.linalg.vector_norm(gallery, dtype=torch.float64)) / len(gallery) ** 0.5 or 1.0
    # The bias is the weight of a last feature that is always 1.
    gallery, queries = (F.pad(x / scale, (0, 1), value=1.0) for x in (gallery, queries))
    classes, targets = gallery_labels.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)

    def train(images: Tensor, rates: Sequence[float]) -> Tensor:
        x, y = gallery[images], targets[images]
        return _train(x, y, len(classes), rates, epochs, batch_size, generator)

    # Every tenth image of a shuffled list sorted by class, so that each class gives its tenth.
    order = torch.randperm(len(gallery), generator=generator).to(gallery.device)
    order = order[targets[order].argsort(stable=True)]
    held_out = torch.arange(len(order), device=gallery.device) % HELD_OUT == 0
    weights = train(order[~held_out], learning_rates)
    cross_entropy = 0
    for images in order[held_out].split(batch_size):
        likelihood = _logits(gallery[images], weights).log_softmax(-1)
        cross_entropy -= likelihood.take_along_dim(targets[images, None, None], -1).sum((0, 2))
    rate = learning_rates[int(cross_entropy.argmin())]

    weights = train(order, [rate])
    hits = 0
    for x, actual in zip(queries.split(batch_size), query_labels.split(batch_size), strict=True):
        hits += int((classes[_logits(x, weights)[:, 0].argmax(-1)] == actual).sum())
    return LinearProbe(hits / len(queries), rate)


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    """Of features (n, D) under S classifiers (S, C, D): (n, S, C)."""
    return (x @ weights.flatten(0, 1).T).unflatten(1, weights.shape[:2])


def _train(
    features: Tensor,
    targets: Tensor,
    classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Weights (S, C, D) of softmax regression on features (N, D), one classifier per learning rate."""
    rates = torch.tensor(learning_rates, device=features.device)[:, None, None]
    weights = torch.zeros(len(rates), classes, features.shape[1], device=features.device)
    velocity = torch.zeros_like(weights)
    indices = torch.arange(classes, device=features.device)
    step, steps = 0, epochs * math.ceil(len(features) / batch_size)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for first in range(0, len(features), batch_size):
            batch = order[first : first + batch_size]
            x = features[batch]
            # The gradient of cross-entropy in the logits: what is predicted minus what is.
            error = _logits(x, weights).softmax(-1)
            error -= (targets[batch, None] == indices).float()[:, None]
            gradient = (error.flatten(1).T @ x).view_as(weights) / len(batch)
            velocity.mul_(MOMENTUM).add_(gradient)
            weights -= rates * (0.5 + 0.5 * math.cos(math.pi * step / steps)) * velocity
            step += 1
    return weights
