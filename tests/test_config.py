"""The configs, and how they are loaded, merged and checked."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
import yaml

from config import MAX_YAML_BYTES, flat_keys, load_config, nearest, read_yaml, to_dict
from logger import count_macs
from models import build_model
from tools.tables import read_tables
from utils import InputError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
# Exact parameter counts and P of the 16 configs, by variant and data set.
PARAMETERS = {
    "tiny_light": {"imagenet1k": 18_243_920, "cifar100": 17_667_020, "caltech101": 17_667_661, "cifar10": 16_702_130},
    "tiny": {"imagenet1k": 24_903_920, "cifar100": 24_327_020, "caltech101": 24_327_661, "cifar10": 23_073_170},
    "small": {"imagenet1k": 42_568_600, "cifar100": 43_658_644, "caltech101": 43_659_413, "cifar10": 41_807_290},
    "base": {"imagenet1k": 57_216_480, "cifar100": 58_488_348, "caltech101": 58_489_245, "cifar10": 56_328_450},
}
PUBLISHED = [(variant, data) for variant, counts in PARAMETERS.items() for data in counts]
CLASSES = {"imagenet1k": 1000, "cifar100": 100, "caltech101": 101, "cifar10": 10}


def config_path(variant, data):
    return CONFIGS / f"smlp_{variant}_alpha3_patch4_224_{data}.yaml"


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return path


@functools.cache
def body(model: str, img_size: int) -> tuple[int, int]:
    """Parameters before the head, and features that reach it, of the network that a config's MODEL group describes."""
    model = yaml.safe_load(model)
    network = model.pop("STRIP_MLP")
    opts = {f"MODEL.{key}": value for key, value in model.items()}
    opts |= {f"MODEL.STRIP_MLP.{key}": value for key, value in network.items()} | {"DATA.IMG_SIZE": img_size}
    with torch.device("meta"):
        model = build_model(load_config("", [item for pair in opts.items() for item in pair]))
    head = sum(p.numel() for p in model.get_classifier().parameters())
    return sum(p.numel() for p in model.parameters()) - head, model.num_features


def count_parameters(config) -> int:
    """Parameters of a config's network; networks that differ in their heads alone are built once."""
    model = to_dict(config)["MODEL"] | {"NAME": "any", "NUM_CLASSES": 1000}
    parameters, features = body(yaml.safe_dump(model), config.DATA.IMG_SIZE)
    return parameters + (features + 1) * config.MODEL.NUM_CLASSES


# ---- the files -----------------------------------------------------------------------------------

@pytest.mark.parametrize("variant, data", PUBLISHED)
def test_published_config(variant, data):
    config = load_config(config_path(variant, data))
    assert config.MODEL.NAME == f"smlp_{variant}_alpha3_patch4_224_{data}"
    assert config.DATA.DATASET == ("imagenet" if data == "imagenet1k" else data)
    assert config.MODEL.NUM_CLASSES == CLASSES[data]
    large = variant in ("small", "base")
    expected = {"imagenet1k": 4 if large else 2, "cifar100": 2, "caltech101": 2, "cifar10": 4}
    assert config.MODEL.STRIP_MLP.NUM_PATCHES == expected[data]
    assert count_parameters(config) == PARAMETERS[variant][data]


@pytest.mark.parametrize("variant, data", PUBLISHED)
def test_published_configs_differ_only_in_what_differs(variant, data):
    assert yaml.safe_load(config_path(variant, data).read_text()).keys() == {"BASE"}
    config, defaults = (flat_keys(load_config(path)) for path in (config_path(variant, data), ""))
    differing = {key for key, value in config.items() if value != defaults[key]}
    assert differing <= {
        "DATA.DATASET", "MODEL.NAME", "MODEL.NUM_CLASSES", "MODEL.STRIP_MLP.EMBED_DIM", "MODEL.STRIP_MLP.DEPTHS",
        "MODEL.STRIP_MLP.NUM_PATCHES",
    }


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "caltech101"])
@pytest.mark.parametrize("variant, features, parameters", [  # of the published networks, their heads of 1000 classes
    ("resnet50", 2048, 25_557_032), ("resnet101", 2048, 44_549_160), ("resnet152", 2048, 60_192_808),
    ("swin_tiny", 768, 28_288_354), ("swin_small", 768, 49_606_258), ("swin_base", 1024, 87_768_224),
])
def test_baseline_configs(variant, features, parameters, data):
    check_baseline(variant, features, parameters, data)


