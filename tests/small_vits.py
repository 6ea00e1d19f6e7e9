"""Small ViTs of each kind, registered in timm, for tests without downloads."""

from typing import Any

import timm
import torch
from timm.models import Beit, Eva, VisionTransformer, register_model
from timm.models.beit import _create_beit
from timm.models.eva import _create_eva
from timm.models.vision_transformer import _create_vision_transformer

__all__ = ["RESAMPLED_BILINEARLY", "random_vit"]

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}


@register_model
def small_beit(pretrained: bool = False, **options: Any) -> Beit:
    """A BEiT whose blocks share one relative bias, and have one of their own."""
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}
    return _create_beit("small_beit", pretrained, **(sizes | options))


@register_model
def small_mixed_rope(pretrained: bool = False, **options: Any) -> Eva:
    """A ViT with learned rotary positions for each block, and registers."""
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_reg_tokens": 2, "global_pool": "token"}
    rope = {"use_rot_pos_emb": True, "rope_type": "mixed", "qkv_bias": True, "init_values": 1.0}
    return _create_eva("small_mixed_rope", pretrained, **(sizes | rope | options))


@register_model
def small_dinov3(pretrained: bool = False, **options: Any) -> Eva:
    rope = {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False}
    extras = {"num_reg_tokens": 2, "init_values": 1.0, "qkv_bias": True, "use_fc_norm": False}
    return _create_eva("small_dinov3", pretrained, **(SMALL | rope | extras | options))


@register_model
def small_dinov3_without_bias(pretrained: bool = False, **options: Any) -> Eva:
    return small_dinov3(pretrained, **({"qkv_bias": False} | options))


def register_small_vit(name: str) -> None:
    """Register a ViT whose name decides how timm resamples its positions."""

    def build(pretrained: bool = False, **options: Any) -> VisionTransformer:
        return _create_vision_transformer(name, pretrained, **(SMALL | options))

    build.__name__ = name
    register_model(build)


RESAMPLED_BILINEARLY = [
    "small_flexi",
    "small_base_patch16_radio_v3",  # with aligned corners
    "small_large_patch16_radio_v3",
    "small_base_patch16_radio_v4",
]
for name in RESAMPLED_BILINEARLY:
    register_small_vit(name)


def random_vit(name: str, noise: float = 0.1, **options: Any) -> Any:
    """Build a model of timm's with random weights, none of them 0 or 1: noise is added to timm's own."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **{"num_classes": 0, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()
