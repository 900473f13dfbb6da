"""Data sets that Hugging Face's package wrote to disk, and Parquet files in the Hub's layout."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from config import load_config
from data.datasets import build_dataset
from data.huggingface import HubDataset
from utils import InputError

datasets = pytest.importorskip("datasets")
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Parquet files are converted into this one, not the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(count, label=lambda i: i % 2):
    rows = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{i}.png"}, "label": label(i)})
    return datasets.Dataset.from_list(rows, features=FEATURES)


def config(root):
    return load_config(opts=["DATA.DATASET", "imagenet", "DATA.DATA_PATH", str(root), "MODEL.NUM_CLASSES", "2"])


def write(root, form):
    if form == "saved":
        datasets.DatasetDict({"train": table(10), "validation": table(4)}).save_to_disk(str(root))
        return
    (root / "data").mkdir(parents=True)
    table(6).to_parquet(root / "data" / "train-00000-of-00002.parquet")
    table(10).select(range(6, 10)).to_parquet(root / "data" / "train-00001-of-00002.parquet")
    table(4).to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    table(2, lambda i: -1).to_parquet(root / "data" / "test-00000-of-00001.parquet")


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_images_at_random(form, tmp_path):
    write(tmp_path / "set", form)
    for split, count in (("train", 10), ("val", 4)):
        dataset = build_dataset(config(tmp_path / "set"), split)
        order = np.random.default_rng(0).permutation(count).tolist()
        assert len(dataset) == count and dataset.classes == ["cat", "dog"]
        for again in (dataset, pickle.loads(pickle.dumps(dataset))):
            assert [again[i][0].getpixel((0, 0)) for i in order] == [(10 * i, 0, 0) for i in order]
            assert [again[i][1] for i in order] == [i % 2 for i in order]


def test_faults(tmp_path):
    datasets.DatasetDict({"train": table(2, lambda i: -1)}).save_to_disk(str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"train\[0\] has the label -1, which is none of the 2 classes"):
        HubDataset(tmp_path / "a", "train")
    with pytest.raises(FileNotFoundError, match="has no split validation or val or valid or test; it has train"):
        HubDataset(tmp_path / "a", "val")
    other = datasets.Dataset.from_dict({"picture": [1], "label": [0]})
    datasets.DatasetDict({"train": other}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(ValueError, match="needs a column image of the type Image; its columns are .*picture"):
        HubDataset(tmp_path / "b", "train")
    write(tmp_path / "c", "parquet")
    path = tmp_path / "c" / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="c: the train split cannot be read .*Parquet magic .*; download or s"):
        HubDataset(tmp_path / "c", "train")


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_classes_of_the_splits_must_agree(form, tmp_path):
    """In another order the labels of one split would mean other classes."""
    features = FEATURES | {"label": datasets.ClassLabel(names=["dog", "cat"])}
    val = datasets.Dataset.from_list(list(table(4)), features=datasets.Features(features))
    write(tmp_path, form)
    if form == "saved":
        datasets.DatasetDict({"train": table(10), "validation": val}).save_to_disk(str(tmp_path))
    else:
        val.to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    for split in ("train", "val"):
        with pytest.raises(InputError, match="different classes: label 0 is cat in train and dog in val"):
            build_dataset(config(tmp_path), split)


def test_a_single_saved_split(tmp_path):
    table(10).save_to_disk(str(tmp_path / "[x]"))
    options = config(tmp_path / "[x]")
    with pytest.raises(FileNotFoundError, match="it has train; .* add --opts DATA.HOLD_OUT 0.2"):
        build_dataset(options, "val")
    options.defrost()
    options.DATA.HOLD_OUT = 0.2
    assert len(build_dataset(options, "val")) == 2


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("gone", path)])
def test_parquet_files_that_are_no_files(make, tmp_path):
    write(tmp_path, "parquet")
    make(tmp_path / "data" / "train-00002-of-00002.parquet")
    for split in ("train", "val"):
        with pytest.raises(InputError, match=r"train-00002-of-00002\.parquet is not a file; copy it there, or remove"):
            build_dataset(config(tmp_path), split)


def test_any_path_is_read_as_it_is(tmp_path):
    write(tmp_path / "[x] *a?", "parquet")
    assert len(build_dataset(config(tmp_path / "[x] *a?"), "train")) == 10


def test_a_path_in_place_of_an_image_is_not_followed(tmp_path):
    """It could be that of any file, which a conversion would copy."""
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    rows = datasets.Dataset.from_list([{"image": {"bytes": None, "path": str(tmp_path / "private.png")}, "label": 0}],
                                      features=FEATURES)
    rows.to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train\[0\] holds no image"):
        HubDataset(tmp_path, "train").read(0)


def test_without_the_package(tmp_path, monkeypatch):
    write(tmp_path / "set", "parquet")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="needs a package: pip install datasets"):
        HubDataset(tmp_path / "set", "train")


@pytest.mark.parametrize("label", [None, 2, 10**6, -2])
def test_labels_that_are_no_class_are_named(label, tmp_path):
    """Parquet holds any number, whatever the names of the classes."""
    stored = pa.table({"image": table(3).data.table["image"], "label": pa.array([0, label, 1], pa.int64())})
    pq.write_table(stored.replace_schema_metadata(FEATURES.arrow_schema.metadata), tmp_path / "train-0.parquet")
    with pytest.raises(InputError, match=rf"train\[1\] has the label {label}|the train split cannot be read"):
        HubDataset(tmp_path, "train")


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_a_saved_format_does_not_matter(form, tmp_path):
    datasets.DatasetDict({"train": table(3).with_format(form)}).save_to_disk(str(tmp_path / "set"))
    dataset = HubDataset(tmp_path / "set", "train")
    assert dataset.labels == [0, 1, 0] and dataset[2][0].getpixel((0, 0)) == (20, 0, 0)
