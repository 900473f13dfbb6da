"""Tar shards written by the webdataset package and by hand, read at random."""

import io
import os
import pickle
import random
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from config import load_config
from data import listing, prepare_data
from data.datasets import build_dataset
from data.images import ImageError
from data.shards import ShardDataset, read_index
from utils import InputError


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "JPEG", quality=100)
    return file.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """20 training images in three shards and 6 of validation, as the Hub's timm/imagenet-1k-wds names them."""
    wds = pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("shards")
    with wds.ShardWriter(str(root / "imagenet1k-train-%04d.tar"), maxcount=8, verbose=0) as writer:
        for i in range(20):
            writer.write({"__key__": f"n0144_{i}", "jpg": jpeg(10 * i), "cls": i % 3, "json": {"label": i % 3}})
    with wds.ShardWriter(str(root / "imagenet1k-validation-%02d.tar"), maxcount=8, verbose=0) as writer:
        for i in range(6):
            writer.write({"__key__": f"ILSVRC2012_val_{i}", "jpg": jpeg(10 * i), "cls": i % 3})
    return root


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "data")


def values(dataset, order) -> list[int]:
    return [round(int(np.asarray(dataset[index][0]).mean()) / 10) for index in order]


def config(root, *opts):
    return load_config(opts=["DATA.DATASET", "imagenet", "DATA.DATA_PATH", str(root), "MODEL.NUM_CLASSES", "3", *opts])


def test_images_at_random(root):
    prepare_data(config(root))
    assert {path.name for path in root.glob(".index*")} == {".index_train.npz", ".index_val.npz"}
    dataset = build_dataset(config(root), "train")
    order = np.random.default_rng(0).permutation(20).tolist()
    assert len(dataset) == 20 and values(dataset, order) == order
    assert [dataset[i][1] for i in order] == [i % 3 for i in order] and dataset.classes == ["0", "1", "2"]
    assert values(pickle.loads(pickle.dumps(dataset)), [17]) == [17]
    assert values(build_dataset(config(root), "val"), range(6)) == list(range(6))
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    assert build_dataset(config(root), "train").classes == ["cat", "dog", "eel"]


def test_labels_must_fit(root):
    with pytest.raises(ValueError, match="has 3 classes but MODEL.NUM_CLASSES is 5"):
        build_dataset(config(root, "MODEL.NUM_CLASSES", "5"), "train")
    (root / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"classes.txt names 2 classes, but labels go up to 2"):
        ShardDataset(root, "train")


def test_shards_that_changed_are_indexed_again(root):
    """Copied or touched ones, which have another time, and others."""
    expected = values(ShardDataset(root, "train"), range(20))
    for path in root.glob("*.tar"):
        path.touch()
    assert values(ShardDataset(root, "train"), range(20)) == expected
    copied = shutil.copytree(root, root.parent / "copied", copy_function=shutil.copyfile)
    assert values(ShardDataset(copied, "train"), range(20)) == expected
    before = ShardDataset(copied, "train").fingerprint
    (copied / "imagenet1k-train-0001.tar").unlink()
    assert len(ShardDataset(copied, "train")) == 12 and ShardDataset(copied, "train").fingerprint != before
    (copied / ".index_train.npz").write_bytes(b"damaged")
    assert len(ShardDataset(copied, "train")) == 12


@pytest.mark.parametrize("cut", [100, 700, 5000])
def test_a_damaged_shard_is_named(root, cut):
    path = root / "imagenet1k-train-0002.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"train-0002.tar is not a complete tar file .*; download it again"):
        ShardDataset(root, "train")


def test_a_damaged_image_is_named(root):
    dataset = ShardDataset(root, "train")
    path = dataset.shards[1]
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[dataset.offset[9] : dataset.offset[9] + 50] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"train-0001.tar:n0144_9.jpg is not an image"):
        dataset[9]
    path.write_bytes(data[: dataset.offset[9] + 20])
    with pytest.raises(ImageError, match="the shard ends within the image"):
        dataset[9]
    assert state.st_size != path.stat().st_size


