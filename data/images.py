"""Strict decoding of image files to RGB images: a damaged file is an error, never a grey patch."""

import contextlib
import io
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.io import decode_jpeg

from utils import InputError, MissingFileError


class ImageError(InputError):
    """An image that cannot be used; the message names its file."""


class EncodedImages(Dataset):
    """Images that are stored encoded, and their labels. A subclass sets ``labels`` and implements reading."""

    labels: list[int]

    def read(self, index: int) -> bytes:
        """The stored bytes of an image; raises ImageError if it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The name of an image in messages: its path, or where it is stored."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode_image(self.read(index), self.name(index)), self.labels[index]

    def pixels(self, index: int) -> tuple[np.ndarray, int]:
        """An image as uint8 (H, W, 3), and its label."""
        return decode_pixels(self.read(index), self.name(index)), self.labels[index]


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file; only regular files are opened, since a pipe without a writer would block.

    Raises:
        MissingFileError: there is no such file.
        ImageError: it cannot be read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError(f"{path} is not a regular file")
            return file.read()
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror})") from error


def load_image(path: str | Path, upright: bool = False) -> Image.Image:
    """The image file at ``path``, decoded by ``decode_image``.

    Raises:
        MissingFileError: there is no such file.
        ImageError: it cannot be read, or is not a complete image.
    """
    return decode_image(read_file(path), str(path), upright)


def decode_image(data: bytes, name: str, upright: bool = False) -> Image.Image:
    """The 8-bit RGB image that ``data`` encodes.

    Grayscale, palette and CMYK images are converted, an alpha channel is dropped, 16-bit grayscale is scaled to 8 bits.

    Args:
        data: a whole image file, in any format that Pillow reads.
        name: its name in error messages.
        upright: apply its EXIF orientation. Training and evaluation do not, like torchvision and timm.

    Raises:
        ImageError: ``data`` is empty, truncated, damaged or not an image.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a global setting of Pillow that some libraries turn on
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(ImageOps.exif_transpose(image) if upright else image)
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image of a known format") from None
    except Exception as error:  # decoders raise a dozen types of errors, which do not name the file
        raise ImageError(f"{name} cannot be decoded ({type(error).__name__}: {error})") from error


def decode_pixels(data: bytes, name: str) -> np.ndarray:
    """The image that ``data`` encodes as uint8 (H, W, 3): a faster ``decode_image``, for training.

    torchvision decodes colour JPEGs, with the same libjpeg-turbo but without Pillow's copies.

    Raises:
        ImageError: as ``decode_image``.
    """
    with contextlib.suppress(OSError, RuntimeError, ValueError, Image.DecompressionBombError):
        with Image.open(io.BytesIO(data)) as header:
            is_plain = header.format == "JPEG" and header.mode == "RGB"
        if is_plain:
            planes = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            return planes.permute(1, 2, 0).contiguous().numpy()  # (C, H, W) -> (H, W, C), its layout in memory
    return np.asarray(decode_image(data, name))  # also reports what is wrong with it


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
