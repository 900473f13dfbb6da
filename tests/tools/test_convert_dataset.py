"""Every form of a data set into every other: the same bytes, labels, classes and order."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from data.datasets import open_images
from data.zipped import ZipDataset
from tools import convert_dataset

FORMS = ["folders", "zip", "shards"]


def write(root, classes=("ant", "cat")):
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (12, 30 - i, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def content(root):
    """Everything that a training would see of a data set."""
    found = {}
    for split in ("train", "val"):
        dataset = ZipDataset(root, split, 2) if (root / f"{split}.zip").is_file() else open_images(root, split)
        found[split] = [dataset.read(i) for i in range(len(dataset))], list(dataset.labels), dataset.classes
    return found


@pytest.mark.parametrize("form", [*FORMS, "hub"])
def test_nothing_changes(form, tmp_path, capsys):
    if form == "hub":
        pytest.importorskip("datasets")
    source, target = write(tmp_path / "source"), tmp_path / "target"
    assert convert_dataset.main([str(source), str(target), "--to", form, "--workers", "1"]) == 0
    assert "10 training and 4 validation images" in capsys.readouterr().out
    assert content(target) == content(source)
    back = tmp_path / "back"
    assert convert_dataset.main([str(target), str(back), "--to", "folders", "--workers", "1"]) == 0
    assert content(back) == content(source)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_many_shards_by_many_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_dataset, "SHARD", 4)
    source, target = write(tmp_path / "source"), tmp_path / "target"
    assert convert_dataset.convert(source, target, "shards", workers=2) == {"train": 10, "val": 4}
    assert sorted(path.name for path in target.iterdir()) == [
        "classes.txt", "train-0000.tar", "train-0001.tar", "train-0002.tar", "val-0000.tar"]
    assert content(target) == content(source)


def test_shrinking(tmp_path):
    """Larger images get the shorter side, in the same shape; smaller ones stay byte for byte."""
    source = write(tmp_path / "source")
    Image.new("RGB", (6, 4)).save(source / "train" / "ant" / "0.jpg")
    convert_dataset.convert(source, tmp_path / "target", "folders", short_side=6)
    before, after = content(source)["train"], content(tmp_path / "target")["train"]
    assert before[0][0] == after[0][0] and before[1:] == after[1:]
    for old, new in zip(before[0][1:], after[0][1:], strict=True):
        old, new = Image.open(io.BytesIO(old)), Image.open(io.BytesIO(new))
        assert new.format == "JPEG" and new.size == (round(old.width / 2), 6)


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path, capsys):
    source = write(tmp_path / "source")
    (source / "val" / "cat" / "1.png").write_bytes(b"")
    assert convert_dataset.main([str(source), str(tmp_path / "target"), "--to", "zip", "--workers", "1"]) == 2
    assert capsys.readouterr().err.startswith("convert_dataset.py: ")
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] in ([], ["target"])
    assert not list((tmp_path / "target").glob("*"))


def test_what_cannot_be_converted(tmp_path, capsys):
    source = write(tmp_path / "source")
    (source / "val" / "cat").rename(source / "val" / "dog")
    for arguments, message in (
        ([source, tmp_path / "target", "--to", "zip"], "different classes: 1 missing from val (cat)"),
        ([source, source, "--to", "zip"], "is not empty; choose another folder"),
        ([tmp_path / "none", tmp_path / "target", "--to", "zip"], "none does not exist; name the folder"),
    ):
        assert convert_dataset.main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err


def test_names_that_others_chose(tmp_path, capsys):
    """A name with a line break or a path in it adds no line to a map and leads to no other folder."""
    source = write(tmp_path / "source")
    odd = next((source / "train" / "cat").iterdir())
    odd.rename(odd.with_name("x\t0\ny\\.." + "z" * 200 + odd.suffix))
    assert convert_dataset.main([str(source), str(tmp_path / "zip"), "--to", "zip", "--workers", "1"]) == 0
    lines = (tmp_path / "zip" / "train_map.txt").read_text().splitlines()
    assert len(lines) == len(list((source / "train").rglob("*.*")))
    assert max(map(len, lines)) < 120 and "\\" not in "".join(lines)
    for name, message in (("a\nb", r"the class name 'a\nb'"), (os.fsdecode(b"\xff"), r"the class name '\udcff'")):
        other = shutil.copytree(source, tmp_path / f"source {len(name)}")
        for split in ("train", "val"):
            (other / split / "cat").rename(other / split / name)
        assert convert_dataset.main([str(other), str(tmp_path / "target"), "--to", "zip"]) == 2
        assert message in capsys.readouterr().err
        shutil.rmtree(other)


@pytest.mark.parametrize("form", [*FORMS, "hub"])
def test_images_whose_names_lie_are_all_read_back(form, tmp_path):
    """A phone's MPO, a GIF, a PNG and a TIFF called .jpg, and rare extensions."""
    if form == "hub":
        pytest.importorskip("datasets")
    source = write(tmp_path / "source")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 8, 3), dtype=np.uint8))
    phone = {"save_all": True, "append_images": [picture]}
    for name, kind, options in (
        ("a.jpg", "MPO", phone), ("b.jpg", "GIF", {}), ("c.jpg", "PNG", {}), ("d.jpg", "TIFF", {}),
        ("e.JPE", "JPEG", {}), ("f.jfif", "JPEG", {}), ("g.bmp", "WEBP", {}), ("h.png", "PPM", {}),
        ("i.gif", "GIF", {}),
    ):
        picture.save(source / "train" / "ant" / name, kind, **options)
    target, back = tmp_path / "target", tmp_path / "back"
    assert convert_dataset.convert(source, target, form) == {"train": 19, "val": 4}
    assert content(target) == content(source)
    assert convert_dataset.convert(target, back, "folders") == {"train": 19, "val": 4}
    assert content(back) == content(source)


def test_a_loss_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "source")

    def lossy(target, images, classes):
        write_all(target, images | {"val": lambda: list(images["val"]())[:-1]}, classes)

    write_all = convert_dataset._WRITERS["zip"]
    monkeypatch.setitem(convert_dataset._WRITERS, "zip", lossy)
    assert convert_dataset.main([str(source), str(tmp_path / "target"), "--to", "zip", "--workers", "1"]) == 2
    assert "4 images of val were written as zip, and 3 read back" in capsys.readouterr().err
    assert not list((tmp_path / "target").iterdir())
