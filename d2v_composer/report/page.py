"""Write the report of a run."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml

from d2v_composer.evaluation.run_log import HEALTH_STATES
from d2v_composer.report.gallery import galleries, render
from d2v_composer.report.plots import TESTED, accuracy_plots, curves, to_png
from d2v_composer.report.run import Run, latest, verdicts
from d2v_composer.report.tables import accuracy_tables, cost_table
from d2v_composer.system.files import write_atomically


def write_report(run: Run, folder: Path) -> list[Path]:
    """Write ``report.html``, and the report's plots as ``report/*.png``, into a run's folder.

    Returns:
        The written files, the page first.
    """
    results, training = ([(name, to_png(figure)) for name, figure in plots(run)] for plots in (accuracy_plots, curves))
    page = render(
        "page.html",
        record=run.record,
        num_batches=int(latest(run.log.get("time/batch", {})) or 0),
        warnings=[
            f"{problem} (health/{state} in the log): first at batch {min(batches)}, last at batch {max(batches)}"
            for state, problem in HEALTH_STATES.items()
            if (batches := [step for step, value in run.log.get(f"health/{state}", {}).items() if value])
        ],
        answers=list(verdicts(run)),
        tables=[*accuracy_tables(run.results, run.retrieval["datasets"]), *cost_tables(run)],
        accuracies={name: latest(run.log.get(f"metrics/test/{key}", {})) for key, name in TESTED.items()},
        results=results,
        training=training,
        unit=run.modality.unit,
        found=list(galleries(run.datasets, run.results, run.modality.unit)),
        dump=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    )
    files = {f"report/{name}.png": png for name, png in results + training}
    (folder / "report").mkdir(exist_ok=True)
    for name, content in {**files, "report.html": page}.items():
        write_atomically(folder / name, content)
    return [folder / name for name in ("report.html", *files)]


def cost_tables(run: Run) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the title and the lines of the table of costs, if the run's record has costs."""
    if costs := run.record.get("costs"):
        yield "Size and computation", cost_table(costs, run.modality.cost_unit)
