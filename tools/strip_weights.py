"""Draws the strip weights that a network has learnt: which token of a row or column each output token reads.

    python tools/strip_weights.py output/NAME/TAG/best.pth                  # the last block of each stage
    python tools/strip_weights.py output/NAME/TAG/best.pth --all --channel 3

The figure has a line for each block: its row layer, then its column layer, each with a matrix (output token, input
token) for every row (column) k of the strip. It shows the mean over the channels, or one channel. The tool also prints
how the squared weights of each layer are distributed.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, one_line_errors

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("checkpoint", metavar="CKPT", help="the trained network")
PARSER.add_argument("--cfg", metavar="FILE",
                    help="the network's config; for a released checkpoint, or another image size")
PARSER.add_argument("--all", action="store_true", help="draw all blocks; default: the last of each stage")
PARSER.add_argument("--channel", type=int, metavar="N", help="channel of a patch to draw; default: the mean of all")
PARSER.add_argument("--figure", default="strip_weights.png", metavar="FILE",
                    help="the figure, .png, .pdf or .svg; default: strip_weights.png")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import torch

from config import load_config
from inference import load_network
from models.strip_mlp import StripMLP
from plots import new_figure, save_figure


def strip_layers(model: torch.nn.Module) -> dict[str, list[StripMLP]]:
    """The strip layers of each block that has any, by the block's name, e.g. ``stages.0.1``: row, then column."""
    blocks = {}
    for name, module in model.named_modules():
        if isinstance(module, StripMLP):
            blocks.setdefault(".".join(name.split(".")[:3]), []).append(module)
    if not blocks:
        raise InputError(f"{type(model).__name__} has no strip layers to draw")
    return blocks


def last_of_each_stage(blocks: dict) -> dict:
    """The last block of each stage."""
    lasts = {name.split(".")[1]: name for name in blocks}
    return {name: blocks[name] for name in lasts.values()}


def summarise(weight: torch.Tensor) -> dict:
    """How the squares of a strip weight (D, L, L, K) are distributed: ``rms``, their root mean; ``rows``, the share in
    each of the K rows of the strip; ``near``, the share between a token and itself or its neighbours, and
    ``near_if_even``, this share for equal weights."""
    squares = weight.double().square().sum(dim=0)  # (L, L, K)
    is_near = torch.ones_like(squares[..., 0]).triu(-1).tril(1)
    return {
        "rms": float((squares.sum() / weight.numel()).sqrt()),
        "rows": (squares.sum(dim=(0, 1)) / squares.sum()).tolist(),
        "near": float((squares * is_near[..., None]).sum() / squares.sum()),
        "near_if_even": float(is_near.mean()),
    }


def draw_weights(blocks: dict[str, list[StripMLP]], channel: int | None = None):
    """A line of panels for each block, blue below and red above zero, with one scale for each layer: the mean over all
    channels of a patch, or one ``channel``."""
    layers = [layer for block in blocks.values() for layer in block]
    channels, width = min(len(layer.weight) for layer in layers), layers[0].weight.shape[3]
    if channel is not None and not 0 <= channel < channels:
        raise InputError(f"--channel is {channel}; the smallest layer has channels 0 to {channels - 1}")
    columns = width * len(layers) // len(blocks)
    figure, panels = new_figure(len(blocks), columns, (1.35 * columns + 0.4, 1.6 * len(blocks) + 0.3), squeeze=False,
                                subplot_kw={"xticks": [], "yticks": []})
    for line, name in zip(panels, blocks, strict=True):
        _, stage, block = name.split(".")
        line[0].set_ylabel(f"stage {int(stage) + 1}, block {int(block) + 1}\noutput token", fontsize=7)
    for layer, line in zip(layers, panels.reshape(-1, width), strict=True):
        weight = layer.weight.detach().float().cpu()
        weight = weight.mean(dim=0) if channel is None else weight[channel]  # (L, L, K)
        limit = float(weight.abs().max())
        for k, panel in enumerate(line):
            panel.imshow(weight[:, :, k], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            panel.set_title(f"{layer.axis}, k = {k} (±{limit:.2g})", fontsize=7)
    for panel in panels[-1]:
        panel.set_xlabel("input token", fontsize=7)
    return figure


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    args = PARSER.parse_args(argv)
    model, _, _ = load_network(args.checkpoint, load_config(args.cfg) if args.cfg else None)
    blocks = strip_layers(model)
    save_figure(draw_weights(blocks if args.all else last_of_each_stage(blocks), args.channel), args.figure)
    print("layer                  root mean square   squared weights by k (%)   token and neighbours (% / if even)")
    for name, layers in blocks.items():
        for layer in layers:
            found = summarise(layer.weight.detach())
            rows = " ".join(f"{100 * share:5.1f}" for share in found["rows"])
            print(f"{f'{name} {layer.axis}':<21}{found['rms']:>18.4f}{rows:>27}"
                  f"{100 * found['near']:>22.1f} / {100 * found['near_if_even']:.1f}")
    print(f"drawn to {args.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