@pytest.mark.parametrize("variant, features, parameters, data", [
    *(("smlpnet_tiny", 640, 24_123_584, data) for data in CLASSES),
    *(("wave_mlp_small", 512, 30_708_040, data) for data in CLASSES),
    ("smlpnet_small", 768, 48_558_136, "imagenet1k"), ("smlpnet_base", 896, 65_880_408, "imagenet1k"),
    ("wave_mlp_tiny", 512, 17_193_160, "imagenet1k"), ("wave_mlp_medium", 512, 44_056_632, "imagenet1k"),
    ("wave_mlp_base", 768, 63_586_360, "imagenet1k"),
])
def test_mlp_baseline_configs(variant, features, parameters, data):
    check_baseline(variant, features, parameters, data)


def check_baseline(variant, features, parameters, data):
    """A baseline's config changes the network alone, and the network has the published size but for its head."""
    path = CONFIGS / "baselines" / f"{variant}_224_{data}.yaml"
    assert yaml.safe_load(path.read_text()).keys() == {"BASE"}
    config = load_config(path)
    assert count_parameters(config) == parameters + (features + 1) * (CLASSES[data] - 1000)
    ours = flat_keys(load_config(config_path("tiny_light", data)))
    differing = {key for key, value in flat_keys(config).items() if value != ours[key]}
    network = {"MODEL.TYPE", "MODEL.ARCH", "MODEL.STRIP_MLP.EMBED_DIM", "MODEL.STRIP_MLP.DEPTHS"}
    assert differing <= {"MODEL.NAME", *network}


def test_the_small_comparison_is_fair():
    """Its networks differ by at most 10 % in multiply-accumulates, their configs in network and learning rate alone."""
    table = read_tables()["cifar10_small"][1]
    macs, configs = [], [row.recipe for row in table]
    for row in table:
        with torch.device("meta"):
            macs.append(count_macs(build_model(row.config()), (3, 64, 64)))
    assert len(table) == 5 and max(macs) < 1.1 * min(macs)
    differing = {key for config in configs for key, value in config.items() if value != configs[0][key]}
    assert {key for key in differing if not key.startswith("MODEL.STRIP_MLP.")} <= {
        "MODEL.TYPE", "MODEL.ARCH", "MODEL.NAME", "MODEL.TIMM_KWARGS", "TRAIN.BASE_LR",
    }


def test_every_config_loads_builds_and_holds_no_absolute_path():
    for path in sorted(CONFIGS.rglob("*.yaml")):
        for value in flat_values(yaml.safe_load(path.read_text())):
            assert not re.match(r"[/~\\$]|[A-Za-z]:\\", str(value)), f"{path}: {value}"
        config = load_config(path)
        assert config.MODEL.NAME == path.stem  # so that no two share an output folder
        if path.parent.name in ("configs", "baselines", "small"):
            count_parameters(config)


def flat_values(node):
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
    return [node] if children is None else [value for child in children for value in flat_values(child)]


# ---- loading and merging -------------------------------------------------------------------------

def test_order_of_precedence(tmp_path):
    write(tmp_path, "{SEED: 1, TAG: first, PRINT_FREQ: 1, TRAIN: {EPOCHS: 21}}", "first.yaml")
    (tmp_path / "sub").mkdir()
    write(tmp_path, "{BASE: ../first.yaml, TAG: second, PRINT_FREQ: 2, SAVE_FREQ: 2}", "sub/second.yaml")
    path = write(tmp_path, "{BASE: [first.yaml, sub/second.yaml], PRINT_FREQ: 3, SAVE_FREQ: 3}")
    config = load_config(path, ["SAVE_FREQ", "4", "TRAIN.BASE_LR", "1e-3", "SAVE_FREQ", "5"])
    assert (config.SEED, config.TRAIN.EPOCHS) == (1, 21)  # of the base's base
    assert config.TAG == "second"  # later bases win
    assert config.PRINT_FREQ == 3  # the file wins over its bases
    assert (config.SAVE_FREQ, config.TRAIN.BASE_LR) == (5, 1e-3)  # opts win over all, the last one over the others
    assert config.TRAIN.WARMUP_EPOCHS == 20  # the default where nobody says otherwise
    assert config.MODEL.NAME == "run"
    swapped = write(tmp_path, "BASE: [sub/second.yaml, first.yaml]", "swapped.yaml")
    assert load_config(swapped).TAG == "first"


