"""Effective receptive fields against theoretical supports, analytic gradients and finite differences."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from config import load_config
from models import build_model
from models.strip_mlp import StripMLP
from tests.helpers import DIGITS, TINY
from tools import receptive_field
from tools.receptive_field import areas, effective_fields

TINY_STRIP = load_config(DIGITS, [*TINY, "DATA.IMG_SIZE", "32"])


def support(field):
    """The rows and columns that hold the field's entries, if these fill them: (first, last), (first, last)."""
    rows, columns = (field > 0).any(dim=1).nonzero(), (field > 0).any(dim=0).nonzero()
    box = (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))
    assert (field > 0).sum() == (box[0][1] - box[0][0] + 1) * (box[1][1] - box[1][0] + 1)
    return box


def draw(layer, generator_seed=0):
    """Fills a module's parameters with numbers far from zero."""
    generator = torch.Generator().manual_seed(generator_seed)
    for parameter in layer.parameters():
        parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def test_a_convolution_stack_has_its_theoretical_support():
    """3x3, then 3x3 with stride 2, then 5x5: sides 3, 5 and 5 + 4 * 2."""
    convs = [draw(nn.Conv2d(3, 4, 3, padding=1)), draw(nn.Conv2d(4, 4, 3, stride=2, padding=1)),
             draw(nn.Conv2d(4, 2, 5, padding=2))]

    def stages(x):
        outputs = []
        for conv in convs:
            outputs.append(x := conv(x).relu())
        return outputs

    images = torch.rand(2, 3, 32, 40, dtype=torch.float64)
    (first, a), (second, b), (third, c) = effective_fields(stages, images)
    assert (a, b, c) == ((32, 40), (16, 20), (16, 20))
    assert support(first) == ((15, 17), (19, 21))
    assert support(second) == ((14, 18), (18, 22))
    assert support(third) == ((10, 22), (14, 26))


def test_a_linear_network_s_field_is_its_kernel():
    conv = nn.Conv2d(3, 5, (3, 7), padding=(1, 3)).double()
    (field, _), = effective_fields(lambda x: [conv(x)], torch.randn(4, 3, 9, 11, dtype=torch.float64))
    expected = torch.zeros(9, 11, dtype=torch.float64)
    expected[3:6, 2:9] = conv.weight.detach().sum(dim=0).abs().sum(dim=0)
    assert torch.allclose(field, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_a_strip_layer_s_field_is_its_strip(axis):
    """Three whole rows (columns), by the weights of the central token: channel c = p * D + d has weight[d]."""
    layer = StripMLP(dim=4, length=8, num_patches=2, axis=axis).double()
    (field, _), = effective_fields(lambda x: [layer(x)], torch.randn(3, 4, 8, 8, dtype=torch.float64))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    expected[3:6] = 2 * layer.weight.detach()[:, 4].abs().sum(dim=0).T  # (D, in, K) -> (K, in)
    assert torch.allclose(field, expected if axis == "row" else expected.T, rtol=1e-12, atol=0)


def test_fields_are_averaged_over_images_whatever_the_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1)).double()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    alone = [effective_fields(lambda x: [net(x)], image[None])[0][0] for image in images]
    for batch_size in (2, 5):
        (field, _), = effective_fields(lambda x: [net(x)], images, batch_size)
        assert torch.allclose(field, sum(alone) / 5, rtol=1e-12)


def test_strip_mlp_s_fields_equal_finite_differences():
    torch.manual_seed(0)
    model = build_model(TINY_STRIP).double().eval()
    stages = partial(model.forward_intermediates, intermediates_only=True)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    measured = effective_fields(stages, image)
    assert [size for _, size in measured] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    with torch.no_grad():
        for row, column in [(16, 16), (3, 30)]:
            slopes = torch.zeros(4, dtype=torch.float64)
            for channel in range(3):
                step = torch.zeros_like(image)
                step[0, channel, row, column] = 1e-5
                sums = [[out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum() for out in stages(image + sign * step)]
                        for sign in (1, -1)]
                slopes += (torch.stack(sums[0]) - torch.stack(sums[1])).abs() / 2e-5
            assert torch.allclose(slopes, torch.stack([field[row, column] for field, _ in measured]), rtol=1e-5)


def test_centre_and_areas():
    """Half of the field in the central token's 4 x 4 pixels, 30 % in the ring around them, the rest in a corner."""
    field = torch.zeros(32, 32, dtype=torch.float64)
    field[14:22, 14:22] = 0.3 / 48
    field[16:20, 16:20] = 0.5 / 16
    field[0, 31] = 0.2
    with pytest.raises(ValueError, match="adds up to nan"):
        areas(field * float("nan"), (8, 8))
    assert areas(field, (8, 8), (0.5, 0.51, 0.79, 1.0)) == [16 / 1024, 36 / 1024, 64 / 1024, 1.0]
    wide = torch.zeros(7, 14, dtype=torch.float64)
    wide[3, 6:8] = 1.0  # the central output of 7 x 7
    assert areas(wide, (7, 7), (1.0,)) == [2 / 98]


def test_panels_hold_the_fields():
    fields = [torch.rand(16, 16, dtype=torch.float64) + 0.1 for _ in range(5)]
    figure = receptive_field.draw_fields(fields, list("abcde"))
    shown = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list("abcde")
    for axes, field in zip(shown, fields, strict=True):
        assert np.allclose(axes.images[0].get_array(), field / field.max())


def test_command_line_on_a_fresh_network(tmp_path, capsys):
    arguments = ["--cfg", str(DIGITS), "--images", "2", "--figure", str(tmp_path / "field.png")]
    receptive_field.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert "2 images of 32 x 32" in lines[0] and len(lines) == 7
    fields = np.load(tmp_path / "field.npz")
    torch.manual_seed(0)
    config = load_config(DIGITS)
    model = build_model(config).eval()
    images = receptive_field.validation_images(config, 2)  # the first and the last of 360
    expected = effective_fields(partial(model.forward_intermediates, intermediates_only=True), images)
    for stage, (field, size) in enumerate(expected, start=1):
        assert np.allclose(fields[f"stage{stage}"], field, rtol=1e-6)
        printed = [float(word) for word in lines[1 + stage].split()[4:]]
        assert printed == pytest.approx([100 * share for share in areas(field, size)], abs=0.0051)
    assert (tmp_path / "field.png").stat().st_size > 10_000


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    for argv, message in [
        ([], "name a checkpoint, or use --cfg to name the config of a new network"),
        ([tmp_path / "gone.pth"], "gone.pth does not exist"),
        ([tmp_path / "bad.pth"], "bad.pth"),
        (["--cfg", DIGITS, "--images", 0], "--images is 0; it must be at least 1"),
        (["--cfg", DIGITS.parent / "small" / "smlp_nano_alpha3_patch2_32_cifar10.yaml"], "--data-path DIR"),
        (["--cfg", DIGITS, "--noise", "--images", 1, "--figure", tmp_path], "cannot write"),
    ]:
        assert receptive_field.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("receptive_field.py: ") and error.count("\n") == 1
