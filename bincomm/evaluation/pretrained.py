"""A pretrained backbone, and its head where it has one, ready to be evaluated."""

import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bincomm.building import create_networks, trained_part
from bincomm.config import PretrainConfig, read_config
from bincomm.data.images import Images, eight_bits
from bincomm.data.listing import Files
from bincomm.data.sources import Source
from bincomm.engine.checkpoints import Checkpoints, load_checkpoint
from bincomm.engine.run import is_finished, keeps_initial_weights, read_result
from bincomm.files import expand_home
from bincomm.networks import Head, Network, PrototypeHead, create_backbone, feature_width
from bincomm.weights import load_weights, read_metadata

logger = logging.getLogger(__name__)


class Pixels(nn.Module):
    """Raw pixels as features: images (n, C, S, S) -> (n, C·s·s), averaged down to s = min(16, S) a side."""

    SIDE = 16  # larger features of a million images would not fit in memory, and k-NN gains nothing from them

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, min(self.SIDE, images.shape[-1])).flatten(1)


class EncodedImage(NamedTuple):
    """What `Pretrained.encode` returns, on the CPU."""

    features: Tensor  # (D,) fp32, of the backbone
    bits: Tensor | None  # (K,) bool, the code; None where there is no head


@dataclass(frozen=True)
class Pretrained:
    """A backbone, images (n, C, S, S) -> features (n, D), and its head, features -> logits of the code.

    Of `config` only the keys that say how images are read and preprocessed matter: `global_size`,
    `eval_crop`, `mean`, `std`, `channels`, `pixel_range`, `threads` and `batch_size`.
    """

    name: str
    backbone: nn.Module  # in evaluation mode and on the device, as is the head
    head: Head | PrototypeHead | None
    config: PretrainConfig
    device: torch.device

    def __post_init__(self):
        # However it was trained: the same weights give the same features, wherever they come from.
        self.backbone.to(memory_format=torch.contiguous_format)

    @classmethod
    def of(cls, network: Network, config: PretrainConfig, device: torch.device) -> "Pretrained":
        """A network in its present state; it is put into evaluation mode."""
        network.eval()
        return cls(config.output, network.backbone, network.head, config, device)

    @classmethod
    def of_pixels(cls, config: PretrainConfig, device: torch.device) -> "Pretrained":
        """No network: the features are the pixels that a network of this configuration would be given."""
        return cls("raw pixels", Pixels(), None, config, device)

    def encode(self, image: str | Path | Image.Image | np.ndarray) -> EncodedImage:
        """Features and code of one image, as `bincomm.encode` computes those of many: of its center crop.

        Args:
            image: a file, or an image of Pillow. Neither is turned by its EXIF orientation. For a network
                of other pixels than RGB of 8 bits also an array (H, W), (H, W, C) or (C, H, W).

        Raises:
            ValueError: it cannot be read or decoded; or the weights give NaN.
        """
        from bincomm.evaluation.features import forward_batches  # which imports this module, and DALI

        name, images = _one_image(image, self.config.crops.rgb)
        reasons: list[str] = []
        for batch in forward_batches(self, Source(images), lambda _, reason: reasons.append(reason)):
            features = batch.features[0].float().cpu()
            return EncodedImage(features, None if batch.logits is None else (batch.logits[0] > 0).cpu())
        raise ValueError(f"image: {name} cannot be used: {reasons[0]}")


class InMemory:
    """One encoded image: `Images`."""

    def __init__(self, name: str, data: bytes):
        self._name, self._data = name, np.frombuffer(data, np.uint8)

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return self._name

    def names(self) -> Iterator[str]:
        return iter([self._name])

    def read(self, index: int) -> np.ndarray:
        return self._data


def _one_image(image: Any, rgb: bool) -> tuple[str, Images]:
    if isinstance(image, str | os.PathLike):
        path = str(expand_home(os.fspath(image)))
        return path, Files([path])
    file = io.BytesIO()
    if isinstance(image, np.ndarray) and not rgb:
        np.save(file, image, allow_pickle=False)
    elif not isinstance(image, Image.Image):
        kinds = "a path or an image of Pillow" if rgb else "a path, an image of Pillow or an array"
        raise ValueError(f"image: expected {kinds}, got {type(image).__name__}")
    elif rgb:
        eight_bits(image).convert("RGB").save(file, "PNG", compress_level=1)
    else:
        image.save(file, "TIFF")  # of any mode, as it is
    return "the image", InMemory("image", file.getvalue())


def check_rgb(argument: str, model: Pretrained) -> None:
    """Raise ValueError, naming the argument that needs pictures, unless a network takes RGB of 8 bits."""
    crops = model.config.crops
    if not crops.rgb:
        what = f"channels {crops.channels}" + (
            f", pixel_range {crops.pixel_range}" if crops.pixel_range else ""
        )
        raise ValueError(f"{argument}: expected a backbone for RGB of 8 bits, got {model.name}, with {what}")


