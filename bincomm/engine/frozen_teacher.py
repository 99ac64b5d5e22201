"""A teacher that does not move: a pretrained backbone, and a fixed code of its features as the message."""

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bincomm.building import hash_seed, write_attention_out
from bincomm.config import PretrainConfig
from bincomm.distributed.ranks import Ranks
from bincomm.networks import create_backbone, feature_width
from bincomm.ops.messages import pack_signs
from bincomm.weights import hash_weights, load_weights, read_metadata

if TYPE_CHECKING:  # a step runs without DALI
    from bincomm.data.loader import Loader
    from bincomm.data.sources import Source

SAMPLE = 1024  # images, at most, whose two global crops the code is estimated from
SAMPLE_BATCH = 64
RIDGE = 1.0  # times the mean variance, added to every variance before whitening


class Code(NamedTuple):
    """A code of features f: bit j is 1 where `⟨projection_j, f⟩ + offset_j > 0`."""

    projection: Tensor  # (k, D) fp32
    offset: Tensor  # (k,) fp32


class FrozenBackbone(nn.Module):
    """A pretrained backbone and the code of its features.

    Crops are shown to it as in its own evaluation: normalized by its own mean and deviation, and resized to
    its own size where that is another one, because a network for large images sees little in small ones.

    Args:
        weights: a run's directory, a .safetensors file that bincomm wrote, or a timm model's name.
        bits: k, its share of the message.
        config: of the run, whose crops it is shown.

    Raises:
        ValueError: there are no such weights, they do not name their backbone, or are for other pixels.
    """

    projection: Tensor
    offset: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, weights: str, bits: int, config: PretrainConfig):
        super().__init__()
        known = read_metadata(weights, "teacher")
        if "backbone" not in known:
            raise ValueError(
                f"teacher: expected a finished run, a .safetensors file that bincomm wrote or a timm model, "
                f"got {weights}, which does not name its backbone"
            )
        pixels = {"channels": config.channels, "pixel_range": config.pixel_range and list(config.pixel_range)}
        for key, value in pixels.items():
            there = known.get(key, 3 if key == "channels" else None)
            if there != value:
                raise ValueError(f"teacher: expected weights for {key} {value}, got {weights}, for {there}")
        self.name = known["backbone"]
        self.size = known.get("global_size", config.global_size)
        # What is random in it is overwritten, and the run's own random numbers stay what they are.
        with torch.random.fork_rng(devices=[]):
            self.backbone, _ = create_backbone(
                self.name, self.size, in_chans=config.channels, **known["backbone_args"]
            )
        load_weights(self.backbone, weights, "teacher")
        self.eval().requires_grad_(False)
        width = feature_width(self.backbone, [self.size], config.channels)
        self.register_buffer("projection", torch.zeros(bits, width))
        self.register_buffer("offset", torch.zeros(bits))
        mean, std = (torch.tensor(known.get(key, getattr(config, key))) for key in ("mean", "std"))
        of_crops = torch.tensor(config.mean), torch.tensor(config.std)
        self.register_buffer("scale", (of_crops[1] / std).view(-1, 1, 1))
        self.register_buffer("shift", ((of_crops[0] - mean) / std).view(-1, 1, 1))
        self.same_pixels = bool((self.scale == 1).all() and (self.shift == 0).all())

    def features(self, views: Tensor) -> Tensor:
        """Crops (n, U, C, S, S) -> features (U, n, D)."""
        images = views.flatten(0, 1)
        if not self.same_pixels:
            images = images * self.scale + self.shift
        if images.shape[-1] != self.size:
            images = F.interpolate(
                images.float(), size=(self.size, self.size), mode="bicubic", antialias=True
            )
        return self.backbone(images).unflatten(0, views.shape[:2]).transpose(0, 1)

    def forward(self, views: Tensor) -> Tensor:
        """Crops (n, U, C, S, S) -> logits (U, n, k), whose signs are the code."""
        features = self.features(views)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.projection, self.offset)


