"""Build the models and the data sets of an evaluation."""

import sys
from contextlib import suppress
from pathlib import Path

import torch

from d2v_composer.checkpoints.model_file import build_encoder
from d2v_composer.config.reference import load_any
from d2v_composer.config.schema import EvaluateConfig, LookupConfig, ShardLoaderConfig
from d2v_composer.data import build_augmentation, modality_of
from d2v_composer.data.modality import Augmentation, Modality, collate
from d2v_composer.evaluation.evaluate import Evaluation, cost, share_encoders
from d2v_composer.evaluation.rows import GAP, GAP_CLOSED, ROWS, STUDENT, TEACHER, UNTRAINED
from d2v_composer.evaluation.settings import Settings
from d2v_composer.models.alignment import EmbeddingInfo, Moments, side_by_side
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import TimmNetworkConfig
from d2v_composer.models.names import EMBEDDING, JOINT, TIMM_PREFIX
from d2v_composer.models.precision import precision_of
from d2v_composer.models.provenance import distillation_of, has_tuned_encoder, value_at
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.objectives import build_objectives
from d2v_composer.sources.labeled import EvaluationSet, open_labeled_sets
from d2v_composer.sources.mds import Index, choose_alignment_samples
from d2v_composer.sources.source import open_mds
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.processes import global_rank


def build_labeled_sets(lookup: LookupConfig, modality: Modality, embedding: EmbeddingInfo) -> dict[str, EvaluationSet]:
    """Load the data sets in ``lookup.datasets`` that are not null, and return the data sets by name.

    A warning is printed if test samples are also training samples.
    """
    width = embedding.width if embedding.of == JOINT else 0
    if "zero_shot" in lookup.probes and not width:
        raise InputError(f"probes: zero_shot needs the embedding {JOINT!r}, got {embedding.of!r}")
    sets = {name: load() for name, load in open_labeled_sets(lookup.model_dump(), modality).items()}
    widths = {labeled.class_embeddings.shape[1] for labeled in sets.values() if labeled.class_embeddings is not None}
    if "zero_shot" in lookup.probes and widths != {width}:
        raise InputError(
            f"probes: zero_shot needs data sets with class_embeddings that have {width} columns; got "
            f"{' and '.join(map(str, sorted(widths))) or 'none'}"
        )
    for name, labeled in sets.items() if global_rank() == 0 else ():
        if shared := labeled.count_shared():
            overlap = f"{shared} of {len(labeled.test.labels)} test {modality.unit}"
            print(f"warning: {name}: {overlap} are also in its train split", file=sys.stderr)
    return sets


def build_untrained(model: Backbone, teacher: Teacher | None) -> Backbone | None:
    """Build the student as it was before its training or, if the model is a teacher, the teacher's default student.

    Returns:
        The student; ``None``, after a line on stderr, if the initial weights are not available.
    """
    if isinstance(model, Teacher):
        return model.build_student()
    if isinstance(model.config, TimmNetworkConfig):
        from d2v_composer.models.timm_network import TimmStudent  # timm takes seconds to import

        is_pretrained = value_at(distillation_of(model.provenance), "config.student.pretrained") or False
        try:
            return TimmStudent(model.config, pretrained=is_pretrained)
        except ValueError as error:  # the hub cannot be reached
            print(f"the untrained student is not measured: {error}", file=sys.stderr)
            return None
    record = distillation_of(model.provenance)
    init = value_at(record, "config.student.init") or "random"
    if value_at(record, "student.own_encoder"):
        return Student(build_encoder(model.encoder.config), model.config)
    if teacher is not None:
        return teacher.build_student(**model.config.model_dump(exclude={"kind"}), init=init)
    is_tuned = has_tuned_encoder(model.provenance)
    if init == "random" and not is_tuned:
        return Student(model.encoder, model.config)
    part = "encoder" if is_tuned else f"weights (init {init})"
    print(f"the untrained student is not measured: its {part} came from the teacher; set teacher=PATH", file=sys.stderr)
    return None


