"""Write a student's model card, README.md beside its file, for the Hugging Face hub."""

import json
import re
import shlex
from pathlib import Path

import jinja2
import torch

from d2v_composer.checkpoints.student_file import choose_embedding
from d2v_composer.data.modalities import modality_of
from d2v_composer.embedding import hash_weights
from d2v_composer.models.student import Student
from d2v_composer.report.run import EMBEDDINGS
from d2v_composer.system.errors import reading, writing
from d2v_composer.system.files import write_atomically

MARK = "d2v export wrote this file and replaces it: remove this line to keep your changes"
# Licences that allow commercial use, and the others that the hub has a name for.
FREE = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "mit")
NOT_FREE = re.compile(r"unknown|cc-by-nc(-sa|-nd)?-[234]\.0")
# How a note begins if nobody stated the licence of these weights.
NOT_STATED = ("not-stated", "the-file-s", "as-the-source-s")


def write_model_card(student: Student, source: str, out: Path) -> str:
    """Write README.md, unless another one exists; return a line that says what was done.

    Args:
        student: With its run's record as provenance.
        source: The file that it was loaded from. An ``evaluation.json`` beside it, of the same weights, gives the
            results, with intervals; otherwise the run's last retrieval does.
        out: The exported file.

    Raises:
        InputError: The record, or ``evaluation.json``, is not one of ours.
        RunError: The disk is full.
    """
    readme, evaluation = out.with_name("README.md"), Path(source).with_name("evaluation.json")
    if readme.exists() and MARK not in readme.read_text("utf-8", "replace"):
        return f"kept {readme}: d2v export did not write it"
    with reading(evaluation):
        evaluated = json.loads(evaluation.read_bytes()) if evaluation.is_file() else {}
        has_tables = "weights" in evaluated and evaluated["weights"] == hash_weights(student)
    modality = modality_of(student.encoder.config)
    with reading(source):
        record = {"teacher": {}, "data": {}, "versions": {}, "command": "not recorded"} | student.provenance
        teacher = {"model": "", "source": "", "licence": ""} | record["teacher"]
        licence = name_licence(teacher["licence"] or "")
        template = Path(__file__).with_name("model_card.md").read_text("utf-8")
        card = jinja2.Template(template, undefined=jinja2.StrictUndefined, trim_blocks=True).render(
            mark=MARK,
            licence=licence,
            is_free=licence in FREE,
            is_named_by_hub=licence in FREE or NOT_FREE.fullmatch(licence) is not None,
            teacher=teacher,
            record=record,
            student=student,
            parameters=lambda model: sum(map(torch.numel, model.parameters())),
            unit=modality.unit,
            words=modality.words(),
            embedding=choose_embedding(student, None, None),
            tables=evaluated["tables"] if has_tables else "",
            results=record.get("results"),
            other_embeddings=tuple(EMBEDDINGS),
            file=out.name,
            quote=shlex.quote,
        )
    with writing(readme):
        write_atomically(readme, card)
    return f"wrote {readme}: the model card; license: {licence}"


def name_licence(stated: str) -> str:
    """Return the hub's name of a license, from the note stored with a teacher's weights.

    A note that says anything more than a license's name has a name of its own: what it adds may be a restriction.
    """
    name = re.sub("[^a-z0-9.]+", "-", stated.lower().removesuffix(", as this repository")).strip("-")
    return "unknown" if not name or name.startswith(NOT_STATED) else name
