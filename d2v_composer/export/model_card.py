"""Write a student's model card, the README.md beside the student's file."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from d2v_composer.checkpoints.load import save_student
from d2v_composer.checkpoints.timm_student import timm_call
from d2v_composer.data import MODALITIES
from d2v_composer.evaluation.evaluate import cost, read_evaluation
from d2v_composer.evaluation.results import heading, label
from d2v_composer.evaluation.rows import ROWS, STUDENT
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.backbone import hash_weights
from d2v_composer.models.names import timm_name
from d2v_composer.models.provenance import Record, value_at
from d2v_composer.system.errors import reading
from d2v_composer.system.files import check_out_file, write_atomically

CARD_MARK = "d2v export wrote this file and replaces it: remove this line to keep your changes"
# Licenses that allow commercial use, and the others that the hub has a name for.
FREE = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "mit")
NOT_FREE = re.compile(r"unknown|cc-by-nc(-sa|-nd)?-[234]\.0")
# How a note begins if nobody stated the license of these weights.
NOT_STATED = ("not-stated", "the-file-s", "as-the-source-s", "nothing")


def save_with_card(student: Any, source: str, out: Path) -> None:
    """Write a student's .safetensors file and, unless the student is a classifier, its model card."""
    if student.head is None:
        write_card = plan_model_card(student, source, out)
        save_student(student, out, lambda: print(write_card()))  # d2v export is refused once the file is there
    else:
        save_student(student, out)
    print(size_of(student, out))


def size_of(student: Any, out: Path) -> str:
    """Return a line with a student's number of parameters and the size of the student's written file."""
    size = cost(student)["num_parameters"]
    return f"wrote {out}: {size / 1e6:.2f} M parameters, {out.stat().st_size / 1e6:.1f} MB"


def plan_model_card(student: Any, source: str, out: Path) -> Callable[[], str]:
    """Prepare a student's README.md; return a function that writes README.md and returns a line for the user.

    An existing README.md is kept if ``d2v export`` did not write it, or if it describes another file in the folder.
    """
    readme = out.with_name("README.md")
    check_out_file(readme)
    template = Path(__file__).with_name("model_card.md").read_text("utf-8")
    with reading(readme):
        text = readme.read_text("utf-8", "replace") if os.path.lexists(readme) else CARD_MARK
        named = re.search(r"^hf upload \S+ (.+) student\.safetensors$", text, re.MULTILINE)
        described = shlex.split(named[1])[0] if named else out.name
    if CARD_MARK not in text:
        return lambda: f"kept {readme}: d2v export did not write it"
    if described != out.name and out.with_name(described).exists():
        return lambda: (
            f"kept {readme}: it describes {described}; to get a model card, export {out.name} to another folder"
        )
    modality = MODALITIES[student.encoder.config.modality]
    network = getattr(student.config, "model", None)
    with reading(source):
        record = {"teacher": {}, "data": {}, "versions": {}, "command": "not recorded"} | student.provenance
        teacher = {"model": "", "source": "", "license": ""} | record["teacher"]
        results = {"accuracies": {}, "queries": {}} | record.get("results", {})
        by_embedding, titles = choose_rows(results["queries"], student)
        stated, start = [teacher["license"] or ""], None
        if network and value_at(record, "config.student.pretrained"):
            import timm  # the import takes seconds

            start = getattr(timm.get_pretrained_cfg(timm_name(network)), "license", None) or "nothing"
            stated.append(start)
        license = "-and-".join(dict.fromkeys(map(name_license, stated)))
        card = jinja2.Template(template, undefined=jinja2.StrictUndefined, trim_blocks=True).render(
            mark=CARD_MARK,
            license=license,
            is_free=license in FREE,
            is_named_by_hub=license in FREE or NOT_FREE.fullmatch(license) is not None,
            teacher=teacher,
            start=start,
            record=record,
            student=student,
            cost=cost,
            modality=modality,
            network=network,
            shares_encoder=not value_at(record, "student.own_encoder"),
            timm_call=timm_call(student, out.name),
            embedding=student.embedding,
            tables=read_evaluation(Path(source).parent, hash_weights(student)).get("tables", ""),
            accuracies=results["accuracies"],
            by_embedding=by_embedding,
            titles=titles,
            pages=[name for name in ("report.html", "evaluation.html") if out.with_name(name).exists()],
            file=out.name,
            quote=shlex.quote,
        )

    def write() -> str:
        write_atomically(readme, card)
        return f"wrote {readme}, the model card; license: {license}"

    return write


def choose_rows(queries: Record, student: Any) -> tuple[str, dict[str, str]]:
    """Choose the rows of a run's results for a student's card.

    Rows that the run measured with other weights or another alignment of the student are left out.

    Returns:
        The embedding in the table's heading, and row → title; both are empty if no row of the student remains.
    """
    infos = {row: EmbeddingInfo(**about["info"]) for row, about in queries.items()}
    weights, fingerprints = student.identify_weights(), ("", student.embedding.fingerprint)
    texts = {
        title: infos[title].in_words(queries[title]["embedding"])
        for title, row in ROWS.items()
        if title in infos
        and (
            STUDENT not in row.models
            or (queries[title]["weights"] == weights and infos[title].fingerprint in fingerprints)
        )
    }
    if STUDENT not in texts:
        return "", {}
    of_table = heading(texts)
    return of_table, {title: label(title, text, of_table) for title, text in texts.items()}


def name_license(stated: str) -> str:
    """Return the license that a note states, in the spelling of the Hugging Face hub; ``unknown`` if it states none."""
    # A note that says more than a license's name becomes a name of its own: the addition may be a restriction.
    name = re.sub("[^a-z0-9.]+", "-", stated.lower().removesuffix(", as this repository")).strip("-")
    return "unknown" if not name or name.startswith(NOT_STATED) else name
