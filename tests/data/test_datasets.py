import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import load_config
from data.datasets import ArraySet, build_dataset, hold_out, read_digits
from tools.convert_dataset import convert
from utils import InputError


def config(dataset, root="", num_classes=2, *opts):
    values = ["DATA.DATASET", dataset, "DATA.DATA_PATH", str(root), "MODEL.NUM_CLASSES", str(num_classes), *opts]
    return load_config(opts=values)


def write_folders(root: Path, train=("cat", "dog"), val=("cat", "dog"), per_class=3) -> Path:
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(per_class):
                Image.new("L", (5, 4), 40 * index).save(root / split / name / f"{index}.png")
    return root


def fails(kind, message, split, *args):
    with pytest.raises(kind, match=message):
        build_dataset(config(*args), split)


@pytest.mark.parametrize("name", ["imagenet", "imagefolder", "caltech101"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_folders(name, split, tmp_path):
    dataset = build_dataset(config(name, write_folders(tmp_path)), split)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 6
    assert [dataset[index][1] for index in range(6)] == [0, 0, 0, 1, 1, 1]
    image = dataset[4][0]
    assert image.mode == "RGB" and image.size == (5, 4) and image.getpixel((0, 0)) == (40, 40, 40)


def test_held_out_images_come_from_the_training_set():
    """The two parts are the training set, no image twice, with the same share of each class."""
    whole = build_dataset(config("digits", "", 10), "train")
    opts = ("DATA.HOLD_OUT", 0.25)
    train, val = (build_dataset(config("digits", "", 10, *opts), split) for split in ("train", "val"))
    assert train.classes == val.classes == whole.classes

    def pairs(dataset):
        return sorted((image.tobytes(), label) for image, label in zip(dataset.images, dataset.labels, strict=True))

    assert sorted(pairs(train) + pairs(val)) == pairs(whole)
    shares = np.bincount(val.labels) / np.bincount(whole.labels)
    assert np.abs(shares - 0.25).max() < 0.005
    again = build_dataset(config("digits", "", 10, *opts, "SEED", 7), "val")
    assert np.array_equal(again.images, val.images)


def test_images_are_held_out_of_class_folders(tmp_path):
    """Of train/, and of a folder without splits; every class in both parts, the same parts every time."""
    opts = ("DATA.HOLD_OUT", 0.2)
    write_folders(tmp_path / "split", per_class=10, val=())
    write_folders(tmp_path / "made", per_class=10, val=())
    (tmp_path / "made" / "train").rename(tmp_path / "whole")
    for root in (tmp_path / "split", tmp_path / "whole"):
        train, val = (build_dataset(config("imagefolder", root, 2, *opts), split) for split in ("train", "val"))
        assert train.classes == val.classes == ["cat", "dog"]
        assert np.bincount(train.labels).tolist() == [8, 8] and np.bincount(val.labels).tolist() == [2, 2]
        names = [dataset.name(i) for dataset in (train, val) for i in range(len(dataset))]
        assert len(set(names)) == 20 and all(Path(name).is_file() for name in names)
        picture = Image.open(val.name(3)).convert("RGB")
        assert val[3][0].tobytes() == picture.tobytes() and val[3][1] == 1
        again = build_dataset(config("imagefolder", root, 2, *opts), "val")
        assert list(again.names) == list(val.names) and again.fingerprint == val.fingerprint != train.fingerprint
    fails(FileNotFoundError, "to evaluate on a part of the training images, add --opts DATA.HOLD_OUT 0.2", "val",
          "imagefolder", tmp_path / "split")
    fails(FileNotFoundError, "to evaluate on a part of the training images, add --opts DATA.HOLD_OUT 0.2", "train",
          "imagefolder", tmp_path / "whole")


@pytest.mark.parametrize("form", ["zip", "shards", "hub"])
def test_images_are_held_out_of_every_form(form, tmp_path):
    """The same images as of the folders from which they were converted, without a validation set."""
    if form == "hub":
        pytest.importorskip("datasets")
    convert(write_folders(tmp_path / "folders", per_class=10, val=("cat", "dog")), tmp_path / form, form)
    for path in (tmp_path / form).glob("val[._-]*"):
        path.unlink()
    opts = ("DATA.HOLD_OUT", 0.2, *(("DATA.ZIP_MODE", "True") if form == "zip" else ()))

    def pictures(root, split, *opts):
        dataset = build_dataset(config("imagefolder", root, 2, *opts), split)
        return [(image.tobytes(), label) for image, label in (dataset[i] for i in range(len(dataset)))]

    for split, count in (("train", 16), ("val", 4)):
        found = pictures(tmp_path / form, split, *opts)
        assert len(found) == count and found == pictures(tmp_path / "folders", split, "DATA.HOLD_OUT", 0.2)


@pytest.mark.parametrize(("labels", "held"), [([0] * 2 + [1] * 100, [1, 10]), ([0] + [1] * 9, [0, 1])])
def test_rare_classes_are_held_out_too(labels, held):
    images = ArraySet(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, ["a", "b"])
    assert np.bincount(hold_out(images, 0.1, "val").labels, minlength=2).tolist() == held
    assert set(hold_out(images, 0.1, "train").labels) == {0, 1}
    with pytest.raises(InputError, match="DATA.HOLD_OUT needs a class of two images or more"):
        hold_out(ArraySet(images.images[:2], [0, 1], ["a", "b"]), 0.1, "train")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val", "Validation"])
def test_other_names_of_the_folders(name, tmp_path):
    """In any case; an empty folder of another name does not matter."""
    write_folders(tmp_path)
    (tmp_path / "val").rename(tmp_path / name)
    (tmp_path / "train").rename(tmp_path / "Training")
    if name.lower() != "val":
        (tmp_path / "val").mkdir()
    assert build_dataset(config("imagefolder", tmp_path), "val").name(0) == f"{tmp_path}/{name}/cat/0.png"
    assert build_dataset(config("imagefolder", tmp_path), "train").name(0) == f"{tmp_path}/Training/cat/0.png"


def test_a_path_that_is_not_the_data_sets_folder(tmp_path):
    write_folders(tmp_path / "made" / "inner")
    archive = tmp_path / "made.zip"
    archive.write_bytes(b"PK")
    instead = rf"does not exist; .*; name {tmp_path}/made/inner instead"
    for path, message in ((archive, r"made\.zip is a file; unpack it if it is an archive, and name the folder"),
                          (tmp_path / "gone", "gone does not exist; name the folder of the data set$"),
                          ("~nobody9/data", "~nobody9/data does not exist; name the folder of the data set$"),
                          (tmp_path / "made", instead), (tmp_path / "made" / "inner" / "train", instead)):
        for split in ("train", "val"):
            fails(FileNotFoundError, message, split, "imagefolder", path)


def test_class_folders_come_before_the_archives_that_they_were_in(tmp_path):
    """torchvision's ImageNet leaves its archives beside what it unpacks; the Hub's metadata is a Parquet file."""
    write_folders(tmp_path)
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "train.tar", "train_metadata.parquet"):
        (tmp_path / name).write_bytes(b"an archive")
    for split in ("train", "val"):
        assert build_dataset(config("imagefolder", tmp_path), split).name(5) == f"{tmp_path}/{split}/dog/2.png"
    for name in ("cat", "dog"):  # also class folders without splits
        (tmp_path / "train" / name).rename(tmp_path / name)
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "val")
    assert len(build_dataset(config("imagefolder", tmp_path, 2, "DATA.HOLD_OUT", 0.4), "train")) == 4


