"""What a user can get wrong, one row each: the run ends before it trains, with one message that names the culprit.

The table is ``ROWS``. Every row runs in this process; a few also in a process of their own.
"""

import os
import shutil
import socket
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import main
from config import load_config
from models import build_model
from tests.helpers import DIGITS, TINY, arguments, folder
from tests.processes import run_interpreter

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
ROWS = {}


class Case(NamedTuple):
    """A command line, what its error must contain, and the environment variables that it needs."""

    argv: list
    message: list[str]
    variables: dict = {}


def row(name):
    """Adds a row: a function that makes the bad input in an empty folder and returns its Case."""
    def add(function):
        assert name not in ROWS
        ROWS[name] = function
        return function
    return add


# ---- configs and flags -----------------------------------------------------------------------------

for name, text, *message in [
    ("config that is not YAML", "TRAIN: [", "x.yaml is not YAML"),
    ("config of bytes", "\udcff\udcfe\udc81", "x.yaml is not YAML"),
    ("config that is a list", "- SEED", "x.yaml holds list"),
    ("config with an unknown key", "TRAIN: {EPOCH: 3}", "x.yaml", "TRAIN.EPOCH; did you mean TRAIN.EPOCHS?"),
    ("config with an unknown group", "TRIAN: {EPOCHS: 3}", "x.yaml", "TRIAN; did you mean TRAIN?"),
    ("config with a value of another type", "TRAIN: {EPOCHS: many}", "x.yaml", "TRAIN.EPOCHS takes int", "'many'"),
    ("config with a value out of range", "TRAIN: {EPOCHS: 0}", "TRAIN.EPOCHS is 0"),
    ("config with a value for a group", "DATA: 3", "x.yaml", "DATA is a group of keys"),
    ("config whose base is missing", "BASE: [gone.yaml]", "gone.yaml does not exist"),
    ("config that is its own base", "BASE: [x.yaml]", "x.yaml: its BASE files include it again"),
]:
    @row(name)
    def _(path, text=text, message=message):
        (path / "x.yaml").write_bytes(text.encode(errors="surrogateescape"))
        return Case(["--cfg", path / "x.yaml", "--output", path], message)

