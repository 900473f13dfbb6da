"""What detection.py reads and how it is scored: scenes of the bundled digits, or a folder in COCO's format; COCO's mAP.

A scene is ``(image, target)``: image float32 (3, H, W) in 0..1; target holds ``boxes``, float32 (n, 4) as x1, y1, x2,
y2 in pixels, ``labels``, int64 (n,) from 0, and ``image_id``.
"""

import contextlib
import functools
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert, nms
from torchvision.transforms.functional import resize, to_pil_image, to_tensor
from torchvision.utils import make_grid

import distributed
from data.datasets import read_digits
from utils import InputError, MissingFileError


class DigitScenes(Dataset):
    """``count`` scenes of up to eight training or test digits, of random size, position and brightness, on a coloured,
    textured background of 96 to 160 pixels a side. A scene depends only on its split and index."""

    def __init__(self, split: str, count: int):
        self.split, self.count = split, count
        self.digits, self.labels, self.classes = read_digits(split)
        self.categories = range(len(self.classes))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index >= self.count:  # ends a loop over the scenes
            raise IndexError(index)
        rng = np.random.default_rng((self.split == "val", index))
        height, width = rng.integers(96, 161, 2)
        canvas = _ground(rng, height, width)
        boxes, labels = [], []
        for _ in range(rng.integers(3, 9)):
            side = int(rng.integers(18, 49))
            x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
            if any(x < box[2] and box[0] < x + side and y < box[3] and box[1] < y + side for box in boxes):
                continue
            number = rng.integers(len(self.digits))
            ink = np.asarray(Image.fromarray(self.digits[number]).resize((side, side), Image.BICUBIC), np.float32) / 255
            canvas[y:y + side, x:x + side] += ink * rng.uniform(0.5, 0.9) * rng.choice([-1, 1])
            boxes.append((x, y, x + side, y + side))
            labels.append(self.labels[number])
        image = torch.from_numpy(canvas.clip(0, 1).astype(np.float32)).permute(2, 0, 1)
        boxes = torch.tensor(boxes, dtype=torch.float32)
        return image, {"boxes": boxes, "labels": torch.tensor(labels), "image_id": index}

    @functools.cached_property
    def truth(self) -> COCO:
        """The boxes in pycocotools' format."""
        coco = COCO()
        images, annotations = [], []
        for image, target in self:
            images.append({"id": target["image_id"], "height": image.shape[1], "width": image.shape[2]})
            boxes = box_convert(target["boxes"], "xyxy", "xywh").tolist()
            for box, label in zip(boxes, target["labels"].tolist(), strict=True):
                annotations.append({"id": len(annotations) + 1, "image_id": target["image_id"], "category_id": label,
                                    "iscrowd": 0, "bbox": box, "area": box[2] * box[3]})
        categories = [{"id": label, "name": name} for label, name in enumerate(self.classes)]
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mid-grey background with a coloured texture of two scales: float64 (height, width, 3) in 0..1."""
    ground = rng.uniform(0.35, 0.65, 3)
    for side, strength in ((6, 0.12), (24, 0.06)):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        ground = ground + strength * (np.asarray(noise.resize((width, height), Image.BICUBIC)) / 127.5 - 1)
    return ground


class CocoScenes(Dataset):
    """One split of a folder in COCO's format, its labels in the order of the category ids."""

    def __init__(self, root: Path, split: str):
        annotations = root / "annotations" / f"instances_{split}2017.json"
        images = root / f"{split}2017"
        if not annotations.is_file():
            raise MissingFileError(f"{annotations} does not exist; --data-path takes 'digits' or a folder in COCO's "
                                   "format")
        if not images.is_dir():
            raise MissingFileError(f"the folder {images} of the images does not exist")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = CocoDetection(str(images), str(annotations))
            self.categories = sorted(self.coco.coco.getCatIds())
            self.classes = [category["name"] for category in self.coco.coco.loadCats(self.categories)]
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise InputError(f"{annotations} is not in COCO's format ({type(error).__name__}: {error})") from error
        if split == "train":  # images without objects are not used
            annotated = {annotation["image_id"] for annotation in self.coco.coco.anns.values()}
            self.coco.ids = [index for index in self.coco.ids if index in annotated]
        if not self.coco.ids or not self.categories:
            raise InputError(f"{annotations} has no {'images' if self.categories else 'categories'} to train on")
        self.truth = self.coco.coco  # the boxes in pycocotools' format

    def __len__(self) -> int:
        return len(self.coco)

    def __getitem__(self, index: int):
        image, objects = self.coco[index]
        objects = [o for o in objects if not o.get("iscrowd") and min(o["bbox"][2:]) > 0]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        labels = torch.tensor([self.categories.index(o["category_id"]) for o in objects], dtype=torch.long)
        return to_tensor(image), {"boxes": boxes, "labels": labels, "image_id": self.coco.ids[index]}


