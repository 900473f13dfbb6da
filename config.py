"""Every option of a run, with its default and a comment on what it does; loading, merging and checking of configs.

Precedence, lowest first: the defaults below, BASE files, the YAML file, ``--opts``, other flags.
"""

import copy
import difflib
import math
import os
import re
from pathlib import Path

import yaml
from yacs.config import CfgNode

from utils import InputError, MissingFileError

_C = CfgNode()

_C.BASE = []  # config files merged before this one, in order, relative to it

# ---- data ----------------------------------------------------------------------------------------
_C.DATA = CfgNode()
_C.DATA.DATASET = "imagenet"  # imagenet | cifar10 | cifar100 | caltech101 | imagefolder (your own) | digits (bundled)
_C.DATA.DATA_PATH = ""  # the data set's folder; may stay empty for digits
_C.DATA.MIRROR = ""  # cifar10, cifar100: URL of a folder that holds the archive; empty: the original host
_C.DATA.IMG_SIZE = 224  # side of the square input, in pixels
_C.DATA.HOLD_OUT = 0.0  # share of each class of the training set that is held out and evaluated instead of val/
_C.DATA.BALANCED = False  # training draws every class equally often, images of rare ones several times
_C.DATA.BATCH_SIZE = 128  # images per process and micro-batch
_C.DATA.INTERPOLATION = "bicubic"  # for resizing: bicubic | bilinear | random (evaluation then uses bicubic)
_C.DATA.ZIP_MODE = False  # imagenet and imagefolder: read train.zip + train_map.txt, val.zip + val_map.txt
_C.DATA.CACHE_MODE = "part"  # with ZIP_MODE, what to keep in memory: no | part (this process's share) | full
_C.DATA.SKIP_BAD_IMAGES = False  # skip an image that cannot be read instead of stopping; training takes the next one
_C.DATA.NUM_WORKERS = 8  # loading processes per training process
_C.DATA.AUGMENT_ON = "auto"  # where training images are augmented: worker | device | auto (device on a GPU)

# ---- model ---------------------------------------------------------------------------------------
_C.MODEL = CfgNode()
_C.MODEL.TYPE = "strip_mlp"  # strip_mlp | timm (any of timm's models, trained with the same recipe)
_C.MODEL.ARCH = ""  # timm: the model's name, e.g. resnet50
_C.MODEL.NAME = ""  # name of the output folder; empty: the config file's name
_C.MODEL.TIMM_KWARGS = ""  # timm: further arguments of timm.create_model, in YAML: "{stem_type: deep, stem_width: 32}"
_C.MODEL.NUM_CLASSES = 1000  # must equal the data set's number of classes
_C.MODEL.PRETRAINED = ""  # initial weights (a checkpoint); if the class count differs, the head is re-initialised
_C.MODEL.RESUME = ""  # checkpoint to resume from (or to evaluate)
_C.MODEL.LABEL_SMOOTHING = 0.1  # share of each target that is spread over all classes
_C.MODEL.DROP_PATH_RATE = 0.1  # probability of dropping a residual branch for an image
_C.MODEL.DROP_PATH_SCHEDULE = "constant"  # constant: the same in every block | linear: from 0 up to DROP_PATH_RATE
_C.MODEL.STRIP_MLP = CfgNode()
_C.MODEL.STRIP_MLP.PATCH_SIZE = 4  # kernel and stride of the stem, in pixels
_C.MODEL.STRIP_MLP.IN_CHANS = 3  # channels of the input image
_C.MODEL.STRIP_MLP.EMBED_DIM = 80  # channels of the first stage; they double at every stage
_C.MODEL.STRIP_MLP.DEPTHS = [2, 2, 6, 2]  # blocks of the four stages
_C.MODEL.STRIP_MLP.MLP_RATIO = 3.0  # alpha: hidden width of the channel mixing, relative to its input
_C.MODEL.STRIP_MLP.NUM_PATCHES = 2  # P: channel patches that share the strip weights
_C.MODEL.STRIP_MLP.STRIP_WIDTH = 3  # rows (columns) that a strip spans; odd
_C.MODEL.STRIP_MLP.TRAINED_IMG_SIZE = 0  # IMG_SIZE of the weights' training, to run in windows of it; 0: no windows
_C.MODEL.STRIP_MLP.TOKEN_MIXERS = "both"  # ablation: both (half of the channels each) | cgsmm | lsmm (all channels)
_C.MODEL.STRIP_MLP.CASCADE = True  # ablation: CGSMM's column layer reads the row layer's output; False: the input
_C.MODEL.STRIP_MLP.SHORTCUTS = True  # ablation: the cross-stage shortcuts

