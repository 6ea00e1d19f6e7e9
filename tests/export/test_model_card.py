"""The model card beside an exported student: its license, results and sizes; another README.md stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.fairseq import LICENSES
from d2v_composer.checkpoints.load import load_models
from d2v_composer.commands import evaluate, export
from d2v_composer.evaluation.metrics import AGREEMENT
from d2v_composer.evaluation.metrics.retrieval import retrieval_from
from d2v_composer.evaluation.results import Result
from d2v_composer.export.model_card import name_license, plan_model_card
from d2v_composer.models.backbone import hash_weights
from d2v_composer.models.configs import AudioEncoderConfig, ImageEncoderConfig
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, QUICKSTART, datasets_of, load_checkpoint, slow, small_run
from recipes import train


def small_student(**provenance: Any) -> Student:
    config = ImageEncoderConfig(embed_dim=16, num_heads=2, prenet_depth=1, image_size=32, num_extra_tokens=1)
    return Student(ImageEncoder(config).freeze(), StudentConfig(depth=2), provenance)


def write_card(student: Any, out: Path) -> str:
    """Write the card of a student's file, and return what is said of it."""
    return plan_model_card(student, str(out.with_name("none.pt")), out)()


def card_of(student: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """Write a student's card; return its front matter and its text."""
    assert "wrote" in write_card(student, folder / "mine.safetensors")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("apache-2.0", "apache-2.0"),
        ("Apache-2.0, as this repository", "apache-2.0"),
        (LICENSES[ImageEncoderConfig], "unknown"),
        ("MIT, weights for research only", "mit-weights-for-research-only"),
        ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0"),
        ("the file's; timm states for its own: apache-2.0", "unknown"),
        ("not stated by timm", "unknown"),
        ("", "unknown"),
        ("fair-noncommercial-research-license", "fair-noncommercial-research-license"),
        ("not MIT", "not-mit"),
    ],
)
def test_the_license_is_named_as_it_is_stated(stated: str, name: str, tmp_path: Path) -> None:
    """And comes first unless it allows commercial use."""
    assert name_license(stated) == name
    teacher = {"license": stated, "source": "hub:timm/vit.tag@main", "model": "timm/vit"}
    front, text = card_of(small_student(teacher=teacher), tmp_path)
    is_on_hub = name in ("apache-2.0", "cc-by-nc-sa-4.0", "unknown")
    assert front["license"] == (name if is_on_hub else "other")
    assert front.get("license_name") == (None if is_on_hub else name)
    assert front["base_model"] == "timm/vit.tag"
    assert (f"> **License: {name}" in text) == (name != "apache-2.0")
    assert ("no commercial use" in text) == ("-nc" in name or "noncommercial" in name)
    assert f"(hub:timm/vit.tag@main): {stated or 'nothing'}." in text
    assert "We treat a student as derived from its teacher" in text


def test_a_student_without_a_record_has_a_card(tmp_path: Path) -> None:
    front, text = card_of(small_student(), tmp_path)
    assert (front["license"], front["library_name"], "base_model" in front) == ("unknown", "d2v-composer", False)
    assert "hf upload ORG/NAME mine.safetensors student.safetensors" in text
    assert "No results are recorded" in text


def test_a_student_on_a_stem_of_its_own_has_nothing_of_its_teacher(tmp_path: Path) -> None:
    """As a student of a CNN; tests/recipes/test_module_teacher.py trains one."""
    _, own = card_of(small_student(student={"own_encoder": True}), tmp_path / "own")
    _, shared = card_of(small_student(student={"own_encoder": False}), tmp_path / "shared")
    for words in ("on the first layers of its teacher", "the teacher's own", "in the encoder"):
        assert (words in own, words in shared) == (False, True), words
    assert "2 blocks on a stem of its own" in own


def test_a_student_of_sound_says_how_it_takes_clips(tmp_path: Path) -> None:
    license = LICENSES[AudioEncoderConfig]
    teacher = load_teacher(GOLDEN / "audio_base.pt")
    student = Student(teacher.encoder, StudentConfig(depth=2), {"teacher": teacher.provenance, "data": {"samples": 96}})
    assert teacher.provenance["license"] == license
    front, text = card_of(student, tmp_path)
    assert (front["pipeline_tag"], front["tags"][-1]) == ("feature-extraction", "audio")
    shown = "trained it on 96 clips", "maps an audio clip", "GFLOP per 5-s clip", "| clips | 16 kHz mono"
    for words in (*shown, "student.embed(clips)", license):
        assert words in text, words
    assert "image" not in text


def run_export(*arguments: str | Path) -> None:
    export.main([str(argument) for argument in arguments])


