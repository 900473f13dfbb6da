"""Classifies images with a trained network and prints the most probable classes of each.

    python tools/predict.py output/NAME/TAG/best.pth photo.jpg more_photos/
    python tools/predict.py best.pth photos/ --top-k 3 --sheet sheet.png

Exit status: 0; 1 if an image could not be read (it is named and skipped); 2 for an error that you can fix.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import load_config
from data.images import ImageError, load_image
from data.transforms import build_transform
from inference import load_network
from plots import run_names
from utils import InputError, MissingFileError, one_line_errors, printable


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files among ``paths`` and the images in the folders among them, at any depth, sorted.

    Raises:
        MissingFileError: there is no such file or folder, or a folder holds no images.
    """
    pictures = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
            if not found:
                raise MissingFileError(f"{path} holds no images ({', '.join(IMG_EXTENSIONS)})")
            pictures += found
        elif path.exists():
            pictures.append(path)
        else:
            raise MissingFileError(f"{path} does not exist")
    return pictures


@torch.inference_mode()
def predict(model, images: torch.Tensor, top_k: int) -> list[list[tuple[int, float]]]:
    """The ``top_k`` most probable labels of each image and their probabilities, the most probable first.

    Args:
        model: a network in evaluation mode; the images are copied to its device.
        images: one batch (N, 3, S, S), preprocessed.
        top_k: at most the number of classes.

    Raises:
        InputError: an output is not finite.
    """
    device = next(model.parameters()).device
    logits = model(images.to(device))
    if not logits.isfinite().all():
        raise InputError("the network's outputs are not finite; its weights cannot be used")
    probabilities, labels = logits.softmax(dim=1).topk(top_k)
    rows = zip(labels.tolist(), probabilities.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


# ---- the contact sheet ---------------------------------------------------------------------------

SHEET_LIMIT = 1000  # pictures
SHEET_CLASSES = 3  # named below each image
_SIDE, _GAP, _LINE = 160, 10, 18  # pixels: side of an image, space between cells, height of a line of text


def thumbnail(picture: Image.Image) -> Image.Image:
    """The whole image, as large as fits into a cell; small ones show their pixels."""
    is_small = max(picture.size) < _SIDE
    return ImageOps.contain(picture, (_SIDE, _SIDE), Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS)


def draw_sheet(cells: list[tuple[str, Image.Image, list[tuple[str, float]]]]) -> Image.Image:
    """A grid of ``(title, thumbnail, [(class name, probability), ...])``, probabilities as bars behind the names."""
    columns = min(math.ceil(math.sqrt(len(cells))), 10)
    lines = 1 + max(len(classes) for *_, classes in cells)
    width, height = _SIDE + _GAP, _SIDE + lines * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-len(cells) // columns) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (title, picture, classes) in enumerate(cells):
        x, y = _GAP + index % columns * width, _GAP + index // columns * height
        sheet.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
        y += _SIDE
        draw.text((x, y + 3), _fit(title, font, _SIDE), "gray", font)
        for name, probability in classes:
            y += _LINE
            percent = f"{probability:.1%}"
            room = _SIDE - font.getlength(percent) - 10
            draw.rectangle((x, y + 1, x + round(probability * (_SIDE - 1)), y + _LINE - 2), "lightblue")
            draw.text((x + 3, y + 3), _fit(name, font, room), "black", font)
            draw.text((x + _SIDE - 3, y + 3), percent, "black", font, anchor="ra")
    return sheet


def _fit(text: str, font, width: float) -> str:
    """The text, or as much of its beginning as fits, with dots for the rest."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


# ---- the command line ----------------------------------------------------------------------------

@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the trained network, e.g. a run's best.pth")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to print for each image; default: 5")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image instead of text")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="also draw a contact sheet of all images")
    parser.add_argument("--cfg", metavar="FILE",
                        help="the network's config; for a released checkpoint, or another image size")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time; default: 32")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is a GPU")
    args = parser.parse_args(argv)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Prints the predictions, reports unreadable images on standard error, draws the sheet; returns the exit status."""
    if min(args.top_k, args.batch_size) < 1:
        raise InputError("--top-k and --batch-size must be at least 1")
    paths = find_pictures(args.pictures)
    if args.sheet:
        _check_sheet(args.sheet, len(paths))
    titles = dict(zip(paths, run_names(paths), strict=True)) if args.sheet else {}
    model, config, classes = load_network(args.checkpoint, load_config(args.cfg) if args.cfg else None, args.device)
    transform, top_k = build_transform(config), min(args.top_k, len(classes))
    cells, bad = [], 0
    for first in range(0, len(paths), args.batch_size):
        batch = []
        for path in paths[first : first + args.batch_size]:
            try:
                picture = load_image(path)
                batch.append((path, picture, transform(picture)))
            except (ImageError, OSError) as error:
                bad += 1
                message = str(error) if str(path) in str(error) else f"{path}: {error}"
                print(f"predict.py: {printable(message)}; skipped", file=sys.stderr)
        if not batch:
            continue
        rankings = predict(model, torch.stack([prepared for *_, prepared in batch]), top_k)
        for (path, picture, _), ranking in zip(batch, rankings, strict=True):
            named = [(classes[label], probability) for label, probability in ranking]
            print(_json_line(path, named) if args.json else _text_line(path, named))
            if args.sheet:
                shown = [(printable(name), probability) for name, probability in named[:SHEET_CLASSES]]
                cells.append((printable(titles[path]), thumbnail(picture), shown))
    if cells:
        draw_sheet(cells).save(args.sheet, optimize=True)
        print(f"contact sheet written to {args.sheet}", file=sys.stderr)
    if bad:
        print(f"predict.py: {bad} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if bad else 0


def _check_sheet(path: Path, pictures: int) -> None:
    if path.suffix.lower() != ".png":
        raise InputError(f"--sheet {path}: the sheet is a PNG; use a name that ends in .png")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--sheet {path}: {path.parent} is not a writable folder; create it first")
    if pictures > SHEET_LIMIT:
        raise InputError(f"--sheet holds at most {SHEET_LIMIT} images; {pictures} were given")


def _text_line(path: Path, named: list[tuple[str, float]]) -> str:
    return printable(f"{path}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in named))


def _json_line(path: Path, named: list[tuple[str, float]]) -> str:
    ranking = [{"class": name, "probability": round(probability, 6)} for name, probability in named]
    return json.dumps({"picture": str(path), "classes": ranking})


if __name__ == "__main__":
    sys.exit(main())
