"""WebDataset tar shards, like the Hub's ``timm/imagenet-1k-wds``, read in random order through an index.

A sample is a series of files of the same name: ``n01440764_10026.jpg`` and ``n01440764_10026.cls``, the label as text.
The index holds the shard and position of each image. It is kept beside the shards as ``.index_<split>.npz``, and built
again when a shard has changed.
"""

import contextlib
import io
import posixpath
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import InputError, MissingFileError, printable

from . import listing
from .images import ImageError, ImageSet
from .listing import IMAGE_EXTENSIONS, Names

MAX_LABEL = 999_999
SPLITS = {"train": ("*train*.tar",), "val": ("*validation*.tar", "*val*.tar")}
_MOST_NAME = 2**16  # bytes of the header of a long name


def find_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split in a folder, by name; empty if there are none."""
    for pattern in SPLITS[split]:
        found = sorted(path for path in root.glob(pattern) if not listing.is_system(path.name))
        if found:
            return found
    return []


class ShardDataset(ImageSet):
    """Images of numbered tars with their labels.

    Class names are the lines of ``classes.txt`` beside the shards if it exists, else the numbers.

    Args:
        root: the folder of the shards.
        split: ``"train"`` or ``"val"``.

    Raises:
        MissingFileError: there are no shards.
        InputError: a shard is damaged, or a sample has no image or no label.
    """

    def __init__(self, root: Path, split: str):
        self.shards = find_shards(root, split)
        if not self.shards:
            raise MissingFileError(f"{root} holds no shards of {split}: no file is named {' or '.join(SPLITS[split])}")
        index = read_index(root, split)
        self.names = Names(index["text"], index["ends"])
        self.shard, self.offset, self.size = index["shard"], index["offset"], index["size"]
        self.labels = index["labels"].tolist()
        self.classes = class_names(root, max(self.labels) + 1)

    def read(self, index: int) -> bytes:
        with open(self.shards[self.shard[index]], "rb") as file:
            file.seek(self.offset[index])
            data = file.read(self.size[index])
        if len(data) < self.size[index]:
            raise ImageError(f"{self.name(index)}: the shard ends within the image; download it again")
        return data

    def name(self, index: int) -> str:
        return printable(f"{self.shards[self.shard[index]]}:{self.names[index]}")


def class_names(root: Path, count: int) -> list[str]:
    """The lines of ``classes.txt``, or the numbers up to ``count`` if it does not exist.

    Raises:
        InputError: there are fewer names than labels.
    """
    path = root / "classes.txt"
    if not path.is_file():
        return [str(label) for label in range(count)]
    names = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if len(names) < count:
        raise InputError(f"{path} names {len(names)} classes, but labels go up to {count - 1}; write a line for each")
    return names


def read_index(root: Path, split: str) -> dict[str, np.ndarray]:
    """The index of a split's shards, built if there is none of the shards as they are.

    Raises:
        InputError: as ``ShardDataset``.
    """
    shards, place = find_shards(root, split), root / f".index_{split}.npz"
    for path in shards:
        if not path.is_file():
            raise InputError(f"{path} is not a file; copy the shard there, or remove it")
    names = np.array([path.name for path in shards])
    states = np.array([(path.stat().st_size, path.stat().st_mtime_ns) for path in shards])
    with contextlib.suppress(Exception):  # another program's file
        index = listing.load(place)
        if np.array_equal(index["shards"], names) and np.array_equal(index["states"], states) and _is_sound(index):
            return index
    bar = tqdm(shards, f"indexing {split} shards", delay=2, leave=False, disable=None)
    rows = [row for number, path in enumerate(bar) for row in _index_shard(path, number)]
    if not rows:
        raise InputError(f"the shards of {split} in {root} hold no samples (an image and a .cls file each); unpack tar "
                         "files that hold something else")
    names_of_images, shard, offset, size, labels = zip(*rows, strict=True)
    members = Names.of(names_of_images)
    index = {"shards": names, "states": states, "text": members.text, "ends": members.ends, "shard": np.array(shard),
             "offset": np.array(offset), "size": np.array(size), "labels": np.array(labels)}
    listing.save(place, index)
    return index


def _is_sound(index: dict[str, np.ndarray]) -> bool:
    """Whether a file's arrays are a valid index, which leads only to bytes of its shards."""
    count, sizes = len(Names(index["text"], index["ends"])), index["states"][:, 0]
    arrays = [index[name] for name in ("shard", "offset", "size", "labels")]
    shard, offset, size, labels = arrays
    return (all(array.dtype == np.int64 and array.shape == (count,) and array.min() >= 0 for array in arrays)
            and labels.max() <= MAX_LABEL and (offset <= sizes[shard] - size).all())


def _index_shard(path: Path, number: int) -> list[tuple[str, int, int, int, int]]:
    """Name, shard, offset, size and label of each sample's image."""
    images, labels = {}, {}
    try:
        with _BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # a million of them would take a gigabyte
                if member.issparse():
                    raise ValueError(f"{member.name} is stored as a sparse file, which is not supported")
                left = path.stat().st_size - member.offset_data
                if member.size < 0 or member.isfile() and member.size > left:  # below 0 tarfile goes back, without end
                    raise ValueError(f"{member.name} has {member.size} bytes; {left} are left")
                stem, extension = posixpath.splitext(member.name)
                found = images if extension.lower() in IMAGE_EXTENSIONS else labels if extension == ".cls" else None
                if found is None or not member.isfile() or listing.is_system(posixpath.basename(member.name)):
                    continue
                if stem in found:
                    raise InputError(printable(f"{path}: {stem} occurs twice; give each sample a name of its own"))
                if found is images:
                    images[stem] = member.name, number, member.offset_data, member.size
                    continue
                text = tar.extractfile(member).read(100).decode("utf-8", "replace").strip()
                if not text.isdecimal() or len(text) > 20 or int(text) > MAX_LABEL:
                    raise InputError(printable(f"{path}:{member.name} holds {text!r:.60}, not a class from 0 to "
                                               f"{MAX_LABEL}"))
                labels[stem] = int(text)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends at a damaged header, too
                raise ValueError(f"its end, or the header at byte {tar.offset}, is missing or damaged")
    except (InputError, PermissionError):
        raise
    except Exception as error:  # tarfile raises many types of errors
        raise InputError(printable(f"{path} is not a complete tar file ({error}); download it again")) from None
    for stem in images.keys() ^ labels.keys():
        if "." in posixpath.basename(stem):  # something else about the sample before the dot, such as a.mask.png
            continue
        missing = ".cls file, which holds its label; unpack an archive of class folders" if stem in images else "image"
        raise InputError(printable(f"{path}: {stem} has no {missing}"))
    return [(*image, labels[stem]) for stem, image in images.items() if stem in labels]


class _BoundedFile(io.FileIO):
    """A file that is read in small parts; tarfile would read a long name of any length."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_NAME:
            raise ValueError(f"a name of {size} bytes")
        return super().read(size)
