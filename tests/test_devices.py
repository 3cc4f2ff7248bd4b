"""No tensor stays on the CPU when a network runs on a GPU: shown on any machine, by tensors without contents."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import build_model
from models.heads import OUTPUTS
from models.image_pyramid import ImagePyramid
from utils.config import load_config

BATCH, HEIGHT, WIDTH = 2, 96, 160


def on_fake_gpu(network: nn.Module) -> nn.Module:
    """The network with its weights on a GPU that need not exist; for use within a FakeTensorMode."""
    for module in network.modules():
        for tensors, wrap in ((module._parameters, nn.Parameter), (module._buffers, torch.Tensor)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = wrap(torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
    return network


def test_a_fake_gpu_refuses_what_is_on_the_cpu():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@pytest.mark.parametrize("name", ["v2_ultra", "v2_ultra_plan", "v2_ultra_full", "v2", "v1", "v1_compact"])
def test_networks(name):
    network = build_model(load_config(name).model)
    with FakeTensorMode():
        on_fake_gpu(network)
        images = torch.zeros(BATCH, 3, HEIGHT, WIDTH, device="cuda")
        for training in (True, False):
            check(network.train(training)(images), network.anchors(HEIGHT, WIDTH, images.device))


@pytest.mark.parametrize("factors", ["1.5", "0.75+1.2"])
def test_two_looks(factors):
    network = build_model(load_config("v2_ultra").model).eval()
    with FakeTensorMode():
        pyramid = ImagePyramid(on_fake_gpu(network), factors, always=True)
        images = torch.zeros(BATCH, 3, HEIGHT, WIDTH, device="cuda")
        check(pyramid(images), pyramid.anchors(HEIGHT, WIDTH, images.device))


def check(out: dict[str, torch.Tensor], anchors: torch.Tensor) -> None:
    assert anchors.device.type == "cuda"
    for key in OUTPUTS:
        assert out[key].device.type == "cuda" and out[key].shape[:2] == (BATCH, len(anchors)), key
