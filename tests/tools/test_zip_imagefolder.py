import os
import shutil
import zipfile
from pathlib import Path

import pytest

from config import load_config
from data.datasets import build_dataset
from tests.helpers import digits_folder
from tools import zip_imagefolder

NAMES = ["train.zip", "train_map.txt", "val.zip", "val_map.txt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits in 10 classes, some deeper than others, one name that is not ASCII and one with a tab."""
    root = digits_folder(tmp_path_factory.mktemp("folder"))
    for place in ("train/3/left", "train/3/left/over", "val/7/left"):
        (root / place).mkdir()
    first = sorted((root / "train/3").glob("*.png"))[0]
    shutil.copy(first, root / "train/3/left/x.png")
    shutil.move(first, root / "train/3/left/over/x.png")
    for image in (root / "val/7").glob("*.png"):  # none of its images lies in the class folder itself
        shutil.move(image, root / "val/7/left")
    for name in ("über allem.png", "a\tb.png"):
        shutil.copy(next((root / "train/0").glob("*.png")), root / "train/0" / name)
    (root / "train/notes.txt").write_text("no picture")
    return root


def config(path, zipped):
    return load_config(opts=["DATA.DATASET", "imagefolder", "MODEL.NUM_CLASSES", "10", "DATA.DATA_PATH", str(path),
                             "DATA.ZIP_MODE", str(zipped)])


@pytest.mark.parametrize("split", ["train", "val"])
def test_round_trip(split, folder, tmp_path, capsys):
    """The same images, pixel for pixel and in the same order, labels and class names."""
    assert zip_imagefolder.main([str(folder), str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 123 images in train.zip, 61 in val.zip\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    unzipped, zipped = build_dataset(config(folder, False), split), build_dataset(config(tmp_path, True), split)
    assert zipped.classes == unzipped.classes == list("0123456789")
    assert len(zipped) == len(unzipped) == {"train": 123, "val": 61}[split]
    for (a, label_a), (b, label_b) in zip(unzipped, zipped, strict=True):
        assert a.tobytes() == b.tobytes() and label_a == label_b


def test_the_bytes_depend_on_the_images_alone(folder, tmp_path, monkeypatch):
    other = shutil.copytree(folder, tmp_path / "other")
    for index, path in enumerate(other.rglob("*.png")):
        path.chmod(0o600)
        os.utime(path, (index, 1e9))
    zip_imagefolder.zip_imagefolder(folder, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    zip_imagefolder.zip_imagefolder(Path("other"), Path("deep/b"))
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "deep/b" / name).read_bytes()


def test_images_are_stored_as_they_are(folder, tmp_path):
    zip_imagefolder.zip_imagefolder(folder, tmp_path)
    with zipfile.ZipFile(tmp_path / "train.zip") as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED and info.date_time == (1980, 1, 1, 0, 0, 0)
        assert archive.read("left/over/3/x.png") == (folder / "train/3/left/over/x.png").read_bytes()
        lines = [f"{info.filename}\t{info.filename.split('/')[-2]}" for info in archive.infolist()]
    assert (tmp_path / "train_map.txt").read_text().split("\n") == [*lines, ""]


@pytest.mark.parametrize("name", NAMES)
def test_existing_files_are_not_touched(name, folder, tmp_path, capsys):
    (tmp_path / name).write_text("precious")
    assert zip_imagefolder.main([str(folder), str(tmp_path)]) == 2
    assert f"{name} exists already; remove it or choose another folder" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_half_made_is_left(fault, folder, tmp_path, monkeypatch):
    written, write = [], zipfile.ZipFile.writestr

    def writestr(self, info, data):
        written.append(info)
        if len(written) == 150:  # in the second archive
            raise fault
        write(self, info, data)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", writestr)
    with pytest.raises(type(fault)):
        zip_imagefolder.zip_imagefolder(folder, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["byte", "label"])
def test_what_does_not_read_back_is_not_kept(damage, folder, tmp_path, monkeypatch, capsys):
    write = zip_imagefolder.write_split

    def write_damaged(images, target, split):
        write(images, target, split)
        name = f"{split}.zip" if damage == "byte" else f"{split}_map.txt"
        data = (target / name).read_bytes()
        at, change = (2000, 1) if damage == "byte" else (data.index(b"\t9"), 1)
        at += damage == "label"
        (target / name).write_bytes(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])  # label 9 becomes 8

    monkeypatch.setattr(zip_imagefolder, "write_split", write_damaged)
    assert zip_imagefolder.main([str(folder), str(tmp_path)]) == 2
    assert "train.zip does not read back as it was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_input(tmp_path, capsys):
    def fault(source):
        assert zip_imagefolder.main([str(source), str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.startswith("zip_imagefolder.py: ") and err.count("\n") == 1 and not (tmp_path / "out").exists()
        return err

    assert "gone/train does not exist; " in fault(tmp_path / "gone")
    (tmp_path / "no/train").mkdir(parents=True)
    assert "no/train holds no class folders" in fault(tmp_path / "no")
    root = digits_folder(tmp_path / "yes")
    shutil.rmtree(root / "val/3")
    assert "train and val have different classes: 1 missing from val (3)" in fault(root)
    shutil.copytree(root / "train/3", root / "val/3")
    (tmp_path / "out").write_text("a file")
    assert zip_imagefolder.main([str(root), str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("name", ["a\nb.png", "a\u2028b.png", os.fsdecode(b"\xff.png")])
def test_names_that_no_map_file_can_hold(name, tmp_path, capsys):
    root = digits_folder(tmp_path / "in")
    shutil.copy(next((root / "val/5").glob("*.png")), root / "val/5" / name)
    assert zip_imagefolder.main([str(root), str(tmp_path / "out")]) == 2
    assert f"{'5/' + name!r}: a map file holds no names with line breaks" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
