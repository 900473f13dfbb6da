"""The data benchmark at its smallest: every pipeline is measured on the same pictures."""

import re

from tools import benchmark_data


def test_it_compares_the_pipelines(capsys):
    assert benchmark_data.main(["--images", "4", "--turns", "1"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", out, re.M)
    assert [name for name, *_ in rows] == [
        "ours, augmented in the worker", "ours, augmented on the device", "timm's loader", "torchvision v2",
        "ours, augmented in the worker, 288 pixels", "ours, augmented on the device, 288 pixels",
    ]  # fmt: skip
    times = {name: float(milliseconds) for name, _, milliseconds, _ in rows}
    for _, speed, milliseconds, ratio in rows:
        assert abs(float(speed) - 1000 / float(milliseconds)) < 0.02 * float(speed) + 1
        assert abs(float(ratio) - times["timm's loader"] / float(milliseconds)) < 0.02 * float(ratio) + 0.01
    found = re.findall(r"^- (.+): ([\d.]+) MB per image, (\d+) launches per batch of 128; [\d.]+ ms", out, re.M)
    assert [name for name, *_ in found] == ["augment", "normalise and erase"]
    # Bytes to floats, then three passes over the floats, each read and written, and the erased parts.
    assert float(found[1][1]) * 1e6 > 3 * 224 * 224 * (1 + 4 + 3 * 8)


def test_the_pipelines_make_training_batches(tmp_path):
    """Of the same shape, from the same pictures: no pipeline is measured at doing less."""
    benchmark_data.write_pictures(tmp_path, 5)
    shapes = {}
    for name, make in benchmark_data.loaders(tmp_path).items():
        batch = make(0, range(4))
        images = batch[0]
        shapes[name] = sorted(images.shape[1:]), str(images.dtype)
        assert len(images) == 4
    assert all(
        shape == [3, 224, 224] for shape, _ in shapes.values())
    assert [kind for _, kind in shapes.values()] == ["torch.uint8"] * 3 + ["torch.float32"]


def test_a_missing_folder_is_an_error_of_one_line(tmp_path, capsys):
    assert benchmark_data.main(["--data-path", str(tmp_path / "nowhere")]) == 2
    assert re.fullmatch(r"benchmark_data\.py: .*nowhere.*\n", capsys.readouterr().err)
