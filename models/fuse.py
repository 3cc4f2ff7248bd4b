"""Faster inference: fold batch norms into the convolutions before them."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.blocks import ConvBN
from models.cbam import CBAM


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, equal to float tolerance, whose batch norms are part of its convolutions.

    The copy is for inference only: its state dict no longer fits the configuration, so do not save it as a checkpoint.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, ConvBN) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        elif isinstance(module, CBAM):
            module.spatial, module.bn = fuse_conv_bn_eval(module.spatial, module.bn), nn.Identity()
    return model.requires_grad_(False)
