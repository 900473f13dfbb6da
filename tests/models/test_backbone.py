"""Frozen stages: which parameters and modules they are, and that training leaves them as they were."""

import pytest
import timm
import torch
from torch import nn

from models import freeze_stages, set_train_mode
from tests.nets import tiny_net

# What freezing n stages freezes, by the beginnings of the names.
PARTS = [
    (), ("stem", "stages.0"), ("stem", "stages.0", "stages.1", "merging.0"),
    ("stem", "stages.0", "stages.1", "stages.2", "merging.0", "merging.1", "shortcut_m1"),
    ("stem", "stages", "merging", "shortcut", "norm"),
]


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_stages(count, checkpointing):
    """A training step changes everything but them, their statistics included; their drop path is off."""
    net, parts = tiny_net(drop_path_rate=0.2), PARTS[count]
    net.set_grad_checkpointing(checkpointing)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    freeze_stages(net, count)
    assert {key for key, p in net.named_parameters() if not p.requires_grad} == {
        key for key in before if key.startswith(parts) and "running" not in key and "batches" not in key
    } if parts else all(p.requires_grad for p in net.parameters())
    net.eval()
    set_train_mode(net)
    for name, module in net.named_modules():
        if isinstance(module, (nn.BatchNorm2d, type(net.stages[0][0].drop_path))):
            assert module.training is not (bool(parts) and name.startswith(parts)), name
    assert net.training
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0, weight_decay=0.01)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    for key, value in net.state_dict().items():
        if key.endswith("grn.beta") or key.endswith("grn.gamma"):
            continue  # zero at the start, where weight decay moves nothing and a gradient may be as small
        assert torch.equal(value, before[key]) is (bool(parts) and key.startswith(parts)), key


@pytest.mark.parametrize("name, count, frozen", [
    ("resnet10t", 2, ("conv1", "bn1", "layer1", "layer2")),
    ("swin_tiny_patch4_window7_224", 1, ("patch_embed", "layers.0")),
    ("convnext_atto", 3, ("stem", "stages.0", "stages.1", "stages.2")),
])
def test_timm_models(name, count, frozen):
    with torch.device("meta"):
        model = timm.create_model(name)
    freeze_stages(model, count)
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == {
        key for key, _ in model.named_parameters() if key.startswith(frozen)
    }


def test_what_cannot_be_frozen():
    with pytest.raises(ValueError, match="TRAIN.FREEZE_STAGES is 5; StripMLPNet has 4 stages"):
        freeze_stages(tiny_net(), 5)
    with pytest.raises(ValueError, match="Linear does not define its stages .*; set TRAIN.FREEZE_STAGES 0"):
        freeze_stages(nn.Linear(1, 1), 1)
    freeze_stages(nn.Linear(1, 1), 0)
