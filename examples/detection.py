"""Trains a detector, torchvision's RetinaNet, on a Strip-MLP backbone; evaluates its mAP after every epoch.

Scenes of the bundled digits, with a small backbone that a classification run has trained (nothing is downloaded):

    python main.py --cfg configs/smlp_nano_alpha3_patch2_32_digits.yaml
    python examples/detection.py --cfg configs/smlp_nano_alpha3_patch2_32_digits.yaml --data digits \\
        --weights output/smlp_nano_alpha3_patch2_32_digits/default/best.pth

COCO, or any data set in its format (train2017/, val2017/, annotations/instances_{train,val}2017.json):

    torchrun --nproc_per_node 8 examples/detection.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml \\
        --data DIR --weights strip_mlp_tiny.pth --freeze-norm --min-size 800 --max-size 1333 --batch-size 2

The same command resumes from OUTPUT/last.pth. It needs pycocotools (pip install pycocotools).
"""

import argparse
import contextlib
import io
import logging
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from detection_data import CocoScenes, DigitScenes, truth  # noqa: E402

import checkpoint  # noqa: E402
import distributed  # noqa: E402
from config import load_config  # noqa: E402
from device import choose_device  # noqa: E402
from engine import Precision  # noqa: E402
from hub import weights_file  # noqa: E402
from logger import setup_console  # noqa: E402
from models import InputError, adapt_size, build_model, load_strict, model_state_dict  # noqa: E402

logger = logging.getLogger("strip_mlp")
STAGES = [1, 2, 3]  # stages 2 to 4 feed the pyramid


# ---- the detector --------------------------------------------------------------------------------

class Backbone(nn.Module):
    """Strip-MLP's stages 2 to 4, each with a norm, and a feature pyramid with two further levels.

    Args:
        config: describes the network.
        weights: a classification checkpoint, ours or published; empty: newly initialised.
        channels: of the pyramid.
        freeze_norm: keep the BatchNorms of the backbone as the checkpoint has them, for small batches.
        resize: the images all have the network's own size; otherwise any size, mixed in windows.
    """

    def __init__(self, config, weights: str = "", channels: int = 256, freeze_norm=False, resize=False):
        super().__init__()
        self.net = build_model(config)
        if weights:
            state_dict = adapt_size(model_state_dict(checkpoint.load_file(weights_file(weights))), self.net)
            head = self.net.state_dict()  # the classifier is not used: any class count will do
            load_strict(self.net, state_dict | {key: head[key] for key in ("head.weight", "head.bias")})
        self.net.dynamic_img_size = not resize
        self.net.prune_intermediate_layers(STAGES, prune_norm=True, prune_head=True)
        self.freeze_norm = freeze_norm
        widths = [self.net.feature_info[stage]["num_chs"] for stage in STAGES]
        self.strides = [self.net.feature_info[stage]["reduction"] for stage in STAGES]
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths)
        self.pyramid = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(channels, channels))
        self.strides += [2 * self.strides[-1], 4 * self.strides[-1]]
        self.out_channels = channels

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.net.modules() if self.freeze_norm else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        return self

    def forward(self, x):
        """(N, 3, H, W) -> {level: (N, channels, H / stride, W / stride)}"""
        stages = self.net.forward_intermediates(x, indices=STAGES, intermediates_only=True)
        normalised = (norm(stage) for norm, stage in zip(self.norms, stages, strict=True))
        return self.pyramid(OrderedDict((str(level), stage) for level, stage in enumerate(normalised)))


