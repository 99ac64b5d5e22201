"""From a configuration to the networks and the objective, as they are before the first step."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from bincomm.config import PretrainConfig
from bincomm.engine.optimiser import clear_state
from bincomm.engine.ranks import split_like
from bincomm.networks import Head, Network, PrototypeHead, create_backbone, create_teacher, feature_width
from bincomm.objectives import DINO, DiscreteCommunication, SimDINO


def create_networks(config: PretrainConfig, device: torch.device) -> tuple[Network, Network]:
    """Student and teacher: equal, determined by the seed and by what `config.init_from` holds.

    Raises:
        ValueError: the backbone, its arguments or the weights do not fit; the message names the key.
    """
    torch.manual_seed(config.seed)
    arguments = dict(config.backbone_args)
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    backbone, _ = create_backbone(config.backbone, config.global_size, **arguments)
    sizes = [config.global_size] + [config.local_size] * (config.local_crops > 0)
    width = feature_width(backbone, sizes)
    if config.method == "dino":
        head = PrototypeHead(width, config.hidden, config.bits, config.prototypes, config.head_std)
    else:
        head = Head(width, config.hidden, config.bits, config.head_std)
    if config.init_from is not None:
        load_weights(backbone, config.init_from)
        for key, theirs in normalisation_of(config.init_from).items():
            if list(getattr(config, key)) != theirs:
                raise ValueError(
                    f"{key}: expected {theirs}, with which {config.init_from} was trained, got "
                    f"{list(getattr(config, key))}"
                )
    if config.checkpoint_activations:
        if not hasattr(backbone, "set_grad_checkpointing"):
            raise ValueError(f"checkpoint_activations: expected false, for {config.backbone} cannot")
        backbone.set_grad_checkpointing(True)
    student = Network(backbone, head)
    # The teacher's message is to be certain: nothing is dropped in it, neither paths nor features.
    certain = {key: value for key, value in arguments.items() if "drop" not in key}
    still, _ = create_backbone(config.backbone, config.global_size, **certain)
    teacher = create_teacher(student, still)
    if device.type == "cpu" and config.precision == "bf16":
        write_attention_out(student, teacher)  # PyTorch's fused one takes two to five times as long there
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    return student.to(device, memory_format=layout), teacher.to(device, memory_format=layout)


def write_attention_out(*networks: nn.Module) -> None:
    """Let attention be products and a softmax in place of PyTorch's fused operation."""
    for network in networks:
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False


def create_objective(config: PretrainConfig) -> nn.Module:
    """What the configuration's method trains."""
    if config.method == "simdino":
        return SimDINO(config.eps_squared, expa_type=config.expa_type)
    if config.method == "dino":
        return DINO(config.prototypes)
    return DiscreteCommunication(config.beta, config.eps_squared, agreement=config.agreement, tau=config.tau)


def reset_head(
    student: Network, teacher: Network, optimiser: torch.optim.Optimizer, seed: tuple[int, int]
) -> None:
    """Draw the head anew, the same for student and teacher, and clear the optimiser's state of it."""
    # Every rank draws it, on the CPU: the same numbers for all.
    for head in (student.head, teacher.head):
        head.reset(torch.Generator().manual_seed(hash_seed(*seed)))
    clear_state(optimiser, student.head)


def hash_seed(seed: int, number: int) -> int:
    """One seed from a run's seed and another number, different for different pairs of ordinary size."""
    return (seed * 1_000_003 + number) % 2**63


def load_weights(backbone: nn.Module, source: str) -> None:
    """Fill a backbone from a run's directory, a .safetensors file, or timm's pretrained weights by name.

    Position embeddings are resampled to the backbone's size; weights of a classifier are left out.

    Raises:
        ValueError: there are no such weights, or they are of another backbone.
    """
    weights = read_weights(source)
    ours = backbone.state_dict()
    positions = [state.get("pos_embed", torch.empty(0, 0)).shape[1] for state in (weights, ours)]
    if all(positions) and positions[0] != positions[1]:
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], backbone.patch_embed.grid_size, num_prefix_tokens=backbone.num_prefix_tokens
        )
    missing = sorted(set(ours) - set(weights))
    other = sorted(name for name in set(ours) & set(weights) if ours[name].shape != weights[name].shape)
    if missing or other:
        name, what = (missing[0], "is missing") if missing else (other[0], "has another shape")
        raise ValueError(
            f"init_from: {source} holds weights of another backbone: {name} {what} there "
            f"({len(missing)} missing, {len(other)} of another shape)"
        )
    backbone.load_state_dict({name: weights[name] for name in ours})


def read_weights(source: str) -> dict[str, Tensor]:
    """A backbone's weights by name; see `load_weights`."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        path = path / "backbone.safetensors"
        if not path.exists():
            raise ValueError(f"init_from: {source} holds no finished run (there is no {path.name})")
    if path.exists():
        try:
            return safetensors.torch.load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"init_from: {path} cannot be read as safetensors: {error}") from error
    if not timm.is_model(source):
        raise ValueError(
            f"init_from: expected a run's directory, a .safetensors file or a timm model, got {source!r}"
        )
    try:
        return timm.create_model(source, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of whatever library timm fetches them with
        raise ValueError(f"init_from: timm has no weights of {source} here: {error}") from error


def normalisation_of(source: str) -> dict[str, list[float]]:
    """The keys mean and std that weights were trained with, as far as that is known: of timm's, and ours."""
    made = made_with(source)
    if made:
        return {key: made[key] for key in ("mean", "std") if key in made}
    if not Path(os.path.expanduser(source)).exists() and timm.is_model(source):
        theirs = timm.get_pretrained_cfg(source)
        return {"mean": list(theirs.mean), "std": list(theirs.std)}
    return {}


def made_with(source: str) -> dict[str, Any]:
    """The keys backbone, backbone_args, mean and std of the weights in a run or a file of ours; {} for
    others."""
    path = Path(os.path.expanduser(source))
    path = path / "backbone.safetensors" if path.is_dir() else path
    if not path.exists():
        return {}
    with safetensors.safe_open(path, "pt") as file:
        created = (file.metadata() or {}).get("create_model")
    if created is None:
        return {}
    arguments = json.loads(created)
    for key in ("num_classes", "img_size", "dynamic_img_size"):
        arguments.pop(key, None)
    colours = arguments.pop("pretrained_cfg_overlay", {})
    return {"backbone": arguments.pop("model_name"), "backbone_args": arguments, **colours}


def place(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a network, whose parameters may be split over the ranks."""
    ours = network.state_dict()
    network.load_state_dict({name: split_like(value, ours[name]) for name, value in state.items()})


def place_optimiser(optimiser: torch.optim.Optimizer, state: dict) -> None:
    """Load a whole state into an optimiser, whose parameters may be split over the ranks."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        model = parameters[number]
        for name, value in values.items():
            if value.shape == model.shape and value.dim():
                values[name] = split_like(value, model)
    optimiser.load_state_dict(state)