class FrozenTeacher(nn.Module):
    """One or several pretrained backbones; the message is the codes of all of them, one after the other.

    Of T backbones each has ⌊K/T⌋ of the K bits, the first K mod T of them one more. The codes are zero until
    they are `chosen`, or loaded from a checkpoint, where they are all that is kept of the teacher.
    """

    def __init__(self, config: PretrainConfig, device: torch.device):
        super().__init__()
        count = len(config.teacher)
        self.backbones = nn.ModuleList(
            FrozenBackbone(weights, config.bits // count + (number < config.bits % count), config)
            for number, weights in enumerate(config.teacher)
        )
        if device.type == "cpu" and config.precision == "bf16":
            write_attention_out(self)  # as in the other networks
        self.fingerprint = fingerprint(self.members)
        self.to(device)

    @property
    def members(self) -> list[FrozenBackbone]:
        """The backbones."""
        return [member for member in self.backbones if isinstance(member, FrozenBackbone)]

    def forward(self, views: Tensor) -> Tensor:
        """Crops (n, U, C, S, S) -> their message (U, n, ⌈K/32⌉) int32."""
        return pack_signs(torch.cat([backbone(views) for backbone in self.backbones], -1))

    @torch.inference_mode()
    def choose(self, crops: Iterable[Tensor], seed: int, autocast: bool) -> list[Code]:
        """The codes of a seed, for the features of crops (n, 2, C, S, S), batch by batch.

        Raises:
            ValueError: the features are not finite, or do not tell images apart.
        """
        gathered: list[list[Tensor]] = [[] for _ in self.members]
        for views in crops:
            for member, features in zip(self.members, gathered, strict=True):
                with torch.autocast(views.device.type, torch.bfloat16, enabled=autocast):
                    features.append(member.features(views).double().cpu())
        return [
            canonical_projection(torch.cat(features, 1), len(member.offset), hash_seed(seed, number))
            for number, (member, features) in enumerate(zip(self.members, gathered, strict=True))
        ]

    def take(self, codes: Iterable[Code]) -> None:
        """Send these codes from now on."""
        for member, code in zip(self.members, codes, strict=True):
            member.projection.copy_(code[0])
            member.offset.copy_(code[1])

    def code_state(self) -> dict:
        """What a checkpoint holds: the codes, and the fingerprint of the weights that they are of."""
        codes = [[member.projection, member.offset] for member in self.members]
        return {"fingerprint": self.fingerprint, "codes": codes}

    def load_code_state(self, state: dict) -> None:
        """Send the codes of a checkpoint.

        Raises:
            ValueError: they are of other weights.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"teacher: expected the weights that the run began with, of fingerprint "
                f"{state['fingerprint']}, got {self.fingerprint}: they were changed; restore them, or choose "
                "another --output"
            )
        self.take(state["codes"])


def fingerprint(members: Iterable[FrozenBackbone]) -> str:
    """A name for what backbones send: of their architecture, weights and images, and how a code is chosen."""
    digest = hashlib.sha256(f"{canonical_projection.__name__} {RIDGE}".encode())
    for member in members:
        digest.update(repr((member.name, member.size, len(member.offset))).encode())
        for pixels in (member.scale, member.shift):
            digest.update(pixels.cpu().numpy().tobytes())
        hash_weights(digest, member.backbone)
    return digest.hexdigest()[:32]


def canonical_projection(features: Tensor, bits: int, seed: int) -> Code:
    """The code of features whose bits are random directions, each cut at its mean, of what two crops of an
    image have in common.

    `W = R·C^(1/2)·S`, offset `-W·μ`. `S = (Σ + ρ·tr(Σ)/D·I)^(-1/2)` whitens: μ and Σ are mean and covariance
    of the features, ρ is `RIDGE`, which keeps directions of little variance from weighing as much as the
    others. `C = S·Σ₁₂·S`, with the cross-covariance of the two crops, made symmetric: its eigenvalues are the
    canonical correlations (Hotelling, "Relations between two sets of variates", 1936), from 1 for what the
    other crop has, too, to 0 for noise, which no student could predict; those below 0 count as 0. R is a
    random matrix (k, D) with orthonormal rows where k ≤ D, else columns.

    Args:
        features: (2, n, D) fp64, of two crops of n images.
        bits: k.
        seed: determines R.

    Raises:
        ValueError: features are not finite, all the same, or of two crops not more alike than of two images.
    """
    mean = features.mean((0, 1))
    first, second = features - mean
    count, width = first.shape
    covariance = (first.T @ first + second.T @ second) / (2 * count)
    spread = covariance.trace().item() / width
    if not (math.isfinite(spread) and spread > 0):
        what = "the same for all images" if spread == 0 else "not finite"
        raise ValueError(f"teacher: expected features that tell images apart, got features that are {what}")
    whitening = _power(covariance + RIDGE * spread * torch.eye(width, dtype=covariance.dtype), -0.5)
    cross = first.T @ second / count
    shared = _power(whitening @ ((cross + cross.T) / 2) @ whitening, 0.5)
    if shared.square().sum() < 1e-9:  # the sum of the correlations above 0: what is left is rounding
        raise ValueError(
            "teacher: expected features that are more alike in two crops of an image than in crops of two "
            f"images, got others, in a sample of {count}; choose other weights, or more images"
        )
    random = torch.empty(bits, width, dtype=torch.float64)
    nn.init.orthogonal_(random, generator=torch.Generator().manual_seed(seed))
    projection = random @ shared @ whitening
    return Code(projection.float(), -(projection @ mean).float())


def _power(symmetric: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric matrix, whose eigenvalues below 0 count as 0."""
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp(min=0).pow(exponent) @ vectors.T


def choose_codes(teacher: FrozenTeacher, config: PretrainConfig, source: "Source", ranks: Ranks) -> None:
    """Choose the codes of a run, by its seed and the crops of its first images: on rank 0, for all ranks."""

    def choose() -> list[Code]:
        crops = sample_crops(source, config, ranks.device)
        return teacher.choose(crops, config.seed, config.precision == "bf16")

    teacher.take(ranks.first(choose))


def sample_crops(source: "Source", config: PretrainConfig, device: torch.device) -> Iterable[Tensor]:
    """Global crops (n, 2, C, S, S) of the first images of the run's first epoch, at most `SAMPLE` of them,
    in batches that do not depend on the run's, nor on its ranks."""
    count = len(source.images)
    batch = min(SAMPLE_BATCH, count)
    loader = create_global_loader(config, source, device, batch)
    for _ in range(min(SAMPLE, count) // batch):
        yield loader.next()[0]


def create_global_loader(
    config: PretrainConfig, source: "Source", device: torch.device, batch_size: int
) -> "Loader":
    """A loader of the global crops of a run, by one process on its own, in batches of any size."""
    from bincomm.data.loader import Loader

    return Loader(
        source,
        config.crops,
        batch_size=batch_size,
        seed=config.seed,
        device=device,
        threads=config.threads,
        max_unusable=config.max_unusable,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        channels_last=config.channels_last,
        globals_only=True,
    )
