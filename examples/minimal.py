"""Self-supervised learning as discrete communication (arXiv 2602.09764), the method in one file.

A teacher sends K bits about an image, the signs of its logits; the student predicts each of them from another
crop. This alone would end in a constant message, so a coding rate keeps the logits of different images apart:

    message    m = 1[a_teacher > 0],  a = head(backbone(crop)),  K raw logits
    agreement  softplus(a_v) - m_u·a_v, averaged over pairs of different views (u, v), images and bits
    rate       R = ½ logdet(I + K/(N·ε²)·zᵀz),  rows z = a/‖a‖ of the N images of a global view
    loss       L = agreement - β·γ·R,  β found while training, γ = (K + N)/(K·N), R a mean over global views

    python examples/minimal.py   # the digits, a minute on two cores; for photos: --data FOLDER, on a GPU
"""

import argparse
import math
from copy import deepcopy
from typing import Any

import timm
import torch
from torch import Tensor, nn

import bincomm
from bincomm.data.crops import Crops
from bincomm.data.evaluation_batches import eval_batches
from bincomm.data.loader import Loader
from bincomm.data.sources import Source, evaluation_sources, open_source
from bincomm.evaluation.knn import knn_accuracy

# As in `bincomm pretrain`, with what auto stands for in these runs; lr is for batches of 256.
PHOTOS = argparse.Namespace(
    backbone="vit_base_patch16_224", hidden=2048, bits=256, head_std=0.02, crops=Crops(), eval_crop=0.875,
    backbone_args={"img_size": 224, "dynamic_img_size": True, "drop_path_rate": 0.1}, momentum=0.996,
    epochs=100, reset_every=10, batch_size=256, lr=5e-4, min_lr=5e-5, warmup_epochs=10,
)  # fmt: skip
DIGITS = argparse.Namespace(
    backbone="resnetv2_18", backbone_args={"layers": [1, 1, 1], "channels": [32, 64, 128], "stem_chs": 32},
    hidden=512, bits=128, head_std=0.03, eval_crop=1, momentum=1 - 20 / 440, epochs=20, reset_every=0,
    batch_size=64, lr=8e-3, min_lr=1e-5, warmup_epochs=2, crops=Crops(
        global_size=24, global_scale=(0.7, 1), local_crops=2, local_size=16, local_scale=(0.6, 0.9),
        flip=0, jitter=(0, 0, 0, 0), gray=0, blur=(0, 0, 0), solarize=0))  # fmt: skip


class Head(nn.Sequential):
    def __init__(self, features: int, hidden: int, bits: int, std: float):
        """Features (..., D) -> logits (..., K), raw: no norm and no temperature."""
        first, second, last = nn.Linear(features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bits)
        super().__init__(first, nn.GELU(), second, nn.GELU(), last)
        self.std = std
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        for layer in self:
            if isinstance(layer, nn.Linear):  # drawn on the CPU, so that every device gets the same
                std = self.std * math.sqrt((768 if layer is self[0] else 2048) / layer.in_features)
                layer.weight.copy_(nn.init.trunc_normal_(layer.weight.cpu(), std=std, generator=generator))
                layer.bias.zero_()


class Network(nn.Module):
    def __init__(self, backbone: Any, config: Any):
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.num_features, config.hidden, config.bits, config.head_std)

    def forward(self, *groups: Tensor) -> Tensor:
        """Crops in groups of one size, (n, V_g, 3, H_g, W_g) -> logits (V, n, K) of all V = Σ V_g views."""
        features = [self.backbone(crops.flatten(0, 1)).unflatten(0, crops.shape[:2]) for crops in groups]
        return self.head(torch.cat([views.transpose(0, 1) for views in features]))


