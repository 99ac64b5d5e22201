"""Patches: a backbone's features of the places of an image, as a map."""

from typing import Any

from torch import Tensor, nn


def patch_map(backbone: nn.Module, features: Tensor, shape: tuple[int, int]) -> Tensor:
    """What a timm model's `forward_features` returns for n images, as (n, h, w, D).

    Of a ViT the patch tokens; class and register tokens are left out. Where timm puts the final norm behind
    the pooling (`fc_norm`, of models that average their tokens), it is applied to each token. Of a conv net
    the map before pooling.

    Args:
        backbone: the timm model.
        features: of its `forward_features`.
        shape: (h, w), how many patches there are in the images. A net of unpadded convolutions has a smaller
            map, which is then taken to cover the image.

    Raises:
        ValueError: the features are neither a map nor as many tokens.
    """
    if isinstance(features, Tensor) and features.dim() == 4:
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        return features if channels_last else features.permute(0, 2, 3, 1)
    rows, columns = shape
    if isinstance(features, Tensor) and features.dim() == 3:
        tokens = features[:, getattr(backbone, "num_prefix_tokens", 0) :]
        if tokens.shape[1] == rows * columns:
            norm = getattr(backbone, "fc_norm", None)
            tokens = tokens if norm is None else norm(tokens)
            return tokens.unflatten(1, (rows, columns))
    given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise ValueError(
        f"backbone: expected of {type(backbone).__name__} a map (n, D, h, w) or tokens of {rows}×{columns} "
        f"patches, got {given}"
    )


def stride_of(backbone: nn.Module) -> int:
    """Pixels a side of the image that belong to one feature of a timm model.

    Raises:
        ValueError: it does not say, or has no feature maps.
    """
    feature_info: Any = getattr(backbone, "feature_info", None)
    try:
        stride = int(feature_info[-1]["reduction"])
    except (AttributeError, IndexError, KeyError, TypeError):
        stride = 0
    if stride < 1 or not hasattr(backbone, "forward_features"):
        raise ValueError(
            "backbone: expected a timm model with patch tokens or feature maps, got "
            f"{type(backbone).__name__}"
        )
    return stride
