"""Registers the variants with timm: ``timm.create_model("strip_mlp_tiny")``, also with ``features_only``."""

import re

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet

from .strip_mlp import VARIANTS, StripMLPNet
from .weights import fit_state_dict

default_cfgs = generate_default_cfgs({
    name: {
        "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "pool_size": (7, 7),
        "crop_pct": 224 / 256, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem", "classifier": "head",
    }
    for name in VARIANTS
})


class StripMLPFeatures(FeatureGetterNet):
    """What ``features_only`` makes: timm's feature extractor, which also loads the weights of a whole network."""

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        if any(key.startswith("model.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)

        def part(key):
            return re.match(r"(stages|merging)\.\d+|[^.]*", key)[0]

        parts = {part(key) for key in self.model.state_dict()}  # the others were pruned
        weights = {key: value for key, value in fit_state_dict(state_dict, self.model).items() if part(key) in parts}
        return self.model.load_state_dict(weights, strict, assign)


def _create(variant: str, pretrained: bool, **kwargs) -> StripMLPNet:
    return build_model_with_cfg(
        StripMLPNet, variant, pretrained, pretrained_filter_fn=fit_state_dict,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": StripMLPFeatures}, **(VARIANTS[variant] | kwargs),
    )


@register_model
def strip_mlp_tiny_light(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-T*: 18.2 M parameters, 2.5 G multiply-accumulates at 224."""
    return _create("strip_mlp_tiny_light", pretrained, **kwargs)


@register_model
def strip_mlp_tiny(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-T: 24.9 M parameters, 3.7 G multiply-accumulates at 224."""
    return _create("strip_mlp_tiny", pretrained, **kwargs)


@register_model
def strip_mlp_small(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-S: 42.6 M parameters, 6.8 G multiply-accumulates at 224."""
    return _create("strip_mlp_small", pretrained, **kwargs)


@register_model
def strip_mlp_base(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-B: 57.2 M parameters, 9.2 G multiply-accumulates at 224."""
    return _create("strip_mlp_base", pretrained, **kwargs)
