"""Each ablation by config alone: its parameters by a formula, its sums, and that it trains."""

import itertools

import pytest
import torch

from config import load_config
from models import StripMLPNet, build_model
from models.ablations import AblatedMixingBlock, ParallelCGSMM, build_ablated
from models.strip_mlp import CGSMM, StripMixingBlock
from tests.nets import draw, randomise
from tests.processes import ROOT

SIZES = {"img_size": 32, "num_classes": 5, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_patches": 2}
TINY = ["DATA.IMG_SIZE", 32, "MODEL.NUM_CLASSES", 5, "MODEL.STRIP_MLP.EMBED_DIM", 16,
        "MODEL.STRIP_MLP.DEPTHS", [1, 1, 2, 1]]


def check(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def parameters(img_size, embed_dim, depths, classes, patches=2, width=3, mixers="both", shortcuts=True):
    """Trainable numbers of a network of patch size 4 and alpha 3, counted by hand."""

    def cgsmm(c, side):
        strip = c // patches * (side * side * width + side)
        return 2 * ((2 * side + 1) * c + strip + 2 * c * c) + 2 * c

    def lsmm(c):
        return 2 * 21 * c + (c * c // 2 + c // 2) + (c // 2 * 3 * c + 3 * c)

    def block(c, side):
        mixing = {"both": cgsmm(c // 2, side) + lsmm(c // 2), "cgsmm": cgsmm(c, side), "lsmm": lsmm(c)}[mixers]
        token = 2 * c + 9 * c + (c * c + c) + 2 * c + mixing + c * c
        channel = 49 * c + 2 * c + (3 * c * c + 3 * c) + 2 * 3 * c + (3 * c * c + c)
        return token + channel

    dims = [embed_dim * 2**stage for stage in range(4)]
    sides = [img_size // 4 // 2**stage for stage in range(4)]
    total = 3 * 16 * embed_dim + sum(depth * block(*stage) for depth, *stage in zip(depths, dims, sides, strict=True))
    total += sum(4 * dim * 2 * dim for dim in dims[:3])  # mergings
    total += 4 * (dims[2] + 2 * dims[3]) * shortcuts  # a filter of 2x2 for each output channel
    return total + 2 * dims[3] + (dims[3] + 1) * classes


ABLATIONS = [
    (["STRIP_WIDTH", 1], {"width": 1}),
    (["STRIP_WIDTH", 3], {}),
    (["STRIP_WIDTH", 5], {"width": 5}),
    (["NUM_PATCHES", 1], {"patches": 1}),
    (["NUM_PATCHES", 4], {"patches": 4}),
    (["NUM_PATCHES", 8], {"patches": 8}),
    (["TOKEN_MIXERS", "cgsmm"], {"mixers": "cgsmm"}),
    (["TOKEN_MIXERS", "lsmm"], {"mixers": "lsmm"}),
    (["CASCADE", False], {}),
    (["SHORTCUTS", False], {"shortcuts": False}),
    (["TOKEN_MIXERS", "cgsmm", "CASCADE", False, "SHORTCUTS", False], {"mixers": "cgsmm", "shortcuts": False}),
]


@pytest.mark.parametrize("choice, changes", ABLATIONS, ids=lambda value: str(value))
def test_ablation_has_the_parameters_of_the_formula_and_trains(choice, changes):
    opts = [f"MODEL.STRIP_MLP.{item}" if isinstance(item, str) and item.isupper() else item for item in choice]
    torch.manual_seed(0)
    model = build_model(load_config("", [*TINY, *opts]))
    assert sum(p.numel() for p in model.parameters()) == parameters(32, 16, (1, 1, 2, 1), 5, **changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant, data, patches", [
    ("tiny_light", "cifar10", 4), ("base", "caltech101", 2), ("small", "imagenet1k", 4),
])
def test_the_formula_holds_for_the_paper_s_networks(variant, data, patches):
    config = load_config(ROOT / f"configs/smlp_{variant}_alpha3_patch4_224_{data}.yaml")
    with torch.device("meta"):
        model = build_model(config)
    net = config.MODEL.STRIP_MLP
    expected = parameters(224, net.EMBED_DIM, net.DEPTHS, config.MODEL.NUM_CLASSES, patches)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_without_any_ablation_it_is_the_whole_network():
    whole = randomise(StripMLPNet(**SIZES)).eval()
    ablated = randomise(build_ablated("both", True, True, **SIZES)).eval()
    assert type(build_model(load_config("", TINY)).stages[0][0].token_mixing) is StripMixingBlock
    assert whole.state_dict().keys() == ablated.state_dict().keys()
    whole.load_state_dict(ablated.state_dict())
    images = draw(2, 3, 32, 32)
    torch.testing.assert_close(ablated(images), whole(images), rtol=1e-12, atol=1e-12)  # float64; the sums are split


def test_parallel_strips_do_not_see_each_other():
    """Without the fusions' other halves, the cascade's column strips move with the row's weights, the parallel ones'
    do not."""
    for kind, moves in ((CGSMM, True), (ParallelCGSMM, False)):
        module, x = randomise(kind(4, 6, 2)).eval(), draw(2, 4, 6, 6)
        with torch.no_grad():
            module.column_fuse.weight[:, :4] = 0  # leaves the column strips alone
            before = module(x)
            module.row_strip.weight.add_(1)
            assert torch.equal(module(x), before) is not moves


def test_parallel_cgsmm():
    module, x = randomise(ParallelCGSMM(4, 6, 2)).eval(), draw(2, 4, 6, 6)
    row = module.row_strip(module.row_position(x))
    row = module.norm(torch.einsum("oc,nchw->nohw", module.row_fuse.weight[:, :, 0, 0], torch.cat([row, x], 1)))
    column = module.column_strip(module.column_position(x))
    both = torch.cat([torch.nn.functional.gelu(row), column], 1)
    check(module(x), torch.einsum("oc,nchw->nohw", module.column_fuse.weight[:, :, 0, 0], both))


@pytest.mark.parametrize("mixers", ["cgsmm", "lsmm"])
def test_one_mixer_takes_all_channels(mixers):
    block, x = randomise(AblatedMixingBlock(8, 6, 2, 3, mixers, True)).eval(), draw(2, 8, 6, 6)
    y = block.conv(torch.nn.functional.gelu(block.conv_norm(x)))
    y = torch.nn.functional.gelu(block.proj_norm(block.proj_in(y)))
    check(block(x), block.proj_out(getattr(block, mixers)(y)))
    assert not hasattr(block, {"cgsmm": "lsmm", "lsmm": "cgsmm"}[mixers])


def test_without_shortcuts_the_stages_follow_one_another():
    model = randomise(build_ablated("both", True, False, **SIZES)).eval()
    images = draw(2, 3, 32, 32)
    x = model.stages[0](model.stem(images))
    for merging, stage in zip(model.merging, itertools.islice(model.stages, 1, None), strict=True):
        x = stage(merging(x))
    check(model(images), model.forward_head(model.norm(x)))
    assert not [key for key in model.state_dict() if key.startswith("shortcut")]


def test_unknown_mixers():
    with pytest.raises(ValueError, match="TOKEN_MIXERS is 'lsm'; it must be one of both, cgsmm, lsmm; .* lsmm"):
        load_config("", ["MODEL.STRIP_MLP.TOKEN_MIXERS", "lsm"])
