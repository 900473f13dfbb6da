"""Which files of a folder are images, and compact lists of many files, cached beside the data.

Imports neither PyTorch nor Pillow: ``split_caltech101.py`` uses it.
"""

import collections
import contextlib
import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import InputError, printable, replacing

logger = logging.getLogger("strip_mlp")

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_SYSTEM = ("__macosx", "__pycache__", "thumbs.db", "desktop.ini", "lost+found", "system volume information", "@eadir",
           "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin")
WORTH_CACHING = 20_000  # files; listing fewer is fast
_SETTLED = 3  # seconds; a folder's time stamp may not show two changes within them


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_system(name)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or left by a system: ``._cat.jpg``, ``.ipynb_checkpoints``, ``Thumbs.db``."""
    return name.startswith(".") or name.lower() in _SYSTEM


def class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in ``folder``, without those of systems, or none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if not is_system(entry.name)
                  and (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()))


def has_images(folder: Path) -> str:
    """The path of an image in a folder itself, or an empty string."""
    return next((entry.path for entry in os.scandir(folder) if is_image(entry.name) and entry.is_file()), "")


class Names(Sequence):
    """Strings in two arrays; a list of a million strings would be copied into every data worker.

    ``text`` (uint8) holds all names in UTF-8, without separators, ``ends`` (int64) the end of each. Raises ValueError
    if the arrays, which may come from a file, do not match.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        kinds = (text.dtype, text.ndim, ends.dtype, ends.ndim)
        if kinds != (np.uint8, 1, np.int64, 1) or (np.diff(ends, prepend=0, append=len(text)) < 0).any():
            raise ValueError("the arrays do not hold names")
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names) -> "Names":
        """From strings; file names that are not UTF-8 are kept unchanged."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        begin = self.ends[index - 1] if index % (len(self) or 1) else 0
        return self.text[begin : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


def list_images(folder: Path, classes: list[str]) -> tuple[Names, np.ndarray]:
    """The images below each class folder, in the order of their names: paths relative to ``folder``, and labels.

    Files that are not images are skipped with a warning that counts them. A listing of 20,000 images or more is cached
    as ``.listing_<folder>.npz`` beside ``folder``, or in the user's cache if that cannot be written, and used again
    until a folder in it changes.

    Raises:
        InputError: a link leads back to a folder that contains it.
    """
    place = folder.parent / f".listing_{folder.name}.npz"
    names, labels, summary = _cached(place, folder, classes) or _listed(place, folder, classes)
    if summary and (folder, summary) not in _warned:
        _warned.add((folder, summary))
        logger.warning(printable(f"{folder}: skipped files that are not images: {summary}"))
    return names, labels


_warned = set()  # a run opens its folders several times


def _cached(place: Path, folder: Path, classes: list[str]) -> tuple[Names, np.ndarray, str] | None:
    with contextlib.suppress(Exception):  # damaged, or another program's
        cached = load(place)
        names, labels = Names(cached["text"], cached["ends"]), cached["labels"]
        folders, times = Names(cached["folders"], cached["folder_ends"]), cached["times"].tolist()
        is_sound = labels.dtype == np.int64 and labels.shape == (len(names),) and cached["classes"].tolist() == classes
        is_sound = is_sound and np.array_equal(np.unique(labels), range(len(classes))) and folders[0] == ""
        text, begins = names.text.tobytes(), np.append(0, names.ends[:-1])  # only what is below the folder:
        is_sound = is_sound and not any(part in text for part in (b"\0", b"../")) and ord("/") not in names.text[begins]
        if is_sound and all(_time(folder / path) == time for path, time in zip(folders, times, strict=True)):
            return names, labels, str(cached["skipped"])[:300]
    return None


def _listed(place: Path, folder: Path, classes: list[str]) -> tuple[Names, np.ndarray, str]:
    names, labels, folders, skipped = [], [], {"": _time(folder)}, collections.Counter()
    with tqdm(desc=f"listing {printable(str(folder))}", unit=" images", delay=2, leave=False, disable=None) as bar:
        for label, name in enumerate(classes):
            for path in _walk(folder, name, folders, skipped, ()):
                names.append(path)
                labels.append(label)
                bar.update()
    summary = ", ".join(f"{kind} ({count})" for kind, count in skipped.most_common(10))
    names, labels, paths = Names.of(names), np.array(labels, np.int64), Names.of(folders)
    if len(names) >= WORTH_CACHING and time.time() - max(folders.values()) / 1e9 > _SETTLED:
        save(place, {"classes": np.array(classes), "text": names.text, "ends": names.ends, "labels": labels,
                     "folders": paths.text, "folder_ends": paths.ends, "times": np.array(list(folders.values())),
                     "skipped": np.array(summary)})
    return names, labels, summary


def _walk(root: Path, relative: str, folders: dict[str, int], skipped: collections.Counter, above: tuple) -> Iterator:
    """Images below ``root/relative``, sorted; records the folders' times and what is skipped, by its kind."""
    status = os.stat(root / relative)
    identity = status.st_dev, status.st_ino
    if identity in above:
        raise InputError(f"{root / relative} is a link to a folder that contains it, so the listing would never end; "
                         "remove it")
    folders[relative] = status.st_mtime_ns
    inner = []
    for entry in sorted(os.scandir(root / relative), key=lambda entry: entry.name):
        if is_system(entry.name):
            skipped["hidden and system files"] += 1
        elif entry.is_dir():
            inner.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
            yield f"{relative}/{entry.name}"
        else:
            skipped[os.path.splitext(entry.name)[1].lower()[:12] or "without extension"] += 1
    for name in inner:
        yield from _walk(root, f"{relative}/{name}", folders, skipped, (*above, identity))


def _time(path: Path) -> int:
    return os.stat(path).st_mtime_ns


# ---- arrays in files -----------------------------------------------------------------------------


def load(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays saved for ``path``, there or in the user's cache; None if they cannot be read."""
    for place in (path, _in_cache(path)):
        with contextlib.suppress(Exception):  # whatever is wrong with the file, it is written anew
            if not place.is_file():  # a pipe would be waited for
                continue
            with zipfile.ZipFile(place) as archive, np.load(place, allow_pickle=False) as arrays:
                # Uncompressed, as save() writes it; otherwise a small file could fill the memory.
                if all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist()):
                    return dict(arrays)
    return None


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Saves arrays as ``path``, atomically, or in the user's cache if that cannot be written."""
    for place in (path, _in_cache(path)):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as file:
                np.savez(file, **arrays)
            return
        except OSError as error:
            failure = error
    logger.warning("the list of files of %s could not be cached (%s); the next run creates it again", path, failure)


def _in_cache(path: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")
    return Path(home, "strip_mlp", hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16] + path.name)
