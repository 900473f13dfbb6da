"""The inference form in an evaluation."""

import pytest
import torch.nn.functional as F

import models.strip_mlp
from config import load_config
from evaluation import inference_form
from models import InputError
from tests.helpers import DIGITS, TINY, tiny_network


def test_the_inference_form_of_a_network_with_another_ingredient_is_refused(monkeypatch):
    config = load_config(DIGITS, [*TINY, "TEST.FUSE", "True"])
    assert inference_form(config, tiny_network()[1]) is not None
    monkeypatch.setattr(models.strip_mlp.F, "gelu", F.silu)
    with pytest.raises(InputError, match="outputs differ from the network's by .* change them there too"):
        inference_form(config, tiny_network()[1])
