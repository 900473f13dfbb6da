"""Draws the effective receptive field of each stage: how much each input pixel influences its central output.

    python tools/receptive_field.py output/NAME/TAG/best.pth --data-path DIR      # a trained network
    python tools/receptive_field.py --cfg configs/X.yaml --noise                  # a new one, random images

The field is the gradient of the central output position (summed over its channels) with respect to the input: absolute
values, summed over the input's channels, averaged over images of the validation set. Prints the size of the square
around the centre that holds a given share of it, and writes the fields beside the figure as .npz.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, one_line_errors

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("checkpoint", nargs="?", metavar="CKPT", help="the trained network; default: a new one")
PARSER.add_argument("--cfg", metavar="FILE",
                    help="the network's config; for a new network, a released checkpoint, or another image size")
PARSER.add_argument("--data-path", metavar="DIR", help="the data set's folder; default: the config's")
PARSER.add_argument("--noise", action="store_true", help="use random images instead of the validation set")
PARSER.add_argument("--images", type=int, default=64, metavar="N", help="images to average over; default: 64")
PARSER.add_argument("--figure", default="receptive_field.png", metavar="FILE",
                    help="the figure, .png, .pdf or .svg; default: receptive_field.png")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import numpy as np
import torch
from matplotlib.colors import LogNorm

from config import load_config
from data import build_val_loader
from data.transforms import build_transform
from inference import build_network, image_shape, load_network
from plots import new_figure, save_figure

SHARES = (0.2, 0.5, 0.9, 0.99)


def effective_fields(stages, images: torch.Tensor, batch_size: int = 8) -> list[tuple[torch.Tensor, tuple]]:
    """The mean absolute gradient of each stage's central output with respect to the images (N, C, H, W).

    ``stages`` computes the list of the stages' outputs, each (N, C, h, w). Returns, for each, its field, float64 (H,
    W), and (h, w); the central output is that at (h // 2, w // 2).
    """
    sums = []
    for batch in images.split(batch_size):
        batch = batch.detach().requires_grad_()
        outputs = stages(batch)
        sizes = [tuple(output.shape[2:]) for output in outputs]
        centres = [output[:, :, h // 2, w // 2].sum() for output, (h, w) in zip(outputs, sizes, strict=True)]
        gradients = [torch.autograd.grad(centre, batch, retain_graph=True)[0] for centre in centres]
        fields = [gradient.double().abs().sum(dim=(0, 1)).cpu() for gradient in gradients]
        sums = [total + field for total, field in zip(sums, fields, strict=True)] if sums else fields
    return [(total / len(images), size) for total, size in zip(sums, sizes, strict=True)]


def areas(field: torch.Tensor, size: tuple[int, int], shares=SHARES) -> list[float]:
    """The shares of the image's pixels in the smallest squares that hold these shares of a field (H, W).

    The squares lie around the centre of the central output of a stage of ``size`` (h, w); what of a square is outside
    the image does not count.
    """
    if not 0 < field.sum() < float("inf"):
        raise InputError(f"the gradient of a stage's output adds up to {field.sum()}; are its weights finite?")
    rows, columns = (torch.arange(whole) - ((side // 2 + 0.5) * whole / side - 0.5)
                     for whole, side in zip(field.shape, size, strict=True))
    rings = torch.maximum(rows.abs()[:, None], columns.abs()[None]).flatten()  # half the side of a pixel's square
    order = rings.argsort()
    held = field.flatten()[order].cumsum(0) / field.sum()
    outermost = rings[order][torch.searchsorted(held, torch.tensor(shares, dtype=held.dtype) - 1e-12)]
    return [float((rings <= ring).double().mean()) for ring in outermost]


def draw_fields(fields: list[torch.Tensor], titles: list[str]):
    """A panel for each stage, logarithmic, scaled to its largest value."""
    height, width = fields[0].shape
    size = (2.5 * len(fields) + 0.7, 2.5 * height / width + 0.5)
    figure, panels = new_figure(1, len(fields), size, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for panel, field, title in zip(panels.flat, fields, titles, strict=True):
        image = panel.imshow((field / field.max()).clamp(min=1e-4), cmap="magma", norm=LogNorm(1e-4, 1))
        panel.set_title(title, fontsize=8)
    figure.colorbar(image, ax=panels, label="gradient / largest", format="%g", fraction=0.02, pad=0.01)
    return figure


def validation_images(config, count: int) -> torch.Tensor:
    """``count`` images of the validation set, evenly spread over it, or all if there are fewer: (N, 3, S, S)."""
    dataset, transform = build_val_loader(config).dataset, build_transform(config)
    indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    return torch.stack([transform(dataset[index][0]) for index in indices.tolist()])


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    args = PARSER.parse_args(argv)
    if not (args.checkpoint or args.cfg):
        raise InputError("name a checkpoint, or use --cfg to name the config of a new network")
    if args.images < 1:
        raise InputError(f"--images is {args.images}; it must be at least 1")
    torch.manual_seed(0)
    config = load_config(args.cfg) if args.cfg else None
    if args.checkpoint:
        model, config, _ = load_network(args.checkpoint, config)
    else:
        model = build_network(config).eval()
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"{config.MODEL.NAME} does not return its stages' outputs (forward_intermediates)")
    if args.noise:
        images = torch.randn(args.images, *image_shape(config))
    else:
        config.defrost()
        config.DATA.DATA_PATH = args.data_path or config.DATA.DATA_PATH
        images = validation_images(config, args.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    measured = effective_fields(lambda x: model.forward_intermediates(x, intermediates_only=True), images.to(device))
    fields, sizes = zip(*measured, strict=True)
    held = [areas(field, size) for field, size in measured]
    titles = [f"stage {stage}: {h} x {w}\n50 % in {100 * shares[1]:.1f} % of the image"
              for stage, ((h, w), shares) in enumerate(zip(sizes, held, strict=True), start=1)]
    save_figure(draw_fields(fields, titles), args.figure)
    numbers = Path(args.figure).with_suffix(".npz")
    np.savez_compressed(numbers, **{f"stage{stage}": field for stage, field in enumerate(fields, start=1)})
    print(f"Area of the smallest centred square that holds a share of the gradient, in % of the image's "
          f"({len(images)} images of {images.shape[2]} x {images.shape[3]}):")
    print("stage     output" + "".join(f"{share:>8.0%}" for share in SHARES))
    for stage, ((h, w), shares) in enumerate(zip(sizes, held, strict=True), start=1):
        print(f"{stage:>5}{f'{h} x {w}':>11}" + "".join(f"{100 * share:>8.2f}" for share in shares))
    print(f"drawn to {args.figure}; the fields are in {numbers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
