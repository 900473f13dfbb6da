"""One thread for every test, since many threads on busy cores wait for one another; a training that tests share."""

import logging

import pytest
import torch

import logger as log
import main
from tests.helpers import arguments, folder

torch.set_num_threads(1)
draw_curves = log.draw_curves
log.draw_curves = lambda folder: None  # matplotlib would take half of the time of a tiny training


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The output folder of a finished training, which tests read and may evaluate."""
    output = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "draw_curves", draw_curves)
        folder(output).mkdir(parents=True)
        (folder(output) / "curves.png").symlink_to("elsewhere.png")
        assert main.main(arguments(output)) == 0
    return output


@pytest.fixture
def log_handlers():
    """Puts the log's handlers back."""
    logger = logging.getLogger("strip_mlp")
    before = logger.handlers
    yield
    logger.handlers = before
