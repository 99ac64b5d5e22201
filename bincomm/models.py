"""From a configuration to the networks and the objective, as they are before the first step."""

import difflib
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
from bincomm.engine.optimizer import clear_state
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
        known = keys_of(config.init_from)
        for key in ("mean", "std"):
            ours = list(getattr(config, key))
            if known.get(key, ours) != ours:
                raise ValueError(
                    f"{key}: expected {known[key]}, with which {config.init_from} was trained, got {ours}"
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
    student: Network, teacher: Network, optimizer: torch.optim.Optimizer, seed: tuple[int, int]
) -> None:
    """Draw the head anew, the same for student and teacher, and clear the optimizer's state of it."""
    # Every rank draws it, on the CPU: the same numbers for all.
    for head in (student.head, teacher.head):
        head.reset(torch.Generator().manual_seed(hash_seed(*seed)))
    clear_state(optimizer, student.head)


def hash_seed(seed: int, number: int) -> int:
    """One seed from a run's seed and another number, different for different pairs of ordinary size."""
    return (seed * 1_000_003 + number) % 2**63


def load_weights(backbone: nn.Module, source: str, argument: str = "init_from") -> None:
    """Fill a backbone from a run's directory, a .safetensors file, or timm's pretrained weights by name.

    Position embeddings are resampled to the backbone's size; weights of a classifier are left out.

    Raises:
        ValueError: there are no such weights, or they are of another backbone; the message begins with
            `argument`, which the source was named by.
    """
    weights = read_weights(source, argument)
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
            f"{argument}: {source} holds weights of another backbone: {name} {what} there "
            f"({len(missing)} missing, {len(other)} of another shape)"
        )
    backbone.load_state_dict({name: weights[name] for name in ours})


def read_weights(source: str, argument: str) -> dict[str, Tensor]:
    """A backbone's weights by name; see `load_weights`."""
    file = weights_file(source, argument)
    if file is not None:
        try:
            return safetensors.torch.load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{argument}: {file} cannot be read as safetensors: {error}") from error
    try:
        return timm.create_model(source, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of whatever library timm fetches them with
        raise ValueError(f"{argument}: timm has no weights of {source} here: {error}") from error


def weights_file(source: str, argument: str) -> Path | None:
    """The file of a backbone's weights, given it or a run's directory; None for those of timm."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        if not (path / "backbone.safetensors").exists():
            raise ValueError(f"{argument}: {source} holds no finished run (there is no backbone.safetensors)")
        return path / "backbone.safetensors"
    if path.exists():
        return path
    if timm.is_model(source):
        return None
    near = difflib.get_close_matches(source, timm.list_models(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{argument}: expected a run's directory, a .safetensors file or a timm model, got {source!r}{hint}"
    )


def keys_of(source: str, argument: str = "init_from") -> dict[str, Any]:
    """The keys of a configuration that weights know: backbone, backbone_args, mean, std, and the global_size
    and eval_crop at which they were evaluated; of timm's all but the last, of a file that is not ours none.

    Raises:
        ValueError: there is no such source, or it cannot be read; see `load_weights`.
    """
    file = weights_file(source, argument)
    if file is None:
        try:
            theirs = timm.get_pretrained_cfg(source)
        except RuntimeError as error:  # it has the model, but no such weights
            raise ValueError(f"{argument}: {error}") from error
        named = {"backbone": source, "backbone_args": {}, "global_size": theirs.input_size[-1]}
        return {**named, "mean": list(theirs.mean), "std": list(theirs.std)}
    try:
        with safetensors.safe_open(file, "pt") as opened:
            created = (opened.metadata() or {}).get("create_model")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{argument}: {file} cannot be read as safetensors: {error}") from error
    if created is None:
        return {}
    arguments = json.loads(created)
    for key in ("num_classes", "img_size", "dynamic_img_size"):
        arguments.pop(key, None)
    shown = arguments.pop("pretrained_cfg_overlay", {})
    known = {"backbone": arguments.pop("model_name"), "backbone_args": arguments}
    known |= {key: shown[key] for key in ("mean", "std") if key in shown}
    if "input_size" in shown:
        known |= {"global_size": shown["input_size"][-1], "eval_crop": shown["crop_pct"]}
    return known


def place(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a network, whose parameters may be split over the ranks."""
    ours = network.state_dict()
    network.load_state_dict({name: split_like(value, ours[name]) for name, value in state.items()})


def place_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a whole state into an optimizer, whose parameters may be split over the ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        model = parameters[number]
        for name, value in values.items():
            if value.shape == model.shape and value.dim():
                values[name] = split_like(value, model)
    optimizer.load_state_dict(state)
