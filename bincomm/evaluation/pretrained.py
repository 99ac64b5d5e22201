"""A pretrained backbone, and its head where it has one, ready to look at images."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bincomm.building import create_networks
from bincomm.config import PretrainConfig, read_config
from bincomm.engine.checkpoints import Checkpoints, load_checkpoint
from bincomm.networks import Head, Network, PrototypeHead, create_backbone, feature_width
from bincomm.weights import load_weights, read_metadata


@dataclass(frozen=True)
class Pretrained:
    """A backbone, images (n, 3, S, S) -> features (n, D), and its head, features -> logits of the code.

    Of `config` counts how images are shown to it: `global_size`, `eval_crop`, `mean` and `std`, and with how
    many `threads` and in what `batch_size` they are read.
    """

    name: str
    backbone: nn.Module  # both in evaluation mode, on the device
    head: Head | PrototypeHead | None
    config: PretrainConfig
    device: torch.device

    @classmethod
    def of(cls, network: Network, config: PretrainConfig, device: torch.device) -> "Pretrained":
        """A network as it is now; it is put into evaluation mode."""
        network.eval()
        return cls(config.output, network.backbone, network.head, config, device)


def load_pretrained(
    weights: str | Path, device: torch.device | str, *, backbone: str | None = None, **shown: Any
) -> Pretrained:
    """Load what was pretrained.

    Args:
        weights: a run's directory (its newest checkpoint, else its backbone alone), a checkpoint, a
            .safetensors file or a timm model with pretrained weights, by name; the last two have no head.
        device: where the networks shall be.
        backbone: timm's name of it, for a .safetensors file that does not say.
        shown: keys of `PretrainConfig` that tell how images are shown, where not as in training.

    Raises:
        ValueError: there are no such weights, or they do not fit.
    """
    found = _load(os.fspath(weights), torch.device(device), backbone, shown)
    if backbone not in (None, found.config.backbone):
        raise ValueError(f"backbone: expected {found.config.backbone}, as {weights} says, got {backbone}")
    return found


def _load(weights: str, device: torch.device, backbone: str | None, shown: dict[str, Any]) -> Pretrained:
    path = Path(os.path.expanduser(weights))
    if path.suffix == ".ckpt":
        if not path.exists():
            raise ValueError(f"weights: expected a checkpoint, got {weights}, which does not exist")
        return _of_state(load_checkpoint(path), weights, device, shown)
    keys: dict[str, Any] = {}
    if path.is_dir():
        checkpoint = Checkpoints(path / "checkpoints", 1, print).load()
        if checkpoint is not None:
            return _of_state(checkpoint, weights, device, shown)
        keys = read_config(path, "weights")
    keys = {**read_metadata(weights, "weights"), **keys}
    if not keys.setdefault("backbone", backbone):
        raise ValueError(f"weights: {weights} does not say of which backbone it is; say --backbone")
    # Made for the size that is shown: position embeddings are then resampled to it, and once.
    config = _config({**keys, **shown}, weights)
    network, _ = create_backbone(config.backbone, config.global_size, **config.backbone_args)
    load_weights(network, weights, "weights")
    feature_width(network, [config.global_size])
    network.eval().requires_grad_(False)
    return Pretrained(weights, network.to(device), None, config, device)


def _of_state(state: Any, weights: str, device: torch.device, shown: dict[str, Any]) -> Pretrained:
    if not (isinstance(state, dict) and {"config", "teacher"} <= state.keys()):
        raise ValueError(f"weights: {weights} is no checkpoint of a run")
    config = _config(state["config"], weights)
    _, teacher = create_networks(config, device)
    try:
        teacher.load_state_dict(state["teacher"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"weights: {weights} does not fit the network of its config: {reason}") from error
    found = Pretrained.of(teacher, config, device)
    if "global_size" in shown:
        feature_width(found.backbone.cpu(), [shown["global_size"]])
        found.backbone.to(device)
    return replace(found, name=weights, config=replace(config, **shown))


def _config(keys: dict[str, Any], weights: str) -> PretrainConfig:
    """Of keys as YAML and JSON give them; those that only training goes by and that could stand in the way of
    others are left out."""
    training = {"init_from": None, "fsdp": False, "accumulate": 1}
    keys = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    try:
        return PretrainConfig(**{**keys, **training})
    except TypeError as error:
        raise ValueError(f"weights: {weights} is of another version of bincomm: {error}") from error
