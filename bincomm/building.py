"""From a configuration to the networks and the objective, as they are before the first step."""

import torch
from torch import nn

from bincomm.config import PretrainConfig
from bincomm.engine.optimizer import clear_state
from bincomm.networks import Head, Network, PrototypeHead, create_backbone, create_teacher, feature_width
from bincomm.objectives import DINO, DiscreteCommunication, SimDINO
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
    backbone, _ = create_backbone(config.backbone, config.global_size, **arguments)
    sizes = [config.global_size] + [config.local_size] * (config.local_crops > 0)
    width = feature_width(backbone, sizes)
    if config.method == "dino":
        head = PrototypeHead(width, config.hidden, config.bits, config.prototypes, config.head_std)
    else:
        head = Head(width, config.hidden, config.bits, config.head_std)
    if config.init_from is not None:
        load_weights(backbone, config.init_from)
        known = read_metadata(config.init_from)
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
