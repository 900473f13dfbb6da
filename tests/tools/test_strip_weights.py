"""Strip weights: what is drawn are the network's numbers; what is printed agrees with weights of a known form."""

import numpy as np
import pytest
import torch

from config import load_config, to_dict
from models import build_model
from tests.helpers import DIGITS
from tools import strip_weights

CONFIG = load_config(DIGITS)


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of random weights, its network and its path."""
    torch.manual_seed(0)
    model = build_model(CONFIG)
    torch.save({"model": model.state_dict(), "config": to_dict(CONFIG)}, tmp_path / "best.pth")
    return model, str(tmp_path / "best.pth")


def test_layers_by_block():
    blocks = strip_weights.strip_layers(build_model(CONFIG))
    assert list(blocks) == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    assert [layer.axis for layer in blocks["stages.2.1"]] == ["row", "column"]
    assert list(strip_weights.last_of_each_stage(blocks)) == ["stages.0.0", "stages.1.0", "stages.2.1", "stages.3.0"]
    with pytest.raises(ValueError, match="Linear has no strip layers"):
        strip_weights.strip_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("channel", [None, 0, 5])
def test_panels_hold_the_weights(trained, channel):
    model, _ = trained
    panels = np.array(strip_weights.draw_weights(strip_weights.strip_layers(model), channel).axes).reshape(5, 6)
    block = model.stages[2][1].token_mixing.cgsmm
    for layer, line in (block.row_strip, panels[3, :3]), (block.column_strip, panels[3, 3:]):
        weight = layer.weight.detach().numpy()
        expected = weight.mean(axis=0) if channel is None else weight[channel]
        for k, panel in enumerate(line):
            image = panel.images[0]
            assert np.allclose(image.get_array(), expected[:, :, k], atol=1e-7)
            assert image.get_clim() == pytest.approx((-abs(expected).max(), abs(expected).max()))
            assert panel.get_title().startswith(f"{layer.axis}, k = {k}")


def test_summary_of_known_weights():
    eye = torch.zeros(4, 8, 8, 3)
    eye[..., 1] = 2 * torch.eye(8)
    assert strip_weights.summarise(eye) == {
        "rms": pytest.approx((4 / 24) ** 0.5), "rows": [0, 1, 0], "near": 1, "near_if_even": 22 / 64}
    even = strip_weights.summarise(torch.full((4, 8, 8, 3), -0.5))
    assert even == {"rms": 0.5, "rows": pytest.approx([1 / 3] * 3), "near": 22 / 64, "near_if_even": 22 / 64}


def test_command_line(trained, tmp_path, capsys):
    model, path = trained
    strip_weights.main([path, "--figure", str(tmp_path / "weights.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    spread = strip_weights.summarise(model.stages[0][0].token_mixing.cgsmm.column_strip.weight.detach())
    assert lines[2].split() == ["stages.0.0", "column", f"{spread['rms']:.4f}",
                                *(f"{100 * share:.1f}" for share in spread["rows"]),
                                f"{100 * spread['near']:.1f}", "/", "18.0"]
    assert (tmp_path / "weights.png").stat().st_size > 10_000


def test_errors_are_one_line(trained, tmp_path, capsys):
    _, path = trained
    timm = load_config("", ["MODEL.TYPE", "timm", "MODEL.ARCH", "test_resnet"])
    torch.save({"model": build_model(timm).state_dict(), "config": to_dict(timm)}, tmp_path / "timm.pth")
    for argv, message in [
        ([tmp_path / "gone.pth"], "gone.pth does not exist"),
        ([tmp_path / "timm.pth"], "ResNet has no strip layers to draw"),
        ([path, "--channel", 8], "--channel is 8; the smallest layer has channels 0 to 7"),
        ([path, "--figure", tmp_path / "gone" / "x.png"], "cannot write"),
    ]:
        assert strip_weights.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("strip_weights.py: ") and error.count("\n") == 1