# ---- training ------------------------------------------------------------------------------------
_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300  # passes over the training set
_C.TRAIN.WARMUP_EPOCHS = 20  # epochs of linear warm-up, part of EPOCHS
_C.TRAIN.BASE_LR = 5e-4  # learning rate at the end of the warm-up; never scaled by the batch size
_C.TRAIN.WARMUP_LR = 5e-7  # learning rate of the first step
_C.TRAIN.MIN_LR = 5e-6  # learning rate at the end
_C.TRAIN.WEIGHT_DECAY = 0.05  # not applied to one-dimensional parameters and biases
_C.TRAIN.LAYER_DECAY = 1.0  # fine-tuning: learning rate of a layer relative to the next layer's; 1: the same for all
_C.TRAIN.FREEZE_STAGES = 0  # fine-tuning: freeze the stem and this many stages; 0: freeze nothing
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0: no clipping
_C.TRAIN.ACCUMULATION_STEPS = 1  # micro-batches per update
_C.TRAIN.AUTO_RESUME = True  # resume from the newest checkpoint in the output folder
_C.TRAIN.USE_CHECKPOINT = False  # gradient checkpointing: less memory, more time, the same result
_C.TRAIN.MAX_SKIPPED = 50  # stop after this many updates in a row were skipped for a non-finite loss or gradient
_C.TRAIN.SYNC_BN = False  # normalise with statistics over all processes (CUDA); False: each process its own
_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step, by update step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between two decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor of a decay
_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw | sgd (Nesterov) | any other of timm.optim.list_optimizers()
_C.TRAIN.OPTIMIZER.EPS = 1e-8  # adamw: added to the denominator
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]  # adamw: decay of the two moments
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd
_C.TRAIN.EMA = CfgNode()
_C.TRAIN.EMA.ENABLED = False  # keep an exponential moving average of the weights, and evaluate and save it too
_C.TRAIN.EMA.DECAY = 0.9999  # share of the average that an update keeps; it starts lower and rises to this

# ---- augmentation --------------------------------------------------------------------------------
_C.AUG = CfgNode()
_C.AUG.SCALE = [0.08, 1.0]  # area of the random crop, as a share of the image
_C.AUG.RATIO = [0.75, 4 / 3]  # aspect ratio of the random crop
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip
_C.AUG.COLOR_JITTER = 0.4  # strength of colour jitter; used when AUTO_AUGMENT is none
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # timm's policy string | none
_C.AUG.REPROB = 0.25  # random erasing: probability
_C.AUG.REMODE = "pixel"  # random erasing: pixel | rand | const
_C.AUG.RECOUNT = 1  # random erasing: number of rectangles
_C.AUG.MIXUP = 0.8  # mixup's alpha; 0: off
_C.AUG.CUTMIX = 1.0  # cutmix's alpha; 0: off
_C.AUG.CUTMIX_MINMAX = []  # cutmix: smallest and largest side of the box as a share; replaces alpha when set
_C.AUG.MIXUP_PROB = 1.0  # probability that a batch is mixed
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix if both are on
_C.AUG.MIXUP_MODE = "batch"  # what shares one random draw: batch | pair | elem

# ---- evaluation ----------------------------------------------------------------------------------
_C.TEST = CfgNode()
_C.TEST.CROP = True  # resize to 256/224 of the input size, then crop the centre; False: resize to the input size
_C.TEST.PREDICTIONS = False  # --eval: also write predictions.csv, one line per image