def test_what_systems_leave_is_skipped_and_counted(tmp_path, caplog):
    root = write_folders(tmp_path)
    for split in ("train", "val"):
        for folder in (".ipynb_checkpoints", "__MACOSX", "#recycle", "@tmp", "cat/.ipynb_checkpoints", "cat/@eaDir"):
            (root / split / folder).mkdir()
            (root / split / folder / "0.png").write_bytes(b"a copy")
        for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "1.heic", "2.heic"):
            (root / split / "cat" / name).write_bytes(b"no image")
        (root / split / "._stray.jpg").touch()
    shutil.copy(root / "train" / "dog" / "0.png", root / "train" / "dog" / "3.jfif")
    shutil.copy(root / "train" / "dog" / "0.png", root / "train" / "dog" / "4.JPE")
    train, val = (build_dataset(config("imagefolder", root), split) for split in ("train", "val"))
    assert train.classes == ["cat", "dog"] and len(train) == 8 and len(val) == 6
    build_dataset(config("imagefolder", root), "train")
    assert [record.message for record in caplog.records] == [
        f"{root}/{split}: skipped files that are not images: hidden and system files (6), .heic (2), .txt (1)"
        for split in ("train", "val")]


def test_unicode_forms_are_named(tmp_path):
    write_folders(tmp_path, train=("B\u00e4r",), val=("Ba\u0308r",))
    fails(InputError, "differ only in their Unicode form, composed .NFC. or decomposed .NFD", "train", "imagefolder",
          tmp_path, 1)


