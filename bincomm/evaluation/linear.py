"""Linear probe: softmax regression by SGD on frozen features, its learning rate swept."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bincomm.evaluation.geometry import moments
from bincomm.evaluation.labeled import check_alike, check_labeled

# For features of mean 0 whose largest variance in any direction is 1, beside a bias of 1: the loss then has a
# curvature of at most 1/2, and SGD with momentum 0.9 is stable up to 7.6, mostly further.
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MOMENTUM = 0.9
HELD_OUT = 10  # one image in so many chooses the learning rate
CHOOSING = 100  # images that choose it at least: where a tenth has fewer, several tenths do in turn


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
    rate swept; on features computed once, so without augmentation. The learning rate taken is the one whose
    classifier, trained on nine tenths of the gallery, has the lowest cross-entropy on the other tenth, drawn
    by class; accuracy would be too coarse where that tenth is small. Where it has fewer than 100 images,
    further tenths are held out in turn until so many have chosen. The classifier is then trained again on the
    complete gallery. Choosing by the queries would make the figure too high.

    The gallery's mean is first subtracted from all features, and they are divided by one number, the largest
    standard deviation of the gallery in any direction, so that one grid of rates fits every backbone. That
    leaves the possible classifiers the same; but a mean that outweighs the differences, as that of an
    untrained network's features does, would keep gradient descent from finding the good ones.

    Args:
        gallery: (N, D) features, gallery_labels: (N,) class indices.
        queries: (M, D) features, query_labels: (M,) class indices; a class that the gallery lacks is missed.
        learning_rates: for features so scaled; all are trained at once, in fp32.
        epochs: passes over the gallery.
        batch_size: images per step.
        seed: of the tenth and of the order of images. The global generators are left alone.

    Raises:
        ValueError: no gallery or query images, different numbers of features and labels, numbers of
            features per image that differ, values that are not finite, or no learning rate.
    """
    check_labeled("gallery", gallery, gallery_labels)
    check_labeled("queries", queries, query_labels)
    check_alike(gallery, queries)
    if len(learning_rates) == 0:
        raise ValueError("learning_rates: expected at least one, got none")
    scale = scaling(gallery)
    gallery, queries = scale(gallery), scale(queries)
    classes, targets = gallery_labels.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)

    def train(images: Tensor, rates: Sequence[float]) -> Tensor:
        x, y = gallery[images], targets[images]
        return train_classifiers(x, y, len(classes), rates, epochs, batch_size, generator)

    order, tenth = hold_out(targets, generator)
    losses = torch.zeros(len(learning_rates), device=gallery.device)
    for number in range(min(HELD_OUT, len(order), math.ceil(HELD_OUT * CHOOSING / len(order)))):
        weights, held_out = train(order[tenth != number], learning_rates), order[tenth == number]
        losses += cross_entropy(weights, gallery[held_out], targets[held_out], batch_size)
    rate = learning_rates[int(losses.argmin())]

    weights = train(order, [rate])
    return LinearProbe(accuracy(weights[0], classes, queries, query_labels, batch_size), rate)


def scaling(gallery: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that features (n, D) pass through before they are classified: those of the gallery get mean
    0 and a largest variance of 1 in any direction; and a last feature is added that is always 1, whose weight
    is the bias."""
    mean, covariance = moments(gallery)
    scale = float(torch.linalg.eigvalsh(covariance)[-1].clamp(min=0).sqrt()) or 1.0
    return lambda x: F.pad(((x - mean) / scale).float(), (0, 1), value=1.0)


def hold_out(targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random order of the images by class, and of which tenth of them each of its places is, (n,) from 0 to
    9: every tenth of a shuffled list sorted by class, so that each class gives its part to each."""
    order = torch.randperm(len(targets), generator=generator).to(targets.device)
    order = order[targets[order].argsort(stable=True)]
    return order, torch.arange(len(order), device=targets.device) % HELD_OUT


def cross_entropy(weights: Tensor, features: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """Sums over features (n, D) under each of the classifiers (S, C, D): (S,), infinite where it is NaN."""
    sums = torch.zeros(len(weights), device=features.device)
    for x, y in zip(features.split(batch_size), targets.split(batch_size), strict=True):
        likelihood = _logits(x, weights).log_softmax(-1)
        sums -= likelihood.take_along_dim(y[:, None, None], -1).sum((0, 2))
    return sums.nan_to_num(torch.inf)


def accuracy(weights: Tensor, classes: Tensor, queries: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of queries (M, D) that a classifier (C, D) of classes (C,) gets right."""
    hits = 0
    for x, targets in zip(queries.split(batch_size), labels.split(batch_size), strict=True):
        hits += int((classes[(x @ weights.T).argmax(-1)] == targets).sum())
    return hits / len(queries)


class Descent:
    """Softmax regression by SGD with momentum, the learning rate falling to 0 by cosine, for several learning
    rates at once.

    Args:
        learning_rates: S of them, at the start.
        classes, features: C and D.
        steps: in all.
        device: of the features.
    """

    def __init__(
        self,
        learning_rates: Sequence[float],
        classes: int,
        features: int,
        steps: int,
        device: torch.device,
    ):
        self.rates = torch.tensor(learning_rates, device=device)[:, None, None]
        self.weights = torch.zeros(len(learning_rates), classes, features, device=device)
        self.velocity = torch.zeros_like(self.weights)
        self.indices = torch.arange(classes, device=device)
        self.done, self.steps = 0, steps

    def step(self, x: Tensor, targets: Tensor) -> None:
        """One step on features (n, D) of classes (n,)."""
        # The gradient of cross-entropy in the logits: what is predicted minus what is.
        error = _logits(x, self.weights).softmax(-1)
        error -= (targets[:, None] == self.indices).float()[:, None]
        gradient = (error.flatten(1).T @ x).view_as(self.weights) / len(x)
        self.velocity.mul_(MOMENTUM).add_(gradient)
        decay = 0.5 + 0.5 * math.cos(math.pi * self.done / self.steps)
        self.weights -= self.rates * decay * self.velocity
        self.done += 1


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    """Of features (n, D) under S classifiers (S, C, D): (n, S, C)."""
    return (x @ weights.flatten(0, 1).T).unflatten(1, weights.shape[:2])


def train_classifiers(
    features: Tensor,
    targets: Tensor,
    classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Weights (S, C, D) of softmax regression on features (N, D), one classifier per learning rate."""
    steps = epochs * math.ceil(len(features) / batch_size)
    descent = Descent(learning_rates, classes, features.shape[1], steps, features.device)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for first in range(0, len(order), batch_size):  # split() would give an empty batch of none
            batch = order[first : first + batch_size]
            descent.step(features[batch], targets[batch])
    return descent.weights
