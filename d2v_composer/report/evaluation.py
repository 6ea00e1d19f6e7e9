"""Write the files of an evaluation."""

from pathlib import Path
from typing import Any

from d2v_composer.data.modality import Modality
from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.report.gallery import galleries, render
from d2v_composer.report.plots import quality_over_speed, to_png
from d2v_composer.report.tables import accuracy_tables, cost_table
from d2v_composer.system.files import write_atomically


def write_evaluation(
    evaluation: Evaluation, folder: Path, title: str, modality: Modality, context: dict[str, Any]
) -> None:
    """Write ``evaluation.json``, ``.csv``, ``.html`` and, with measured speeds, ``.png``."""
    (folder / "evaluation.png").unlink(missing_ok=True)  # an earlier evaluation may have measured speeds
    evaluation.write(folder, context)
    costs = "Size and computation", cost_table(evaluation.costs, modality.cost_unit, evaluation.speeds)
    tables = [*accuracy_tables(evaluation.results, evaluation.datasets), costs]
    found = list(galleries(evaluation.datasets, evaluation.results, modality.unit))
    write_atomically(folder / "evaluation.html", render("evaluation.html", title=title, tables=tables, found=found))
    if evaluation.speeds:
        figure = quality_over_speed(evaluation, max(evaluation.speeds), modality.unit)
        write_atomically(folder / "evaluation.png", to_png(figure))