def build_detector(args, config, num_classes: int) -> RetinaNet:
    """RetinaNet with anchors of 4 to 6.3 strides in three aspect ratios at every level."""
    backbone = Backbone(config, args.weights, args.channels, args.freeze_norm, args.resize)
    anchors = AnchorGenerator([tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in backbone.strides],
                              [(0.5, 1.0, 2.0)] * len(backbone.strides))
    size = {"min_size": args.min_size, "max_size": args.max_size}
    if args.resize:
        size["fixed_size"] = (config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
    return RetinaNet(backbone, num_classes, anchor_generator=anchors, **size)


# ---- training and evaluation ---------------------------------------------------------------------

def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """A linear warm-up, then a tenth after 2/3 and a hundredth after 11/12 of the training."""
    drops = (step >= steps * 2 / 3) + (step >= steps * 11 / 12)
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.1**drops


def train_one_epoch(model, loader, optimizer, schedule, precision, scaler, device) -> float:
    """The mean loss of an epoch."""
    model.train()
    total = torch.zeros((), device=device)
    for images, targets in loader:
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
        schedule.step()
        total += loss.detach()
    return float(total) / len(loader)


@torch.inference_mode()
def evaluate(detector, loader, ground_truth: COCO, precision, device) -> tuple[float, float]:
    """COCO's mAP at IoU 0.50 to 0.95, and at 0.50, in percent, over every process's share of the images."""
    detector.eval()
    dataset, found = loader.dataset, []
    categories = getattr(dataset, "categories", range(len(dataset.classes)))
    for images, targets in loader:
        with precision.autocast():
            outputs = detector([image.to(device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            boxes = output["boxes"].float()
            boxes[:, 2:] -= boxes[:, :2]
            figures = zip(boxes.tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True)
            found += [{"image_id": target["image_id"], "category_id": categories[label], "bbox": box, "score": score}
                      for box, label, score in figures]
    found = sum(distributed.gather_objects(found), [])
    # The sampler repeats an image where the processes' shares would differ in length.
    found = list({(box["image_id"], box["category_id"], *box["bbox"]): box for box in found}.values())
    if distributed.rank() != 0 or not found:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        scores = COCOeval(ground_truth, ground_truth.loadRes(found), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return 100 * scores.stats[0], 100 * scores.stats[1]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, help="config of the classification network")
    parser.add_argument("--data", required=True, help="'digits', or a folder in COCO's format")
    parser.add_argument("--weights", default="", help="classification checkpoint to start from, ours or published")
    parser.add_argument("--output", default="output/detection", help="folder of last.pth; default: output/detection")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images; default: 12")
    parser.add_argument("--batch-size", type=int, default=4, help="images per process")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the new layers; the backbone gets a tenth of it")
    parser.add_argument("--backbone-lr", type=float, default=None, help="default: a tenth of --lr")
    parser.add_argument("--channels", type=int, default=256, help="of the pyramid and the heads")
    parser.add_argument("--min-size", type=int, default=128, help="shorter side of an image, in pixels")
    parser.add_argument("--max-size", type=int, default=224, help="limit of the longer side")
    parser.add_argument("--resize", action="store_true", help="resize all images to the network's own size instead")
    parser.add_argument("--freeze-norm", action="store_true", help="keep the backbone's BatchNorms as loaded")
    parser.add_argument("--scenes", type=int, default=400, help="training scenes of digits; a quarter more for testing")
    parser.add_argument("--workers", type=int, default=0, help="loading processes per process")
    parser.add_argument("--amp-dtype", default="auto", help="bf16, fp16, fp32 or auto")
    parser.add_argument("--device", default="", help="default: a GPU if there is one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, or 2 for what the user can put right."""
    args = parse_arguments(argv)
    setup_console(is_first=True)
    try:
        run(args)
    except InputError as error:
        logger.error(error)
        return 2
    return 0


def unzip(pairs: list) -> tuple[tuple, tuple]:
    """Images and targets of a batch; the images have sizes of their own, so they cannot be stacked."""
    images, targets = zip(*pairs, strict=True)
    return images, targets


def run(args) -> None:
    """Trains and evaluates; resumes from ``last.pth`` in the output folder."""
    device = choose_device(args.device, distributed.launcher_local_rank())
    distributed.init_distributed(device)
    torch.manual_seed(0)
    if args.data == "digits":
        train_set, val_set = DigitScenes("train", args.scenes), DigitScenes("val", max(args.scenes // 4, 1))
    else:
        train_set, val_set = (CocoScenes(Path(args.data), split) for split in ("train", "val"))
    world = {"num_replicas": distributed.world_size(), "rank": distributed.rank()}
    loading = {"batch_size": args.batch_size, "num_workers": args.workers, "collate_fn": unzip}
    sampler = DistributedSampler(train_set, **world, drop_last=True)
    train_loader = DataLoader(train_set, sampler=sampler, drop_last=True, **loading)
    val_loader = DataLoader(val_set, sampler=DistributedSampler(val_set, **world, shuffle=False), **loading)

    detector = build_detector(args, load_config(args.cfg), len(train_set.classes)).to(device)
    backbone = [p for p in detector.backbone.net.parameters() if p.requires_grad]
    others = [p for name, p in detector.named_parameters() if not name.startswith("backbone.net.")]
    backbone_lr = args.lr / 10 if args.backbone_lr is None else args.backbone_lr
    optimizer = torch.optim.AdamW([{"params": others, "lr": args.lr}, {"params": backbone, "lr": backbone_lr}],
                                  weight_decay=0.05)
    steps = args.epochs * len(train_loader)
    warmup = min(500, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, warmup))
    precision = Precision(args.amp_dtype, device)
    scaler = precision.scaler()
    state = {"model": detector, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}

    epoch, last = 0, Path(args.output, "last.pth")
    if last.is_file():
        content = checkpoint.load_file(last)
        for name, part in state.items():
            part.load_state_dict(content[name])
        epoch = content["epoch"]
        logger.info(f"resumed {last} after epoch {epoch}")
    model = DistributedDataParallel(detector) if distributed.is_distributed() else detector
    ground_truth = truth(val_set)
    while epoch < args.epochs:
        start = time.perf_counter()
        sampler.set_epoch(epoch)
        loss = train_one_epoch(model, train_loader, optimizer, schedule, precision, scaler, device)
        mean, half = evaluate(detector, val_loader, ground_truth, precision, device)
        epoch += 1
        if distributed.rank() == 0:
            last.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_file({name: part.state_dict() for name, part in state.items()} | {"epoch": epoch}, last)
            logger.info(f"epoch {epoch}  loss {loss:.4f}  mAP {mean:.2f}  mAP at IoU 0.5 {half:.2f}  "
                        f"({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
