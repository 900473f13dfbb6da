import dataclasses
import hashlib
import pickle
import tarfile
from urllib.error import URLError

import numpy as np
import pytest

from data import cifar
from data.cifar import CIFAR, download_cifar, read_cifar


def write_binary(folder, name, monkeypatch, per_file=6, seed=0):
    """A small binary version with matching MD5s; returns {file: (labels, pixels (N, 3, 32, 32))}."""
    folder.mkdir(parents=True)
    rng, layout, content = np.random.default_rng(seed), CIFAR[name], {}
    (folder / layout.names_file).write_text("left\nright\n\n")
    for files in layout.files.values():
        for file in files:
            labels = rng.integers(0, 10, (per_file, layout.label_bytes), dtype=np.uint8)
            pixels = rng.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
            data = b"".join(label.tobytes() + image.tobytes() for label, image in zip(labels, pixels, strict=True))
            (folder / file).write_bytes(data)
            monkeypatch.setitem(files, file, hashlib.md5(data).hexdigest())
            content[file] = labels[:, -1].tolist(), pixels
    return content


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("inside", [True, False])
def test_binary_version(name, inside, tmp_path, monkeypatch):
    folder = tmp_path / CIFAR[name].binary_folder if inside else tmp_path / "renamed"
    content = write_binary(folder, name, monkeypatch)
    root = tmp_path if inside else folder
    for split, files in CIFAR[name].files.items():
        images, labels, classes = read_cifar(name, root, split)
        assert labels == sum((content[file][0] for file in files), [])
        pixels = np.concatenate([content[file][1] for file in files])
        np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), pixels)
        assert images.dtype == np.uint8 and images.flags.c_contiguous
        assert classes == ["left", "right"]


def test_a_record_is_read_channel_by_channel_and_row_by_row(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    pixels = np.zeros(3072, np.uint8)
    pixels[[0, 1024 + 1, 2048 + 32]] = 1, 2, 3  # red of (0, 0), green of row 0 column 1, blue of row 1 column 0
    data = bytes([7]) + pixels.tobytes()
    (folder / "test_batch.bin").write_bytes(data)
    (folder / "batches.meta.txt").write_text("a")
    monkeypatch.setitem(CIFAR["cifar10"].files["val"], "test_batch.bin", hashlib.md5(data).hexdigest())
    images, labels, _ = read_cifar("cifar10", tmp_path, "val")
    assert labels == [7]
    assert images[0, 0, 0].tolist() == [1, 0, 0]
    assert images[0, 0, 1].tolist() == [0, 2, 0]
    assert images[0, 1, 0].tolist() == [0, 0, 3]
    assert images.sum() == 6


def test_validation_needs_no_training_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder, "cifar10", monkeypatch)
    for file in CIFAR["cifar10"].files["train"]:
        (folder / file).unlink()
    assert len(read_cifar("cifar10", tmp_path, "val")[0]) == 6
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin does not exist; unpack the binary version"):
        read_cifar("cifar10", tmp_path, "train")


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    write_binary(tmp_path / "cifar-100-binary", "cifar100", monkeypatch)
    path, md5 = tmp_path / "cifar-100-binary" / "train.bin", CIFAR["cifar100"].files["train"]["train.bin"]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"train\.bin is damaged: its MD5 is not {md5}; remove its folder"):
        read_cifar("cifar100", tmp_path, "train")