def align_untrained(untrained: Backbone, model: Backbone, teacher: Teacher | None, device: str) -> bool:
    """Align an untrained student with the teacher's embedding, in the same way as the trained student.

    Returns:
        True; False, after a line on stderr, if the run's teacher or training samples are not available.
    """
    info, source, batches = model.embedding, None, []
    if info.made_by in ("teacher", "raw"):
        untrained.raw_embedding = model.raw_embedding
        return True
    config, modality = value_at(distillation_of(model.provenance), "config"), modality_of(model.encoder.config)
    if info.made_by == "training" and teacher is not None:
        build_objectives(config["objectives"], teacher, untrained)  # with the random numbers of the run
        return True
    with suppress(InputError, LookupError, TypeError):
        loader, sizes = config["train_loader"], (config["seed"], config["alignment"]["max_samples"])
        if loader["remote"] is None:  # else it is a cache
            source = open_mds(index := Index(Path(loader["local"]), modality, loader["column"]))
            batches = choose_alignment_samples(index, *sizes, config["device_eval_batch_size"])
    if source is None or teacher is None or not teacher.embedding.is_in_space_of(info):
        if teacher is None:
            needed = "the run's teacher (teacher=PATH)"
        elif source is None:
            needed = "the run's training samples on this machine"
        else:
            needed = f"the embedding {info.of!r} of the run's teacher"
        print(f"the untrained student is not measured: its alignment needs {needed}", file=sys.stderr)
        return False
    samples = (collate([*map(source.decode, numbers.tolist())]) for numbers in batches)
    inputs = ([tensor.to(device) for tensor in batch] for batch in samples)
    embeds, names = (untrained.eval().to(device).embed_all, teacher.to(device).embed_all), untrained.alignment_inputs
    with torch.inference_mode():
        pairs = ([embed(*batch) for embed in embeds] for batch in inputs)
        moments = Moments((side_by_side(ours, names), theirs[EMBEDDING]) for ours, theirs in pairs)
    fit = moments.fit()
    untrained.align(fit.weight, fit.bias, info.of, space=info.space)
    return True


def load_rival(place: str, modality: str) -> Backbone:
    """Load a further model to compare: a file or, as ``timm/NAME``, a model of timm."""
    with errors_of("rivals"):
        if place.startswith(TIMM_PREFIX) and not Path(place).exists():
            from d2v_composer.models.timm_network import load_pretrained  # timm takes seconds to import

            model: Backbone = load_pretrained(place)
        else:
            model, _ = load_any(place)
        if (rival_modality := model.encoder.config.modality) != modality:
            raise InputError(
                f"{place}: expected a model for {modality} samples, got a model for {rival_modality} samples"
            )
    return model


def build_comparison(config: EvaluateConfig, device: str) -> tuple[Backbone, Evaluation]:
    """Load a model, and build the evaluation that compares the model with baselines and other models.

    Returns:
        The model, and the evaluation, which has not run yet.
    """
    model, teacher = config.load()
    modality = modality_of(model.encoder.config)
    with torch.random.fork_rng(), reading(config.model):
        run_seed = value_at(distillation_of(model.provenance), "config.seed")
        torch.manual_seed(config.seed if run_seed is None else run_seed)  # as the run's build_model does
        untrained = build_untrained(model, teacher)
        recorded = value_at(model.provenance, "config.train_loader") or {}
        loader = ShardLoaderConfig(**{name: recorded[name] for name in modality.options & recorded.keys()})
        headline = model.choose_embedding(config.pooling, config.representation)
        if untrained is not None and headline == EMBEDDING and not align_untrained(untrained, model, teacher, device):
            untrained = None
    places = [*map(hide_secrets, config.rivals)]
    for place in places:
        if place in (*ROWS, GAP_CLOSED):
            raise InputError(f"rivals: {place!r} is the name of another row; write the file as ./{place}")
        if places.count(place) > 1:
            raise InputError(f"rivals: {place!r} is listed more than once")
    compared = zip(GAP, (untrained, None if isinstance(model, Teacher) else model, teacher), strict=True)
    models = {name: candidate.eval().to(device) for name, candidate in compared if candidate is not None}
    first = teacher or model
    embeds = share_encoders(first, models, model.layer_mean)
    shown = {*config.baselines, UNTRAINED, STUDENT} - ({"encoder"} if has_tuned_encoder(model.provenance) else set())
    embeds = {name: embed for name, embed in embeds.items() if name in shown}
    groups, parts = {modality: embeds}, {"encoder": first.encoder, **models}
    for place, name in zip(config.rivals, places, strict=True):
        parts[name] = rival = load_rival(place, modality.name).eval().to(device)
        groups.setdefault(modality_of(rival.encoder.config), {})[name] = rival.embed_all
    settings = Settings(
        headline,
        config.ks,
        config.probes,
        augment=None,  # each modality has its own
        batch_size=config.device_eval_batch_size,
        has_teacher=TEACHER in embeds,
        needs_all=bool(config.embeddings),
    )

    def load(taken: Modality) -> tuple[dict[str, EvaluationSet], Augmentation]:
        sets = build_labeled_sets(config, taken, model.embedding)
        for name, labeled in sets.items():
            settings.check(name, labeled)
        return sets, build_augmentation(loader, taken, config.seed, for_views=True)

    with torch.device(device), precision_of(None, device):
        costs = {name: cost(parts.get(name)) for group in groups.values() for name in group}
    infos = {"encoder": first.embedding}
    infos |= {name: part.embedding for name, part in parts.items() if isinstance(part, Backbone)}
    weights = {name: part.identify_weights() for name, part in parts.items() if isinstance(part, Backbone)}
    return model, Evaluation(groups, costs, settings, infos, weights, load)
