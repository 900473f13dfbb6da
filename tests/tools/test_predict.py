import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import plots
from config import load_config
from data import build_val_loader
from data.datasets import read_digits
from tests.helpers import DIGITS, TINY, save_network, tiny_network
from tests.processes import ROOT, environment
from tools import predict


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint whose network differs from picture to picture, and its average, which is used."""
    config, average = tiny_network()
    path = tmp_path_factory.mktemp("network") / "a.pth"
    return save_network(path, config, tiny_network(seed=1)[1], model_ema=average.state_dict())


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A checkpoint whose network always says 40 % class 7, 30 % class 2, 10 % class 0 and 20/7 % each other."""
    config, model = tiny_network()
    probabilities = torch.full((10,), 0.2 / 7)
    probabilities[[7, 2, 0]] = torch.tensor([0.4, 0.3, 0.1])
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = probabilities.log()
    return save_network(tmp_path_factory.mktemp("known") / "a.pth", config, model)


@pytest.fixture
def pictures(tmp_path):
    """The first seven validation digits, of which a text file is the third in the list."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    images, _, _ = read_digits("val")
    for index in range(7):
        Image.fromarray(images[index]).save(folder / "deep" / f"{index}.png")
    (folder / "deep" / "1b.JPG").write_text("hello")
    (folder / "notes.txt").write_text("no picture")
    (folder / "deep" / "._0.png").write_text("what macOS leaves")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "0.png").write_text("hidden")
    return folder


def test_it_repeats_the_evaluation(network, pictures, capsys):
    """Same pictures, labels and probabilities as through the validation loader; a damaged one shifts nothing."""
    config, model = tiny_network()
    images, _ = next(iter(build_val_loader(config)))
    with torch.inference_mode():
        expected = model(images[:7]).softmax(dim=1)
    assert len(expected.unique(dim=0)) == len(expected)  # each image has probabilities of its own
    for batch_size in ("1", "3", "32"):
        status = predict.main([str(network), str(pictures), "--json", "--top-k", "99", "--batch-size", batch_size])
        out, err = capsys.readouterr()
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["picture"][-10:] for line in lines] == [f"deep/{index}.png" for index in range(7)]
        for line, row in zip(lines, expected, strict=True):
            order = row.argsort(descending=True).tolist()
            assert [entry["class"] for entry in line["classes"]] == [f"digit {label}" for label in order]
            found = torch.tensor([entry["probability"] for entry in line["classes"]])
            torch.testing.assert_close(found, row[order], rtol=0, atol=2e-6)
        assert status == 1
        assert "deep/1b.JPG is not an image of a known format; skipped" in err and "1 of 8 images" in err


def test_text(known, pictures, capsys):
    first, second = pictures / "deep" / "0.png", pictures / "deep" / "1.png"
    assert predict.main([str(known), str(second), str(first), "--top-k", "3"]) == 0
    ranking = "digit 7 40.0%, digit 2 30.0%, digit 0 10.0%"
    assert capsys.readouterr() == (f"{second}: {ranking}\n{first}: {ranking}\n", "")


def test_a_reader_that_ends_early_and_a_console_without_the_characters(known, pictures, monkeypatch):
    """``predict.py | head -1`` ends without a traceback; what ASCII cannot show is printed as an escape."""
    (pictures / "deep" / "0.png").rename(pictures / "a\U0001f41f \n$.png")
    words = [sys.executable, ROOT / "tools" / "predict.py", known, pictures]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert predict.main([str(word) for word in words[2:]]) == 1
    assert b"a\\U0001f41f \\n$.png: digit 7 40.0%" in console.buffer.getvalue()


def test_sheet(known, pictures, tmp_path, capsys):
    """Seven pictures in three columns, each of 8x8 pixels enlarged to 160, over bars as long as the probabilities."""
    assert predict.main([str(known), str(pictures), "--sheet", str(tmp_path / "sheet.png")]) == 1
    assert str(tmp_path / "sheet.png") in capsys.readouterr().err
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.size == (3 * 170 + 10, 3 * (160 + 4 * 18 + 10) + 10)
    images, _, _ = read_digits("val")
    for index in range(7):
        x, y = 10 + index % 3 * 170, 10 + index // 3 * 242
        shown = sheet.crop((x, y, x + 160, y + 160))
        assert shown.resize((8, 8), Image.Resampling.BOX).tobytes() == images[index].tobytes()
        for line, probability in enumerate((0.4, 0.3, 0.1), start=1):
            row = [sheet.getpixel((x + i, y + 160 + line * 18 + 1)) for i in range(170)]
            assert row.count((173, 216, 230)) == pytest.approx(probability * 160, abs=1)  # light blue
    assert sheet.getpixel((10 + 170 + 80, 10 + 2 * 242 + 80)) == (255, 255, 255)  # no eighth picture


def test_large_pictures_are_shown_whole_and_long_names_cut():
    picture = plots.thumbnail(Image.new("RGB", (1000, 500), "red"))
    assert picture.size == (160, 80)
    sheet = plots.draw_sheet([("x" * 100, picture, [("y" * 100, 0.0)])])
    assert sheet.size == (180, 10 + 160 + 2 * 18 + 10)
    assert sheet.getpixel((90, 10 + 40)) == (255, 0, 0) and sheet.getpixel((90, 10 + 39)) == (255, 255, 255)
    assert set(sheet.crop((170, 170, 180, 216)).tobytes()) == {255}  # nothing beside the cell


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NETWORK", "gone.jpg"], "gone.jpg does not exist"),
        (["NETWORK", "empty"], "empty holds no images (.jpg, "),
        (["gone.pth", "0.png"], "checkpoint gone.pth does not exist"),
        (["0.png", "0.png"], "0.png "),
        (["other.pth", "0.png"], "other.pth: no weights under model, state_dict"),
        (["NETWORK", "0.png", "--top-k", "0"], "--top-k and --batch-size must be at least 1"),
        (["NETWORK", "0.png", "--cfg", "gone.yaml"], "gone.yaml does not exist"),
        (["NETWORK", "0.png", "--sheet", "s.gif"], "s.gif: the sheet is a PNG"),
        (["NETWORK", "0.png", "--sheet", "gone/s.png"], "gone is not a writable folder"),
        (["NETWORK", *["0.png"] * 1001, "--sheet", "s.png"], "at most 1000 images; 1001 were given"),
    ],
)
def test_bad_input(arguments, message, network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save("0.png")
    torch.save({"a": 1}, "other.pth")
    assert predict.main([str(network) if word == "NETWORK" else word for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("predict.py: ") and err.count("\n") == 1


def test_pictures_are_turned_upright_and_one_too_narrow_is_named(tmp_path, capsys):
    """A phone's picture gives what the upright picture gives; a 1x60000 one is left out, and the others go on."""
    checkpoint = save_network(tmp_path / "a.pth", load_config(DIGITS, [*TINY, "TEST.CROP", "True"]), tiny_network()[1])
    images, _, _ = read_digits("val")
    upright, exif = Image.fromarray(images[3]), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "a.png")
    upright.rotate(90).save(tmp_path / "b.png", exif=exif)
    Image.new("RGB", (1, 600_000)).save(tmp_path / "c.png")
    assert predict.main([str(checkpoint), str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    first, second = (json.loads(line)["classes"] for line in out.splitlines())
    assert first == second
    assert "c.png: an image of 1x600000 pixels would have" in err and "1 of 3 images could not be read" in err


def test_a_network_whose_outputs_overflow_is_refused(network, tmp_path, capsys):
    config, model = tiny_network()
    for parameter in model.parameters():
        parameter.data *= 1e38
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    path = save_network(tmp_path / "huge.pth", config, model)
    assert predict.main([str(path), str(tmp_path / "a.png")]) == 2
    assert "the network's outputs are not finite" in capsys.readouterr().err