for name, argv, *message in [
    ("config that is missing", ["--cfg", "configs/smlp_nano_alpha3_patch2_32_digit.yaml"],
     "smlp_nano_alpha3_patch2_32_digit.yaml does not exist; did you mean", "_digits.yaml?"),
    ("config that is a folder", ["--cfg", "configs"], "configs is a folder; name one of the config files"),
    ("no config", ["--batch-size", "4"], "required: --cfg"),
    ("unknown flag", ["--cfg", DIGITS, "--batchsize", "3"], "--batchsize; did you mean --batch-size?"),
    ("flag named like an option", ["--cfg", DIGITS, "--epochs", "3"], "--epochs; set TRAIN.EPOCHS with --opts"),
    ("flag named like several", ["--cfg", DIGITS, "--lr", "3"], "--lr; set TRAIN.BASE_LR or TRAIN.WARMUP_LR"),
    ("unknown flag with its value", ["--cfg", DIGITS, "--resum=x"], "argument --resum=x; did you mean --resume?"),
    ("abbreviated flag", ["--cfg", DIGITS, "--batch", "3"], "--batch; did you mean --batch-size?"),
    ("stray argument", ["--cfg", DIGITS, "stray"], "unknown argument stray"),
    ("flag without its value", ["--cfg", DIGITS, "--batch-size"], "--batch-size: expected one argument"),
    ("flag with a value of another type", ["--cfg", DIGITS, "--batch-size", "many"], "--batch-size", "'many'"),
    ("flag with a value out of range", ["--cfg", DIGITS, "--batch-size", "0"], "DATA.BATCH_SIZE is 0"),
    ("flags that exclude each other", ["--cfg", DIGITS, "--eval", "--throughput"], "--throughput", "--eval"),
    ("unknown device", ["--cfg", DIGITS, "--device", "tpu"], "--device tpu", "finds no such device here"),
    ("unknown precision", ["--cfg", DIGITS, "--amp-dtype", "fp8"], "AMP_DTYPE is 'fp8'"),
    ("unknown cache mode", ["--cfg", DIGITS, "--cache-mode", "all"], "DATA.CACHE_MODE is 'all'"),
    ("tag that is a path", ["--cfg", DIGITS, "--tag", "a/b"], "TAG is 'a/b'"),
    ("config in a folder with a typo", ["--cfg", f"config/{DIGITS.name}"], f"did you mean {DIGITS}?"),
    ("option with an equals sign", ["--cfg", DIGITS, "--opts", "TRAIN.EPOCHS=2"], "a space between key and value"),
    ("option without its value", ["--cfg", DIGITS, "--opts", "SEED", "1", "TAG"], "'TAG' has no value"),
    ("unknown option", ["--cfg", DIGITS, "--opts", "TRAIN.LR", "1"], "unknown config key TRAIN.LR"),
    ("option with a value of another type", ["--cfg", DIGITS, "--opts", "TEST.CROP", "yes"], "TEST.CROP", "'yes'"),
    ("option with a value out of range", ["--cfg", DIGITS, "--opts", "AUG.REPROB", "2"], "AUG.REPROB is 2.0"),
    ("option with an unknown choice", ["--cfg", DIGITS, "--opts", "TRAIN.OPTIMIZER.NAME", "adamx"],
     "TRAIN.OPTIMIZER.NAME is 'adamx'", "did you mean adam"),
    ("list of the wrong length", ["--cfg", DIGITS, "--opts", "MODEL.STRIP_MLP.DEPTHS", "[1, 1]"],
     "MODEL.STRIP_MLP.DEPTHS is [1, 1]"),
]:
    @row(name)
    def _(path, argv=argv, message=message):
        return Case(argv, message)


# ---- sizes and models ------------------------------------------------------------------------------

for name, options, *message in [
    ("image size that is no multiple", ("DATA.IMG_SIZE", 30), "img_size 30"),
    ("channels that the patches do not divide", ("MODEL.STRIP_MLP.EMBED_DIM", 10), "embed_dim 10"),
    ("grayscale network", ("MODEL.STRIP_MLP.IN_CHANS", 1), "MODEL.STRIP_MLP.IN_CHANS is 1"),
    ("odd batch with mixup", ("DATA.BATCH_SIZE", 3), "DATA.BATCH_SIZE is 3", "AUG.MIXUP"),
    ("batch larger than the data set", ("DATA.BATCH_SIZE", 2000), "287 images", "2000", "--batch-size"),
    ("warm-up longer than the training", ("TRAIN.WARMUP_EPOCHS", 9), "TRAIN.WARMUP_EPOCHS is 9"),
    ("other number of classes", ("MODEL.NUM_CLASSES", 11), "10 classes", "MODEL.NUM_CLASSES is 11"),
    ("unknown augmentation", ("AUG.AUTO_AUGMENT", "rand-z3"), "AUG.AUTO_AUGMENT is 'rand-z3'"),
    ("zip form of a set without one", ("DATA.DATASET", "digits", "DATA.ZIP_MODE", True), "DATA.ZIP_MODE",
     "digits"),
    ("unknown timm model", ("MODEL.TYPE", "timm", "MODEL.ARCH", "resnet51"), "'resnet51'", "resnet50"),
    ("timm model without a name", ("MODEL.TYPE", "timm"), "MODEL.ARCH is ''", "name of a timm model"),
    ("more frozen stages than there are", ("TRAIN.FREEZE_STAGES", 5), "TRAIN.FREEZE_STAGES is 5", "has 4 stages"),
    ("timm model without drop path", ("MODEL.TYPE", "timm", "MODEL.ARCH", "vgg11"), "vgg11", "DROP_PATH_RATE"),
    ("timm model of another size", ("MODEL.TYPE", "timm", "MODEL.ARCH", "test_vit", "DATA.IMG_SIZE", 30),
     "test_vit", "DATA.IMG_SIZE"),
    ("synchronised BatchNorm without CUDA", ("TRAIN.SYNC_BN", True), "TRAIN.SYNC_BN"),
]:
    @row(name)
    def _(path, options=options, message=message):
        return Case(arguments(path, *options), message)


