"""Write a student's model card, README.md beside its file, as the Hugging Face hub shows it."""

import json
import re
from pathlib import Path

import jinja2
import torch

from d2v_composer.checkpoints.student_file import choose_embedding, sha256
from d2v_composer.models.sizes import height_and_width
from d2v_composer.models.student import Student
from d2v_composer.report.run import EMBEDDINGS
from d2v_composer.system.errors import reading, writing
from d2v_composer.system.files import write_atomically

MARK = "d2v export wrote this file and replaces it: remove this line to keep your changes"
# What a licence's note says if nobody stated one.
NOT_STATED = ("", "unknown", "not-stated-by-timm", "the-file-s")


def write_model_card(student: Student, source: str, out: Path) -> str:
    """Write README.md, unless there is another one; return a line that says so.

    Args:
        student: With its run's record as provenance.
        source: The file that it was loaded from. An ``evaluation.json`` beside it, of this very file, gives the
            results, with intervals; otherwise the run's last retrieval does.
        out: The exported file.

    Raises:
        InputError: The record, or ``evaluation.json``, is not one of ours.
        RunError: The disk is full.
    """
    readme, evaluation = out.with_name("README.md"), Path(source).with_name("evaluation.json")
    if readme.exists() and MARK not in readme.read_text(errors="replace"):
        return f"kept {readme}, which is no model card of ours"
    with reading(source):
        record = {"teacher": {}, "data": {}, "versions": {}, "command": "not recorded"} | student.provenance
        teacher = {"model": "", "source": "", "licence": ""} | record["teacher"]
        licence = name_licence(teacher["licence"])
        evaluated = json.loads(evaluation.read_bytes()) if evaluation.is_file() else {}
        template = Path(__file__).with_name("model_card.md").read_text()
        card = jinja2.Template(template, undefined=jinja2.StrictUndefined, trim_blocks=True).render(
            mark=MARK,
            licence=licence,
            teacher=teacher,
            record=record,
            student=student,
            parameters=lambda model: sum(map(torch.numel, model.parameters())),
            size=height_and_width(student.encoder.config.image_size),
            embedding=choose_embedding(student, None, None),
            tables=evaluated["tables"] if evaluated and evaluated.get("sha256") == sha256(Path(source)) else "",
            results=record.get("results"),
            other_embeddings=tuple(EMBEDDINGS),
            file=out.name,
        )
    with writing(readme):
        write_atomically(readme, card)
    return f"wrote {readme}: the model card; licence: {licence}"


def name_licence(stated: str) -> str:
    """Return a licence in the hub's words, from the note that is kept with a teacher's weights."""
    begin, whole = (re.sub("[^a-z0-9.]+", "-", each.lower()) for each in (re.split("[,;(]", stated)[0], stated))
    restricted = re.search(r"cc-by-nc-((sa|nd)-)?\d\.\d", whole)
    return "unknown" if begin in NOT_STATED else restricted[0] if restricted else begin