def test_an_exported_checkpoint_has_a_card(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(uninterrupted / "latest-rank0.pt", tmp_path / "student.safetensors")
    assert f"wrote {tmp_path / 'README.md'}, the model card; license: unknown" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert "2 blocks on the first layers of its teacher. d2v-composer trained it on 96 images" in card
    assert "recipes/train.py" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card


def test_a_card_has_the_evaluation_of_its_weights(exported: Path, labeled: Path, tmp_path: Path) -> None:
    """Not another student's, or what another program wrote."""
    student = Path(shutil.copy(exported, tmp_path))
    evaluate.main([f"model={student}", datasets_of(labeled), "max_images=20", f"out={tmp_path}"])
    evaluation, out = tmp_path / "evaluation.json", tmp_path / "more" / "student.safetensors"
    assert json.loads(evaluation.read_text())["weights"] == hash_weights(load_student(student))
    for content in (evaluation.read_text(), '{"weights": "of another student"}', "another program's"):
        evaluation.write_text(content)
        run_export(student, out, "--overwrite")
        card = out.with_name("README.md").read_text()
        assert ("Zero-shot retrieval on small" in card) == ("results" in content)
    assert ".html](" not in card
    run_export(student, beside := tmp_path / "copy.safetensors")
    assert "[evaluation.html](evaluation.html) shows which images" in beside.with_name("README.md").read_text()


def test_the_runs_last_retrieval_is_in_the_card(uninterrupted: Path, tmp_path: Path) -> None:
    """The student was trained on, and a probe was added, since the baselines were measured."""
    shares = {"teacher": 5, "untrained student": 1, "student": 2}
    top1, contents = retrieval_from("train", 1), load_checkpoint(uninterrupted / "latest-rank0.pt")
    student, _ = load_models(str(uninterrupted / "latest-rank0.pt"))
    weights, info = student.identify_weights(), student.embedding

    results = [
        Result(row, "small", top1, "embedding", info, True, torch.arange(10) < hits, weights)
        for row, hits in shares.items()
    ]
    [agreement] = AGREEMENT.columns((), {})
    results.append(results[-1]._replace(column=agreement, hits=torch.full((10,), 0.4)))
    measured = {"history": [{"batch": 12}], "results": [result.plain() for result in results]}
    contents["state"]["callbacks"]["ZeroShotRetrieval"] = measured
    torch.save(contents, tmp_path / "checkpoint.pt")
    run_export(tmp_path / "checkpoint.pt", tmp_path / "exported" / "student.safetensors")
    table = [
        "| | untrained student | student | teacher |",
        "|---|---|---|---|",
        "| small bank_train/top1 | 0.100 | 0.200 | 0.500 |",
        "| small agreement@10 | – | 0.400 | – |",
    ]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "\n".join(["", *table, ""]) in card
    assert "\nmetrics: [accuracy]\n" in card
    assert "The run's last retrieval, by the teacher's output_cls, without intervals." in card


@pytest.mark.parametrize("change", ["weights", "alignment"])
def test_a_card_has_no_results_of_other_weights_or_of_another_alignment(change: str, tmp_path: Path) -> None:
    """As after d2v align, or in a checkpoint between two retrievals."""
    student = small_student()
    student.align(torch.eye(student.embed_dim, 4 * student.embed_dim), torch.zeros(student.embed_dim), "output_cls")
    about = {"weights": student.identify_weights(), "embedding": "embedding", "info": student.embedding._asdict()}
    accuracies = {"small bank_train/top1": {"student": 0.5}}
    student.provenance["results"] = {"accuracies": accuracies, "queries": {"student": about}}
    assert "| small bank_train/top1 | 0.500 |" in card_of(student, tmp_path / "before")[1]
    if change == "weights":
        next(student.blocks.parameters()).data.add_(1)
    else:
        assert student.alignment is not None
        student.align(student.alignment.weight + 1, student.alignment.bias, "output_cls")
    assert "No results are recorded" in card_of(student, tmp_path / "after")[1]


RAW = ("retrieval.representation=output", "retrieval.pooling=cls")


@pytest.mark.parametrize(
    ("options", "heading", "row"),
    [
        slow(RAW, "output_cls", "| student | in the teacher's index (the teacher's output_cls) |"),
        (("alignment.max_samples=0",), "the teacher's output_cls", "| student (raw) |"),
    ],
)
def test_a_card_names_the_embedding_of_each_row(
    options: tuple[str, ...], heading: str, row: str, small_data: Path, labeled: Path, tmp_path: Path
) -> None:
    """A run by raw embeddings, and one without an alignment."""
    train.main(
        small_run(tmp_path / "run", small_data, f"retrieval.{datasets_of(labeled)}", "max_duration=4ba", *options)
    )
    run_export(tmp_path / "run" / "latest-rank0.pt", tmp_path / "student.safetensors")
    card = (tmp_path / "README.md").read_text()
    assert f"The run's last retrieval, by {heading}, without intervals." in card
    assert row in card


def test_a_readme_that_export_did_not_write_is_kept(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    assert write_card(small_student(), tmp_path / "s") == f"kept {readme}: d2v export did not write it"
    assert readme.read_text() == "mine"


def test_a_card_belongs_to_the_student_that_it_describes(tmp_path: Path) -> None:
    first, second, readme = (tmp_path / name for name in ("my first.safetensors", "second.safetensors", "README.md"))
    write_card(small_student(), first)
    first.touch()
    card = readme.read_text().replace("ORG/NAME", "me/mine")
    readme.write_text(card)
    said = write_card(small_student(), second)
    assert said.startswith(f"kept {readme}: it describes {first.name}; to get a model card, export second")
    assert readme.read_text() == card
    first.unlink()
    write_card(small_student(), second)
    assert "NAME second.safetensors student.safetensors" in readme.read_text()


def test_a_card_that_cannot_be_written_is_told_before_the_student_is_written(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(InputError, match=r"README\.md is a folder; expected a file to write"):
        run_export(exported, tmp_path / "student.safetensors")
    assert not (tmp_path / "student.safetensors").exists()


@pytest.mark.parametrize(("pretrained", "license"), [(True, "apache-2.0-and-cc-by-nc-4.0"), (False, "apache-2.0")])
def test_weights_that_a_student_started_from_have_a_license_too(
    pretrained: bool, license: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model  # without the hub
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    teacher = load_teacher(QUICKSTART / "teacher.safetensors")
    student = teacher.build_student(model="timm/convnextv2_atto.fcmae", pretrained=pretrained)
    front, text = card_of(student, tmp_path)
    assert front.get("license_name", front["license"]) == license
    assert ("no commercial use" in text) == ("timm's weights" in text) == pretrained
