"""Image files to upright RGB pixels. Every image is opened here; a damaged one is an error, never a grey patch."""

import contextlib
import hashlib
import io
import itertools
import os
import re
import stat
import struct
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose
from torch.utils.data import Dataset
from torchvision.io import decode_jpeg

from utils import InputError, MissingFileError, printable

from .listing import Names

Image.init()
# Pillow tries 43 formats on a file, whatever its name; one of them starts Ghostscript.
FORMATS = [name for name in ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF") if name in Image.OPEN]
_UPRIGHT = {  # what turns an image of an EXIF orientation upright
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}
_ZEROS = 128  # coded pixels never have so many zero bytes in a row
_WARNING = re.compile(rb"JPEG|Inconsistent|\.tif: |Decode: ")
_stderr = threading.Lock()


class ImageError(InputError):
    """An image that cannot be used; the message names its file."""


def with_advice(error: Exception) -> ImageError:
    """An error about an image, with what to do about it."""
    return ImageError(f"{error}; remove or replace it, or skip such images with --opts DATA.SKIP_BAD_IMAGES True")


class ImageSet(Dataset):
    """Images with labels. A subclass sets the attributes and implements ``read`` and ``name``, or ``pixels``.

    Attributes:
        classes: names of the classes, by label.
        labels: the label of each image.
        names: the name of each image, relative to the data set; empty if the images have none.
    """

    classes: list[str]
    labels: list[int]
    names = ()

    def read(self, index: int) -> bytes:
        """The stored bytes of an image; raises ImageError if it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where an image is stored, for messages, without control characters; empty if it has no file."""
        return ""

    def pixels(self, index: int) -> tuple[np.ndarray, int]:
        """An image as uint8 (H, W, 3), and its label; raises ImageError if it cannot be used."""
        return decode(self.read(index), self.name(index)), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels, label = self.pixels(index)
        return Image.fromarray(pixels), label

    @property
    def fingerprint(self) -> str:
        """A hash of the names of classes and images and of the labels, in order; not of the images' content."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        digest.update(np.array(self.labels, np.int64).tobytes())
        names = self.names if isinstance(self.names, Names) else Names.of(self.names)
        digest.update(names.text.tobytes() + names.ends.tobytes())
        return digest.hexdigest()[:16]


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file; a pipe, which could block, is an ImageError, a missing file a MissingFileError."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError(printable(f"{path} is not a regular file"))
            return file.read()
    except FileNotFoundError:
        raise MissingFileError(printable(f"{path} does not exist")) from None
    except OSError as error:
        raise ImageError(printable(f"{path} cannot be read ({error.strerror})")) from error


def load_image(path: str | Path) -> Image.Image:
    """The image file at ``path`` as an upright RGB image; raises what ``read_file`` and ``decode`` raise."""
    return Image.fromarray(decode(read_file(path), str(path)))


def decode(data: bytes, name: str) -> np.ndarray:
    """The image that a whole file in one of ``FORMATS`` encodes, as uint8 (H, W, 3), turned upright by its orientation.

    Grayscale, palette and CMYK images are converted, an alpha channel is dropped, 16-bit grayscale is scaled to 8 bits.
    Of an animation it is the first picture.

    Raises:
        ImageError: the file, called ``name`` in messages, is empty, truncated, damaged or not an image.
    """
    name = printable(name)
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a global setting of Pillow that some libraries turn on
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format in _CHECKS:
                _CHECKS[image.format](data)
            with _warnings_are_errors():
                # torchvision has the same libjpeg-turbo as Pillow, without Pillow's copies and patience.
                pixels = _decode_jpeg(data) if image.format in ("JPEG", "MPO") else np.asarray(_to_rgb(image))
            if pixels.shape[2] == 4:  # CMYK, which only Pillow converts
                pixels = np.asarray(_to_rgb(image))
            turn = _UPRIGHT.get(_orientation(image))
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image of a known format") from None
    except Exception as error:  # decoders raise a dozen types of errors
        raise ImageError(f"{name} cannot be decoded ({type(error).__name__}: {printable(str(error))})") from error
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range and cannot be scaled to 8 bits")
    if image.mode.startswith("I"):  # 16-bit grayscale, which convert() would clip at 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("pixel values outside 0..65535 cannot be scaled to 8 bits")
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    with contextlib.suppress(Exception):  # EXIF data is damaged more often than images are
        return image.getexif().get(Base.Orientation)


def _decode_jpeg(data: bytes) -> np.ndarray:
    """A JPEG file as uint8 (H, W, 3), or (H, W, 4) for CMYK; the file must reach to its end marker."""
    try:
        planes = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError as error:
        raise ValueError(re.sub(r".*(: |:\d+, )", "", str(error).splitlines()[0])) from None
    if planes.shape[0] == 1:
        planes = planes.expand(3, -1, -1)
    return planes.permute(1, 2, 0).contiguous().numpy()  # (C, H, W) -> (H, W, C), its layout in memory


@contextlib.contextmanager
def _warnings_are_errors():
    """Raises what libjpeg and libtiff only print: that data is corrupt, too short or too long."""
    with _stderr, tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        message = file.read()
    if _WARNING.search(message):
        raise ValueError(message.decode(errors="replace").splitlines()[0])
    os.write(2, message)  # of others: a warning, another thread


# ---- damage that decoders read past --------------------------------------------------------------


def _check_jpeg(data: bytes) -> None:
    """Raises ValueError if scans of a progressive JPEG are missing, or a part of another one is zeroed.

    The first code of a Huffman table is all zeros. If it stands for an empty block in all tables, or in one of several
    scans, flat areas are zeros too; in progressive files refinements are. libjpeg finds most of the damage there.
    """
    position, firsts = 2, {}
    while data[position : position + 1] == b"\xff" and (kind := data[position + 1]) not in (0xC2, 0xDA):
        if kind == 0xFF:
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        tables = data[position + 4 : position + 2 + length] if kind == 0xC4 else b""
        while len(tables) > 17:  # class and number, 16 counts of codes, the symbols
            if tables[0] >= 16:  # of everything but the blocks' means
                firsts[tables[0]] = tables[17]
            tables = tables[17 + sum(tables[1:17]) :]
        position += 2 + max(length, 2)
    end = data.find(b"\xff\xd9", position)
    if data[position + 1] == 0xDA and any(firsts.values()) and data[position + 4] >= len(firsts):  # components in it
        _check_zeros(data[position:end])
    if data[position + 1] == 0xC2:
        components = data[position + 10 : position + 10 + 3 * data[position + 9] : 3]
        bits = dict.fromkeys(itertools.product(components, range(64)), 1)  # of each coefficient that are still to come
        while (position := data.find(b"\xff\xda", position + 1, end)) > 0:
            first, last, low = data[position + 5 + 2 * data[position + 4] :][:3]
            for component in data[position + 5 : position + 5 + 2 * data[position + 4] : 2]:
                bits |= {(component, coefficient): low % 16 for coefficient in range(first, last + 1)}
        if any(bits.values()):
            raise ValueError("scans of it are missing")


def _check_png(data: bytes) -> None:
    """Raises an error if a part is missing or its checksum wrong; decoding ignores that of the pixels."""
    Image.open(io.BytesIO(data), formats=["PNG"]).verify()


def _check_webp(data: bytes) -> None:
    """Raises ValueError if a WebP file is cut, or a part of its pixels is zeroed."""
    position, end = 12, 8 + int.from_bytes(data[4:8], "little")
    if len(data) < end:
        raise ValueError("its end is missing")
    while position < end:
        name, size = struct.unpack_from("<4sI", data, position)
        if name in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):  # not metadata, which may hold zeros
            _check_zeros(data[position + 8 : position + 8 + size], tail=16)
        position += 8 + size + size % 2


def _check_zeros(coded: bytes, tail: int = 0) -> None:
    if bytes(_ZEROS) in coded or tail and coded.endswith(bytes(tail)):
        raise ValueError("a part of it is zeros, as in an unfinished copy or download")


_CHECKS = {"JPEG": _check_jpeg, "MPO": _check_jpeg, "PNG": _check_png, "WEBP": _check_webp}