def test_the_fingerprint_tells_data_sets_apart(tmp_path):
    def fingerprint(*steps):
        root = write_folders(tmp_path / str(len(list(tmp_path.iterdir()))))
        for step in steps:
            step(root)
        return build_dataset(config("imagefolder", root, len(list((root / "train").iterdir()))), "train").fingerprint

    def renamed_class(root):
        for split in ("train", "val"):
            (root / split / "cat").rename(root / split / "eel")

    found = [
        fingerprint(), fingerprint(renamed_class),
        fingerprint(lambda root: (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "9.png")),
        fingerprint(lambda root: (root / "train" / "cat" / "0.png").rename(root / "train" / "dog" / "9.png")),
        fingerprint(lambda root: (root / "train" / "cat" / "0.png").unlink()),
    ]
    assert len(set(found)) == 5 and fingerprint() == found[0]
    digits = [build_dataset(config("digits", "", 10, *opts), "train").fingerprint
              for opts in ((), ("DATA.HOLD_OUT", 0.1))]
    assert digits[0] != digits[1]


def test_a_damaged_image_is_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"")
    dataset = build_dataset(config("imagefolder", tmp_path), "train")
    with pytest.raises(ValueError, match=r"train/dog/1\.png is empty"):
        dataset[4]


def test_evaluation_needs_no_training_folder(tmp_path):
    write_folders(tmp_path, train=())
    assert len(build_dataset(config("imagefolder", tmp_path), "val")) == 6
    fails(FileNotFoundError, r"train does not exist; .* must hold train/ and val/", "train", "imagefolder", tmp_path)
    (tmp_path / "train").mkdir()
    assert len(build_dataset(config("imagefolder", tmp_path), "val")) == 6
    fails(FileNotFoundError, "train holds no class folders", "train", "imagefolder", tmp_path)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").touch()
    fails(FileNotFoundError, "val is not a folder; ", "val", "imagefolder", tmp_path)


def test_missing_caltech101_names_the_script(tmp_path):
    message = rf"val does not exist; .*python split_caltech101\.py 101_ObjectCategories {tmp_path}$"
    fails(FileNotFoundError, message, "val", "caltech101", tmp_path)


def test_an_empty_class_is_named(tmp_path):
    write_folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "eel").mkdir()
        (tmp_path / split / "eel" / "notes.txt").write_text("none yet")
    fails(FileNotFoundError, rf"{tmp_path}/val: .* eel\. .*Fill these folders", "val", "imagefolder", tmp_path, 3)


def test_links_to_class_folders(tmp_path):
    """A class would be missing without a word if the link is broken or leads to itself."""
    write_folders(tmp_path)
    (tmp_path / "train" / "cat").rename(tmp_path / "elsewhere")
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    assert len(build_dataset(config("imagefolder", tmp_path), "train")) == 6
    for target in ("gone", "eel"):
        for split in ("train", "val"):
            (tmp_path / split / "eel").symlink_to(target)
            fails(FileNotFoundError, f"{split}/eel is a link to nothing; repair or", split, "imagefolder", tmp_path)
            (tmp_path / split / "eel").unlink()


def test_an_image_outside_the_class_folders_is_named(tmp_path):
    write_folders(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "val" / "stray.JPEG")
    fails(ValueError, r"val/stray\.JPEG is outside the class folders", "val", "imagefolder", tmp_path)
    assert len(build_dataset(config("imagefolder", tmp_path), "train")) == 6


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_of_the_splits_must_agree(split, tmp_path):
    write_folders(tmp_path, train=("cat", "dog", "eel"), val=("ant", "cat", "dog"))
    message = r"different classes: 1 missing from val \(eel\); 1 missing from train \(ant\)"
    fails(ValueError, message, split, "imagefolder", tmp_path, 3)


def test_a_long_list_of_missing_classes_is_cut(tmp_path):
    write_folders(tmp_path, train=[f"c{number:02}" for number in range(13)], val=("c00",), per_class=1)
    message = r"12 missing from val \(c01, c02, .*, c10, \.\.\.\)$"
    fails(ValueError, message, "val", "imagefolder", tmp_path, 13)