def evaluation_device(config: PretrainConfig) -> torch.device:
    """The device to evaluate a run of this configuration on: the one that it is trained on here."""
    gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def load_pretrained(
    weights: str | Path, device: torch.device | str, *, backbone: str | None = None, **preprocessing: Any
) -> Pretrained:
    """Load a pretrained backbone, and its head if it has one.

    Args:
        weights: a run's directory (its newest checkpoint, or without one its backbone; of an adaptation that
            made it worse the backbone as it came), a checkpoint, a .safetensors file or the name of a timm
            model with pretrained weights; the last two have no head, nor has a backbone alone.
        device: device of the networks.
        backbone: timm's name of the backbone, for a .safetensors file that does not name it.
        preprocessing: preprocessing keys that replace those of training: global_size, eval_crop, batch_size,
            threads; see `PretrainConfig`.

    Raises:
        ValueError: there are no such weights, or they do not fit.
    """
    model = _load(os.fspath(weights), torch.device(device), backbone, preprocessing)
    if backbone not in (None, model.config.backbone):
        raise ValueError(f"backbone: expected {model.config.backbone}, as {weights} says, got {backbone}")
    return model


def _load(
    weights: str, device: torch.device, backbone: str | None, preprocessing: dict[str, Any]
) -> Pretrained:
    path = expand_home(weights)
    if path.suffix == ".ckpt":
        if not path.exists():
            raise ValueError(f"weights: expected a checkpoint, got {weights}, which does not exist")
        return _from_state(load_checkpoint(path), weights, device, preprocessing)
    keys: dict[str, Any] = {}
    if path.is_dir():
        checkpoint = None
        if keeps_initial_weights(path):
            logger.info(
                "%s: adapting made the backbone worse; taken is the one as it came, without a head. The "
                "adapted one is adapted.safetensors there",
                weights,
            )
        else:
            checkpoint = Checkpoints(path / "checkpoints", keep=1).load()
        if checkpoint is not None:
            model = _from_state(checkpoint, weights, device, preprocessing)
            _tell_step(path, checkpoint["step"])
            return model
        if (path / "config.yaml").exists():  # not where its weights and config.json alone were copied to
            keys = read_config(path, "weights")
    keys = {**read_metadata(weights, "weights"), **keys}
    if not keys.setdefault("backbone", backbone):
        raise ValueError(f"weights: {weights} does not name its backbone; give its timm name as backbone")
    # Built for the size of the crops, so that position embeddings are resampled to it, and only once.
    config = _config({**keys, **preprocessing}, weights)
    network, _ = create_backbone(
        config.backbone, config.global_size, in_chans=config.channels, **config.backbone_args
    )
    load_weights(network, weights, "weights")
    feature_width(network, [config.global_size], config.channels)
    network.eval().requires_grad_(False)
    return Pretrained(weights, network.to(device), None, config, device)


def _tell_step(run: Path, step: int) -> None:
    """Say so where the newest checkpoint, of `step`, is not the end of its run."""
    if not is_finished(run):
        logger.info("%s is not finished; its network after step %d is taken", run, step)
        return
    last = read_result(run)["last_metrics"].get("step", step)
    if last != step:  # the disk was full, or the newest checkpoint is damaged
        logger.warning(
            "%s ended at step %d, but its newest checkpoint is of step %d, whose network is taken; the "
            "backbone of the end, without a head, is the .safetensors file there",
            run,
            last,
            step,
        )


def _from_state(state: Any, weights: str, device: torch.device, preprocessing: dict[str, Any]) -> Pretrained:
    if not (isinstance(state, dict) and {"config", "teacher"} <= state.keys()):
        raise ValueError(f"weights: {weights} is no checkpoint of a run")
    config = _config(state["config"], weights)
    _, network = create_networks(config, device)
    try:
        network.load_state_dict(state[trained_part(config)])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"weights: {weights} does not fit the network of its config: {reason}") from error
    model = Pretrained.of(network, replace(config, **preprocessing), device)
    if "global_size" in preprocessing:
        feature_width(model.backbone.cpu(), [preprocessing["global_size"]], config.channels)
        model.backbone.to(device)
    return replace(model, name=weights)


def _config(keys: dict[str, Any], weights: str) -> PretrainConfig:
    """A configuration from keys as YAML and JSON give them, without those that matter only in training and
    could contradict others, or change how features are rounded, as the attention of bf16 on a CPU does."""
    training = {"init_from": None, "fsdp": False, "accumulate": 1, "precision": "fp32"}
    keys = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    try:
        return PretrainConfig(**{**keys, **training})
    except TypeError as error:
        raise ValueError(f"weights: {weights} is of another version of bincomm: {error}") from error
