"""The data benchmark at its smallest: every pipeline is measured on the same pictures."""

import re

from tools.bench import data_loading


def test_it_compares_the_pipelines(capsys):
    assert data_loading.main(["--images", "4", "--turns", "1"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", out, re.M)
    assert [name for name, *_ in rows] == [
        "ours, augmented in the worker", "ours, augmented on the device", "timm's loader", "torchvision v2",
        "ours, augmented in the worker, 288 pixels", "ours, augmented on the device, 288 pixels",
    ]
    times = {name: float(milliseconds) for name, _, milliseconds, _ in rows}
    for _, speed, milliseconds, ratio in rows:
        assert abs(float(speed) - 1000 / float(milliseconds)) < 0.02 * float(speed) + 1
        assert abs(float(ratio) - times["timm's loader"] / float(milliseconds)) < 0.02 * float(ratio) + 0.01


def test_the_pipelines_make_training_batches(tmp_path):
    """Of the same shape, from the same pictures: no pipeline is measured at doing less."""
    data_loading.write_pictures(tmp_path, 6)
    shapes = {}
    for name, make in data_loading.pipelines_of(tmp_path).items():
        batch = make(0, range(4))
        images = batch[0]
        shapes[name] = sorted(images.shape[1:]), str(images.dtype)
        assert len(images) == 4
    assert all(
        shape == [3, 224, 224] for shape, _ in shapes.values())
    assert [kind for _, kind in shapes.values()] == ["torch.uint8"] * 3 + ["torch.float32"]


def test_a_missing_folder_is_an_error_of_one_line(tmp_path, capsys):
    assert data_loading.main(["--data-path", str(tmp_path / "nowhere")]) == 2
    assert re.fullmatch(r"data_loading\.py: .*nowhere.*\n", capsys.readouterr().err)
