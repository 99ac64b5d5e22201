"""A pretrained backbone, and its head where it has one, ready to look at images."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from bincomm.config import PretrainConfig, read_config
from bincomm.engine.checkpoints import Checkpoints, load_checkpoint
from bincomm.models import create_networks, load_weights, made_with, normalisation_of
from bincomm.networks import Head, Network, PrototypeHead, create_backbone


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
    weights: str, device: torch.device, *, backbone: str | None = None, **shown: Any
) -> Pretrained:
    """Load what was pretrained.

    Args:
        weights: a run's directory (its newest checkpoint, else its backbone alone), a checkpoint, a
            .safetensors file or a timm model with pretrained weights, by name; the last two have no head.
        backbone: timm's name of it, for a .safetensors file that does not say.
        shown: keys of `PretrainConfig` that tell how images are shown, where not as in training.

    Raises:
        ValueError: there are no such weights, or they do not fit.
    """
    path = Path(os.path.expanduser(weights))
    if path.is_dir():
        return _of_run(path, weights, device, shown)
    if path.suffix == ".ckpt":
        return _of_state(load_checkpoint(path), weights, device, shown)
    if path.exists():
        try:
            keys = made_with(weights)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights: {weights} cannot be read as safetensors: {error}") from error
        if not keys and backbone is None:
            raise ValueError(f"weights: {weights} does not say of which backbone it is; say --backbone")
        keys = keys or {"backbone": backbone}
        return _of_backbone(PretrainConfig(**_tuples({**keys, "init_from": weights})), weights, device, shown)
    if timm.is_model(weights):
        size = timm.get_pretrained_cfg(weights).input_size[-1]
        keys = {"backbone": weights, "global_size": size, "init_from": weights, **normalisation_of(weights)}
        return _of_backbone(PretrainConfig(**_tuples(keys)), weights, device, shown)
    raise ValueError(
        "weights: expected a run's directory, a checkpoint, a .safetensors file or a timm model, got "
        f"{weights!r}"
    )


def _of_run(run: Path, weights: str, device: torch.device, shown: dict[str, Any]) -> Pretrained:
    checkpoint = Checkpoints(run / "checkpoints", 1, print).load()
    if checkpoint is not None:
        return _of_state(checkpoint, weights, device, shown)
    keys = read_config(run, "weights")
    return _of_backbone(PretrainConfig(**_tuples({**keys, "init_from": weights})), weights, device, shown)


def _of_state(state: dict[str, Any], weights: str, device: torch.device, shown: dict[str, Any]) -> Pretrained:
    if "config" not in state or "teacher" not in state:
        raise ValueError(f"weights: {weights} is no checkpoint of a run")
    config = PretrainConfig(**_tuples({**state["config"], "init_from": None, "fsdp": False}))
    _, teacher = create_networks(config, device)
    teacher.load_state_dict(state["teacher"])
    found = Pretrained.of(teacher, config, device)
    return replace(found, name=weights, config=replace(config, **_tuples(shown)))


def _of_backbone(
    config: PretrainConfig, weights: str, device: torch.device, shown: dict[str, Any]
) -> Pretrained:
    backbone, _ = create_backbone(config.backbone, config.global_size, **config.backbone_args)
    load_weights(backbone, weights)
    backbone.eval().requires_grad_(False)
    return Pretrained(weights, backbone.to(device), None, replace(config, **_tuples(shown)), device)


def _tuples(keys: dict[str, Any]) -> dict[str, Any]:
    """As the command line gives them: what YAML and JSON have as lists are tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
