"""Linear probe on augmented images: random resized crops and flips, as in the protocol of DINO."""

import torch

from bincomm.data.crops import Crops
from bincomm.data.loader import Loader
from bincomm.data.sources import Source
from bincomm.evaluation.labeled import check_alike, check_labeled
from bincomm.evaluation.linear import (
    LEARNING_RATES,
    Descent,
    LinearProbe,
    accuracy,
    cross_entropy,
    hold_out,
    scaling,
)
from bincomm.evaluation.pretrained import Pretrained

BATCH = 256
SCALE = (0.08, 1.0)  # torchvision's, of a crop's area


def augmented_probe(
    model: Pretrained,
    source: Source,
    indices: torch.Tensor,
    gallery: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    *,
    epochs: int = 10,
    seed: int = 0,
) -> LinearProbe:
    """Share of queries that softmax regression classifies rightly after training on features of random
    resized crops and flips, new ones in every epoch.

    Otherwise as `linear_probe` (SGD with momentum 0.9, no weight decay, cosine to 0, the learning rate
    swept), but for one thing: the classifier is the one that chose its learning rate, trained on nine tenths
    of the gallery, because training it again would take another pass over all crops. An image gives two crops
    at a time.

    Args:
        model: the backbone.
        source: the gallery's images, labeled.
        indices: (N,) int64, of those of its images that can be used, and gallery: (N, D) their features by
            one center crop each, which choose the learning rate.
        queries: (M, D) features by center crops, query_labels: (M,) class indices.
        epochs: crops of every image.
        seed: of crops, order and the tenth.

    Raises:
        ValueError: no labels, too few images for a step, or what `linear_probe` raises it for.
    """
    if source.labels is None:
        raise ValueError("source: expected images with labels, got none")
    labels = torch.from_numpy(source.labels)[indices]
    check_labeled("gallery", gallery, labels)
    check_labeled("queries", queries, query_labels)
    check_alike(gallery, queries)
    classes, targets = labels.unique(return_inverse=True)
    order, tenth = hold_out(targets, torch.Generator().manual_seed(seed))
    chosen, rest = order[tenth == 0], order[tenth > 0]
    if len(rest) == 0:
        raise ValueError(f"source: expected images beside those held out, got {len(indices)} in all")
    config, device = model.config, model.device
    crops = Crops(
        global_size=config.global_size,
        global_scale=SCALE,
        local_crops=0,
        jitter=(0.0, 0.0, 0.0, 0.0),
        gray=0.0,
        blur=(0.0, 0.0, 0.0),
        solarize=0.0,
        mean=config.mean,
        std=config.std,
        channels=config.channels,
        pixel_range=config.pixel_range,
    )
    loader = Loader(
        source.select(indices[rest].tolist()),
        crops,
        batch_size=min(BATCH // 2, len(rest)),
        seed=seed,
        device=device,
        threads=config.threads,
        max_unusable=1.0,
    )
    scale = scaling(gallery.to(device))
    steps = loader.steps_per_epoch * -(-epochs // 2)
    descent = Descent(LEARNING_RATES, len(classes), gallery.shape[1] + 1, steps, device)
    for _ in range(steps):
        views, _ = loader.next()
        with torch.no_grad():
            features = model.backbone(views.flatten(0, 1))
        batch_targets = targets[rest[loader.indices]].repeat_interleave(views.shape[1])
        descent.step(scale(features.float()), batch_targets.to(device))
    held_out = scale(gallery[chosen].to(device)), targets[chosen].to(device)
    best = int(cross_entropy(descent.weights, *held_out, BATCH).argmin())
    share = accuracy(
        descent.weights[best],
        classes.to(device),
        scale(queries.to(device)),
        query_labels.to(device),
        BATCH,
    )
    return LinearProbe(share, LEARNING_RATES[best])
