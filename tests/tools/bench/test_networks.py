"""The published formulation computes the same network: outputs and every gradient."""

import copy

import pytest
import torch

from models import StripMLPNet
from tools.bench.networks import published_formulation


@pytest.mark.parametrize("kwargs", [{}, {"num_patches": 4}, {"img_size": (32, 64)}], ids=str)
def test_same_outputs_and_gradients(kwargs):
    torch.manual_seed(0)
    net = StripMLPNet(**{"img_size": 32, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_classes": 5,
                         "drop_path_rate": 0.0} | kwargs).double()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # GRN's would be zero
    images = torch.randn(3, 3, *net.img_size, dtype=torch.float64)
    results = []
    for model in (net, published_formulation(net)):
        logits = model(images)
        results.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for value, reference in zip(*results, strict=True):
        assert float((value - reference).norm()) <= 1e-10 * float(reference.norm()) + 1e-12


def test_it_is_a_copy_with_the_same_weights():
    net = StripMLPNet(img_size=32, embed_dim=4, depths=(1, 1, 1, 1), num_classes=2)
    before = copy.deepcopy(net.state_dict())
    published = published_formulation(net)
    assert type(published.stages[0][0].token_mixing.cgsmm.row_strip) is not type(
        net.stages[0][0].token_mixing.cgsmm.row_strip)
    for key, value in published.state_dict().items():
        assert torch.equal(value, before[key]) and value.data_ptr() != net.state_dict()[key].data_ptr()