def test_dots_in_names(tmp_path):
    """A part of the name, or another image that belongs to the sample."""
    files = {"a.5x.jpg": jpeg(1), "a.5x.cls": b"0", "b.jpg": jpeg(2), "b.mask.png": jpeg(3), "b.cls": b"1"}
    with tarfile.open(tmp_path / "x-train-0.tar", "w") as shard:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    dataset = ShardDataset(tmp_path, "train")
    assert list(dataset.names) == ["a.5x.jpg", "b.jpg"] and dataset.labels == [0, 1]
    with tarfile.open(tmp_path / "x-train-0.tar", "a") as shard:
        info = tarfile.TarInfo("b.png")
        shard.addfile(info)
    with pytest.raises(InputError, match="b occurs twice; give each sample a name of its own"):
        ShardDataset(tmp_path, "train")


@pytest.mark.parametrize("files, message", [
    ({"a.jpg": b"x"}, "a has no .cls file"), ({"a.cls": b"1"}, "a has no image"),
    ({"a.jpg": b"x", "a.cls": b"cat"}, "a.cls holds 'cat', not a class from 0"),
    ({"a.jpg": b"x", "a.cls": b"1000000"}, "a.cls holds '1000000', not a class from 0 to 999999"),
    ({"a.jpg": b"x", "a.cls": b"9" * 5000}, "a.cls holds '999"),
    ({"readme.txt": b"x"}, "hold no sample"),
])
def test_samples_that_are_not_whole(files, message, tmp_path):
    with tarfile.open(tmp_path / "x-train-0.tar", "w") as shard:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=message):
        ShardDataset(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="holds no shards of val"):
        ShardDataset(tmp_path, "val")


def test_shards_that_are_no_files(root):
    """A pipe would be waited for; what macOS leaves beside files is no shard."""
    (root / "._imagenet1k-train-0000.tar").touch()
    assert len(ShardDataset(root, "train")) == 20
    path = root / "imagenet1k-train-0001.tar"
    path.unlink()
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("gone", path)):
        make(path)
        with pytest.raises(InputError, match=r"train-0001\.tar is not a file; copy the shard there, or remove it"):
            ShardDataset(root, "train")
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_sparse_member_is_refused(tmp_path):
    """It may claim to be of any size."""
    with tarfile.open(tmp_path / "x-train-0.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 4, {"GNU.sparse.size": str(10**12), "GNU.sparse.map": "0,4"}
        shard.addfile(info, io.BytesIO(b"data"))
    with pytest.raises(InputError, match=r"a\.jpg is stored as a sparse file"):
        ShardDataset(tmp_path, "train")


@pytest.mark.parametrize(("name", "value"), [
    ("shards", None), ("text", None), ("ends", np.arange(3)), ("ends", np.array([9, 1])), ("labels", np.array([0, -1])),
    ("labels", np.array([0, 10**7])), ("shard", np.array([0, 1])), ("offset", np.array([0, -1])),
    ("offset", np.array([0, 2**62])), ("size", np.array([0, 2**62])), ("labels", np.zeros(2)), ("states", np.zeros(2)),
    ("size", np.array(5)),
])
def test_a_file_that_is_no_index_is_made_again(name, value, tmp_path):
    """Whoever can write beside the shards cannot have other bytes read, or the memory filled."""
    with tarfile.open(tmp_path / "x-train-0.tar", "w") as shard:
        for file, data in ({"a.jpg": jpeg(1), "a.cls": b"0", "b.jpg": jpeg(2), "b.cls": b"1"}).items():
            info = tarfile.TarInfo(file)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    expected = read_index(tmp_path, "train")
    arrays = expected | {name: value}
    listing.save(tmp_path / ".index_train.npz", {key: array for key, array in arrays.items() if array is not None})
    found = read_index(tmp_path, "train")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(array, expected[key]) for key, array in found.items())


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with any bytes in its field of the size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


