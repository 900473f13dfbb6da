import io
import os

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from data.datasets import FolderDataset
from data.images import ImageError, decode, load_image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (1, 1), 77), "PNG", [[77, 77, 77]]),
        (Image.new("1", (1, 1), 1), "PNG", [[255, 255, 255]]),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", [[1, 2, 3]]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), "PNG", [[1, 2, 3]]),
        (Image.new("LA", (1, 1), (9, 0)), "PNG", [[9, 9, 9]]),
        (palette_image(), "PNG", [[10, 20, 30], [200, 100, 0]]),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF", [[0, 255, 255]]),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_mode_becomes_rgb(image, kind, expected):
    found = decode(encode(image, kind), "x")
    assert found.dtype == np.uint8 and found[0].tolist() == expected


def test_cmyk_jpeg_is_close_to_its_colour():
    decoded = np.asarray(decode(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"), "x"))
    assert np.abs(decoded.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])  # Pillow opens the last as mode I
def test_16_bit_grayscale_is_scaled_not_clipped(kind):
    image = Image.fromarray(np.array([[0, 256, 257, 32896, 65535]], np.uint16))
    assert np.asarray(decode(encode(image, kind), "x"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_big_endian_16_bit_tiff():
    image = Image.frombytes("I;16B", (2, 1), np.array([257, 65535], ">u2").tobytes())
    assert np.asarray(decode(encode(image, "TIFF"), "x"))[0, :, 0].tolist() == [1, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(dtype):
    data = encode(Image.fromarray(np.array([[0, 1 << 20]], dtype)), "TIFF")
    with pytest.raises(ImageError, match=r"a\.tif cannot be decoded .* to 8 bits"):
        decode(data, "a.tif")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lenient_global", [False, True])
def test_a_truncated_jpeg_is_never_accepted_with_other_pixels(progressive, lenient_global, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), "JPEG", progressive=progressive)
    whole = decode(data, "x")
    refused = 0
    for length in range(1, len(data)):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient_global)
        try:
            assert np.array_equal(decode(data[:length], "x"), whole)
        except ImageError:
            refused += 1
    assert refused == len(data) - 1


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_other_truncated_formats_are_refused(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), kind)
    with pytest.raises(ImageError, match="^x cannot be decoded|^x is not an image"):
        decode(data[: len(data) // 2], "x")


def test_errors_name_the_file(tmp_path):
    empty, text = tmp_path / "empty.jpg", tmp_path / "text.jpg"
    empty.write_bytes(b"")
    text.write_bytes(b"hello")
    with pytest.raises(ImageError, match=r"empty\.jpg is empty \(0 bytes\)"):
        load_image(empty)
    with pytest.raises(ImageError, match=r"text\.jpg is not an image of a known format"):
        load_image(text)
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        load_image(tmp_path / "missing.jpg")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", "/dev/zero"):
        with pytest.raises(ImageError, match=f"{path} is not a regular file"):
            load_image(path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    os.rename(tmp_path / "a.jpg", tmp_path / "train" / "cat" / "a.jpg")
    with pytest.raises(ImageError, match=r"a\.jpg is not a regular file"):
        FolderDataset(tmp_path, tmp_path / "train").read(0)


def test_a_huge_image_is_refused(monkeypatch):
    data = encode(Image.new("L", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"x cannot be decoded \(DecompressionBombError: Image size \(10000 pixels\)"):
        decode(data, "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(kind, orientation):
    """As ImageOps.exif_transpose turns them; the corners tell which of the eight ways it was."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.kron(np.array([[0, 80, 160], [40, 120, 250]], np.uint8), np.ones((16, 16), np.uint8)))
    data = encode(image.convert("RGB"), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    found = decode(data, "x")
    assert found.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    assert np.abs(found.astype(int) - expected).max() <= (2 if kind == "JPEG" else 0)


def test_damaged_exif_data_does_not_matter():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    begin = data.index(b"MM") if b"MM" in data else data.index(b"II")
    assert decode(data[:begin] + b"??" + data[begin + 2 :], "x").shape == (4, 6, 3)


@pytest.mark.parametrize("mode, options", [
    ("RGB", {}), ("RGB", {"quality": 30, "subsampling": 0}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {}),
    ("RGB", {"kind": "PNG"}), ("P", {"kind": "PNG"}),
])  # fmt: skip
def test_pixels_are_those_of_pillow(mode, options):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels).resize((130, 90)).convert(mode), **{"kind": "JPEG"} | options)
    found = decode(data, "x")
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_damaged_pixels_are_named():
    file = io.BytesIO()
    Image.new("RGB", (50, 40)).save(file, "JPEG")
    data = file.getvalue()
    for damaged in (b"", b"hello", data[:-10], data[:30]):
        with pytest.raises(ImageError, match="^x.jpg "):
            decode(damaged, "x.jpg")
