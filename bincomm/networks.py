"""Networks: a timm backbone under a three-layer head; the teacher is the student's moving average."""

import difflib
import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bincomm.backbone_arguments import check_backbone_arguments, check_backbone_name
from bincomm.distributed.sharding import shard_like

try:
    import timm
except ImportError as error:
    raise ImportError("training needs timm; install it with: pip install 'bincomm[train]'") from error


def create_backbone(
    name: str, image_size: int, *, in_chans: int = 3, **arguments: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A timm backbone without its classifier, images (n, C, H, W) -> features (n, D), and the arguments of
    `timm.create_model` it was made with.

    The feature is the one timm's classifier would see: the CLS token of a ViT, the pooled map of a conv net.
    ViTs interpolate their position embedding to the size of each crop.

    Args:
        name: a timm model name, `timm.list_models()`.
        image_size: side of the global crops in pixels; a ViT's position embedding is made for it.
        in_chans: C, the channels of an image.
        arguments: passed on to `timm.create_model`.

    Raises:
        ValueError: unknown name (with the nearest ones), arguments the model does not take, or that do not
            describe it; see `check_backbone_arguments`.
    """
    check_backbone_name(name, "backbone")
    check_backbone_arguments(arguments)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"backbone: timm has no model named {name!r}{hint}")
    refused = ""
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    for sizes in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}, {}):
        made_with = {"model_name": name, "num_classes": 0, **sizes, **arguments}
        try:  # timm's constructors take different arguments, and say so by TypeError only
            return timm.create_model(**made_with), made_with
        except TypeError as error:
            refused = str(error)
            if not any(key in refused for key in sizes):
                break
    raise ValueError(f"backbone: {name} does not accept these arguments: {refused}")


@torch.no_grad()
def feature_width(
    backbone: nn.Module, sizes: list[int], channels: int = 3, argument: str = "backbone"
) -> int:
    """D, found by showing the backbone one image of every size, in pixels a side; it is left as it was.

    Raises:
        ValueError: it cannot take an image of some size; the message begins with `argument`.
    """
    training, width = backbone.training, 0
    backbone.eval()
    for size in sizes:
        try:
            width = backbone(torch.zeros(1, channels, size, size)).shape[-1]
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or "its parts do not fit this size"
            raise ValueError(
                f"{argument}: {type(backbone).__name__} cannot take crops of {size} pixels: {reason}"
            ) from error
    backbone.train(training)
    return width


class Head(nn.Module):
    """Projection head D → hidden → GELU → hidden → GELU → K, with biases and no norm: features -> raw logits.

    Weights are drawn from a normal truncated at ±2, biases are 0, as in DINO's code. There the standard
    deviation is 0.02 in all layers, of 768 features and a width of 2048 in the paper; elsewhere it is
    `std·√(768/features)` and `std·√(2048/hidden)`, so that the initial logits do not depend on the widths.
    """

    def __init__(self, features: int, hidden: int, bits: int, std: float = 0.02):
        super().__init__()
        self.features = features
        self.std = std
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bits),
        )
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Re-initialize the head from its initial distribution."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer, width in zip(linear, (768, 2048, 2048), strict=True):
            # Drawn on the CPU, so that every rank and every kind of device gets the same head.
            weight = torch.empty(layer.weight.shape)
            std = self.std * math.sqrt(width / layer.in_features)
            nn.init.trunc_normal_(weight, std=std, generator=generator)
            with torch.no_grad():
                layer.weight.copy_(shard_like(weight, layer.weight))
                layer.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)

    def code(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., K), whose signs are the code: the logits themselves."""
        return self(features)


class PrototypeHead(nn.Module):
    """DINO's head: features -> scores of P prototypes, the cosines of a bottleneck of K numbers and each of
    them ("Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294).

    `s = b/‖b‖ · (w/‖w‖)ᵀ`, b the output of a `Head`, w the rows of `prototypes` (P, K): DINO's last layer
    under weight normalization, its magnitudes held at 1. The rows are drawn as PyTorch draws a linear layer's
    weight, from U(-1/√K, 1/√K); their lengths, which training may change, have no effect on the scores.
    Under autocast scores are rounded to its dtype, as in DINO's own code.
    """

    def __init__(self, features: int, hidden: int, bits: int, prototypes: int, std: float = 0.02):
        super().__init__()
        self.features = features
        self.bottleneck = Head(features, hidden, bits, std)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bits))
        self._draw_prototypes(None)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Re-initialize bottleneck and prototypes from their initial distributions."""
        self.bottleneck.reset(generator)
        self._draw_prototypes(generator)

    def _draw_prototypes(self, generator: torch.Generator | None) -> None:
        limit = self.prototypes.shape[1] ** -0.5
        rows = torch.empty(self.prototypes.shape).uniform_(-limit, limit, generator=generator)  # on the CPU
        with torch.no_grad():
            self.prototypes.copy_(shard_like(rows, self.prototypes))

    def forward(self, features: Tensor) -> Tensor:
        # Not by a parametrization of torch: a plain parameter can be copied, averaged and saved.
        return F.linear(F.normalize(self.bottleneck(features), dim=-1), F.normalize(self.prototypes, dim=-1))

    def code(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., K), whose signs are the code: the bottleneck before its normalization."""
        return self.bottleneck(features)


class Network(nn.Module):
    """Backbone and head: crops of images -> logits (V, n, K), of a `PrototypeHead` scores (V, n, P)."""

    def __init__(self, backbone: nn.Module, head: Head | PrototypeHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def heads(self) -> list[Head | PrototypeHead]:
        """All heads: what a reset re-initializes."""
        return [self.head]

    def copy_on(self, backbone: nn.Module) -> "Network":
        """A copy on another backbone, which takes on the weights of this one: a teacher's beginning."""
        backbone.load_state_dict(self.backbone.state_dict())
        return Network(backbone, deepcopy(self.head))

    def forward(self, *groups: Tensor) -> Tensor:
        """Groups of equally large views (n, V_g, C, H_g, W_g) -> logits (ΣV_g, n, K) of all, in order.

        The crops of an image lie together, as the loader makes them; so they need not be copied.
        """
        features = [self.backbone(views.flatten(0, 1)).unflatten(0, views.shape[:2]) for views in groups]
        return self.head(torch.cat([some.transpose(0, 1) for some in features]))


def create_teacher(student: Network, backbone: nn.Module) -> Network:
    """A copy of the student without gradients, on a backbone of its own (that has no stochastic depth)."""
    return student.copy_on(backbone).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """Exponential moving average of every parameter, those of both in the same order:
    `θ_t ← m θ_t + (1-m) θ_s`.

    Buffers (the running statistics of batch norm) are the teacher's own, gathered in its forward passes.
    """
    get_ema_multi_avg_fn(momentum)(list(teacher), list(student), None)