BINARY = {size: size.to_bytes(12, "big", signed=True) for size in (-512, -(2**40))}


@pytest.mark.parametrize(("data", "message"), [
    (header("a.jpg", BINARY[-512]), "has -512 bytes|not a complete tar"),
    (header("a.jpg", BINARY[-(2**40)]), "has -1099511627776 bytes|not a complete tar"),
    (header("a.jpg", b"\x80" + (2**60).to_bytes(11, "big")), "has 1152921504606846976 bytes; 1024 are left"),
    (header("a", BINARY[-512], b"L"), "not a complete tar"),
    (header("a", BINARY[-512], b"x"), "not a complete tar"),
    (header("a", b"%o" % (2**20), b"L") + bytes(2**20), "a name of 1048576 bytes"),
    (header("a", b"%o" % (2**30), b"x"), "a name of 1073741824 bytes"),
    (header("a", b"20", b"L") + bytes(512), "not a complete tar"),
    (header("a", b"20", b"L").ljust(1024, b"a") * 2000, "not a complete tar"),
    (header("a", b"20", b"x") + b"14 size=-9999\n".ljust(512, b"\0") + header("a.jpg", b"0"), "not a complete tar"),
    (header("a.jpg", b"zzz"), "not a complete tar file"),
    (header("a.jpg", b"1")[:100] + b"x" + header("a.jpg", b"1")[101:], "not a complete tar file"),
    (header("a.jpg", b"0") + b"x" * 512, "the header at byte 512, is missing or damaged"),
])
def test_hostile_headers_end(data, message, tmp_path):
    (tmp_path / "x-train-0.tar").write_bytes(data + bytes(1024))
    with pytest.raises(InputError, match=message):
        read_index(tmp_path, "train")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read_as_by_tarfile(kind, tmp_path):
    """Long and odd names, folders, links, hidden files of macOS."""
    deep = "/".join(["folder" * 6] * 3)
    names = ["a.jpg", f"{deep}/b.jpg", "k\u00e4se.jpg", *([f"{'x' * 200}.jpg"] if kind != tarfile.USTAR_FORMAT else [])]
    with tarfile.open(tmp_path / "x-train-0.tar", "w", format=kind) as shard:
        folder, link = tarfile.TarInfo(deep), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "a.jpg"
        shard.addfile(folder)
        shard.addfile(link)
        for number, name in enumerate(names):
            for file, data in ((name, jpeg(number)), (name.replace(".jpg", ".cls"), str(number).encode()),
                               (f"{name.rpartition('/')[0]}/._{number}.jpg".lstrip("/"), b"a fork")):
                info = tarfile.TarInfo(file)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    dataset = ShardDataset(tmp_path, "train")
    assert list(dataset.names) == names and dataset.labels == list(range(len(names)))
    assert [dataset.read(i) for i in range(len(names))] == [jpeg(i) for i in range(len(names))]


def test_mutated_shards_are_input_errors(root):
    """Whatever a shard holds: an index whose images are its bytes, or an error."""
    path, rng = root / "imagenet1k-train-0002.tar", random.Random(0)
    data = path.read_bytes()
    for _ in range(100):
        spoilt = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            begin = rng.randrange(8) * 512 if rng.random() < 0.5 else rng.randrange(len(data))
            begin = min(begin + rng.randrange(512), len(data) - 12)
            spoilt[begin : begin + rng.choice((1, 8, 12))] = rng.choice((rng.randbytes(12), b"\xff" * 12, bytes(12)))
        path.write_bytes(spoilt[: rng.randrange(len(spoilt))] if rng.random() < 0.1 else spoilt)
        try:
            dataset = ShardDataset(root, "train")
            for i in range(len(dataset)):
                dataset.read(i)
        except InputError as error:
            assert str(error).isprintable()