# ---- the run -------------------------------------------------------------------------------------
_C.AMP_DTYPE = "auto"  # of the forward pass: bf16 | fp16 | fp32 | auto (GPU: bf16, or fp16 without bf16; CPU: fp32)
_C.DETERMINISTIC = False  # CUDA: bitwise reproducible runs on the same GPU and versions, but slower
_C.COMPILE = "auto"  # torch.compile the network: on | off | auto (only in training, on CUDA; falls back if it fails)
_C.HANG_MINUTES = 10.0  # end the run if a process does not answer for this long (downloads: an hour)
_C.OUTPUT = "output"  # results go to OUTPUT/MODEL.NAME/TAG/
_C.TAG = "default"  # name of the run
_C.SEED = 0  # of initial weights, data order, augmentation and drop path
_C.PRINT_FREQ = 10  # updates between two log lines
_C.WANDB_PROJECT = ""  # also log to this Weights & Biases project (pip install wandb); empty: off
_C.SAVE_FREQ = 1  # epochs between two checkpoints
_C.SAVE_STEPS = 0  # updates between two checkpoints within an epoch; 0: none
_C.SAVE_MINUTES = 0.0  # minutes between two checkpoints within an epoch; 0: none
_C.KEEP_CHECKPOINTS = 3  # newest checkpoints to keep, besides the best one