def build_loaders(data: str, batch_size: int, workers: int, scenes: int) -> tuple[DataLoader, DataLoader]:
    """The training and the validation batches of this process, lists of images and of targets, of ``"digits"``
    (``scenes`` for training, a quarter for validation) or of a folder in COCO's format."""
    if data == "digits":
        train_set, val_set = DigitScenes("train", scenes), DigitScenes("val", max(scenes // 4, 1))
    else:
        train_set, val_set = (CocoScenes(Path(data), split) for split in ("train", "val"))
    world = {"num_replicas": distributed.world_size(), "rank": distributed.rank()}
    loading = {"batch_size": batch_size, "num_workers": workers, "collate_fn": unzip}
    sampler = DistributedSampler(train_set, **world, drop_last=True)
    return (DataLoader(train_set, sampler=sampler, drop_last=True, **loading),
            DataLoader(val_set, sampler=DistributedSampler(val_set, **world, shuffle=False), **loading))


def unzip(pairs: list) -> tuple[tuple, tuple]:
    """Images and targets of a batch; the images differ in size, so they cannot be stacked."""
    images, targets = zip(*pairs, strict=True)
    return images, targets


# ---- scores --------------------------------------------------------------------------------------

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
    boxes = box_convert(output["boxes"].float(), "xyxy", "xywh").tolist()
    return [{"image_id": image_id, "category_id": categories[label], "bbox": box, "score": score}
            for box, label, score in zip(boxes, output["labels"].tolist(), output["scores"].tolist(), strict=True)]


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
    """The first images of a data set, three in a row, with the best box of each place and its class.

    A box is drawn if its score is at least ``threshold`` and no better one overlaps it by half, whatever its class.
    """
    detector.eval()
    drawn, font, side = [], ImageFont.load_default(24), 400
    for image, _ in (dataset[index] for index in range(min(count, len(dataset)))):
        output = {key: value.cpu() for key, value in detector([image.to(device)])[0].items()}
        scale = side / max(image.shape[1:])
        image = resize(image, [round(length * scale) for length in image.shape[1:]], antialias=True).clamp(0, 1)
        picture = to_pil_image(F.pad(image, (0, side - image.shape[2], 0, side - image.shape[1]), value=1.0))
        draw = ImageDraw.Draw(picture)
        for i in nms(output["boxes"], output["scores"], 0.5).tolist():
            if output["scores"][i] >= threshold:
                x1, y1, x2, y2 = (output["boxes"][i] * scale).tolist()
                name = dataset.classes[output["labels"][i]]
                draw.rectangle((x1, y1, x2, y2), outline="yellow", width=2)
                draw.rectangle(draw.textbbox((x2, y1), f" {name} ", font, anchor="rt"), "yellow")
                draw.text((x2, y1), f" {name} ", "black", font, anchor="rt")
        drawn.append(to_tensor(picture))
    return to_pil_image(make_grid(drawn, nrow=3, padding=4, pad_value=1.0))
