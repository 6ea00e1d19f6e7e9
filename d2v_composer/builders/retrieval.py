"""Build the retrieval callback."""

from functools import partial

from d2v_composer.builders.evaluation import build_labelled_sets
from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.config.schema import TrainConfig
from d2v_composer.evaluation.metric_names import Embed
from d2v_composer.evaluation.references import embed_with_encoder, pixels
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import node_leaders_first

__all__ = ["build_references", "build_retrieval"]


def build_retrieval(config: TrainConfig, model: DistillationModel) -> ZeroShotRetrieval | None:
    """Build the section ``retrieval``; ``None`` if it has no data sets.

    Raises:
        InputError: A data set cannot be used.
    """
    retrieval = config.retrieval
    if not any(retrieval.datasets.values()):
        return None
    with node_leaders_first("the data sets for retrieval"):
        datasets = build_labelled_sets(retrieval.datasets, model.teacher.config.image_size)
    if retrieval.max_images is not None:
        datasets = {name: labelled.at_most(retrieval.max_images) for name, labelled in datasets.items()}
    try:
        return ZeroShotRetrieval(
            datasets,
            retrieval.interval,
            retrieval.ks,
            headline=f"{retrieval.representation}_{retrieval.pooling}",
            references=build_references(retrieval.references, model),
            at_start=retrieval.at_start,
            device_batch_size=config.device_eval_batch_size,
            progress_bar=config.progress_bar,
        )
    except ValueError as error:
        raise InputError(f"retrieval: {error}") from error


def build_references(names: list[str], model: DistillationModel) -> dict[str, Embed]:
    """Return the embeddings that the student is compared with: raw pixels, the frozen encoder alone, the teacher."""
    encoder = model.teacher.encoder
    known: dict[str, Embed] = {
        "pixels": partial(pixels, encoder),
        "encoder": model.in_precision(partial(embed_with_encoder, encoder)),
        **model.retrieval_references(),
    }
    return {name: known[name] for name in names}
