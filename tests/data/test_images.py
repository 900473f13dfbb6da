import io
import os

import numpy as np
import pytest
from PIL import Image, ImageFile

from data.folders import FolderDataset
from data.images import ImageError, decode_image, decode_pixels, load_image


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
    decoded = decode_image(encode(image, kind), "x")
    assert decoded.mode == "RGB"
    assert np.asarray(decoded)[0].tolist() == expected


def test_cmyk_jpeg_is_close_to_its_colour():
    decoded = np.asarray(decode_image(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"), "x"))
    assert np.abs(decoded.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])  # Pillow opens the last as mode I
def test_16_bit_grayscale_is_scaled_not_clipped(kind):
    image = Image.fromarray(np.array([[0, 256, 257, 32896, 65535]], np.uint16))
    assert np.asarray(decode_image(encode(image, kind), "x"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_big_endian_16_bit_tiff():
    image = Image.frombytes("I;16B", (2, 1), np.array([257, 65535], ">u2").tobytes())
    assert np.asarray(decode_image(encode(image, "TIFF"), "x"))[0, :, 0].tolist() == [1, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(dtype):
    data = encode(Image.fromarray(np.array([[0, 1 << 20]], dtype)), "TIFF")
    with pytest.raises(ImageError, match=r"a\.tif cannot be decoded .* to 8 bits"):
        decode_image(data, "a.tif")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lenient_global", [False, True])
def test_a_truncated_jpeg_is_never_accepted_with_other_pixels(progressive, lenient_global, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), "JPEG", progressive=progressive)
    whole = decode_image(data, "x").tobytes()
    refused = 0
    for length in range(1, len(data)):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient_global)
        try:
            assert decode_image(data[:length], "x").tobytes() == whole
        except ImageError:
            refused += 1
    assert refused >= len(data) - 3  # only the end marker, two bytes, may be missing


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_other_truncated_formats_are_refused(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), kind)
    with pytest.raises(ImageError, match="^x cannot be decoded|^x is not an image"):
        decode_image(data[: len(data) // 2], "x")


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
        FolderDataset(tmp_path, "train").read(0)


def test_a_huge_image_is_refused(monkeypatch):
    data = encode(Image.new("L", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"x cannot be decoded \(DecompressionBombError: Image size \(10000 pixels\)"):
        decode_image(data, "x")


def test_exif_rotation_is_followed_where_asked(tmp_path):
    """Not in training and evaluation, as in torchvision and timm; in predictions, where phones' pictures come."""
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    image.putpixel((0, 0), (255, 0, 0))
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    assert load_image(tmp_path / "phone.png").size == (6, 4)
    upright = load_image(tmp_path / "phone.png", upright=True)
    assert upright.size == (4, 6) and upright.getpixel((3, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode, options", [
    ("RGB", {}), ("RGB", {"quality": 30, "subsampling": 0}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {}),
    ("RGB", {"format": "PNG"}), ("P", {"format": "PNG"}),
])  # fmt: skip
def test_pixels_for_training_are_those_of_pillow(mode, options):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((130, 90)).convert(mode).save(file, **{"format": "JPEG"} | options)
    found = decode_pixels(file.getvalue(), "x")
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.asarray(decode_image(file.getvalue(), "x")))


def test_damaged_pixels_are_named():
    file = io.BytesIO()
    Image.new("RGB", (50, 40)).save(file, "JPEG")
    data = file.getvalue()
    for damaged in (b"", b"hello", data[:-10], data[:30]):
        with pytest.raises(ImageError, match="^x.jpg "):
            decode_pixels(damaged, "x.jpg")
