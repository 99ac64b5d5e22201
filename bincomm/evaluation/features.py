"""Features, codes and pixels of images, in their order."""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bincomm.config import PretrainConfig
from bincomm.data.loader import eval_batches
from bincomm.networks import Network

PIXELS = 16  # a million images of more would not fit in memory, and k-NN on pixels gains nothing from it


@torch.no_grad()
def extract(
    network: Network, files: list[str], config: PretrainConfig, device: torch.device
) -> dict[str, Tensor]:
    """What a network makes of images, one centre crop each.

    Returns:
        "features" (n, D) of the backbone, "signs" (n, K) of the head's logits as ±1, "pixels" (n, 3·s·s), the
        image itself averaged down to s = PIXELS a side where it is larger; fp32, CPU.
    """
    found: dict[str, list[Tensor]] = {"features": [], "signs": [], "pixels": []}
    training = network.training
    network.eval()
    crops = {"size": config.global_size, "crop_ratio": config.eval_crop, "threads": config.threads}
    with tqdm(total=len(files), desc="evaluating", unit="img", leave=False, disable=None) as bar:
        for images in eval_batches(files, **crops, batch_size=min(256, config.batch_size), device=device):
            features = network.backbone(images)
            signs = torch.where(network.head(features) > 0, 1.0, -1.0)
            pixels = F.adaptive_avg_pool2d(images, min(PIXELS, config.global_size)).flatten(1)
            for name, value in (("features", features), ("signs", signs), ("pixels", pixels)):
                found[name].append(value.float().cpu())
            bar.update(len(images))
    network.train(training)
    return {name: torch.cat(values) for name, values in found.items()}
