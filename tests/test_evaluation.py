"""What an evaluation says before it reads any data."""

import logging
from pathlib import Path

import pytest

from config import load_config
from evaluation import _warn_of_other_data


@pytest.mark.parametrize("content, warned", [
    ({"config": {"DATA": {"DATASET": "imagefolder"}}}, True),
    ({"config": {"DATA": {"DATASET": "cifar10"}}}, False),
    ({"config": {"DATA": {"DATASET": 3}}}, False),
    ({"config": {"DATA": "x"}}, False),
    ({"config": "x"}, False),
    ({}, False),
])
def test_a_checkpoint_of_another_data_set_is_named(content, warned, caplog):
    """Else an evaluation with the wrong --cfg says only that CIFAR-10 could not be downloaded."""
    config = load_config("", ["DATA.DATASET", "cifar10"])
    with caplog.at_level(logging.WARNING, "strip_mlp"):
        _warn_of_other_data(content, config, Path("best.pth"))
    expected = ["best.pth was trained with DATA.DATASET imagefolder, but --cfg sets cifar10; is this the right "
                "--cfg?"]
    assert [record.getMessage() for record in caplog.records] == expected * warned
