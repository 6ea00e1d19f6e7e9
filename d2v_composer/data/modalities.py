"""Find a modality by an encoder's config or by name."""

from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images
from d2v_composer.data.modality import Modality
from d2v_composer.models.configs import EncoderConfig

MODALITIES: dict[str, type[Modality]] = {modality.name: modality for modality in (Images, Audio)}


def modality_of(config: EncoderConfig) -> Modality:
    """Return the modality of the samples that an encoder takes."""
    return MODALITIES[config.modality].of(config)
