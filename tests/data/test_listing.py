"""Lists of images: their order, their cache, links that lead in a circle."""

import errno
import io
import os
import shutil
import zipfile

import numpy as np
import pytest

from data import listing
from data.listing import Names, list_images


def write(root, classes=("cat", "dog"), files=("2.jpg", "10.png", "deep/3.JPG", "notes.txt")):
    for name in classes:
        for file in files:
            path = root / "train" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root / "train"


def settle(folder):
    """Makes every folder look an hour old, as those of a data set do."""
    for path, _, _ in os.walk(folder):
        os.utime(path, (1e9, 1e9))


def found(folder, classes=("cat", "dog")):
    names, labels = list_images(folder, list(classes))
    return list(names), labels.tolist()


FILES = [f"{name}/{file}" for name in ("cat", "dog") for file in ("10.png", "2.jpg", "deep/3.JPG")]
EXPECTED = FILES, [0] * 3 + [1] * 3


def test_images_in_the_order_of_their_names(tmp_path):
    assert found(write(tmp_path)) == EXPECTED
    assert not list(tmp_path.glob(".listing*"))  # a small set is listed in a moment


def test_names_are_what_they_were():
    names = ["a", "", "käse.png", os.fsdecode(b"\xff.png"), "b"]
    assert list(Names.of(names)) == names and Names.of(names)[-1] == "b"


def test_a_long_listing_is_cached_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "WORTH_CACHING", 2)
    folder = write(tmp_path)
    found(folder)
    assert not list(tmp_path.glob(".listing*"))  # it has just been written: a change in this second would go unseen
    settle(folder)
    assert found(folder) == EXPECTED and (tmp_path / ".listing_train.npz").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_walk", lambda *_: pytest.fail("listed again"))
        assert found(folder) == EXPECTED
    (folder / "dog" / "deep" / "4.png").touch()
    assert found(folder) == (EXPECTED[0] + ["dog/deep/4.png"], EXPECTED[1] + [1])
    (tmp_path / ".listing_train.npz").write_bytes(b"damaged")
    (folder / "dog" / "deep" / "4.png").unlink()
    settle(folder)
    assert found(folder) == EXPECTED
    shutil.rmtree(folder / "cat" / "deep")
    assert len(found(folder)[0]) == 5


def test_a_folder_that_cannot_be_written_has_its_listing_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "file" / ".listing_train.npz"  # in a "folder" that is a file
    (tmp_path / "file").touch()
    listing.save(place, {"a": np.arange(3)})
    assert listing.load(place)["a"].tolist() == [0, 1, 2] and len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert listing.load(place) is None


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, caplog):
    def fill(file, **_):
        file.write(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(np, "savez", fill)
    listing.save(tmp_path / ".listing_train.npz", {"a": np.arange(3)})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert "could not be cached ([Errno 28] No space left on device)" in caplog.text


def test_a_link_in_a_circle_is_an_error(tmp_path):
    """torchvision's listing follows it until the path is too long, and finds the images forty times."""
    folder = write(tmp_path)
    (folder / "dog" / "deep" / "again").symlink_to(folder / "dog")
    with pytest.raises(ValueError, match="train/dog/deep/again is a link to a folder that contains it.*; remove it"):
        found(folder)


def test_other_links_are_followed(tmp_path):
    folder = write(tmp_path)
    (folder / "eel").symlink_to(folder / "cat")
    assert found(folder, ("cat", "dog", "eel"))[1] == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(("name", "value"), [
    ("text", None), ("times", np.zeros(1, np.int64)), ("labels", np.full(6, 2)), ("labels", np.zeros(6)),
    ("labels", np.zeros(5, np.int64)), ("ends", np.array([3, 1])), ("folder_ends", np.zeros((2, 2), np.int64)),
    ("text", np.zeros(88, np.uint8)),
])
def test_a_file_that_is_no_listing_is_made_again(name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "WORTH_CACHING", 2)
    folder = write(tmp_path)
    settle(folder)
    found(folder)
    place = tmp_path / ".listing_train.npz"
    arrays = listing.load(place) | {name: value}
    listing.save(place, {key: array for key, array in arrays.items() if array is not None})
    settle(folder)
    assert found(folder) == EXPECTED


def claim(shape) -> bytes:
    """The .npy header of an array of a shape, and none of its numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def encrypted(path):
    """Sets the flag of encryption in both headers of an archive."""
    data = path.read_bytes().replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01")
    path.write_bytes(data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"))


@pytest.mark.parametrize("spoil", ["8 TiB", "negative", "no array", "encrypted", "no folders", "outside", "absolute",
                                   "one class", "pipe", "device"])
def test_a_listing_that_claims_anything_is_made_again(spoil, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "WORTH_CACHING", 2)
    folder, place = write(tmp_path), tmp_path / ".listing_train.npz"
    settle(folder)
    found(folder)
    arrays = listing.load(place)
    if spoil in ("8 TiB", "negative"):
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("text.npy", claim((2**40,) if spoil == "8 TiB" else (-5,)))
    elif spoil == "no array":
        with zipfile.ZipFile(place, "a") as archive:
            archive.writestr("text", b"bytes")
        data = place.read_bytes().replace(b"text.npy", b"text.xyz")
        place.write_bytes(data)
    elif spoil == "no folders":
        none = Names.of([])
        listing.save(place, arrays | {"folders": none.text, "folder_ends": none.ends, "times": np.zeros(0, np.int64)})
        (folder / "cat" / "new.png").touch()
    elif spoil in ("outside", "absolute"):
        other = b"../../a.px" if spoil == "outside" else b"/etc/a.png"
        text = arrays["text"].tobytes().replace(b"cat/10.png", other)
        listing.save(place, arrays | {"text": np.frombuffer(text, np.uint8)})
    elif spoil == "one class":
        listing.save(place, arrays | {"labels": np.zeros(6, np.int64)})
    elif spoil in ("pipe", "device"):
        place.unlink()
        os.mkfifo(place) if spoil == "pipe" else place.symlink_to("/dev/zero")
    else:
        with zipfile.ZipFile(place, "w") as archive:
            for name, array in arrays.items():
                file = io.BytesIO()
                np.save(file, array)
                archive.writestr(f"{name}.npy", file.getvalue())
        encrypted(place)
        assert listing.load(place) is None
    settle(folder)
    names, labels = found(folder)
    assert set(names) == {*FILES, *(["cat/new.png"] if spoil == "no folders" else [])} and set(labels) == {0, 1}


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """A megabyte of it could hold a gigabyte."""
    np.savez_compressed(tmp_path / "a.npz", text=np.zeros(10**6, np.uint8))
    assert listing.load(tmp_path / "a.npz") is None