def create_networks(config: Any) -> tuple[Network, Network]:
    """Student and teacher, equal; the teacher takes no gradients, and has no stochastic depth."""
    student = Network(timm.create_model(config.backbone, num_classes=0, **config.backbone_args), config)
    certain = {**config.backbone_args, "drop_path_rate": 0}
    teacher = Network(timm.create_model(config.backbone, num_classes=0, **certain), config)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def reset_head(student: Network, teacher: Network, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Re-initialize the head, equally in both networks, and clear the optimizer's state of it."""
    for network in (student, teacher):
        network.head.reset(torch.Generator().manual_seed(seed))
    for parameter in student.head.parameters():
        optimizer.state.pop(parameter, None)


def train_step(
    student: Network, teacher: Network, objective: nn.Module, optimizer: torch.optim.Optimizer,
    crops: tuple[Tensor, Tensor | None], lr: float, weight_decay: float, momentum: float, clip: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """One step on global crops (n, 2, 3, S, S) and local ones (n, L, 3, s, s), for the student alone."""
    with torch.autocast(crops[0].device.type, torch.bfloat16, enabled=crops[0].is_cuda):
        teacher_logits = teacher(crops[0])  # (2, n, K); the objective uses only their signs, the message
        student_logits = student(*crops)  # (V, n, K), the teacher's views first
    losses = objective(student_logits, teacher_logits)  # in fp32, whatever the dtype of the logits
    optimizer.zero_grad()
    losses["loss"].backward()
    for gradient in [p.grad for p in student.parameters() if p.grad is not None]:  # each tensor by itself:
        gradient.mul_((clip / gradient.norm()).clamp(max=1))  # g ← g·min(1, clip/‖g‖)
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0), strict=True):
        group.update(lr=lr, weight_decay=decay)
    optimizer.step()
    for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
        average.lerp_(parameter.detach(), 1 - momentum)  # backbone and head: θ_t ← m·θ_t + (1-m)·θ_s
    p = (teacher_logits > 0).double().mean((0, 1))  # share of ones of each bit; entropy 1 at best, 0 if dead
    entropy = nn.functional.binary_cross_entropy(p, p) / math.log(2)
    return {name: value.detach() for name, value in losses.items()} | {"bit_entropy": entropy}


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From start at step 0 to end at the last step, along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * max(0, step) / max(1, steps - 1))) / 2


def encode(network: Any, source: Source, config: Any) -> list[Tensor]:
    """Outputs of a network for a center crop of every image, (N, D), and the labels (N,)."""
    options = {"crop_ratio": config.eval_crop, "batch_size": config.batch_size, "device": config.device}
    labels = torch.as_tensor(source.labels, device=config.device)
    rows = [(network(images), labels[i]) for i, images in eval_batches(source, config.crops, **options)]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def main() -> None:
    """Pretrain, and measure the teacher by k-NN: the classes of the nearest features."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--data", default="digits", help="a folder of images, tar shards, cifar10, ...")
    parser.add_argument("--backbone", help="for photos: another vision transformer of timm")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch_size", type=int)
    options = vars(parser.parse_args())
    config = argparse.Namespace(**vars(DIGITS if options["data"] == "digits" else PHOTOS) | options)
    config.device = device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    student, teacher = (network.to(device) for network in create_networks(config))
    untrained = deepcopy(teacher).eval()
    matrices = [p for p in student.parameters() if p.ndim > 1]  # take weight decay
    vectors = [p for p in student.parameters() if p.ndim <= 1]  # biases and norms, which do not
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], fused=True)
    objective = bincomm.DiscreteCommunication().to(device)
    source = open_source(config.data)
    loader = Loader(source, config.crops, batch_size=config.batch_size, seed=0, device=device)
    steps, peak = config.epochs * loader.steps_per_epoch, config.lr * config.batch_size / 256
    warmup = min(config.warmup_epochs * loader.steps_per_epoch, steps // 4)
    for step in range(steps):
        if step and config.reset_every and step % (config.reset_every * loader.steps_per_epoch) == 0:
            reset_head(student, teacher, optimizer, seed=step // loader.steps_per_epoch)
        lr = cosine(step - warmup, steps - warmup, peak, config.min_lr)  # the peak until warm-up is over
        lr *= min(1, (step + 1) / max(1, warmup))  # linear warm-up: peak/warmup, 2·peak/warmup, ..., peak
        decay, momentum = cosine(step, steps, 0.04, 0.4), cosine(step, steps, config.momentum, 1)
        metrics = train_step(student, teacher, objective, optimizer, loader.next(), lr, decay, momentum)
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}", *(f"{name} {x:.4f}" for name, x in metrics.items()), sep="  ")
    torch.save(teacher.eval().backbone.state_dict(), "backbone.pt")
    networks = {
        "teacher": teacher.backbone,
        "its codes": lambda x: torch.where(teacher(x[:, None])[0] > 0, 1.0, -1.0),  # None adds the view axis
        "untrained": untrained.backbone,
        "raw pixels": nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten()),
    }
    if labeled := evaluation_sources(config.data, source):  # gallery, queries, whether these were held out
        for name, network in networks.items():
            gallery, queries = (encode(network, images, config) for images in labeled[:2])
            print(f"k-NN of {name}: {knn_accuracy(*gallery, *queries):.2%}")


if __name__ == "__main__":
    main()
