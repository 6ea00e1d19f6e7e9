"""Build the augmentation that the section ``train_loader`` describes."""

from d2v_composer.config.schema import ShardLoaderConfig
from d2v_composer.data.modalities import MODALITIES
from d2v_composer.data.modality import Modality
from d2v_composer.sources.labeled import Augmentation
from d2v_composer.system.errors import InputError


def build_augmentation(
    loader: ShardLoaderConfig, modality: Modality, seed: int, for_views: bool = False
) -> Augmentation:
    """Build the augmentation of the training samples, or of the views of a sample in an evaluation.

    Raises:
        InputError: An option of another modality is set.
    """
    for name in sorted(frozenset().union(*(kind.options for kind in MODALITIES.values())) - modality.options):
        if (value := getattr(loader, name)) != ShardLoaderConfig.model_fields[name].default:
            raise InputError(f"train_loader.{name}: must be left out for a teacher of {modality.unit}; got {value}")
    options = loader.model_dump(include=set(modality.options))
    return Augmentation(modality.augmentation(for_views=for_views, **options), seed)
