"""Trains a detector, torchvision's RetinaNet, on a Strip-MLP backbone; evaluates its mAP after every epoch.

On scenes of the bundled digits, from the trained network in weights/ (no download):

    python examples/detection.py --cfg configs/small/smlp_nano_alpha3_patch2_32_cifar10.yaml --data-path digits \\
        --pretrained weights/strip_mlp_nano_cifar10

On COCO, or any data set in its format (train2017/, val2017/, annotations/instances_{train,val}2017.json):

    torchrun --nproc_per_node 8 examples/detection.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml \\
        --data-path DIR --pretrained strip_mlp_tiny.pth --freeze-norm --min-size 800 --max-size 1333 --batch-size 2

The same command resumes from OUTPUT/last.pth; OUTPUT/found.jpg shows detections. Needs pycocotools.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("--cfg", required=True, metavar="FILE", help="config of the classification network")
PARSER.add_argument("--data-path", required=True, metavar="DIR", help="'digits', or a folder in COCO's format")
PARSER.add_argument("--pretrained", default="", metavar="CKPT",
                    help="classification weights to start from: a file, an exported folder, or hf-hub:USER/NAME")
PARSER.add_argument("--output", default="output/detection", metavar="DIR",
                    help="folder for last.pth and found.jpg; default: output/detection")
for flag, default, help in (
    ("--epochs", 12, "passes over the training images"),
    ("--batch-size", 4, "images per process"),
    ("--lr", 1e-4, "learning rate of the new layers"),
    ("--backbone-lr", 1e-5, "learning rate of the backbone"),
    ("--channels", 256, "channels of the pyramid and the heads"),
    ("--min-size", 128, "shorter side of an image in pixels"),
    ("--max-size", 224, "limit of the longer side in pixels"),
    ("--resize", 0, "resize images, and the weights, to this side instead of using windows; 0: no"),
    ("--scenes", 400, "training scenes of digits; plus a quarter for testing"),
    ("--workers", 0, "loading processes per training process"),
):
    PARSER.add_argument(flag, type=type(default), default=default, metavar="N", help=f"{help}; default: {default}")
PARSER.add_argument("--freeze-norm", action="store_true", help="keep the backbone's BatchNorms as loaded")
PARSER.add_argument("--amp-dtype", default="auto", metavar="TYPE", help="bf16, fp16, fp32 or auto; default: auto")
PARSER.add_argument("--device", default="", metavar="TYPE", help="default: a GPU if there is one")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import logging
import time
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import checkpoint
import distributed
from config import load_config
from distributed import choose_device
from engine import Precision
from examples.detection_data import build_loaders, draw_found, evaluate
from inference import build_network, weights_file
from logger import setup_console
from models import check_fit, load_pretrained
from resume_checks import MAX_EPOCHS, check_optimizer, check_scaler
from utils import InputError, input_errors, one_line_errors, replacing

logger = logging.getLogger("strip_mlp")
STAGES = [1, 2, 3]  # stages 2 to 4 feed the pyramid


# ---- the detector --------------------------------------------------------------------------------

class Backbone(nn.Module):
    """Strip-MLP's stages 2 to 4, each with a norm, and a feature pyramid with two further levels.

    ``freeze_norm`` keeps the BatchNorms as loaded, for small batches. With ``any_size`` images may have any size, in
    windows.
    """

    def __init__(self, config, weights: str = "", channels: int = 256, freeze_norm=False, any_size=True):
        super().__init__()
        self.net = build_network(config)
        if weights:
            load_pretrained(self.net, checkpoint.load_file(weights_file(weights)))
        self.net.dynamic_img_size = any_size
        self.net.prune_intermediate_layers(STAGES, prune_norm=True, prune_head=True)
        self.frozen = [m for m in self.net.modules() if freeze_norm and isinstance(m, nn.BatchNorm2d)]
        for norm in self.frozen:
            norm.requires_grad_(False)
        widths = [self.net.feature_info[stage]["num_chs"] for stage in STAGES]
        self.strides = [self.net.feature_info[stage]["reduction"] for stage in STAGES]
        self.strides += [2 * self.strides[-1], 4 * self.strides[-1]]
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths)
        self.pyramid = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(channels, channels))
        self.out_channels = channels

    def train(self, mode: bool = True):
        super().train(mode)
        for norm in self.frozen:
            norm.eval()
        return self

    def forward(self, x):
        """(N, 3, H, W) -> {level: (N, channels, H / stride, W / stride)}"""
        stages = self.net.forward_intermediates(x, indices=STAGES, intermediates_only=True)
        normalised = (norm(stage) for norm, stage in zip(self.norms, stages, strict=True))
        return self.pyramid(OrderedDict((str(level), stage) for level, stage in enumerate(normalised)))


def build_detector(args, num_classes: int) -> RetinaNet:
    """RetinaNet with anchors of 4 to 6.3 strides in three aspect ratios at every level."""
    config = load_config(args.cfg, ["DATA.IMG_SIZE", str(args.resize)] if args.resize else [])
    backbone = Backbone(config, args.pretrained, args.channels, args.freeze_norm, any_size=not args.resize)
    anchors = AnchorGenerator([tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in backbone.strides],
                              [(0.5, 1.0, 2.0)] * len(backbone.strides))
    size = {"fixed_size": (args.resize, args.resize)} if args.resize else {}
    return RetinaNet(backbone, num_classes, args.min_size, args.max_size, anchor_generator=anchors, **size)


# ---- training -----------------------------------------------------------------------------------

def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """A linear warm-up, then a tenth after 2/3 and a hundredth after 11/12 of the training."""
    drops = (step >= steps * 2 / 3) + (step >= steps * 11 / 12)
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.1**drops


def train_one_epoch(model, loader, optimizer, set_rates, precision, scaler, device) -> float:
    """The mean loss of an epoch; ``set_rates(i)`` sets the learning rates of its batch i."""
    model.train()
    total = torch.zeros((), device=device)
    for batch, (images, targets) in enumerate(loader):
        set_rates(batch)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets]
        with precision.autocast():
            loss = sum(model(images, targets).values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
    return float(total) / len(loader)


def restore(content: dict, state: dict) -> int:
    """Restores a checkpoint's ``model``, ``optimizer`` and ``scaler`` and returns the epochs done; hyperparameters stay
    as in this run. Nothing is changed if it is not a checkpoint of this detector."""
    missing = [name for name in (*state, "epoch") if name not in content]
    if missing:
        raise InputError(f"the checkpoint lacks {', '.join(missing)}; choose another --output")
    epoch, optimizer = content["epoch"], state["optimizer"]
    if type(epoch) is not int or not 0 <= epoch <= MAX_EPOCHS:
        raise InputError(f"its epoch is {epoch!r:.60}; it must be a number from 0 to {MAX_EPOCHS}")
    check_fit(state["model"], content["model"])
    check_optimizer(content["optimizer"], optimizer)
    check_scaler(content["scaler"], state["scaler"])
    state["model"].load_state_dict(content["model"])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": groups})
    if content["scaler"]:
        state["scaler"].load_state_dict(content["scaler"])
    return epoch


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; resumes from ``last.pth`` in the output folder. Returns the exit status."""
    args = PARSER.parse_args(argv)
    setup_console(is_first=True)
    device = choose_device(args.device, distributed.launcher_local_rank())
    distributed.init_distributed(device)
    torch.manual_seed(0)
    train_loader, val_loader = build_loaders(args.data_path, args.batch_size, args.workers, args.scenes)
    detector = build_detector(args, len(train_loader.dataset.classes)).to(device)
    backbone = list(detector.backbone.net.parameters())
    others = [p for name, p in detector.named_parameters() if not name.startswith("backbone.net.")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": backbone}], args.lr, weight_decay=0.05)
    steps = args.epochs * len(train_loader)

    def set_rates(done: int, batch: int) -> None:
        factor = learning_rate_factor(done + batch, steps, warmup=min(500, steps // 10))
        for group, rate in zip(optimizer.param_groups, (args.lr, args.backbone_lr), strict=True):
            group["lr"] = rate * factor

    precision = Precision(args.amp_dtype, device)
    scaler = precision.scaler()
    state = {"model": detector, "optimizer": optimizer, "scaler": scaler}
    first, output = 0, Path(args.output)
    if (output / "last.pth").is_file():
        content = checkpoint.load_file(output / "last.pth")
        with input_errors(output / "last.pth"):
            first = restore(content, state)
        logger.info(f"resumed {output / 'last.pth'} after epoch {first}")
    model = DistributedDataParallel(detector) if distributed.is_distributed() else detector
    for epoch in range(first, args.epochs):
        start, done = time.perf_counter(), epoch * len(train_loader)
        train_loader.sampler.set_epoch(epoch)
        loss = train_one_epoch(model, train_loader, optimizer, partial(set_rates, done), precision, scaler, device)
        mean, half = evaluate(detector, val_loader, precision, device)
        if distributed.rank() == 0:
            output.mkdir(parents=True, exist_ok=True)
            content = {name: part.state_dict() for name, part in state.items()} | {"epoch": epoch + 1}
            checkpoint.save_file(content, output / "last.pth")
            logger.info(f"epoch {epoch + 1}  loss {loss:.4f}  mAP {mean:.2f}  mAP at IoU 0.5 {half:.2f}  "
                        f"({time.perf_counter() - start:.0f} s)")
    if distributed.rank() == 0:
        with replacing(output / "found.jpg") as file:
            draw_found(detector, val_loader.dataset, device).save(file, "JPEG", quality=80)
    return 0


if __name__ == "__main__":
    sys.exit(main())