@pytest.mark.parametrize("split", ["train", "val"])
def test_number_of_classes_must_agree_with_the_config(split, tmp_path):
    message = (
        rf"the data set in {tmp_path} has 2 classes but MODEL.NUM_CLASSES is 1000; add --opts MODEL.NUM_CLASSES 2$"
    )
    fails(ValueError, message, split, "imagenet", write_folders(tmp_path), 1000)


def test_an_empty_path_is_an_error():
    fails(ValueError, r"DATA\.DATA_PATH is empty; name the folder of imagenet with --data-path", "val", "imagenet", "")


# ---- zip form ------------------------------------------------------------------------------------


def write_zip(root: Path, split: str, classes: list[str]) -> None:
    image = root / "image.png"
    Image.new("L", (4, 4)).save(image)
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for name in classes:
            archive.write(image, f"{name}/0.png" if name.isalpha() else f"{name}.png")
    members = [f"{name}/0.png" if name.isalpha() else f"{name}.png" for name in classes]
    (root / f"{split}_map.txt").write_text("".join(f"{name}\t{label}\n" for label, name in enumerate(members)))


def test_other_forms_without_validation_images_say_what_to_add(tmp_path):
    write_zip(tmp_path, "train", ["cat", "dog"])
    fails(FileNotFoundError, "train does not exist; .*; add --zip$", "train", "imagefolder", tmp_path)
    (tmp_path / "train_map.txt").unlink()
    (tmp_path / "x-train-0.tar").touch()
    fails(FileNotFoundError, "val does not exist; .* add --opts DATA.HOLD_OUT 0.2$", "val", "imagefolder", tmp_path)


def build_zip(root, split="val", num_classes=2):
    return build_dataset(config("imagenet", root, num_classes, "DATA.ZIP_MODE", "True"), split)


@pytest.mark.parametrize("val", [["cat", "dog"], ["0", "1"]])
def test_zip_form(val, tmp_path):
    write_zip(tmp_path, "val", val)
    assert build_zip(tmp_path).classes == val
    write_zip(tmp_path, "train", ["cat", "dog"])  # checked against val, by name or by label
    assert build_zip(tmp_path, "train").classes == ["cat", "dog"] and build_zip(tmp_path).classes == val


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (["cat", "dog"], ["cat", "eel"], r"1 missing from val \(dog\); 1 missing from train \(eel\)"),
        (["cat", "dog"], ["dog", "cat"], "label 0 is cat in train and dog in val"),
        (["cat", "dog"], ["0"], r"1 missing from val \(1\)"),
        (["0", "1"], ["0", "1", "2"], r"1 missing from train \(2\)"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_zip_classes_of_the_splits_must_agree(train, val, message, split, tmp_path):
    write_zip(tmp_path, "train", train)
    write_zip(tmp_path, "val", val)
    with pytest.raises(ValueError, match=message):
        build_zip(tmp_path, split, num_classes=3)


def test_zip_number_of_classes_must_agree_with_the_config(tmp_path):
    write_zip(tmp_path, "val", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"has 2 classes but MODEL\.NUM_CLASSES is 5"):
        build_zip(tmp_path, num_classes=5)


def test_zip_of_other_data_sets_is_an_error():
    message = r"DATA\.ZIP_MODE is for imagenet, imagefolder, caltech101; DATA\.DATASET is digits"
    with pytest.raises(ValueError, match=message):
        build_dataset(config("digits", "", 10, "DATA.ZIP_MODE", "True"), "val")


# ---- digits --------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    is_val = np.arange(1797) % 5 == 0
    for split, chosen, count in (("train", ~is_val, 1437), ("val", is_val, 360)):
        images, labels, classes = read_digits(split)
        assert len(images) == len(labels) == count and images.dtype == np.uint8
        assert labels == reference.target[chosen].tolist() and classes == [str(digit) for digit in range(10)]
        for channel in range(3):
            np.testing.assert_array_equal(images[..., channel], reference.images[chosen].astype(int) * 255 // 16)


def test_digits_data_set():
    dataset = build_dataset(config("digits", "", 10), "val")
    image, label = dataset[0]
    assert len(dataset) == 360 and label == 0 and image.mode == "RGB" and image.size == (8, 8)
    assert [image.getpixel((x, 0))[0] for x in range(8)] == [v * 255 // 16 for v in (0, 0, 5, 13, 9, 1, 0, 0)]
    fails(ValueError, r"has 10 classes but MODEL\.NUM_CLASSES is 2", "train", "digits", "", 2)
