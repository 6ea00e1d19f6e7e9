"""Fine-tune a classifier from a student, a teacher or a checkpoint: train, evaluate, save, report.

usage: composer recipes/finetune.py FILE.yaml model=PATH [dotted.key=value …]

    composer recipes/finetune.py yamls/finetune.yaml model=runs/quickstart/latest-rank0.pt
    composer recipes/finetune.py yamls/finetune.yaml model=student.safetensors \\
        'dataset={format: folder, root: photos}' run_name=photos
    composer recipes/finetune.py yamls/finetune.yaml model=student.safetensors train_encoder=true \\
        optimizer.layer_decay=0.75 run_name=whole

composer starts a process for each GPU; on one device, python does the same. `d2v fields fine-tuning` lists every field.
Run the same command again to resume.
"""

import d2v_composer.system.cpu_threads  # noqa: F401  (first: torch reads the environment when it is imported)

# isort: split
from collections.abc import Sequence

from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)

from composer import Callback, Trainer

from d2v_composer.builders.finetune import EVALUATOR, build_finetuning
from d2v_composer.builders.run import fit_and_close, join_and_seed, write_run_report
from d2v_composer.checkpoints.checkpoint import LATEST
from d2v_composer.config.load import load_finetune_config
from d2v_composer.config.schema import FinetuneConfig
from d2v_composer.data.modalities import modality_of
from d2v_composer.models.classification import Classifier
from d2v_composer.models.student import Student
from d2v_composer.report.tables import format_table
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.third_party import patched_composer


def main(argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> Trainer:
    """Fine-tune a classifier, from the run's last checkpoint if there is one.

    Args:
        argv: A YAML and its overrides.
        callbacks: Further callbacks, besides the YAML's.
    """
    config = load_finetune_config(argv)
    join_and_seed(config)
    built = build_finetuning(config)
    with patched_composer(built.checkpoint and built.checkpoint.contents):
        built.trainer_arguments["callbacks"].extend(callbacks)
        trainer = Trainer(**built.trainer_arguments)
    fit_and_close(trainer, config, built.header, lambda: report(trainer, config, built.model))
    name_next_step(config, built.model)
    return trainer


def report(trainer: Trainer, config: FinetuneConfig, model: Classifier) -> None:
    """Print the accuracy of the last evaluation, and write the report into the run's folder."""
    metrics = trainer.state.eval_metric_values
    found = {name: float(metrics[name]) for name in model.metrics if name in metrics}
    if found:
        loss = f"{found.pop('loss'):.4f}"
        row = [config.run_name, *(f"{100 * value:.2f}" for value in found.values()), loss]
        table = format_table(["", *(name.replace("top", "top-") for name in found), "loss"], [row])
        unit = modality_of(model.backbone.encoder.config).unit
        print(f"\n{EVALUATOR} {unit}, batch {int(trainer.state.timestamp.batch)}, accuracy in %\n{table}")
    write_run_report(trainer, config)


def name_next_step(config: FinetuneConfig, model: Classifier) -> None:
    """Print how to export the classifier."""
    run_folder = config.run_folder
    if run_folder is not None and isinstance(model.backbone, Student):
        print_next(d2v("export", run_folder.local / LATEST, run_folder.local / "classifier.safetensors"))


if __name__ == "__main__":
    command_line.run(main)
