"""Decode, store, augment and batch images and audio clips."""

from pydantic import BaseModel

from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images
from d2v_composer.data.modality import Augmentation, Modality
from d2v_composer.models.configs import EncoderConfig
from d2v_composer.system.errors import InputError

MODALITIES: dict[str, type[Modality]] = {modality.name: modality for modality in (Images, Audio)}


def modality_of(config: EncoderConfig) -> Modality:
    """Return the modality of the samples that an encoder takes."""
    return MODALITIES[config.modality].of(config)


def build_augmentation(loader: BaseModel, modality: Modality, seed: int, for_views: bool = False) -> Augmentation:
    """Build the augmentation for training, or for the views of a sample in an evaluation.

    Args:
        loader: The config's section ``train_loader``.
        for_views: Build the augmentation for views.
    """
    for name in sorted(frozenset().union(*(kind.options for kind in MODALITIES.values())) - modality.options):
        if (value := getattr(loader, name)) != type(loader).model_fields[name].default:
            raise InputError(f"train_loader.{name}: must be left out for {modality.unit}; got {value}")
    options = loader.model_dump(include=set(modality.options))
    return Augmentation(modality.augmentation(for_views, **options), seed)
