"""Features, codes and pixels of images, in their order."""

import torch
from torch import Tensor

from bincomm.config import PretrainConfig
from bincomm.data.loader import eval_batches
from bincomm.networks import Network


@torch.no_grad()
def extract(
    network: Network, files: list[str], config: PretrainConfig, device: torch.device
) -> dict[str, Tensor]:
    """What a network makes of images, one centre crop each.

    Returns:
        "features" (n, D) of the backbone, "signs" (n, K) of the head's logits as ±1, "pixels" (n, 3·S·S);
        fp32, CPU.
    """
    found: dict[str, list[Tensor]] = {"features": [], "signs": [], "pixels": []}
    training = network.training
    network.eval()
    crops = {"size": config.global_size, "crop_ratio": config.eval_crop}
    for images in eval_batches(files, **crops, batch_size=min(256, config.batch_size), device=device):
        features = network.backbone(images)
        signs = torch.where(network.head(features) > 0, 1.0, -1.0)
        for name, value in (("features", features), ("signs", signs), ("pixels", images.flatten(1))):
            found[name].append(value.float().cpu())
    network.train(training)
    return {name: torch.cat(values) for name, values in found.items()}