@row("output folder whose name is not UTF-8")
def _(path):
    return Case(arguments(path / os.fsdecode(b"\xff")), [r"\udcff", "is not UTF-8; choose another --output"])


@row("GPU that is not there")
def _(path):
    return Case(["--cfg", DIGITS, "--device", "cuda"], ["--device cuda"], {"CUDA_VISIBLE_DEVICES": ""})


# ---- data folders ----------------------------------------------------------------------------------

def picture(path, size=(20, 20), mode="RGB", seed=0):
    """A file with an image of random pixels; its format follows its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def good_folder(root):
    """A data set of two classes, three images of each to train and two to validate."""
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                picture(root / split / name / f"{index}.jpg", seed=index)
    return root


def on_folder(path, *options, flags=()):
    """The command line of a training on ``path/data``."""
    return arguments(path / "out", "DATA.DATASET", "imagefolder", "DATA.DATA_PATH", path / "data", "MODEL.NUM_CLASSES",
                     2, "DATA.BATCH_SIZE", 2, "TRAIN.EPOCHS", 1, *options, flags=flags)


def folder_row(name, *message, options=()):
    """Adds a row: a function that spoils a good data folder, and what the error must contain."""
    def add(spoil):
        @row(name)
        def _(path):
            spoil(good_folder(path / "data"))
            return Case(on_folder(path, *options), list(message))
    return add


folder_row("data folder missing", "data does not exist; name the folder of the data set")(shutil.rmtree)
folder_row("data path empty", "DATA.DATA_PATH is empty", options=("DATA.DATA_PATH", ""))(lambda root: None)
folder_row("training folder missing", "data/train does not exist")(lambda root: shutil.rmtree(root / "train"))
folder_row("validation folder missing", "data/val does not exist")(lambda root: shutil.rmtree(root / "val"))
folder_row("Caltech-101 not split yet", "data/train does not exist", "split_caltech101.py",
           options=("DATA.DATASET", "caltech101"))(lambda root: shutil.rmtree(root / "train"))
folder_row("wrong number of classes", "2 classes", "MODEL.NUM_CLASSES is 3",
           options=("MODEL.NUM_CLASSES", 3))(lambda root: None)
folder_row("class missing from train", "1 missing from train (dog)")(lambda root: shutil.rmtree(root / "train" / "dog"))
folder_row("class missing from val", "1 missing from val (dog)")(lambda root: shutil.rmtree(root / "val" / "dog"))
folder_row("fewer images than a batch", "6 images", "batch of 8", "--batch-size",
           options=("DATA.BATCH_SIZE", 8))(lambda root: None)


@folder_row("file in place of the data folder", "data is a file; unpack it if it is an archive")
def _(root):
    shutil.rmtree(root)
    root.write_text("not a folder")


@folder_row("file in place of the training folder", "data/train is not a folder")
def _(root):
    shutil.rmtree(root / "train")
    (root / "train").write_text("not a folder")


@folder_row("one image", "1 images", "batch of 2", "--batch-size", options=("MODEL.NUM_CLASSES", 1))
def _(root):
    for path in (*root.glob("*/dog"), root / "train" / "cat"):
        shutil.rmtree(path)
    picture(root / "train" / "cat" / "only.jpg")


@folder_row("no class folders", "data/train holds no class folders")
def _(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


@folder_row("empty class", "data/train", "emu")
def _(root):
    for split in ("train", "val"):
        (root / split / "emu").mkdir()


@folder_row("class of other files", "data/val", "dog")
def _(root):
    for path in (root / "val" / "dog").iterdir():
        path.unlink()
    (root / "val" / "dog" / "notes.txt").write_text("no image")


@folder_row("image outside the class folders", "data/train/stray.jpg is outside")
def _(root):
    picture(root / "train" / "stray.jpg")


# ---- images ----------------------------------------------------------------------------------------

def bomb(path):
    """A PNG file of a few bytes that claims 30000 x 30000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) +
                     chunk(b"IEND", b""))