def write_python(root, monkeypatch):
    """A small Python version of CIFAR-10 that torchvision accepts."""
    kind, rng = CIFAR["cifar10"].python, np.random.default_rng(1)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def dump(file, value):
        (folder / file).write_bytes(pickle.dumps(value))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    def batch():
        return {"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 3).tolist()}

    train, val = batch(), batch()
    monkeypatch.setattr(kind, "train_list", [dump("data_batch_1", train)])
    monkeypatch.setattr(kind, "test_list", [dump("test_batch", val)])
    file, digest = dump("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {"filename": file, "key": "label_names", "md5": digest})
    return train, val


def test_python_version(tmp_path, monkeypatch):
    for split, batch in zip(("train", "val"), write_python(tmp_path, monkeypatch), strict=True):
        images, labels, classes = read_cifar("cifar10", tmp_path, split)
        np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(3, 3072), batch["data"])
        assert labels == batch["labels"] and classes == list("abcdefghij")


def test_missing_or_damaged_python_version(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"cifar100 is not in .*cifar-100-python/ or cifar-100-binary/"):
        read_cifar("cifar100", tmp_path, "val")
    write_python(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="cifar10 is not in .*, or is damaged"):
        read_cifar("cifar10", tmp_path, "val")


def no_network(*_, **__):
    raise URLError("no network")


def test_download_failure_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    expected = (
        r"cifar10 could not be downloaded from https://www.cs.toronto.edu/.*no network.* put cifar-10-python.tar.gz "
        rf".170 MB, MD5 c58f.*cifar-10-binary.tar.gz .* into {tmp_path}, or unpacked as .*DATA.MIRROR URL$"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        download_cifar("cifar10", tmp_path)


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:x/", "http://[", " http://127.0.0.1:9/"])
def test_a_mirror_that_is_no_url(url, tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar10 could not be downloaded from"):
        download_cifar("cifar10", tmp_path, url)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=r"a is a file; name a folder, or one of the published \.tar\.gz archives"):
        download_cifar("cifar10", tmp_path / "a")


def test_a_mirror_is_asked_instead(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *args, **options: asked.append((args, options)))
    download_cifar("cifar100", tmp_path, "https://mirror.example/data/")
    assert asked == [(("https://mirror.example/data/cifar-100-python.tar.gz", str(tmp_path)),
                      {"filename": "cifar-100-python.tar.gz", "md5": "eb9058c3a382ffc7106e4002c42a8d85"})]


@pytest.mark.parametrize("named", [False, True])
def test_an_archive_that_is_there_is_unpacked(named, tmp_path, monkeypatch):
    """The folder that holds it or the archive itself is the data path; a damaged one is named."""
    content = write_binary(tmp_path / "made" / "cifar-10-batches-bin", "cifar10", monkeypatch)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "made" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    root = archive if named else tmp_path
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is damaged: its MD5 is not c32a1d4a"):
        download_cifar("cifar10", root)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(CIFAR, "cifar10", dataclasses.replace(CIFAR["cifar10"], binary_md5=digest))
    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    download_cifar("cifar10", root)
    assert read_cifar("cifar10", root, "val")[1] == content["test_batch.bin"][0]


def test_nothing_is_downloaded_when_a_version_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    write_binary(tmp_path / "a" / "cifar-100-binary", "cifar100", monkeypatch)
    download_cifar("cifar100", tmp_path / "a")
    write_python(tmp_path / "b", monkeypatch)
    download_cifar("cifar10", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        download_cifar("cifar10", tmp_path / "a")


def test_a_half_unpacked_folder_is_repaired(tmp_path, monkeypatch):
    """From the archive beside it; without one, the message says to remove the folder."""
    name, layout = "cifar10", CIFAR["cifar10"]
    write_binary(tmp_path / layout.binary_folder, name, monkeypatch)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / layout.binary_folder, layout.binary_folder)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.CIFAR, name, dataclasses.replace(layout, binary_md5=digest))
    whole = read_cifar(name, tmp_path, "train")[0]
    (tmp_path / layout.binary_folder / "data_batch_4.bin").unlink()
    path = tmp_path / layout.binary_folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:100])
    download_cifar(name, tmp_path)
    assert np.array_equal(read_cifar(name, tmp_path, "train")[0], whole)
    path.write_bytes(path.read_bytes()[:100])
    archive.unlink()
    download_cifar(name, tmp_path)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin is damaged: .*; remove its folder and unpack or download"):
        read_cifar(name, tmp_path, "train")
