"""Importing this module registers ``d2v2_student`` with timm."""

from typing import Any

from timm.models import build_model_with_cfg, register_model

from d2v_composer.checkpoints.timm_student import NAME, TimmWrapper, pretrained_cfg

__all__ = ["d2v2_student"]


@register_model
def d2v2_student(pretrained: bool = False, **kwargs: Any) -> TimmWrapper:
    """Build a student as a timm model, for ``timm.create_model("d2v2_student", checkpoint_path=FILE)``.

    FILE is a student's .safetensors file from ``d2v export``. A student that is a timm model is created by its timm
    name instead.

    Args:
        pretrained: Load the file that ``pretrained_cfg_overlay`` names.
        **kwargs: Arguments of :class:`~d2v_composer.checkpoints.timm_student.TimmWrapper`.

    Returns:
        A ``torch.nn.Module`` that maps normalized images, (B, 3, height, width) float, or waveforms, (B, L) float, to
        (B, ``num_classes``) or, if ``num_classes`` is 0, to pooled features, (B, channels).

    Raises:
        ValueError: ``features_only`` is true, but ``pretrained`` is false.

    Example:
        >>> import timm, d2v_composer.timm_models
        >>> student = timm.create_model("d2v2_student", checkpoint_path="student.safetensors", num_classes=10)
        >>> logits = student(torch.rand(2, 3, 32, 32))  # (2, 10), from a new head
    """
    if kwargs.get("features_only") and not pretrained:
        raise ValueError("features_only: d2v2_student needs pretrained=True and pretrained_cfg_overlay=dict(file=FILE)")
    kwargs["feature_cfg"] = {"feature_cls": "getter", "out_indices": (0,)}
    not_ours: Any = ("in_chans", "img_size")  # timm's defaults; the file has its own
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or pretrained_cfg(None)  # timm gives None
    return build_model_with_cfg(TimmWrapper, NAME, pretrained, kwargs_filter=not_ours, **kwargs)