BAD_IMAGES = {
    "of zero bytes": ("0.jpg is empty", lambda path: path.write_bytes(b"")),
    "cut short": ("0.jpg cannot be decoded", lambda path: os.truncate(path, path.stat().st_size - 40)),
    "that is text": ("0.jpg is not an image of a known format", lambda path: path.write_text("<html>Not found</html>")),
    "of floating-point pixels": ("0.jpg cannot be decoded", lambda path: Image.new("F", (9, 9)).save(path, "TIFF")),
    "that is a broken link": ("0.jpg", lambda path: (path.unlink(), path.symlink_to("gone.jpg"))),
    "of 900 million pixels": ("0.jpg", bomb),
}
for name, (message, spoil) in BAD_IMAGES.items():
    for split, workers in (("train", 0), ("train", 1), ("val", 1)):
        @row(f"{split} image {name}, {workers} workers")
        def _(path, split=split, workers=workers, message=message, spoil=spoil):
            spoil(good_folder(path / "data") / split / "dog" / "0.jpg")
            return Case(on_folder(path, "DATA.NUM_WORKERS", workers), [f"data/{split}/dog/{message}"])


# ---- the zip form ----------------------------------------------------------------------------------

def zip_row(name, *message, options=()):
    """Adds a row: a function that spoils a good zip form, and what the error must contain."""
    def add(spoil):
        @row(name)
        def _(path):
            root = good_folder(path / "data")
            for split in ("train", "val"):
                members = sorted((root / split).rglob("*.jpg"))
                names = [str(member.relative_to(root / split)) for member in members]
                with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
                    for member, inside in zip(members, names, strict=True):
                        archive.write(member, inside)
                lines = [f"{inside}\t{int(inside.startswith('dog'))}\n" for inside in names]
                (root / f"{split}_map.txt").write_text("".join(lines))
            spoil(root)
            return Case(on_folder(path, *options, flags=["--zip"]), list(message))
    return add


def edit(name, old, new):
    def spoil(root):
        data = (root / name).read_bytes()
        assert old in data
        (root / name).write_bytes(data.replace(old, new, 1))
    return spoil


zip_row("map missing", "train_map.txt does not exist")(lambda root: (root / "train_map.txt").unlink())
zip_row("map empty", "val_map.txt is empty")(lambda root: (root / "val_map.txt").write_text(""))
zip_row("map line without a label", "train_map.txt:2: expected", "'cat/1.jpg'")(
    edit("train_map.txt", b"cat/1.jpg\t0", b"cat/1.jpg"))
zip_row("map line with a name for a label", "train_map.txt:2: expected", "cat/1.jpg")(
    edit("train_map.txt", b"cat/1.jpg\t0", b"cat/1.jpg\tcat"))
zip_row("map label out of range", "train_map.txt:5: label 2")(edit("train_map.txt", b"dog/1.jpg\t1", b"dog/1.jpg\t2"))
zip_row("map label without images", "val_map.txt: no image has label 0")(
    lambda root: (root / "val_map.txt").write_text("dog/0.jpg\t1\n"))
zip_row("map member missing from the archive", "train_map.txt:3: cat/9.jpg is not in", "train.zip")(
    edit("train_map.txt", b"cat/2.jpg", b"cat/9.jpg"))
