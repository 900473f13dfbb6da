"""Exports a trained network to another format, reads it back and checks that its outputs are the same.

    python tools/export.py best.pth model.onnx                                        # ONNX
    python tools/export.py best.pth model.pt2                                         # torch.export
    python tools/export.py best.pth model.safetensors                                 # weights, config, class names
    python tools/export.py best.pth released_keys.pth --format released               # for the released code
    python tools/export.py released.pth ours.pth --format native --cfg configs/X.yaml # released -> ours
    python tools/export.py output/NAME/TAG/best.pth DIR --format hub                  # a folder to share
    python tools/export.py output/NAME/TAG/best.pth DIR --format hub --half           # of half the size

ONNX and torch.export files take batches of any size: images (N, 3, S, S), float32, resized and normalised as in
evaluation (their metadata describes this in JSON and names the classes), and return logits (N, classes). If the
checkpoint has averaged weights, the better ones at its last evaluation are exported. docs/tools.md says what to do with
a folder to share.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, one_line_errors

FORMATS = {  # by their names on the command line, with their extensions; a hub is a folder
    "onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors", "hub": "", "released": ".pth",
    "native": ".pth",
}

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("checkpoint", metavar="CKPT", type=Path, help="the trained network, e.g. a run's best.pth")
PARSER.add_argument("target", metavar="FILE", type=Path, help="the new file; its extension selects the format")
PARSER.add_argument("--format", choices=FORMATS, help="needed for .pth (released or native) and a folder (hub)")
PARSER.add_argument("--cfg", metavar="FILE",
                    help="the network's config; for a released checkpoint, or another image size")
PARSER.add_argument("--half", action="store_true", help="safetensors, hub: store the weights in 16 bits")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import NamedTuple

import safetensors.torch
import timm
import torch
from torch import nn
from yacs.config import CfgNode

import checkpoint
from config import load_config, to_dict
from inference import WEIGHTS, architecture, image_shape, load_network
from models import StripMLPNet, to_released_state_dict
from tools.model_card import model_card, preprocessing, timm_config

TOLERANCE = 1e-4  # of the outputs, relative to the largest logit or 1


class Network(NamedTuple):
    """The network to export, in evaluation mode, its config, its class names, its source; whether to store 16 bits."""

    model: nn.Module
    config: CfgNode
    classes: list[str]
    source: Path
    half: bool


def export(source: Path, target: Path, format: str, config=None, half: bool = False) -> float:
    """Writes the network of a checkpoint to ``target``, in a format of ``FORMATS``, if its outputs are the network's;
    returns their largest difference. ``config`` is needed for a checkpoint without one; ``half`` stores weights of two
    and more dimensions in 16 bits.

    Raises:
        InputError: ``target`` cannot be written, its outputs differ, a package is missing, or as ``load_network``.
    """
    suffix, write = FORMATS[format], WRITERS[format]
    if suffix and target.suffix != suffix:
        raise InputError(f"{target}: the name of a file in the format {format} must end in {suffix}")
    if half and format not in ("safetensors", "hub"):
        raise InputError(f"--half is for safetensors and hub, not for {format}")
    if target.exists():
        raise InputError(f"{target} already exists; remove it or choose another name")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{target.parent} is not a writable folder")
    network = Network(*load_network(source, config), source, half)
    if half:
        network.model.load_state_dict(_stored(network))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as unfinished, torch.no_grad():
        path = Path(unfinished, target.name)
        difference = largest_difference(network.model, write(network, path), image_shape(network.config))
        if not difference <= TOLERANCE:
            raise InputError(f"{target} was not written: its outputs differ from the network's by {difference:.1e}")
        os.replace(path, target)
    return difference


@torch.no_grad()
def largest_difference(model: nn.Module, other: Callable, shape: tuple[int, ...]) -> float:
    """The largest difference of two networks' logits on random images, relative to the largest logit or 1, in batches
    of 3 and of 1: a fixed batch size would not pass."""
    differences = []
    for batch in (3, 1):
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        expected = model(images)
        differences.append(float((other(images) - expected).abs().max() / expected.abs().max().clamp(min=1)))
    return max(differences)


# ---- the formats: each function writes a file and returns the network as it reads back -----------

def _write_onnx(network: Network, path: Path) -> Callable:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"onnx needs more packages ({error}): pip install onnx onnxscript onnxruntime") from None
    if torch.__version__ < (2, 8):  # 2.6 cannot convert a batched product whose batch may have any size
        raise InputError(f"ONNX export needs PyTorch 2.8 or newer; this is {torch.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's internals
        program = torch.onnx.export(_trace(network), dynamo=True, verbose=False, input_names=["images"],
                                    output_names=["logits"])
    program.model.metadata_props.update(_metadata(network))
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torch_export(network: Network, path: Path) -> Callable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        torch.export.save(_trace(network), path, extra_files=_metadata(network))
        return torch.export.load(path).module()


def _trace(network: Network) -> torch.export.ExportedProgram:
    images = torch.zeros(2, *image_shape(network.config))
    batch = torch.export.Dim("batch", max=2**31 - 1)  # PyTorch 2.6 needs an upper limit
    return torch.export.export(network.model, (images,), dynamic_shapes=({0: batch},))


def _metadata(network: Network) -> dict[str, str]:
    return {"classes": json.dumps(network.classes), "preprocessing": json.dumps(preprocessing(network.config))}


def _write_safetensors(network: Network, path: Path) -> Callable:
    about = {"config": json.dumps(to_dict(network.config)), "classes": json.dumps(network.classes), "format": "pt"}
    path.write_bytes(safetensors.torch.save(_stored(network), about))
    return load_network(path)[0]


def _stored(network: Network) -> dict[str, torch.Tensor]:
    """The weights, with ``half`` those of two and more dimensions in 16 bits."""
    return {key: value.half() if network.half and value.ndim > 1 else value
            for key, value in network.model.state_dict().items()}


def _write_hub(network: Network, path: Path) -> Callable:
    path.mkdir()
    network = network._replace(config=architecture(to_dict(network.config), "the config"))  # without paths
    _write_safetensors(network, path / WEIGHTS)
    (path / "config.json").write_text(json.dumps(timm_config(network.config, network.classes), indent=2) + "\n")
    (path / "README.md").write_text(model_card(network.source, network.config, path / WEIGHTS), encoding="utf-8")
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def _write_released(network: Network, path: Path) -> Callable:
    if not isinstance(network.model, StripMLPNet):
        raise InputError(f"the released code supports Strip-MLP only; this network is a {type(network.model).__name__}")
    return _write_native(network, path, to_released_state_dict(network.model.state_dict()))


def _write_native(network: Network, path: Path, weights: dict | None = None) -> Callable:
    weights = weights or network.model.state_dict()
    checkpoint.save_file({"model": weights, "config": to_dict(network.config), "classes": network.classes}, path)
    return load_network(path)[0]


WRITERS = {
    "onnx": _write_onnx, "torch-export": _write_torch_export, "safetensors": _write_safetensors, "hub": _write_hub,
    "released": _write_released, "native": _write_native,
}


# ---- the command line ----------------------------------------------------------------------------

@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    args = PARSER.parse_args(argv)
    formats = [name for name, suffix in FORMATS.items() if suffix and suffix == args.target.suffix]
    if not args.format and len(formats) != 1:
        raise InputError(f"{args.target}: its extension does not determine the format; add --format "
                         f"{' or '.join(formats or FORMATS)}")
    format = args.format or formats[0]
    difference = export(args.checkpoint, args.target, format, load_config(args.cfg) if args.cfg else None, args.half)
    print(f"{args.target} written ({format}); read back, its outputs differ by at most {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
