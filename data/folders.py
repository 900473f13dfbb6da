"""Images in a folder for each class: ``root/<split>/<class>/*.jpg``."""

import os
from pathlib import Path, PureWindowsPath

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import InputError, MissingFileError

from .images import EncodedImages, ImageError, read_file
from .listing import list_images


class FolderDataset(EncodedImages):
    """The images below the class folders of one split; labels follow the sorted names of the classes.

    Args:
        root: the folder of ``train/`` and ``val/``.
        split: ``"train"`` or ``"val"``.
        hint: text to add to the error if the split is missing.

    Raises:
        MissingFileError: a folder is missing or holds no image.
        InputError: images are outside the class folders, or a link leads back to a folder that contains it.
    """

    def __init__(self, root: Path, split: str, hint: str = ""):
        self.folder = root / split
        if not self.folder.is_dir():
            raise MissingFileError(
                f"{self.folder} does not exist; {root} must hold train/ and val/ with class folders, or another form "
                f"of the data set (see docs/data.md){_likely_cause(root, split)}{hint}"
            )
        for entry in os.scandir(self.folder):
            if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file():
                raise InputError(f"{entry.path} is outside the class folders; move it to {self.folder}/<its class>/")
        self.classes = class_folders(self.folder)
        if not self.classes:
            raise MissingFileError(
                f"{self.folder} holds no class folders; it must hold one folder of images for each class"
            )
        self.names, labels = list_images(self.folder, self.classes, IMG_EXTENSIONS)
        self.labels = labels.tolist()
        filled = set(self.labels)
        empty = [name for label, name in enumerate(self.classes) if label not in filled]
        if empty:
            shown = ", ".join(empty[:10]) + ", ..." * (len(empty) > 10)
            raise MissingFileError(
                f"{self.folder}: no images in the class folders {shown}. Fill these folders or remove them"
            )

    def read(self, index: int) -> bytes:
        try:
            return read_file(self.name(index))
        except MissingFileError as error:  # it existed when the folder was listed
            raise ImageError(str(error)) from error

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])


def _likely_cause(root: Path, split: str) -> str:
    """A likely reason why a folder does not exist, for its message."""
    if (root.parent / split).is_dir():
        return f"; name {root.parent} instead"
    drive = PureWindowsPath(root).drive
    return f"; this is a Windows path, which WSL has under /mnt/{drive[0].lower()}" if drive else ""


def class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in ``folder``, or none if it does not exist."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