zip_row("maps of other classes", "train and val have different classes")(
    lambda root: (root / "val_map.txt").write_text("cat/0.jpg\t0\n"))
zip_row("archive missing", "val.zip does not exist")(lambda root: (root / "val.zip").unlink())
zip_row("archive cut short", "train.zip is not a complete zip archive")(
    lambda root: os.truncate(root / "train.zip", 2000))
zip_row("archive that is text", "train.zip is not a complete zip archive")(
    lambda root: (root / "train.zip").write_text("<html>Not found</html>"))
zip_row("archive with a damaged member", "train.zip:cat/0.jpg cannot be read")(edit("train.zip", b"JFIF", b"JFIG"))


# ---- CIFAR -----------------------------------------------------------------------------------------

@row("CIFAR file with another checksum")
def _(path):
    (path / "cifar-10-batches-bin").mkdir()
    (path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(bytes(30730))
    return Case(arguments(path / "out", "DATA.DATASET", "cifar10", "DATA.DATA_PATH", path),
                ["data_batch_1.bin is damaged: its MD5"])


@row("CIFAR file missing")
def _(path):
    (path / "cifar-100-binary").mkdir()
    return Case(arguments(path / "out", "DATA.DATASET", "cifar100", "DATA.DATA_PATH", path, "MODEL.NUM_CLASSES", 100),
                ["cifar-100-binary/train.bin does not exist"])


@row("CIFAR without a network to download it")
def _(path):
    nobody = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    return Case(arguments(path / "out", "DATA.DATASET", "cifar10", "DATA.DATA_PATH", path / "cifar"),
                ["cifar10 could not be downloaded", "cifar-10-batches-bin", str(path / "cifar")], nobody)


# ---- checkpoints -----------------------------------------------------------------------------------

class Malicious:
    def __reduce__(self):
        return os.system, ("touch marker",)


def weights(*options):
    torch.manual_seed(0)
    return build_model(load_config(DIGITS, [*TINY, *map(str, options)])).state_dict()


def cut(path):
    torch.save({"model": weights()}, path)
    os.truncate(path, path.stat().st_size // 2)


CHECKPOINTS = {
    "missing": ("x.pth", lambda path: None),
    "that is a folder": ("x.pth", lambda path: path.mkdir()),
    "of zero bytes": ("x.pth is damaged or not a checkpoint", lambda path: path.write_bytes(b"")),
    "cut short": ("x.pth is damaged or not a checkpoint", cut),
    "that is text": ("x.pth is damaged or not a checkpoint", lambda path: path.write_text("<html>Not found</html>")),
    "that runs code": ("x.pth: ", lambda path: torch.save({"model": Malicious()}, path)),
    "that is a tensor": ("x.pth: it holds Tensor", lambda path: torch.save(torch.zeros(3), path)),
    "that is empty": ("x.pth: ", lambda path: torch.save({}, path)),
    "without weights": ("x.pth: ", lambda path: torch.save({"epoch": 3, "optimizer": {}}, path)),
    "with numbers for names": ("x.pth: ", lambda path: torch.save({"model": {0: torch.zeros(3)}}, path)),
    "with numbers for weights": ("x.pth: ", lambda path: torch.save({"model": dict.fromkeys(weights(), 3)}, path)),
    "with weights that are not finite": (
        "x.pth: ", lambda path: torch.save({"model": weights() | {"head.bias": torch.full((10,), torch.nan)}}, path)),
    "that is a pipe": ("x.pth", os.mkfifo),
    "that is a link to nothing": ("x.pth", lambda path: path.symlink_to("gone.pth")),
    "of another network": ("x.pth: ", lambda path: torch.save({"model": weights("MODEL.STRIP_MLP.EMBED_DIM", 16)},
                                                              path)),
    "of another image size": ("x.pth: ", lambda path: torch.save({"model": weights("DATA.IMG_SIZE", 32)}, path)),
    "of other classes": ("x.pth: ", lambda path: torch.save({"model": weights("MODEL.NUM_CLASSES", 7)}, path)),
}
for name, (message, make) in CHECKPOINTS.items():
    for flags in (["--resume"], ["--pretrained"], ["--eval", "--resume"]):
        if (name == "of other classes" and flags == ["--pretrained"]  # which are allowed
                or name == "of another image size" and flags != ["--resume"]):
            continue

        @row(f"{' '.join(flags)} of a checkpoint {name}")
        def _(path, flags=flags, message=message, make=make):
            make(path / "x.pth")
            return Case(arguments(path / "out", flags=[*flags, path / "x.pth"]), [message])


@row("--eval of a run without a checkpoint")
def _(path):
    return Case(arguments(path, flags=["--eval"]), ["best.pth", "--resume"])


@row("output folder with a foreign checkpoint")
def _(path):
    folder(path).mkdir(parents=True)
    torch.save({"model": weights()}, folder(path) / "ckpt_step_00000009.pth")
    return Case(arguments(path), ["ckpt_step_00000009.pth: the checkpoint cannot be resumed"])


@row("output folder with damaged checkpoints only")
def _(path):
    folder(path).mkdir(parents=True)
    (folder(path) / "ckpt_step_00000009.pth").write_bytes(b"damaged")
    return Case(arguments(path), ["none of the 1 checkpoints", str(folder(path))])


for name, before, after, *message in [
    ("another optimiser", (), ("TRAIN.OPTIMIZER.NAME", "sgd"), "TRAIN.OPTIMIZER.NAME"),
    ("another network", (), ("MODEL.STRIP_MLP.EMBED_DIM", 16), "another network", "MODEL.STRIP_MLP.EMBED_DIM 8 -> 16"),
    ("another image size", (), ("DATA.IMG_SIZE", 32), "another network", "DATA.IMG_SIZE 16 -> 32"),
    ("no average of the weights", ("TRAIN.EMA.ENABLED", False), (), "TRAIN.EMA.ENABLED"),
    ("another data set", (), ("DATA.DATA_PATH", "more"), "was trained on other images: their names or labels differ"),
]:
    @row(f"output folder of a run with {name}")
    def _(path, before=before, after=after, message=message):
        good_folder(path / "data")
        shutil.copytree(path / "data", path / "more")
        for label in ("cat", "dog"):
            picture(path / "more" / "train" / label / "new.jpg")
        assert main.main([str(argument) for argument in on_folder(path, *before)]) == 0
        after = [path / "more" if value == "more" else value for value in after]
        return Case(on_folder(path, *after), ["ckpt_step_00000003.pth", *message])


# ---- the launcher's environment --------------------------------------------------------------------

for name, variables, *message in [
    ("RANK alone", {"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
    ("WORLD_SIZE alone", {"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
    ("LOCAL_RANK missing", LAUNCHER | {"LOCAL_RANK": ""}, "LOCAL_RANK missing"),
    ("MASTER_ADDR missing", LAUNCHER | {"MASTER_ADDR": ""}, "MASTER_ADDR missing"),
    ("MASTER_PORT missing", LAUNCHER | {"MASTER_PORT": ""}, "MASTER_PORT missing"),
    ("RANK not a number", LAUNCHER | {"RANK": "first"}, "RANK is 'first'"),
    ("WORLD_SIZE not a number", LAUNCHER | {"WORLD_SIZE": "2x"}, "WORLD_SIZE is '2x'"),
    ("LOCAL_RANK not a number", LAUNCHER | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ("MASTER_PORT not a number", LAUNCHER | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ("MASTER_PORT out of range", LAUNCHER | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ("RANK beyond WORLD_SIZE", LAUNCHER | {"RANK": "1"}, "RANK is '1'", "WORLD_SIZE is 1"),
    ("WORLD_SIZE zero", LAUNCHER | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
]:
    @row(name)
    def _(path, variables=variables, message=message):
        return Case(arguments(path), message, variables)


# ---- the output folder -----------------------------------------------------------------------------

@row("output that is a file")
def _(path):
    (path / "out").write_text("a file")
    return Case(arguments(path / "out"), [str(path / "out"), "--output"])


@row("run folder that is a file")
def _(path):
    folder(path).parent.mkdir()
    folder(path).write_text("a file")
    return Case(arguments(path), [str(folder(path)), "--output"])


@row("output that cannot be written")
def _(path):
    return Case(arguments("/proc/strip_mlp"), ["/proc/strip_mlp", "--output"])


@row("log that cannot be written")
def _(path):
    (folder(path) / "log_rank0.txt").mkdir(parents=True)
    return Case(arguments(path), ["log_rank0.txt"])


# ---- the tests -------------------------------------------------------------------------------------

def check(case, status, output):
    assert status == 2
    for part in case.message:
        assert part in output, output
    assert "Traceback" not in output and 'File "' not in output
    assert output.count("ERROR") + output.count("error: ") <= 1, "more than one error"
    assert "Train: [" not in output or "val/" in output, "the error came after training had started"


@pytest.fixture
def case(request, tmp_path, monkeypatch):
    """A row's Case, with its bad input made in a folder of its own."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return ROWS[request.param](tmp_path)


@pytest.mark.parametrize("case", ROWS, indirect=True)
def test_bad_input(case, capsys, monkeypatch):
    if "--device cuda" in case.message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in case.variables.items():
        monkeypatch.setenv(name, value)
    try:
        status = main.main([str(argument) for argument in case.argv])
    except SystemExit as stop:  # argparse's
        status = stop.code
    check(case, status, "".join(capsys.readouterr()))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("case", [
    "RANK not a number", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "config that is a list", "--resume of a checkpoint that is text", "class of other files"))], indirect=True)
def test_bad_input_in_a_shell(case):
    result = run_interpreter(["main.py", *case.argv], **case.variables)
    check(case, result.returncode, result.stdout + result.stderr)


def test_port_of_another_run(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in (LAUNCHER | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        status = main.main(["--cfg", str(DIGITS)])
    case = Case([], [f"cannot join the others at 127.0.0.1:{port}", "--master_port"])
    check(case, status, "".join(capsys.readouterr()))
    assert not torch.distributed.is_initialized()


# ---- what looks bad and is not ---------------------------------------------------------------------

def test_odd_images_are_trained_and_evaluated(tmp_path, capsys):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name, mode in [("cmyk.jpg", "CMYK"), ("palette.png", "P"), ("gray.jpg", "L"), ("alpha.png", "RGBA"),
                           ("gray_alpha.png", "LA"), ("two_colours.png", "1"), ("CAPITALS.JPEG", "RGB"),
                           ("bitmap.bmp", "RGB"), ("photo.webp", "RGB"), ("scan.tiff", "CMYK")]:
            picture(root / split / "cat" / name, mode=mode)
        picture(root / split / "dog" / "pixel.png", size=(1, 1))
        picture(root / split / "dog" / "line.png", size=(300, 1))
        Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(root / split / "dog" / "16_bit.png")
        Image.new("RGB", (6000, 4000), (200, 100, 50)).save(root / split / "dog" / "huge.jpg")
    recipe = ("TRAIN.WARMUP_EPOCHS", 0, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1",
              "AUG.SCALE", [0.1, 1], "AUG.REPROB", 0.25, "TEST.CROP", True)
    assert main.main([str(argument) for argument in on_folder(tmp_path, *recipe)]) == 0
    out = capsys.readouterr().out
    assert "training_images: 14" in out and "(14 images)" in out and "ERROR" not in out and "WARNING" not in out
