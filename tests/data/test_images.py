import io
import os
import random
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from data import images
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
])
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


# ---- damage --------------------------------------------------------------------------------------


def photograph(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((220, 160), 3)
    pixels = np.asarray(smooth, np.int16) + rng.integers(-20, 21, (160, 220, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


STORED = {
    "JPEG": ("RGB", "JPEG", {"quality": 90}), "optimised JPEG": ("RGB", "JPEG", {"quality": 90, "optimize": True}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}), "gray JPEG": ("L", "JPEG", {}),
    "CMYK JPEG": ("CMYK", "JPEG", {}), "JPEG with restarts": ("RGB", "JPEG", {"restart_marker_rows": 1}),
    "PNG": ("RGB", "PNG", {}), "palette PNG": ("P", "PNG", {}), "WEBP": ("RGB", "WEBP", {}),
    "lossless WEBP": ("RGB", "WEBP", {"lossless": True}), "GIF": ("P", "GIF", {}),
    "LZW TIFF": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "TIFF": ("RGB", "TIFF", {}), "BMP": ("RGB", "BMP", {}), "PPM": ("RGB", "PPM", {}),
}


def damaged(data: bytes, rng, kind: str) -> bytes:
    """What crashes, unfinished copies and broken disks leave of a file, or anything for formats with checksums."""
    size, begin = len(data), rng.randrange(len(data))
    if rng.random() < 0.3:
        return data[:begin]
    if kind in ("TIFF", "BMP", "PPM"):  # raw pixels: nothing else can be seen
        return data[:begin]
    sector = begin // 4096 * 4096
    other = rng.randrange(size)
    choices = [
        data[:begin] + bytes(size - begin), data[:sector] + bytes(4096) + data[sector + 4096 :],
        data[:begin] + data[begin + 4096 :],
        data[:begin] + data[-2:], data[:begin] + bytes(max(size - begin - 2, 0)) + data[-2:],
    ]
    if kind.endswith("PNG"):
        length = rng.choice((1, 64, 512))
        choices += [data[:begin] + data[other : other + length] + data[begin + length :],
                    data[:begin] + bytes([data[begin] ^ 1 << rng.randrange(8)]) + data[begin + 1 :]]
    return rng.choice(choices)


def try_damage(kind: str, count: int, rng) -> None:
    mode, name, options = STORED[kind]
    data = encode(photograph(mode), name, **options)
    whole = decode(data, "x")
    refused = 0
    for attempt in range(count):
        spoilt = damaged(data, rng, kind)
        try:
            assert np.array_equal(decode(spoilt, "x"), whole), f"attempt {attempt}: other pixels were accepted"
        except ImageError:
            refused += 1
    assert refused > 0.8 * count


@pytest.mark.parametrize("kind", STORED)
def test_damage_gives_the_whole_image_or_an_error(kind):
    try_damage(kind, 30, random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORED)
def test_ten_thousand_damaged_images(kind):
    try_damage(kind, 10_000 // len(STORED), random.Random(2))


def test_whole_images_with_zeros_are_accepted():
    """Flat areas, which optimised tables code as zeros; what phones and cameras append; metadata."""
    page = Image.new("RGB", (1500, 1500), "white")
    for options in ({"optimize": True}, {"progressive": True}, {"optimize": True, "subsampling": 0}):
        data = encode(page, "JPEG", **options)
        assert (decode(data, "x") == 255).all()
        assert (decode(data + bytes(5000), "x") == 255).all()
    assert (decode(encode(page.convert("L"), "JPEG", optimize=True), "x") == 255).all()
    exif = Image.Exif()
    exif[0x927C] = bytes(5000)  # a camera's own data
    for kind in ("JPEG", "WEBP", "PNG"):
        assert decode(encode(Image.new("RGB", (9, 9)), kind, exif=exif), "x").shape == (9, 9, 3)
    file = io.BytesIO()
    page.save(file, "MPO", save_all=True, append_images=[page.resize((100, 100))])
    assert decode(file.getvalue(), "x").shape == (1500, 1500, 3)


def test_what_libraries_print_of_other_threads_is_passed_on(capfd):
    with images._warnings_are_errors():
        os.write(2, b"from another thread\n")
    assert capfd.readouterr().err == "from another thread\n"


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
                                  b"%PDF-1.4\n", b"\x0a\x05\x01\x08" + bytes(200)])
def test_other_formats_start_no_program(data, monkeypatch):
    for name in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ImageError, match="^cat.jpg is not an image of a known format$"):
        decode(data, "cat.jpg")


def test_names_are_printable_in_messages(tmp_path):
    path = tmp_path / "a\x1b[31m\nb.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError) as error:
        load_image(path)
    assert str(error.value) == rf"{tmp_path}/a\x1b[31m\nb.jpg is not an image of a known format"
    with pytest.raises(FileNotFoundError) as error:
        load_image(tmp_path / "c\n.jpg")
    assert str(error.value) == rf"{tmp_path}/c\n.jpg does not exist"
