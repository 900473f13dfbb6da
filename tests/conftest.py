"""One thread for every test, since many threads on busy cores wait for one another; a training that tests share."""

import os

if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; it reads this when PyTorch imports it

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The output folder of a finished training, which tests read and may evaluate."""
    import main
    from tests.helpers import arguments

    output = tmp_path_factory.mktemp("trained")
    assert main.main(arguments(output)) == 0
    return output
