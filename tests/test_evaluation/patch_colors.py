"""A backbone whose features of patches are known: their mean colors."""

import torch
import torch.nn.functional as F
from torch import nn

from bincomm.config import PretrainConfig
from bincomm.evaluation.pretrained import Pretrained


class Colors(nn.Module):
    """The mean color of every patch, as a conv net's map."""

    feature_info = ({"reduction": 8},)

    def forward_features(self, images):
        return F.avg_pool2d(images, 8)


def pretrained(backbone=None):
    return Pretrained("test", backbone or Colors(), None, PretrainConfig(), torch.device("cpu"))
