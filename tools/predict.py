"""Classifies images with a trained network and prints the most probable classes of each.

    python tools/predict.py output/NAME/TAG/best.pth photo.jpg more_photos/
    python tools/predict.py best.pth photos/ --top-k 3 --sheet sheet.png

Exit status: 0; 1 if an image could not be read (it is named and skipped); 2 for an error that you can fix.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, MissingFileError, one_line_errors, printable

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("checkpoint", metavar="CKPT", help="the trained network, e.g. a run's best.pth")
PARSER.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help="image files, or folders of them")
PARSER.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to print for each image; default: 5")
PARSER.add_argument("--json", action="store_true", help="print a JSON object for each image instead of text")
PARSER.add_argument("--sheet", type=Path, metavar="FILE.png", help="also draw a contact sheet of all images")
PARSER.add_argument("--cfg", metavar="FILE",
                    help="the network's config; for a released checkpoint, or another image size")
PARSER.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time; default: 32")
PARSER.add_argument("--device", default="", metavar="TYPE", help="default: cuda where there is a GPU, else cpu")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import json

import torch

from config import load_config
from data.images import ImageError, load_image
from data.listing import IMAGE_EXTENSIONS, is_image, is_system
from data.transforms import build_transform
from distributed import choose_device
from inference import load_network
from plots import check_sheet, draw_sheet, run_names, thumbnail

SHEET_LIMIT = 1000  # pictures
SHEET_CLASSES = 3  # named below each image


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files among ``paths``, and the images in the folders among them, at any depth, sorted, without hidden
    ones."""
    pictures = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*")
                           if is_image(file.name) and not any(map(is_system, file.relative_to(path).parts)))
            if not found:
                raise MissingFileError(f"{path} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
            pictures += found
        elif path.exists():
            pictures.append(path)
        else:
            raise MissingFileError(f"{path} does not exist")
    return pictures


@torch.inference_mode()
def predict(model, images: torch.Tensor, top_k: int) -> list[list[tuple[int, float]]]:
    """The ``top_k`` most probable labels of each image of a batch (N, 3, S, S) and their probabilities, in that
    order."""
    logits = model(images.to(next(model.parameters()).device))
    if not logits.isfinite().all():
        raise InputError("the network's outputs are not finite; its weights cannot be used")
    probabilities, labels = logits.softmax(dim=1).topk(top_k)
    rows = zip(labels.tolist(), probabilities.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Prints the predictions, reports unreadable images on standard error, draws the sheet; returns the exit status."""
    args = PARSER.parse_args(argv)
    if min(args.top_k, args.batch_size) < 1:
        raise InputError("--top-k and --batch-size must be at least 1")
    paths = find_pictures(args.pictures)
    if args.sheet:
        check_sheet(args.sheet)
        if len(paths) > SHEET_LIMIT:
            raise InputError(f"--sheet holds at most {SHEET_LIMIT} images; {len(paths)} were given")
    titles = run_names(paths) if args.sheet else [""] * len(paths)
    config = load_config(args.cfg) if args.cfg else None
    model, config, classes = load_network(args.checkpoint, config, choose_device(args.device))
    transform, cells, bad = build_transform(config), [], 0
    pictures = list(zip(paths, titles, strict=True))
    for first in range(0, len(pictures), args.batch_size):
        batch = []
        for path, title in pictures[first : first + args.batch_size]:
            try:
                picture = load_image(path)
                batch.append((path, title, picture, transform(picture)))
            except (ImageError, OSError) as error:
                bad += 1
                message = str(error) if str(path) in str(error) else f"{path}: {error}"
                print(f"predict.py: {printable(message)}; skipped", file=sys.stderr)
        if not batch:
            continue
        rankings = predict(model, torch.stack([prepared for *_, prepared in batch]), min(args.top_k, len(classes)))
        for (path, title, picture, _), ranking in zip(batch, rankings, strict=True):
            named = [(classes[label], probability) for label, probability in ranking]
            if args.json:
                ranking = [{"class": name, "probability": round(probability, 6)} for name, probability in named]
                print(json.dumps({"picture": str(path), "classes": ranking}))
            else:
                found = ", ".join(f"{name} {probability:.1%}" for name, probability in named)
                print(printable(f"{path}: {found}"))
            if args.sheet:
                cells.append((title, thumbnail(picture), named[:SHEET_CLASSES]))
    if cells:
        draw_sheet(cells).save(args.sheet, optimize=True)
        print(f"contact sheet written to {args.sheet}", file=sys.stderr)
    if bad:
        print(f"predict.py: {bad} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