_CHOICES = {
    "DATA.DATASET": ("imagenet", "cifar10", "cifar100", "caltech101", "imagefolder", "digits"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.AUGMENT_ON": ("worker", "device", "auto"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "MODEL.TYPE": ("strip_mlp", "timm"),
    "MODEL.DROP_PATH_SCHEDULE": ("constant", "linear"),
    "MODEL.STRIP_MLP.TOKEN_MIXERS": ("both", "cgsmm", "lsmm"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AMP_DTYPE": ("auto", "bf16", "fp16", "fp32"),
    "COMPILE": ("auto", "on", "off"),
}
_RETIRED = ("SAVE_ELSEWHERE", "MODEL.STRIP_MLP.FORM", "MODEL.STRIP_MLP.FAST", "TEST.FUSE")  # of old configs; ignored
_AT_LEAST_ONE = (
    "DATA.IMG_SIZE DATA.BATCH_SIZE MODEL.NUM_CLASSES TRAIN.EPOCHS TRAIN.ACCUMULATION_STEPS PRINT_FREQ SAVE_FREQ "
    "KEEP_CHECKPOINTS TRAIN.MAX_SKIPPED AUG.RECOUNT TRAIN.LR_SCHEDULER.DECAY_EPOCHS MODEL.STRIP_MLP.PATCH_SIZE "
    "MODEL.STRIP_MLP.IN_CHANS MODEL.STRIP_MLP.EMBED_DIM MODEL.STRIP_MLP.NUM_PATCHES MODEL.STRIP_MLP.STRIP_WIDTH"
).split()
_AT_LEAST_ZERO = (
    "MODEL.STRIP_MLP.TRAINED_IMG_SIZE "
    "DATA.NUM_WORKERS TRAIN.WARMUP_EPOCHS TRAIN.WARMUP_LR TRAIN.MIN_LR TRAIN.WEIGHT_DECAY TRAIN.OPTIMIZER.EPS "
    "TRAIN.CLIP_GRAD TRAIN.FREEZE_STAGES AUG.COLOR_JITTER AUG.MIXUP AUG.CUTMIX SEED SAVE_STEPS SAVE_MINUTES"
).split()
_SHARES = (
    "MODEL.LABEL_SMOOTHING MODEL.DROP_PATH_RATE TRAIN.EMA.DECAY TRAIN.LR_SCHEDULER.DECAY_RATE AUG.HFLIP AUG.REPROB "
    "AUG.MIXUP_PROB AUG.MIXUP_SWITCH_PROB DATA.HOLD_OUT"
).split()

_MAX_FILES = 64  # that may be merged for one config
MAX_YAML_BYTES = 2**20
MAX_YAML_DEPTH = 20


def load_config(path: str | Path = "", opts=()) -> CfgNode:
    """The frozen config of a run.

    Args:
        path: a YAML file; its ``BASE`` files are merged first. Empty: the defaults.
        opts: ``[KEY, VALUE, KEY, VALUE, ...]`` merged last; values may be strings, as on the command line.

    Raises:
        InputError: an unknown key (the nearest known one is named), a value of the wrong type or out of range.
        MissingFileError: ``path`` or one of its ``BASE`` files does not exist.
    """
    config = _C.clone()
    if path:
        _merge_file(config, Path(path), (), [])
    check_pairs(opts)
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(config, nested, "--opts")
    if not config.MODEL.NAME and path:
        config.MODEL.NAME = Path(path).stem
    return _checked(config)


def check_pairs(opts) -> None:
    """Raises an InputError, which names the key, if ``[KEY, VALUE, ...]`` are not pairs."""
    known = flat_keys(_C)
    for key in map(str, opts):
        if "=" in key and key.partition("=")[0] in known:
            raise InputError(f"--opts takes a space between key and value: {' '.join(key.split('=', 1))}")
    if len(opts) % 2:
        # The key without a value is one that is followed by another key, else the last word.
        keys = (key for key, value in zip(opts[::2], opts[1::2], strict=False) if str(value) in known)
        raise InputError(f"--opts takes pairs of KEY VALUE; {next(keys, opts[-1])!r} has no value")


def from_dict(values: dict, source: str) -> CfgNode:
    """The frozen config whose ``to_dict`` is ``values``; missing keys have their defaults.

    Errors are those of ``load_config``; they call the values ``source``.
    """
    config = _C.clone()
    _merge(config, values, source)
    return _checked(config)


def flat_keys(config: dict, prefix: str = "") -> dict:
    """``{"DATA.BATCH_SIZE": 128, ...}``: every value of a config, or of its ``to_dict``, by its dotted name."""
    flat = {}
    for key, value in config.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def flat_config(saved: dict) -> dict:
    """A saved ``to_dict`` by dotted names; keys that an older version did not have get their defaults."""
    return flat_keys(_C) | flat_keys(saved)


def to_dict(config: CfgNode) -> dict:
    """The config as nested plain dictionaries."""
    return {key: to_dict(value) if isinstance(value, CfgNode) else copy.copy(value) for key, value in config.items()}


def nearest(word: str, known, cutoff: float = 0.5) -> str:
    """``"; did you mean X?"`` for the known word most like a mistyped one; empty if none is as like as ``cutoff``."""
    lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    return f"; did you mean {lower[match[0]]}?" if match else ""


def _merge_file(config: CfgNode, path: Path, parents: tuple, merged: list) -> None:
    path = path.resolve()
    if path in parents:
        raise InputError(f"{path}: its BASE files include it again")
    if not path.is_file():
        if path.is_dir():
            raise InputError(f"{path} is a folder; name one of the config files in it")
        known = [*path.parent.glob("*.yaml"), *(Path(__file__).parent / "configs").rglob("*.yaml")]
        raise MissingFileError(f"config file {path} does not exist{nearest(str(path), map(str, known))}")
    if len(merged) == _MAX_FILES:
        raise InputError(f"{path}: more than {_MAX_FILES} config files are merged through BASE")
    merged.append(path)
    loaded = read_yaml(path) or {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds {type(loaded).__name__}, not a mapping of config keys")
    base = loaded.pop("BASE", None) or []
    base = [base] if isinstance(base, str) else base
    if not isinstance(base, list) or not all(isinstance(name, str) for name in base):
        raise InputError(f"{path}: BASE takes a list of config files; got {base!r}")
    for name in base:
        _merge_file(config, path.parent / name, (*parents, path), merged)
    _merge(config, loaded, str(path))


def _merge(node: CfgNode, values: dict, source: str, prefix: str = "") -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in _RETIRED:
            continue
        if name == "MODEL.SWIN" or name == "MODEL.TYPE" and value == "swin":
            raise InputError(f"{source}: {name} is a setting of Swin-Transformer's code. To train a Swin here, set "
                             "MODEL.TYPE timm and MODEL.ARCH swin_tiny_patch4_window7_224; see "
                             "configs/baselines/swin_tiny_*.yaml")
        if key not in node:
            known = flat_keys(_C)
            if isinstance(value, dict):
                known = {leaf.rpartition(".")[0] for leaf in known}  # the groups
            raise InputError(f"{source}: unknown config key {name}{nearest(name, known)}")
        if isinstance(node[key], CfgNode):
            if not isinstance(value, dict):
                first = next(iter(node[key]))
                raise InputError(f"{source}: {name} is a group of keys, not a value; set e.g. {name}.{first}")
            _merge(node[key], value, source, name + ".")
        else:
            if name == "COMPILE":  # True or False in configs of older versions, and in YAML if on has no quotes
                value = {"true": "on", "false": "off"}.get(str(value).lower(), value)
            # Text stays text: a TAG may look like a number.
            value = value if isinstance(node[key], str) else _decode(value)
            node[key] = _coerce(value, node[key], name, source)


def _decode(value):
    """The Python value that a string spells (``"5e-4"``, ``"[2, 2]"``, ``"True"``), else the string itself."""
    if isinstance(value, str) and re.match(r"\s*[+-]?0[xob]|.*\d_\d", value, re.IGNORECASE):
        return value  # YAML and Python read 0o17 and 1_000 differently
    try:
        return CfgNode._decode_cfg_value(value)
    except (RecursionError, MemoryError):  # thousands of brackets
        return value


def _coerce(value, default, name: str, source: str):
    is_number = type(value) in (int, float) and not isinstance(default, str)
    if is_number and not (-(2**63) <= value < 2**63 and math.isfinite(value)):
        raise InputError(f"{source}: {name} is {value!r:.40}; it must be a finite number of at most 64 bits")
    if type(default) is float and type(value) is int:
        return float(value)
    if isinstance(default, str) and value is None:
        return ""
    if isinstance(default, str) and type(value) in (int, float):
        return str(value)
    if isinstance(default, list) and isinstance(value, (list, tuple)):
        kind = float if not default else type(default[0])
        return [_coerce(_decode(item), kind(), f"{name}[{i}]", source) for i, item in enumerate(value)]
    if type(value) is not type(default):
        expected, found = type(default).__name__, type(value).__name__
        hint = "; put it in quotes in YAML" if expected == "str" else ""
        raise InputError(f"{source}: {name} takes {expected}, e.g. {default!r}; got {value!r} ({found}){hint}")
    return value


def _checked(config: CfgNode) -> CfgNode:
    """The config, frozen; an InputError names the key if a value cannot be used."""
    values = flat_keys(config)

    def require(holds, key: str, rule: str) -> None:
        if not holds:
            raise InputError(f"{key} is {values[key]!r}; it must be {rule}")

    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise InputError(f"{key} is {values[key]!r}; it must be one of {', '.join(choices)}"
                             f"{nearest(str(values[key]), choices, cutoff=0.6)}")
    for key in _AT_LEAST_ONE:
        require(values[key] >= 1, key, "at least 1")
    for key in _AT_LEAST_ZERO:
        require(values[key] >= 0, key, "at least 0")
    for key in _SHARES:
        require(0 <= values[key] <= 1, key, "between 0 and 1")
    for key in ("MODEL.DROP_PATH_RATE", "DATA.HOLD_OUT"):
        require(values[key] < 1, key, "below 1")
    require(config.MODEL.TYPE != "timm" or config.MODEL.ARCH, "MODEL.ARCH",
            "the name of a timm model, e.g. resnet50, if MODEL.TYPE is timm")
    for key in ("MODEL.ARCH", "MODEL.TIMM_KWARGS"):
        require(config.MODEL.TYPE == "timm" or not values[key], key,
                f"empty if MODEL.TYPE is {config.MODEL.TYPE}; to train a timm model, set MODEL.TYPE timm")
    depths = config.MODEL.STRIP_MLP.DEPTHS
    require(len(depths) == 4 and min(depths) >= 1, "MODEL.STRIP_MLP.DEPTHS", "four numbers, each at least 1")
    require(config.MODEL.STRIP_MLP.STRIP_WIDTH % 2 == 1, "MODEL.STRIP_MLP.STRIP_WIDTH", "odd")
    for key in ("MODEL.STRIP_MLP.MLP_RATIO", "TRAIN.BASE_LR", "HANG_MINUTES"):
        require(values[key] > 0, key, "above 0")
    require(config.HANG_MINUTES <= 10080, "HANG_MINUTES", "at most 10080, a week")
    require(0 < config.TRAIN.LAYER_DECAY <= 1, "TRAIN.LAYER_DECAY", "above 0 and at most 1")
    for key in ("AUG.SCALE", "AUG.RATIO"):
        pair = values[key]
        require(len(pair) == 2 and 0 < pair[0] <= pair[1], key, "two numbers above 0, the smaller first")
    require(config.AUG.SCALE[1] <= 1, "AUG.SCALE", "at most 1, the whole image")
    minmax = config.AUG.CUTMIX_MINMAX
    require(not minmax or (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1), "AUG.CUTMIX_MINMAX",
            "empty or two numbers between 0 and 1, the smaller first")
    if config.TRAIN.OPTIMIZER.NAME not in ("adamw", "sgd"):
        from timm.optim import list_optimizers  # imports PyTorch, for which --help should not wait

        require(config.TRAIN.OPTIMIZER.NAME in list_optimizers(), "TRAIN.OPTIMIZER.NAME",
                "adamw, sgd or another of timm's" + nearest(config.TRAIN.OPTIMIZER.NAME, list_optimizers()))
    betas = config.TRAIN.OPTIMIZER.BETAS
    require(len(betas) == 2 and 0 <= min(betas) and max(betas) < 1, "TRAIN.OPTIMIZER.BETAS", "two numbers in [0, 1)")
    require(0 < config.TRAIN.OPTIMIZER.MOMENTUM < 1, "TRAIN.OPTIMIZER.MOMENTUM", "above 0 and below 1")
    require(config.TRAIN.WARMUP_EPOCHS <= config.TRAIN.EPOCHS, "TRAIN.WARMUP_EPOCHS",
            f"at most TRAIN.EPOCHS ({config.TRAIN.EPOCHS}); for a short run add --opts TRAIN.WARMUP_EPOCHS 0")
    for key in ("TAG", "MODEL.NAME"):
        require("/" not in values[key] and values[key] not in (".", "..") and values[key].isprintable(), key,
                "a plain folder name")
        require(len(os.fsencode(values[key])) <= 255, key, "a name of at most 255 bytes")
    require(config.TAG.strip(), "TAG", "the name of a folder; it may not be empty")
    for key, value in values.items():
        require(not isinstance(value, str) or "\0" not in value, key, "text without a NUL character")
    if re.search("[@?]", config.DATA.MIRROR):  # not shown: it would be in the log, too
        raise InputError("DATA.MIRROR holds a user name or password, or a query, which config.yaml and the checkpoints "
                         "would keep; leave it out; download the archive by hand and put it into DATA.DATA_PATH")
    config.freeze()
    return config


# ---- YAML ------------------------------------------------------------------------------------------

class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for billions of values
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported; repeat the value",
                                       problem_mark=self.peek_event().start_mark)
        if self.depth == MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"values are nested more than {MAX_YAML_DEPTH} deep",
                                       problem_mark=self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, str(key.value))
            if name in names:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """The content of a YAML file; errors as ``parse_yaml``'s, or the file is missing or too large."""
    if not path.is_file():  # opening a pipe could block forever
        raise MissingFileError(f"{path} does not exist or is not a regular file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise InputError(f"{path} has over {MAX_YAML_BYTES} bytes, too many for a file of settings")
    return parse_yaml(path.read_bytes(), str(path))


def parse_yaml(text: str | bytes, source: str):
    """The value that a text in YAML spells.

    An InputError names source and line if it is not YAML, repeats a key, uses aliases, or is nested too deep.
    """
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a date or number out of range
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{source} is not YAML: {where}{problem.splitlines()[0]}") from None
