"""Evaluates a detector: the mAP of its boxes with pycocotools, and a picture of them."""

import contextlib
import io
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distributed


@torch.inference_mode()
def evaluate(detector, loader, precision, device) -> tuple[float, float]:
    """COCO's mAP at IoU 0.50 to 0.95, and at 0.50, in percent, over every process's share of the images."""
    detector.eval()
    found = []
    for images, targets in loader:
        with precision.autocast():
            outputs = detector([image.to(device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            found += in_coco_format(output, target["image_id"], loader.dataset.categories)
    found = sum(distributed.gather_objects(found), [])
    return score(loader.dataset, found) if distributed.rank() == 0 else (0.0, 0.0)


def in_coco_format(output: dict, image_id: int, categories) -> list[dict]:
    """A detector's boxes, labels and scores for an image, in COCO's format."""
    boxes = output["boxes"].float()
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)  # x1, y1, x2, y2 -> x, y, width, height
    found = zip(sides.tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True)
    return [{"image_id": image_id, "category_id": categories[label], "bbox": box, "score": score}
            for box, label, score in found]


def score(dataset: Dataset, found: list[dict]) -> tuple[float, float]:
    """COCO's mAP at IoU 0.50 to 0.95, and at 0.50, in percent, of boxes in COCO's format."""
    # DistributedSampler repeats images so that the processes' shares have equal length.
    found = list({(box["image_id"], box["category_id"], *box["bbox"]): box for box in found}.values())
    if not found:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        scores = COCOeval(dataset.truth, dataset.truth.loadRes(found), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return 100 * scores.stats[0], 100 * scores.stats[1]


@torch.inference_mode()
def draw_found(detector, dataset: Dataset, device: torch.device, count: int = 6, threshold: float = 0.2) -> Image.Image:
    """The first images of a data set, three in a row, their longer sides 200 pixels.

    Boxes with a score of at least ``threshold`` are drawn, with the names of their classes.
    """
    detector.eval()
    drawn = []
    for image, _ in (dataset[index] for index in range(min(count, len(dataset)))):
        output = {key: value.cpu() for key, value in detector([image.to(device)])[0].items()}
        scale = 200 / max(image.shape[1:])
        image = resize(image, [round(side * scale) for side in image.shape[1:]], antialias=True).clamp(0, 1)
        kept = output["scores"] >= threshold
        names = [dataset.classes[label] for label in output["labels"][kept]]
        if names:
            image = draw_bounding_boxes(image, output["boxes"][kept] * scale, names, colors="yellow")
        drawn.append(F.pad(image, (0, 200 - image.shape[2], 0, 200 - image.shape[1]), value=1.0))
    return to_pil_image(make_grid(drawn, nrow=3, padding=4, pad_value=1.0))
