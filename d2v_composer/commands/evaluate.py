"""Measure a model, and compare the model with its teacher, an untrained student and simple baselines.

usage: d2v evaluate [FILE.yaml] model=PATH [key=value …]

    d2v evaluate yamls/evaluate.yaml model=runs/quickstart/latest-rank0.pt
    d2v evaluate model=student.safetensors 'datasets={cifar10: {format: cifar10, root: datasets, download: true}}'
    d2v evaluate yamls/evaluate.yaml model=base_imagenet.pt weights=ema representation=output out=evaluation
    d2v evaluate yamls/evaluate.yaml model=timm/vit_small_patch14_dinov2 checkpoint=dinov2.safetensors image_size=112
    d2v evaluate yamls/evaluate.yaml model=student.safetensors 'rivals=[timm/resnet18.a1_in1k, narrow.safetensors]'

The model is a teacher's file, a training checkpoint, an exported student, or timm/NAME. The tables show the accuracy of
retrieval. ``probes='[knn, linear, agreement, instance, zero_shot]'`` adds further metrics, and ``rivals`` further
models. The results are written to the folder ``out``, if ``out`` is set. `d2v fields evaluation` lists all fields.
"""

from collections.abc import Sequence
from pathlib import Path

from d2v_composer.system import command_line
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.errors import InputError


def main(argv: Sequence[str]) -> None:
    """Evaluate a model: print the tables and, if ``out`` is set, write the results to that folder."""
    command_line.show_help(argv, __doc__)

    import torch

    from d2v_composer.config.load import load_evaluate_config
    from d2v_composer.data import modality_of
    from d2v_composer.evaluation.evaluate import check_replaceable
    from d2v_composer.evaluation.speed import measure_speeds
    from d2v_composer.models.backbone import hash_weights
    from d2v_composer.models.precision import choose_precision
    from d2v_composer.report.tables import evaluation_tables
    from d2v_composer.runs.comparison import build_comparison
    from d2v_composer.system.machine import describe_machine, package_versions

    config = load_evaluate_config(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, evaluation = build_comparison(config, device)
    weights = hash_weights(model)
    if config.out is not None:
        check_replaceable(Path(config.out), weights)
    if "agreement" in config.probes and not evaluation.settings.has_teacher:
        raise InputError("probes: agreement needs the teacher; set teacher=PATH")
    modality = modality_of(model.encoder.config)
    print(f"embedding: {model.describe(evaluation.settings.headline)}")
    autocast_dtype = choose_precision(config.precision).autocast_dtype
    evaluation.run(device, autocast_dtype)
    if config.rivals:
        evaluation.speeds.update(measure_speeds(evaluation, model.encoder.noise, device, autocast_dtype))
    tables = evaluation_tables(evaluation, modality.cost_unit)
    print(tables)
    if config.out is not None:
        about = {"machine": describe_machine(), "versions": package_versions(), "weights": weights, "tables": tables}
        from d2v_composer.report.evaluation import write_evaluation  # matplotlib takes a second

        context = {"config": config.model_dump(mode="json"), **about}
        write_evaluation(evaluation, Path(config.out), hide_secrets(config.model), modality, context)
    if config.model.endswith("-rank0.pt"):
        moved = [] if config.teacher is None else ["--teacher", config.teacher]
        step = d2v("export", config.model, "student.safetensors", *moved)
    else:
        flags = list[str]()
        for name in ("weights", "checkpoint", "first_blocks", "image_size", "pooling", "representation"):
            if (value := getattr(config, name)) not in (None, "model"):
                flags += [f"--{name.replace('_', '-')}", str(value)]
        step = d2v("embed", config.model, modality.unit.upper(), "embeddings.npy", *flags)
    print_next(step)
