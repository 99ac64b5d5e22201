"""Features, codes and pixels of images, in their order."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bincomm.config import PretrainConfig
from bincomm.data.loader import eval_batches
from bincomm.data.sources import Source
from bincomm.networks import Network

PIXELS = 16  # a million images of more would not fit in memory, and k-NN on pixels gains nothing from it


@torch.no_grad()
def extract(
    network: Network,
    source: Source,
    config: PretrainConfig,
    device: torch.device,
    report: Callable[[int, str], None] = lambda image, why: None,
) -> dict[str, Tensor]:
    """What a network makes of images, one centre crop each; unusable ones are left out and reported.

    Returns:
        "images" (n,) int64, the numbers of the images in the source; "features" (n, D) of the backbone,
        "signs" (n, K) of the head's code as ±1, "pixels" (n, 3·s·s), the image itself averaged down to
        s = PIXELS a side where it is larger; fp32, CPU.
    """
    found: dict[str, list[Tensor]] = {"images": [], "features": [], "signs": [], "pixels": []}
    training = network.training
    network.eval()
    options = {"report": report, "crop_ratio": config.eval_crop, "threads": config.threads}
    with tqdm(total=len(source.images), desc="evaluating", unit="img", leave=False, disable=None) as bar:
        batch_size = min(256, config.batch_size)
        batches = eval_batches(source, config.crops, batch_size=batch_size, device=device, **options)
        for numbers, images in batches:
            found["images"].append(torch.tensor(numbers))
            features = network.backbone(images)
            signs = torch.where(network.head.code(features) > 0, 1.0, -1.0)
            pixels = F.adaptive_avg_pool2d(images, min(PIXELS, config.global_size)).flatten(1)
            for name, value in (("features", features), ("signs", signs), ("pixels", pixels)):
                found[name].append(value.float().cpu())
            bar.update(len(images))
    network.train(training)
    return {name: torch.cat(values) if values else torch.empty(0) for name, values in found.items()}
