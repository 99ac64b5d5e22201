"""From a configuration to the networks and the objective, as they are before the first step."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bincomm.config import PretrainConfig
from bincomm.dense import DenseNetwork, find_patches
from bincomm.networks import Head, Network, PrototypeHead, create_backbone, create_teacher, feature_width
from bincomm.objectives import DINO, DenseCommunication, DiscreteCommunication, SimDINO
from bincomm.weights import load_weights, read_metadata


def create_networks(config: PretrainConfig, device: torch.device) -> tuple[Network, Network]:
    """Student and teacher: equal, determined by the seed and by what `config.init_from` holds.

    Raises:
        ValueError: the backbone, its arguments or the weights do not fit; the message names the key.
    """
    torch.manual_seed(config.seed)
    arguments = dict(config.backbone_args)
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    try:
        backbone, _ = create_backbone(
            config.backbone, config.global_size, in_chans=config.channels, **arguments
        )
    except ValueError as error:
        if config.drop_path and "drop_path_rate" in str(error):
            raise ValueError(
                f"drop_path: expected 0, because {config.backbone} has no stochastic depth, got "
                f"{config.drop_path}; for example drop_path: 0, or --drop_path 0"
            ) from error
        raise
    sizes = [config.global_size] + [config.local_size] * (config.local_crops > 0)
    width = feature_width(backbone, sizes, config.channels)
    if config.low_resolution:
        low_sizes = list(config.low_sizes[: len(sizes)])
        feature_width(backbone, low_sizes, config.channels, "low_resolution_sizes")
    if config.method == "dino":
        head: Head | PrototypeHead = PrototypeHead(
            width, config.hidden, config.bits, config.prototypes, config.head_std
        )
    else:
        head = Head(width, config.hidden, config.bits, config.head_std)
    if config.init_from is not None:
        load_weights(backbone, config.init_from)
        metadata = read_metadata(config.init_from)
        # Weights for RGB that were adapted to other channels were trained with other numbers.
        of_same_channels = metadata.get("channels", config.channels) == config.channels
        for key in ("mean", "std") if of_same_channels else ():
            configured = list(getattr(config, key))
            if metadata.get(key, configured) != configured:
                raise ValueError(
                    f"{key}: expected {metadata[key]}, with which {config.init_from} was trained, "
                    f"got {configured}"
                )
    if config.checkpoint_activations:
        enable = getattr(backbone, "set_grad_checkpointing", None)
        if enable is None:
            raise ValueError(f"checkpoint_activations: expected false, because {config.backbone} cannot")
        enable(True)
    student = Network(backbone, head)
    if config.dense:
        student = create_dense_student(config, backbone, head)
    # Nothing is dropped in the teacher, neither paths nor features, so that its message is deterministic.
    without_dropping = {key: value for key, value in arguments.items() if "drop" not in key}
    teacher_backbone, _ = create_backbone(
        config.backbone, config.global_size, in_chans=config.channels, **without_dropping
    )
    teacher = create_teacher(student, teacher_backbone)
    if device.type == "cpu" and config.precision == "bf16":
        write_attention_out(student, teacher)  # PyTorch's fused one takes two to five times as long there
    student, teacher = student.to(device), teacher.to(device)
    if config.channels_last and not config.fsdp:  # FSDP splits contiguous parameters only
        student = student.to(memory_format=torch.channels_last)
        teacher = teacher.to(memory_format=torch.channels_last)
    return student, teacher


def create_dense_student(
    config: PretrainConfig, backbone: nn.Module, head: Head | PrototypeHead
) -> DenseNetwork:
    """The student with a second head, for patches.

    Raises:
        ValueError: the backbone has no patches; the message names the key.
    """
    try:
        patches = find_patches(backbone, config.global_size, config.channels)
    except ValueError as error:
        reason = str(error).removeprefix("backbone: ")
        raise ValueError(
            f"dense: expected 0, because {config.backbone} has no patches to mask, got {config.dense:g}: "
            f"{reason}"
        ) from error
    patch_head = Head(patches.features, config.hidden, config.bits, config.head_std)
    return DenseNetwork(backbone, head, patch_head, patches, masks=True)


def create_trained(config: PretrainConfig, weights: dict[str, Tensor], device: torch.device) -> Network:
    """The network that a run is for with the weights it ended with, on one device, without what is dropped in
    training."""
    _, network = create_networks(replace(config, fsdp=False, init_from=None), device)
    network.load_state_dict(weights)
    return network


def trained_part(config: PretrainConfig) -> str:
    """The part of a run's checkpoints that has these weights."""
    return "student" if config.teacher_is_frozen else "teacher"


def write_attention_out(*networks: nn.Module) -> None:
    """Let attention be products and a softmax in place of PyTorch's fused operation."""
    for network in networks:
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010  (a plain attribute of timm's)


def create_objective(
    config: PretrainConfig,
) -> DiscreteCommunication | DenseCommunication | SimDINO | DINO:
    """What the configuration's method trains."""
    if config.method == "simdino":
        return SimDINO(config.eps_squared, expa_type=config.expa_type)
    if config.method == "dino":
        return DINO(config.prototypes)
    # A frozen teacher cannot collapse, and a student that did would predict nothing of its messages.
    beta = 0.0 if config.teacher_is_frozen and config.beta == "auto" else config.beta
    images = DiscreteCommunication(beta, config.eps_squared, agreement=config.agreement, tau=config.tau)
    return DenseCommunication(images, config.dense) if config.dense else images


def hash_seed(seed: int, number: int) -> int:
    """One seed from a run's seed and another number, different for different pairs of ordinary size."""
    return (seed * 1_000_003 + number) % 2**63
