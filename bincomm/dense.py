"""Dense bits: a network that also gives the logits of patches, which its student does not see.

Masked patches of the student's global crops predict the bits of the teacher's patches at the same places, as
in iBOT (arXiv 2111.07832), whose prototypes are bits here. Which patches are masked is drawn by
`bincomm.engine.masks`, the loss is in `bincomm.objectives`.
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bincomm.networks import Head, Network, PrototypeHead
from bincomm.patches import patch_map, stride_of


class Patches(NamedTuple):
    """The patches of a global crop."""

    rows: int
    columns: int
    features: int  # D of a patch
    embedding: int  # size of what a backbone embeds a patch in before its blocks; 0: it has no such embedding


@torch.no_grad()
def find_patches(backbone: nn.Module, size: int, channels: int) -> Patches:
    """The patches of crops of `size` pixels a side, found by showing the backbone one; it is left as it was.

    Raises:
        ValueError: it gives neither patch tokens nor a feature map, or only one place for the image.
    """
    side = -(-size // stride_of(backbone))
    training, backbone_of_timm = backbone.training, _as_timm(backbone)
    image = torch.zeros(1, channels, size, size)
    backbone.eval()
    found = patch_map(backbone, backbone_of_timm.forward_features(image), (side, side))
    _, rows, columns, features = found.shape
    if rows * columns < 2:
        raise ValueError(
            f"backbone: expected several patches or cells in crops of {size} pixels, got {rows * columns} of "
            f"{type(backbone).__name__}"
        )
    embedding = 0
    if hasattr(backbone, "patch_embed"):
        embedded = backbone_of_timm.patch_embed(image)
        if isinstance(embedded, Tensor) and embedded.shape[:-1] in ((1, rows * columns), (1, rows, columns)):
            embedding = embedded.shape[-1]
    backbone.train(training)
    return Patches(rows, columns, features, embedding)


class DenseNetwork(Network):
    """A network with a second head, for patches of the global crops.

    Called as a `Network` it does what that does. With `places` (n, M), which index the 2·h·w patches of an
    image's two global crops, row by row, the logits of these patches follow those of the crops.

    Args:
        backbone: a timm model.
        head: for crops.
        patch_head: for patches.
        patches: the backbone's, from `find_patches`.
        masks: whether it does not see the patches at these places, as the student. A ViT gets a learned
            vector (`mask_token`) in place of their embeddings, before position embeddings are added. To a net
            without such embeddings the pixels of these cells are 0, the mean color.
    """

    def __init__(
        self, backbone: nn.Module, head: Head | PrototypeHead, patch_head: Head, patches: Patches, masks: bool
    ):
        super().__init__(backbone, head)
        self.patch_head = patch_head
        self.patches = patches
        self.masks = masks
        self.mask_token: nn.Parameter | None
        self.register_parameter("mask_token", None)
        self._masked: Tensor | None = None  # (2n, h, w) bool, while the backbone runs
        if masks and patches.embedding:
            self.mask_token = nn.Parameter(torch.zeros(patches.embedding))
            # A hook leaves the names of the backbone's weights as they are, so that it is exported as ever.
            _as_timm(backbone).patch_embed.register_forward_hook(self._replace_embeddings)

    @property
    def heads(self) -> list[Head | PrototypeHead]:
        """All heads: what a reset re-initializes."""
        return [self.head, self.patch_head]

    def copy_on(self, backbone: nn.Module) -> "DenseNetwork":
        """A copy on another backbone, which takes on the weights of this one; it sees all patches."""
        backbone.load_state_dict(self.backbone.state_dict())
        heads = deepcopy(self.head), deepcopy(self.patch_head)
        return DenseNetwork(backbone, *heads, self.patches, masks=False)

    def forward(self, *groups: Tensor, places: Tensor | None = None) -> Tensor:
        """Groups of equally large views (n, V_g, C, H_g, W_g), the global ones first, and (n, M) places ->
        logits (ΣV_g + M, n, K): of all views, in order, then of the patches at these places."""
        if places is None:
            return super().forward(*groups)
        views, *others = groups
        images = views.flatten(0, 1)
        if self.masks:
            rows, columns = self.patches.rows, self.patches.columns
            seen = places.new_zeros(len(views), views.shape[1] * rows * columns, dtype=torch.bool)
            masked = seen.scatter(1, places, True).view(len(images), rows, columns)
            if self.mask_token is None:
                images = hide(images, masked)
            else:
                self._masked = masked
        backbone = _as_timm(self.backbone)
        maps = backbone.forward_features(images)
        self._masked = None
        pooled = [backbone.forward_head(maps), *(backbone(group.flatten(0, 1)) for group in others)]
        features = [
            some.unflatten(0, group.shape[:2]).transpose(0, 1)
            for some, group in zip(pooled, groups, strict=True)
        ]
        patches = patch_map(backbone, maps, (self.patches.rows, self.patches.columns))
        patches = patches.reshape(len(views), -1, patches.shape[-1])
        chosen = patches.gather(1, places.unsqueeze(-1).expand(-1, -1, patches.shape[-1])).transpose(0, 1)
        return torch.cat([self.head(torch.cat(features)), self.patch_head(chosen)])

    def _replace_embeddings(self, module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor | None:
        if self._masked is None or self.mask_token is None:
            return None  # of a crop that is seen as it is
        masked = self._masked.view(*embeddings.shape[:-1], 1)
        return torch.where(masked, self.mask_token.to(embeddings.dtype), embeddings)


def hide(images: Tensor, masked: Tensor) -> Tensor:
    """Images (n, C, H, W) whose pixels are 0 in the cells, equal parts of the image, that (n, h, w) marks."""
    pixels = F.interpolate(masked.unsqueeze(1).to(images.dtype), images.shape[-2:])
    return images.masked_fill(pixels > 0, 0)


def _as_timm(backbone: nn.Module) -> Any:
    """For the type checker, which knows a module's attributes as tensors or modules alone."""
    return backbone
