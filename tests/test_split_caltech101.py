import random
import shutil
from pathlib import Path

import pytest

from split_caltech101 import plan_split, split_class, write_split
from tests.processes import run
from utils import InputError


def write_source(root: Path, **counts: int) -> Path:
    """Class folders with so many images each, whose content is their name."""
    source = root / "101_ObjectCategories"
    for name, count in counts.items():
        (source / name).mkdir(parents=True)
        for number in range(1, count + 1):
            (source / name / f"image_{number:04}.jpg").write_text(f"{name} {number}")
    return source


def files(folder: Path) -> dict[str, str]:
    found = sorted(folder.rglob("*.*"))
    return {str(path.relative_to(folder)): path.read_text() for path in found if path.is_file()}


def test_the_rule_is_fixed_for_good():
    names = [f"image_{number:04}.jpg" for number in range(1, 11)]
    split = split_class(names)
    assert sorted(split["train"] + split["val"]) == names
    assert sorted(split["val"]) == ["image_0005.jpg", "image_0008.jpg"]  # their draws are the largest two
    draws = random.Random(1024)
    drawn = {name: draws.random() for name in names}
    assert min(drawn[name] for name in split["val"]) > max(drawn[name] for name in split["train"])


@pytest.mark.parametrize(("count", "train"), [(2, 1), (4, 3), (5, 4), (31, 24), (800, 640)])
def test_four_fifths_go_to_train(count, train):
    split = split_class([f"{number}.jpg" for number in range(count)])
    assert (len(split["train"]), len(split["val"])) == (train, count - train)


def test_the_order_of_listing_does_not_matter():
    names = [f"image_{number:04}.jpg" for number in range(50)]
    shuffled = random.Random(0).sample(names, len(names))
    assert split_class(names) == split_class(shuffled)


def test_another_class_does_not_change_a_split(tmp_path):
    one = plan_split(write_source(tmp_path / "one", ant=20))
    two = plan_split(write_source(tmp_path / "two", Faces=7, ant=20))
    assert one["ant"] == two["ant"] and list(two) == ["Faces", "ant"]


@pytest.mark.parametrize("link", [False, True])
def test_the_split_is_written(link, tmp_path):
    source = write_source(tmp_path, ant=10, bass=5, BACKGROUND_Google=10)
    (source / ".cache").mkdir()
    (source / "README").write_text("")
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db"):
        (source / "ant" / name).write_text("")
    before = files(source)
    assert write_split(source, tmp_path / "out", link) == {"train": 12, "val": 3}
    out = {**files(tmp_path / "out/train"), **files(tmp_path / "out/val")}
    images = [name for name in before if name.endswith(".jpg") and "hidden" not in name and "BACK" not in name]
    assert out == {name: before[name] for name in images} and len(out) == 15
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    links = [path.is_symlink() for path in (tmp_path / "out").rglob("*.jpg")]
    assert links == [link] * 15
    assert files(source) == before


def test_links_are_absolute(tmp_path, monkeypatch):
    source = write_source(tmp_path, ant=5)
    monkeypatch.chdir(tmp_path)
    write_split(Path(source.name), Path("deep/out"), link=True)
    shutil.move(tmp_path / "deep", tmp_path / "moved")
    assert len(files(tmp_path / "moved")) == 5


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_existing_split_is_not_touched(split, tmp_path):
    source = write_source(tmp_path, ant=5)
    (tmp_path / "out" / split).mkdir(parents=True)
    with pytest.raises(InputError, match=f"out/{split} already exists; remove it or choose another folder"):
        write_split(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [split]


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_half_made_is_left(fault, tmp_path, monkeypatch):
    source, copied = write_source(tmp_path, ant=5, bass=5), []

    def copyfile(_, target):
        copied.append(target)
        if len(copied) == 7:
            raise fault

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(type(fault)):
        write_split(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("count", [0, 1])
def test_a_class_too_small_is_an_error_before_anything_is_written(count, tmp_path):
    source = write_source(tmp_path, ant=5, bass=count)
    with pytest.raises(ValueError, match=f"bass holds {count} images, too few for train and val"):
        write_split(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_in_the_source_is_an_error(tmp_path):
    source = write_source(tmp_path, ant=5)
    for target in (source, source / "out"):
        with pytest.raises(ValueError, match="where it would count as a class"):
            write_split(source, target)
    assert [path.name for path in source.iterdir()] == ["ant"]
    assert write_split(source, tmp_path) == {"train": 4, "val": 1}  # beside the source is fine


def test_sources_without_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        plan_split(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        plan_split(tmp_path)
    write_source(tmp_path, ant=5)
    with pytest.raises(ValueError, match="SRC must be the folder that holds the class"):
        plan_split(tmp_path)  # one level too high


def test_command_line(tmp_path):
    source = write_source(tmp_path, ant=10, bass=5)
    done = run(["split_caltech101.py", source, tmp_path / "out"])
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path}/out: 2 classes, 12 images in train/, 3 in val/\n"
    again = run(["split_caltech101.py", source, tmp_path / "out", "--link"])
    assert again.returncode == 2 and again.stdout == ""
    fault = f"{tmp_path}/out/train already exists; remove it or choose another folder"
    assert again.stderr == f"split_caltech101.py: {fault}\n"