def test_base_cycles_and_missing_bases(tmp_path):
    path = write(tmp_path, "BASE: [b.yaml]", "a.yaml")
    write(tmp_path, "BASE: [a.yaml]", "b.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml: its BASE files include it again"):
        load_config(path)
    write(tmp_path, "SEED: 3", "b.yaml")
    diamond = write(tmp_path, "BASE: [a.yaml, b.yaml]", "diamond.yaml")  # the same base twice is no cycle
    assert load_config(diamond).SEED == 3
    missing = write(tmp_path, "BASE: [dimond.yaml]", "missing.yaml")
    with pytest.raises(FileNotFoundError, match=r"dimond\.yaml does not exist; did you mean .*/diamond\.yaml\?"):
        load_config(missing)


@pytest.mark.parametrize("name", ["smlp_small_alpha3_patch4_224_cifar10", "smlp_nano_alpha3_patch2_32_digits"])
def test_dumped_config_loads_as_the_same(name, tmp_path):
    odd = ["TAG", "007", "DATA.CACHE_MODE", "no", "DATA.DATA_PATH", "1e5", "AUG.CUTMIX_MINMAX", "[0.2, 0.8]",
           "TRAIN.BASE_LR", "1e-3", "TRAIN.OPTIMIZER.EPS", "1e-12", "MODEL.PRETRAINED", "None"]
    config = load_config(CONFIGS / f"{name}.yaml", odd)
    again = load_config(write(tmp_path, yaml.safe_dump(to_dict(config))))
    assert flat_keys(again) == flat_keys(config)
    assert [type(value) for value in flat_keys(again).values()] == [type(value) for value in flat_keys(config).values()]


def test_to_dict_is_a_copy():
    config = load_config()
    dumped = to_dict(config)
    dumped["AUG"]["SCALE"][0] = 0.5
    dumped["SEED"] = 7
    assert (config.AUG.SCALE[0], config.SEED) == (0.08, 0)


def test_config_is_frozen_and_loads_are_independent():
    config = load_config()
    for node, key in [(config, "SEED"), (config.TRAIN, "EPOCHS"), (config.MODEL.STRIP_MLP, "NUM_PATCHES")]:
        with pytest.raises(AttributeError):
            setattr(node, key, 1)
    config.MODEL.STRIP_MLP.DEPTHS[0] = 9  # a list cannot be frozen; but it is this config's own
    assert load_config().MODEL.STRIP_MLP.DEPTHS == [2, 2, 6, 2]


# ---- values --------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, given, expected", [
    ("TRAIN.CLIP_GRAD", "1", 1.0),
    ("TRAIN.CLIP_GRAD", 0, 0.0),
    ("TRAIN.BASE_LR", "5e-4", 5e-4),
    ("MODEL.STRIP_MLP.MLP_RATIO", 4, 4.0),
    ("AUG.SCALE", "(0.5, 1)", [0.5, 1.0]),
    ("AUG.CUTMIX_MINMAX", "[0, 1]", [0.0, 1.0]),
    ("MODEL.STRIP_MLP.DEPTHS", "[1,1,2,1]", [1, 1, 2, 1]),
    ("TEST.CROP", "False", False),
    ("TAG", "1e5", "1e5"),
    ("TAG", "None", "None"),
    ("TAG", "True", "True"),
    ("TAG", "007", "007"),
    ("TAG", "[1]", "[1]"),
    ("TAG", 5, "5"),
    ("DATA.CACHE_MODE", "no", "no"),
    ("DATA.DATA_PATH", "2012", "2012"),
    ("DATA.DATA_PATH", "", ""),
    ("MODEL.RESUME", "'quoted'", "'quoted'"),
])
def test_values_of_opts(key, given, expected):
    value = flat_keys(load_config("", [key, given]))[key]
    assert (value, type(value)) == (expected, type(expected))
    if isinstance(expected, list):
        assert [type(item) for item in value] == [type(item) for item in expected]


