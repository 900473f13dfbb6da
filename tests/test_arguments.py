"""The flags of the command line, and the config keys that they set."""

import pytest

from arguments import argument_parser, config_overrides, parse_arguments
from config import load_config
from tests.helpers import DIGITS


def overrides(*flags):
    return config_overrides(parse_arguments(argument_parser(), ["--cfg", str(DIGITS), *flags]))


def test_opts_add_up():
    config = load_config(DIGITS, overrides("--opts", "SEED", "4", "--tag", "x", "--opts", "TRAIN.EPOCHS", "9"))
    assert (config.SEED, config.TRAIN.EPOCHS) == (4, 9)


def test_flags_reach_the_config():
    config = load_config(DIGITS, overrides(
        "--batch-size", "6", "--zip", "--cache-mode", "no", "--accumulation-steps", "3", "--use-checkpoint",
        "--amp-dtype", "bf16", "--compile", "--output", "out", "--tag", "1e5", "--pretrained", "p", "--resume", "r",
        "--data-path", "d", "--opts", "DATA.BATCH_SIZE", "8", "SEED", "4",
    ))
    assert config.DATA.BATCH_SIZE == 6 and config.SEED == 4  # a flag wins over --opts
    assert (config.DATA.ZIP_MODE, config.DATA.CACHE_MODE, config.TRAIN.ACCUMULATION_STEPS) == (True, "no", 3)
    assert (config.TRAIN.USE_CHECKPOINT, config.AMP_DTYPE, config.COMPILE) == (True, "bf16", "on")
    assert (config.OUTPUT, config.TAG, config.MODEL.PRETRAINED, config.MODEL.RESUME) == ("out", "1e5", "p", "r")


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_launcher_flags_are_ignored(flag):
    assert overrides(flag) == []


def test_a_flag_is_not_taken_for_the_value_of_a_key():
    with pytest.raises(ValueError, match="'TRAIN.EPOCHS' has no value"):
        overrides("--opts", "TRAIN.EPOCHS", "--output", "out", "--tag", "x")
