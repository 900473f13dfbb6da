"""Registers the variants with timm: ``timm.create_model("strip_mlp_tiny")``, also with ``features_only``."""

import re

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet

from . import smlpnet, strip_mlp, wavemlp
from .backbone import Backbone
from .smlpnet import SMLPNet
from .strip_mlp import StripMLPNet
from .wavemlp import WaveMLP
from .weights import fit_state_dict

_NETWORKS = {  # by class: its variants and its timm settings
    StripMLPNet: (strip_mlp.VARIANTS, {"first_conv": "stem", "classifier": "head", "fixed_input_size": True}),
    SMLPNet: (smlpnet.VARIANTS, {
        "first_conv": "to_patch_embedding.0.0", "classifier": "mlp_head.0", "fixed_input_size": True,
    }),
    WaveMLP: (wavemlp.VARIANTS, {"first_conv": "patch_embed.proj", "classifier": "head"}),
}

default_cfgs = generate_default_cfgs({
    name: {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 224 / 256,
        "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, **settings,
    }
    for variants, settings in _NETWORKS.values() for name in variants
})


class StageFeatures(FeatureGetterNet):
    """The result of ``features_only``: timm's feature extractor, which also loads the weights of a whole network, and
    with which the tools for fine-tuning work as with the network."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the network's."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """As the network's."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """As the network's."""
        def inside(pattern: str) -> str:
            return rf"^model\.{pattern.removeprefix('^')}"

        matcher = self.model.group_matcher(coarse)
        return {"stem": inside(matcher["stem"]), "blocks": [(inside(p), order) for p, order in matcher["blocks"]]}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        if any(key.startswith("model.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)

        def part(key):
            return re.match(r"[^.]*\.\d+|[^.]*", key)[0]

        parts = {part(key) for key in self.model.state_dict()}  # the others were pruned
        weights = {key: value for key, value in fit_state_dict(state_dict, self.model).items() if part(key) in parts}
        return self.model.load_state_dict(weights, strict, assign)


def _register(network: type[Backbone], variant: str, arguments: dict) -> None:
    def create(pretrained: bool = False, device=None, dtype=None, output_stride: int = 32, **kwargs) -> Backbone:
        if output_stride != 32:
            raise ValueError(f"{variant}: output_stride {output_stride} is not supported, since stages cannot be "
                             "dilated; use 32, and a decoder that takes strides of 4 to 32 (FPN, UPerNet, a U-Net)")
        model = build_model_with_cfg(
            network, variant, pretrained, pretrained_filter_fn=fit_state_dict,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": StageFeatures}, **(arguments | kwargs),
        )
        return model.to(device=device, dtype=dtype)

    create.__name__ = create.__qualname__ = variant
    register_model(create)


for _network, (_variants, _) in _NETWORKS.items():
    for _variant, _arguments in _variants.items():
        _register(_network, _variant, _arguments)