@pytest.mark.parametrize("text, key, expected", [
    ("TRAIN: {BASE_LR: 5e-4}", "TRAIN.BASE_LR", 5e-4),  # a string to YAML 1.1, which wants a point in it
    ("TRAIN: {BASE_LR: 1}", "TRAIN.BASE_LR", 1.0),
    ("AUG: {SCALE: [8e-2, 1]}", "AUG.SCALE", [0.08, 1.0]),
    ("TAG: '1e5'", "TAG", "1e5"),
    ("TAG: 'None'", "TAG", "None"),
    ("MODEL: {RESUME: null}", "MODEL.RESUME", ""),
    ("AUG: {AUTO_AUGMENT: none}", "AUG.AUTO_AUGMENT", "none"),
    ("BASE: []", "SEED", 0),
    ("", "SEED", 0),
])
def test_values_of_files(text, key, expected, tmp_path):
    value = flat_keys(load_config(write(tmp_path, text)))[key]
    assert (value, type(value)) == (expected, type(expected))


# Each message names the key, and what is expected or the nearest known key.
@pytest.mark.parametrize("key, value, message", [
    # unknown keys
    ("TRAIN.EPOCH", "1", "unknown config key TRAIN.EPOCH; did you mean TRAIN.EPOCHS?"),
    ("BATCH_SIZE", "1", "unknown config key BATCH_SIZE; did you mean DATA.BATCH_SIZE?"),
    ("train.base_lr", "1", "unknown config key train; did you mean TRAIN?"),
    ("TRAIN.base_lr", "1", "unknown config key TRAIN.base_lr; did you mean TRAIN.BASE_LR?"),
    ("MODEL.STRIPMLP.DEPTHS", "1", "unknown config key MODEL.STRIPMLP; did you mean MODEL.STRIP_MLP?"),
    ("MODEL.STRIP_MLP.NUM_PATCH", "1", "did you mean MODEL.STRIP_MLP.NUM_PATCHES?"),
    ("SEDE", "1", "unknown config key SEDE; did you mean SEED?"),
    ("QQQQQ", "1", "unknown config key QQQQQ"),
    ("", "1", "unknown config key"),
    ("DATA", "1", "DATA is a group of keys, not a value; set e.g. DATA.DATASET"),
    ("DATA.BATCH_SIZE.X", "1", "DATA.BATCH_SIZE takes int"),
    # wrong types
    ("TRAIN.EPOCHS", "many", "TRAIN.EPOCHS takes int, e.g. 300; got 'many' (str)"),
    ("TRAIN.EPOCHS", "1.5", "TRAIN.EPOCHS takes int, e.g. 300; got 1.5 (float)"),
    ("TRAIN.EPOCHS", "None", "TRAIN.EPOCHS takes int"),
    ("TRAIN.EPOCHS", "True", "TRAIN.EPOCHS takes int, e.g. 300; got True (bool)"),
    ("TRAIN.BASE_LR", "fast", "TRAIN.BASE_LR takes float"),
    ("TRAIN.BASE_LR", "nan", "TRAIN.BASE_LR takes float"),
    ("TEST.CROP", "yes", "TEST.CROP takes bool, e.g. True; got 'yes' (str)"),
    ("TEST.CROP", "1", "TEST.CROP takes bool"),
    ("AUG.SCALE", "1", "AUG.SCALE takes list"),
    ("AUG.SCALE", "[0.1, 'a']", "AUG.SCALE[1] takes float"),
    ("MODEL.STRIP_MLP.DEPTHS", "[2, 2, 6, 2.5]", "MODEL.STRIP_MLP.DEPTHS[3] takes int"),
    # out of range
    ("DATA.DATASET", "imagnet", "DATA.DATASET is 'imagnet'; it must be one of imagenet, cifar10"),
    ("DATA.DATASET", "imagnet", "did you mean imagenet?"),
    ("AMP_DTYPE", "fp8", "AMP_DTYPE is 'fp8'; it must be one of auto, bf16, fp16, fp32"),
    ("TRAIN.OPTIMIZER.NAME", "adamv", "TRAIN.OPTIMIZER.NAME is 'adamv'; it must be adamw, sgd or another of timm's"),
    ("TRAIN.EPOCHS", "0", "TRAIN.EPOCHS is 0; it must be at least 1"),
    ("DATA.BATCH_SIZE", "0", "DATA.BATCH_SIZE is 0; it must be at least 1"),
    ("DATA.NUM_WORKERS", "-1", "DATA.NUM_WORKERS is -1; it must be at least 0"),
    ("TRAIN.CLIP_GRAD", "-1", "TRAIN.CLIP_GRAD is -1.0; it must be at least 0"),
    ("TRAIN.BASE_LR", "0", "TRAIN.BASE_LR is 0.0; it must be above 0"),
    ("TRAIN.WARMUP_EPOCHS", "301", "TRAIN.WARMUP_EPOCHS is 301; it must be at most TRAIN.EPOCHS (300)"),
    ("TRAIN.LAYER_DECAY", "0", "TRAIN.LAYER_DECAY is 0.0; it must be above 0 and at most 1"),
    ("TRAIN.LAYER_DECAY", "1.01", "TRAIN.LAYER_DECAY is 1.01; it must be above 0 and at most 1"),
    ("TRAIN.OPTIMIZER.BETAS", "[0.9]", "TRAIN.OPTIMIZER.BETAS is [0.9]; it must be two numbers"),
    ("TRAIN.OPTIMIZER.BETAS", "[0.9, 1.0]", "TRAIN.OPTIMIZER.BETAS is [0.9, 1.0]"),
    ("TRAIN.OPTIMIZER.MOMENTUM", "0", "TRAIN.OPTIMIZER.MOMENTUM is 0.0; it must be above 0 and below 1"),
    ("TRAIN.OPTIMIZER.EPS", "-1e-8", "TRAIN.OPTIMIZER.EPS is -1e-08; it must be at least 0"),
    ("MODEL.DROP_PATH_RATE", "1", "MODEL.DROP_PATH_RATE is 1.0; it must be below 1"),
    ("MODEL.LABEL_SMOOTHING", "1.1", "MODEL.LABEL_SMOOTHING is 1.1; it must be between 0 and 1"),
    ("MODEL.STRIP_MLP.DEPTHS", "[2, 2, 6]", "MODEL.STRIP_MLP.DEPTHS is [2, 2, 6]; it must be four numbers"),
    ("MODEL.STRIP_MLP.DEPTHS", "[2, 2, 0, 2]", "MODEL.STRIP_MLP.DEPTHS is [2, 2, 0, 2]"),
    ("MODEL.STRIP_MLP.STRIP_WIDTH", "2", "MODEL.STRIP_MLP.STRIP_WIDTH is 2; it must be odd"),
    ("MODEL.STRIP_MLP.MLP_RATIO", "0", "MODEL.STRIP_MLP.MLP_RATIO is 0.0; it must be above 0"),
    ("AUG.SCALE", "[1, 0.1]", "AUG.SCALE is [1.0, 0.1]; it must be two numbers above 0, the smaller first"),
    ("AUG.SCALE", "[0.5, 2]", "AUG.SCALE is [0.5, 2.0]; it must be at most 1"),
    ("AUG.RATIO", "[0, 1]", "AUG.RATIO is [0.0, 1.0]"),
    ("AUG.CUTMIX_MINMAX", "[0.8, 0.2]", "AUG.CUTMIX_MINMAX is [0.8, 0.2]"),
    ("AUG.CUTMIX_MINMAX", "[0.5]", "AUG.CUTMIX_MINMAX is [0.5]"),
    ("TAG", "a/b", "TAG is 'a/b'; it must be a plain folder name"),
    ("TAG", "", "TAG is ''; it must be the name of a folder"),
    ("TAG", " ", "TAG is ' '; it must be the name of a folder"),
    ("HANG_MINUTES", "1e15", "HANG_MINUTES is 1000000000000000.0; it must be at most 10080, a week"),
    ("MODEL.ARCH", "resnet50", "MODEL.ARCH is 'resnet50'; it must be empty if MODEL.TYPE is strip_mlp; to train"),
    ("MODEL.TIMM_KWARGS", "{channels: [8]}", "it must be empty if MODEL.TYPE is strip_mlp"),
    ("MODEL.NAME", "..", "MODEL.NAME is '..'; it must be a plain folder name"),
    ("SEED", "-1", "SEED is -1; it must be at least 0"),
])
def test_refused_opts(key, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("", [key, value])


@pytest.mark.parametrize("key", [key for key, value in flat_keys(load_config()).items() if type(value) in (int, float)])
def test_no_number_may_be_negative(key):
    with pytest.raises(ValueError, match=f"^{re.escape(key)} is -1"):
        load_config("", [key, "-1"])


@pytest.mark.parametrize("key", [
    "DATA.DATASET", "DATA.INTERPOLATION", "DATA.CACHE_MODE", "MODEL.TYPE", "MODEL.DROP_PATH_SCHEDULE",
    "TRAIN.LR_SCHEDULER.NAME", "AUG.REMODE", "AUG.MIXUP_MODE", "AMP_DTYPE",
])
def test_choices(key):
    default = flat_keys(load_config())[key]
    with pytest.raises(ValueError, match=f"^{key} is 'nonsense'; it must be one of .*{default}"):
        load_config("", [key, "nonsense"])


@pytest.mark.parametrize("key", [
    "MODEL.LABEL_SMOOTHING", "MODEL.DROP_PATH_RATE", "TRAIN.EMA.DECAY", "TRAIN.LR_SCHEDULER.DECAY_RATE", "AUG.HFLIP",
    "AUG.REPROB", "AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB",
])
def test_shares(key):
    assert flat_keys(load_config("", [key, "0.75"]))[key] == 0.75
    with pytest.raises(ValueError, match=f"^{key} is 1.01; it must be between 0 and 1"):
        load_config("", [key, "1.01"])


@pytest.mark.parametrize("text, message", [
    ("TRIAN: {EPOCHS: 1}", "unknown config key TRIAN; did you mean TRAIN?"),
    ("MODEL: {STRIP_MLPP: {DEPTHS: [1]}}", "unknown config key MODEL.STRIP_MLPP; did you mean MODEL.STRIP_MLP?"),
    ("MODEL: {STRIP_MLP: {DEPTH: [1]}}", "key MODEL.STRIP_MLP.DEPTH; did you mean MODEL.STRIP_MLP.DEPTHS?"),
    ("1: 2", "unknown config key 1"),
    ("DATA: 3", "DATA is a group of keys"),
    ("DATA:", "DATA is a group of keys"),
    ("TRAIN: {EPOCHS: true}", "TRAIN.EPOCHS takes int"),
    ("TEST: {CROP: null}", "TEST.CROP takes bool"),
    ("DATA: {CACHE_MODE: no}", "DATA.CACHE_MODE takes str, e.g. 'part'; got False (bool); put it in quotes in YAML"),
    ("TRAIN: {BASE_LR: .nan}", "TRAIN.BASE_LR is nan; it must be a finite number"),
    ("TRAIN: {CLIP_GRAD: .inf}", "TRAIN.CLIP_GRAD is inf; it must be a finite number"),
    ("AUG: {RATIO: [0.5, .inf]}", "AUG.RATIO[1] is inf; it must be a finite number"),
    ("SEED: 9223372036854775808", "SEED is 9223372036854775808; it must be a finite number of at most 64 bits"),
    (f"TRAIN: {{BASE_LR: {10**400}}}", "TRAIN.BASE_LR is 1000000000000000000000000000000000000000; it must be"),
    ("SEED: 1\nSEED: 2", "line 2: the key SEED occurs twice"),
    ('TAG: "a\\eb"', "TAG is 'a\\x1bb'; it must be a plain folder name"),
    ("- SEED", "holds list, not a mapping"),
    ("SEED: [", "is not YAML"),
    ("SEED: !!python/object/apply:os.getcwd []", "is not YAML"),
    ("BASE: 5", "BASE takes a list of config files; got 5"),
    ("BASE: [5]", "BASE takes a list of config files; got [5]"),
])
def test_refused_files(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_config(path)
    assert path.name in str(error.value) or message.startswith("TAG is ")  # which file it was


def test_bases_that_multiply(tmp_path):
    """Each file names the next one twice: 2**30 files to merge."""
    for i in range(30):
        (tmp_path / f"{i}.yaml").write_text(f"BASE: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("SEED: 1\n")
    with pytest.raises(ValueError, match="yaml: more than 64 config files are merged through BASE"):
        load_config(tmp_path / "0.yaml")


def test_the_largest_seed():
    assert load_config("", ["SEED", str(2**63 - 1)]).SEED == 2**63 - 1
    with pytest.raises(ValueError, match="SEED is 9223372036854775808; it must be"):
        load_config("", ["SEED", str(2**63)])


@pytest.mark.parametrize("value", ["[" * 100_000, "-" * 100_000 + "1", "9" * 10_000, "(" * 1000])
def test_opts_that_no_parser_takes(value):
    with pytest.raises(ValueError, match="SEED takes int"):
        load_config("", ["SEED", value])


@pytest.mark.parametrize("opts", [["SEED", "1", "TRAIN.EPOCHS"], ["TRAIN.EPOCHS", "SEED", "1"]])
def test_the_key_without_a_value_is_named(opts):
    with pytest.raises(ValueError, match=r"'TRAIN.EPOCHS' has no value"):
        load_config("", opts)


def test_no_guess_among_choices_that_are_unlike():
    with pytest.raises(ValueError, match="one of pixel, rand, const$"):
        load_config("", ["AUG.REMODE", "zzz"])


def test_a_missing_config_is_looked_for_among_configs():
    for folder in (ROOT, CONFIGS):
        with pytest.raises(FileNotFoundError) as error:
            load_config(folder / "tables.yaml")
        assert "tables.yaml" not in str(error.value).partition("does not exist")[2]


def test_refused_calls(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"binary\.yaml is not YAML"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*smlp_tiny_alpha3_patch4_224_cifar10\.yaml\?"):
        load_config(CONFIGS / "smlp_tiny_alpha3_patch4_224_cifar1.yaml")


def test_nearest():
    assert nearest("--bach-size", ["--batch-size", "--data-path"]) == "; did you mean --batch-size?"
    assert nearest("train.epochs", ["TRAIN.EPOCHS", "TRAIN.EMA.DECAY"]) == "; did you mean TRAIN.EPOCHS?"
    assert nearest("zzz", ["TRAIN.EPOCHS"]) == ""


# ---- every key is read ---------------------------------------------------------------------------

def keys_read(source):
    """The config keys that a module reads as attributes of ``config``, by their dotted names, through local aliases."""
    tree, aliases, read = ast.parse(source), {}, set()

    def dotted(node):
        """``"TRAIN.EPOCHS"`` for ``config.TRAIN.EPOCHS``; ``""`` for the config itself; None for anything else."""
        if isinstance(node, ast.Name):
            return "" if node.id == "config" else aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            if node.attr == "config":  # self.config
                return ""
            if ast.unparse(node) in aliases:  # self.aug
                return aliases[ast.unparse(node)]
            parent = dotted(node.value)
            return None if parent is None or not node.attr.isupper() else f"{parent}.{node.attr}".lstrip(".")
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                is_tuple = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = zip(target.elts, node.value.elts, strict=True) if is_tuple else [(target, node.value)]
                aliases |= {ast.unparse(left): name for left, right in pairs if (name := dotted(right)) is not None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            read.add(name)
    return read


def test_keys_read_sees_through_aliases_and_not_more():
    source = """
def f(config, other):
    train, ema = config.TRAIN, config.TRAIN.EMA
    self.aug = config.AUG
    return train.EPOCHS + ema.DECAY + self.config.SEED + other.AUG.MIXUP + self.aug.RATIO + len("config.TAG")
"""
    assert keys_read(source) - {"TRAIN", "TRAIN.EMA", "AUG"} == {"TRAIN.EPOCHS", "TRAIN.EMA.DECAY", "SEED", "AUG.RATIO"}


def test_every_key_is_read():
    files = [path for path in ROOT.glob("*.py") if path.name != "config.py"]
    files += [*(ROOT / "models").glob("*.py"), *(ROOT / "data").glob("*.py")]
    read = set().union(*(keys_read(path.read_text(encoding="utf-8")) for path in files))
    unread = flat_keys(load_config()).keys() - read
    assert unread == {"BASE"}  # which config.py itself follows


def test_a_config_of_swin_s_is_told_how_swin_is_trained_here(tmp_path):
    (tmp_path / "swin.yaml").write_text("MODEL: {TYPE: swin, NAME: swin_tiny, SWIN: {EMBED_DIM: 96}}\n")
    with pytest.raises(ValueError, match="MODEL.TYPE is a setting of Swin-Transformer's code. .* MODEL.TYPE timm and "):
        load_config(tmp_path / "swin.yaml")


# ---- YAML ------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True))


def test_plain_values(tmp_path):
    (tmp_path / "a.yaml").write_text("A: {B: [1, 2.5, x, 'ä'], C: true}\nD:\n  - E: null\n")
    assert read_yaml(tmp_path / "a.yaml") == {"A": {"B": [1, 2.5, "x", "ä"], "C": True}, "D": [{"E": None}]}
    (tmp_path / "a.yaml").write_text("")
    assert read_yaml(tmp_path / "a.yaml") is None


@pytest.mark.parametrize(("text", "message"), [
    ("SEED: 1\nTAG: a\nSEED: 2\n", "line 3: the key SEED occurs twice"),
    ("TRAIN: {EPOCHS: 1, EPOCHS: 1}", "line 1: the key EPOCHS occurs twice"),
    ("a: &x 1\nb: *x\n", r"line 2: aliases \(\*name\) are not supported"),
    ("a: &x {b: 1}\nc:\n  <<: *x\n", "line 3: aliases"),
    (BOMB, "line 2: aliases"),
    ("a: &x [*x]", "line 1: aliases"),
    ("[" * 10_000, "line 1: values are nested more than 20 deep"),
    ("".join(f"{' ' * i}a:\n" for i in range(1000)), "values are nested more than 20 deep"),
    ("a: " + "9" * 10_000, "Exceeds the limit"),
    ("a: 2001-99-99", "month"),
    ("a: [", "line 1: "),
    ("a: !!python/object/apply:os.system ['ls']", "line 1: could not determine a constructor"),
    ("a: \x00", "special characters are not allowed"),
    ("a: b\n" * (MAX_YAML_BYTES // 4), "too many for a file of settings"),
    ("? [a, b]\n: c", "line 1: found unhashable key"),
])
def test_refused(text, message, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"a.yaml .*{message}") as error:
        read_yaml(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(InputError, match="'utf-8' codec can't decode"):
        read_yaml(tmp_path / "a.yaml")


# ---- values that look like others ------------------------------------------------------------------

@pytest.mark.parametrize(("key", "value", "message"), [
    ("TRAIN.EPOCHS", "0o17", "TRAIN.EPOCHS takes int"), ("TRAIN.EPOCHS", "0x10", "TRAIN.EPOCHS takes int"),
    ("TRAIN.EPOCHS", "1_000", "TRAIN.EPOCHS takes int"), ("OUTPUT", "a\0b", "OUTPUT is .* without a NUL"),
    ("DATA.DATA_PATH", "\0", "DATA_PATH is .* without a NUL"), ("TAG", "x" * 256, "TAG is .* at most 255 bytes"),
    ("MODEL.NAME", "ä" * 128, "MODEL.NAME is .* at most 255 bytes"),
    *[("DATA.MIRROR", url, "DATA.MIRROR holds a user name or password") for url in
      ("https://me:secret@host/cifar", " https://me:secret@host", "me:secret@host/cifar", "https://host/?key=secret")],
])
def test_odd_values_are_errors_of_their_key(key, value, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config("", [key, value])
    assert "secret" not in str(caught.value)
