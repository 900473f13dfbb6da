"""Swin-Transformer's zip form of a data set: an archive of images and a text file with their labels."""

import collections
import functools
import os
import posixpath
import zipfile
from pathlib import Path

from tqdm import tqdm

from utils import InputError, MissingFileError, printable

from .images import ImageError, ImageSet, with_advice
from .samplers import eval_order

MOST_BYTES = 2**30  # of an unpacked image; a small archive could fill the memory


class ZipDataset(ImageSet):
    """Images of ``<split>.zip`` with the labels of ``<split>_map.txt``; safe in forked and spawned workers.

    Args:
        root: the folder of both files.
        split: ``"train"`` or ``"val"``.
        num_classes: labels are ``0 .. num_classes - 1``.
        cache: what to keep in memory, undecoded: ``"no"``, ``"part"`` (images ``rank, rank + world_size, ...``) or
            ``"full"``.
        rank, world_size: this process and the number of them.
        skip_bad: leave images that cannot be read out of the cache, instead of raising an error.

    Raises:
        MissingFileError: one of the files is missing.
        InputError: the archive or the map is invalid; the message names the line or the image.
    """

    def __init__(self, root, split: str, num_classes: int, cache: str = "no", rank: int = 0, world_size: int = 1,
                 skip_bad: bool = False):
        self.archive = Path(root) / f"{split}.zip"
        map_file = Path(root) / f"{split}_map.txt"
        self.names, self.labels, self.classes = read_map(map_file, num_classes)
        stored = set(_open_archive(self.archive, os.getpid()).namelist())
        for line, member in enumerate(self.names, start=1):
            if member not in stored:
                raise InputError(printable(f"{map_file}:{line}: {member} is not in {self.archive}"))
        cached = {"no": range(0), "part": eval_order(len(self), rank, world_size), "full": range(len(self))}[cache]
        self._cache = {}
        for index in tqdm(cached, f"caching {self.archive}", unit=" images", delay=2, leave=False, disable=None):
            try:
                self._cache[index] = self._read(index)
            except ImageError as error:
                if not skip_bad:
                    raise with_advice(error) from None

    def read(self, index: int) -> bytes:
        return self._cache[index] if index in self._cache else self._read(index)

    def name(self, index: int) -> str:
        return printable(f"{self.archive}:{self.names[index]}")

    def _read(self, index: int) -> bytes:
        archive = _open_archive(self.archive, os.getpid())
        try:
            size = archive.getinfo(self.names[index]).file_size
            if size > MOST_BYTES:
                raise ValueError(f"it has {size} bytes; the limit is {MOST_BYTES}")
            return archive.read(self.names[index])
        except Exception as error:  # its decompressors raise a dozen types of errors
            raise ImageError(f"{self.name(index)} cannot be read from the archive ({printable(str(error))})") from error


@functools.lru_cache(maxsize=8)
def _open_archive(path: Path, pid: int) -> zipfile.ZipFile:
    """The archive, opened once per process, since a handle inherited through a fork would share its file position."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; DATA.ZIP_MODE needs it beside its map file")
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # damaged names, dates and sizes have an error of their own each
        raise InputError(f"{path} is not a complete zip archive ({error}); create or copy it again") from None


def read_map(path: Path, num_classes: int) -> tuple[list[str], list[int], list[str]]:
    """Members, labels and class names of a map file, whose lines are ``path/in/zip.jpg<TAB>label``.

    A class is named after the folder that holds all its images, if each class has such a folder, else after its label.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is empty, a line is malformed, an image is listed twice, a label is not in
            ``0 .. num_classes - 1``, or one has no image.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; it holds one line 'path/in/zip.jpg<TAB>label' for each image")
    members, labels, folders = [], [], {}
    for line, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        member, tab, label = text.rpartition("\t")
        if not (member and tab and label.strip().isdecimal() and len(label) < 20):
            raise InputError(f"{path}:{line}: expected 'path/in/zip.jpg<TAB>label', got {text!r:.300}")
        if int(label) >= num_classes:
            raise InputError(
                f"{path}:{line}: label {int(label)} is not in 0..{num_classes - 1} (MODEL.NUM_CLASSES is {num_classes})"
            )
        members.append(member)
        labels.append(int(label))
        folders.setdefault(int(label), set()).add(posixpath.basename(posixpath.dirname(member)))
    if not members:
        raise InputError(f"{path} is empty; it holds one line 'path/in/zip.jpg<TAB>label' for each image")
    twice, count = collections.Counter(members).most_common(1)[0]
    if count > 1:
        raise InputError(printable(f"{path}: {twice} is in {count} lines; keep one of them"))
    for label in range(max(labels)):
        if label not in folders:
            raise InputError(f"{path}: no image has label {label}, though labels go up to {max(labels)}")
    names = [min(folders[label]) for label in range(len(folders))]
    named = all(names) and len(set(names)) == len(names) and all(len(found) == 1 for found in folders.values())
    return members, labels, names if named else [str(label) for label in range(len(folders))]
