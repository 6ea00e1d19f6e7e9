"""Build the retrieval callback."""

from d2v_composer.builders.evaluation import build_labelled_sets
from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.checkpoints.headline import Headline
from d2v_composer.config.schema import TrainConfig
from d2v_composer.evaluation.embed_function import Embed
from d2v_composer.evaluation.references import WITHOUT_MODEL, build_embeds
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import node_leaders_first

__all__ = ["build_retrieval"]


def build_retrieval(config: TrainConfig, model: DistillationModel) -> ZeroShotRetrieval | None:
    """Build the section ``retrieval``; ``None`` if it has no data sets.

    Raises:
        InputError: A data set cannot be used.
    """
    retrieval = config.retrieval
    if not any(retrieval.datasets.values()):
        return None
    with node_leaders_first("the data sets for retrieval"):
        sizes = model.teacher.config
        datasets = build_labelled_sets(retrieval, sizes.image_size, sizes.interpolation)
    embeds = build_run_embeds(model)
    try:
        return ZeroShotRetrieval(
            datasets,
            retrieval.interval,
            retrieval.ks,
            embed=embeds["student"],
            headline=Headline(retrieval.representation, retrieval.pooling).name,
            references={name: embeds[name] for name in retrieval.references},
            measured_first=WITHOUT_MODEL,
            at_start=retrieval.at_start,
            probes=retrieval.probes,
            device_batch_size=config.device_eval_batch_size,
            progress_bar=config.progress_bar,
        )
    except ValueError as error:
        raise InputError(f"retrieval: {error}") from error


def build_run_embeds(model: DistillationModel) -> dict[str, Embed]:
    """Return the embed functions of pixels, encoder, student and teacher, in the run's precision."""
    embeds = build_embeds(model.teacher.encoder, {"student": model.student, "teacher": model.teacher})
    return {name: model.in_precision(embed) for name, embed in embeds.items()}
