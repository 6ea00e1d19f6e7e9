"""Register the student with timm: ``import d2v_composer.timm_models``."""

from typing import Any

from timm.models import build_model_with_cfg, register_model

from d2v_composer.checkpoints.timm_student import NAME, TimmWrapper, pretrained_cfg

__all__ = ["d2v2_student"]


@register_model
def d2v2_student(pretrained: bool = False, **kwargs: Any) -> TimmWrapper:
    """Build the thesis's student as a timm model, for ``timm.create_model("d2v2_student", checkpoint_path=FILE)``.

    FILE is a .safetensors file that ``d2v export`` wrote; loading FILE sets the model's sizes.

    Args:
        pretrained: Load the file in ``pretrained_cfg_overlay``; no weights are published.
        **kwargs: Arguments of :class:`~d2v_composer.checkpoints.timm_student.TimmWrapper`: ``num_classes`` (the width
            of the file's alignment: the output is the embedding; 0: the output is the features; another number: the
            head is new), ``global_pool``, ``representation``.

    Returns:
        A ``torch.nn.Module``: normalized images, (B, 3, S, S) float → (B, ``num_classes``), or the features, (B, D).

    Raises:
        ValueError: ``features_only`` is true, but not ``pretrained``: the sizes of feature maps are in a file.

    Example:
        >>> import timm, d2v_composer.timm_models
        >>> student = timm.create_model("d2v2_student", checkpoint_path="student.safetensors", num_classes=10)
        >>> logits = student(torch.rand(2, 3, 32, 32))  # (2, 10); the head is new, the rest is the file's
    """
    if kwargs.get("features_only") and not pretrained:
        raise ValueError("features_only: d2v2_student needs pretrained=True, pretrained_cfg_overlay=dict(file=FILE)")
    kwargs["feature_cfg"] = {"feature_cls": "getter", "out_indices": (0,)}
    not_ours: Any = ("in_chans", "img_size")  # timm's defaults; the file has its own
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or pretrained_cfg(None)  # timm gives None
    return build_model_with_cfg(TimmWrapper, NAME, pretrained, kwargs_filter=not_ours, **kwargs)
