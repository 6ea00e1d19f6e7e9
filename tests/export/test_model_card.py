"""The model card beside an exported student: its license, results and sizes; another README.md stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.fairseq import LICENSE_NOTE, LICENSES
from d2v_composer.commands import evaluate, export
from d2v_composer.export.model_card import CARD_MARK, name_license, plan_model_card
from d2v_composer.models.backbone import hash_weights
from d2v_composer.models.configs import AudioEncoderConfig, ImageEncoderConfig
from d2v_composer.models.images import ImageEncoder
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, QUICKSTART, ROOT, small_run
from recipes import train


def written(folder: Path, **provenance: Any) -> tuple[dict[str, Any], str]:
    """Write the card of a small student; return its front matter and its text."""
    config = ImageEncoderConfig(embed_dim=16, num_heads=2, prenet_depth=1, image_size=32, num_extra_tokens=1)
    student = Student(ImageEncoder(config).freeze(), StudentConfig(depth=2), provenance)
    plan_model_card(student, str(folder / "none.pt"), folder / "mine.safetensors")()
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("apache-2.0", "apache-2.0"),
        ("Apache-2.0, as this repository", "apache-2.0"),
        ("CC-BY-NC-4.0", "cc-by-nc-4.0"),
        (LICENSE_NOTE, "unknown"),
        ("MIT, weights for research only", "mit-weights-for-research-only"),
        ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0"),
        ("the file's; timm states for its own: apache-2.0", "unknown"),
        ("not stated by timm", "unknown"),
        ("", "unknown"),
        ("dinov3-license", "dinov3-license"),
        ("fair-noncommercial-research-license", "fair-noncommercial-research-license"),
        ("not MIT", "not-mit"),
    ],
)
def test_the_license_is_named_as_it_is_stated(stated: str, name: str, tmp_path: Path) -> None:
    """And comes first unless it allows commercial use."""
    assert name_license(stated) == name
    front, text = written(tmp_path, teacher={"license": stated, "source": "hub:timm/vit.tag@main", "model": "timm/vit"})
    is_on_hub = name in ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "unknown")
    assert front["license"] == (name if is_on_hub else "other")
    assert front.get("license_name") == (None if is_on_hub else name)
    assert front["base_model"] == "timm/vit.tag"
    assert (f"> **License: {name}" in text) == (name != "apache-2.0")
    assert ("no commercial use" in text) == ("-nc" in name or "noncommercial" in name)
    assert f"(hub:timm/vit.tag@main): {stated or 'nothing'}." in text
    assert "We treat a student as derived from its teacher" in text


def test_a_student_without_a_record_has_a_card(tmp_path: Path) -> None:
    front, text = written(tmp_path)
    assert (front["license"], front["library_name"], "base_model" in front) == ("unknown", "d2v-composer", False)
    assert "hf upload ORG/NAME mine.safetensors student.safetensors" in text
    assert "None are recorded" in text


def test_a_student_of_sound_says_how_it_takes_clips(tmp_path: Path) -> None:
    license = LICENSES[AudioEncoderConfig]
    teacher = load_teacher(GOLDEN / "audio_base.pt")
    student = Student(teacher.encoder, StudentConfig(depth=2), {"teacher": teacher.provenance, "data": {"samples": 96}})
    assert teacher.provenance["license"] == license
    out = tmp_path / "student.safetensors"
    assert "wrote" in plan_model_card(student, str(tmp_path / "none.pt"), out)()
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert (metadata["pipeline_tag"], metadata["tags"][-1]) == ("feature-extraction", "audio")
    for said in (
        "trained it on 96 clips",
        "maps an audio clip",
        "GFLOP per audio second",
        "| clips | 16 kHz mono",
    ):
        assert said in text, said
    assert "student.embed(clips, " in text
    assert license in text
    assert "image" not in text


def test_the_runs_last_retrieval_is_in_the_card(tmp_path: Path) -> None:
    top1 = {"teacher": 0.5, "untrained student": 0.1, "student": 0.25}
    accuracies = {"small bank_train/top1": top1, "small agreement@10": {"student": 0.4}}  # a probe added since
    results = {"batch": 14, "last": 14, "accuracies": accuracies}
    front, text = written(tmp_path, results=json.loads(json.dumps(results)))
    assert front["metrics"] == ["accuracy"]
    table = [
        "| | untrained student | student | teacher |",
        "|---|---|---|---|",
        "| small bank_train/top1 | 0.100 | 0.250 | 0.500 |",
        "| small agreement@10 | – | 0.400 | – |",
    ]
    assert "\n".join(["", *table, ""]) in text
    assert "after 14 batches, in" in text


def test_an_exported_checkpoint_has_a_card_with_its_evaluation(
    uninterrupted: Path, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = uninterrupted / "latest-rank0.pt", tmp_path / "student.safetensors"
    export.main([str(checkpoint), str(out)])
    readme = tmp_path / "README.md"
    assert f"wrote {readme}: the model card; license: unknown" in capsys.readouterr().out
    card = readme.read_text()
    assert "3 blocks on the first layers of its teacher. d2v-composer trained it on 96 images" in card
    assert "recipes/train.py" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    datasets = f"datasets={{small: {{format: mds, root: {labeled}}}}}"
    evaluate.main([str(ROOT / "yamls" / "evaluate.yaml"), f"model={out}", datasets, "max_images=20", f"out={tmp_path}"])
    evaluation = tmp_path / "evaluation.json"
    assert json.loads(evaluation.read_text())["weights"] == hash_weights(load_student(out))
    again = tmp_path / "more" / "again.safetensors"
    export.main([str(out), str(again)])
    assert "Zero-shot retrieval on small" in again.with_name("README.md").read_text()
    for other in ('{"weights": "of another student"}', "another program's"):
        evaluation.write_text(other)
        export.main([str(out), str(again), "--overwrite"])
        expected = card.replace("student.safetensors student", "again.safetensors student")
        assert again.with_name("README.md").read_text() == expected
    readme.write_text(card.replace(CARD_MARK, ""))
    export.main([str(checkpoint), str(out), "--overwrite"])
    assert f"kept {readme}: d2v export did not write it" in capsys.readouterr().out
    assert CARD_MARK not in readme.read_text()


def test_a_card_belongs_to_the_student_that_it_describes(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, readme = uninterrupted / "latest-rank0.pt", tmp_path / "README.md"
    first, second = tmp_path / "my student.safetensors", tmp_path / "second.safetensors"
    readme.mkdir()
    with pytest.raises(InputError, match=rf"^{readme} is a folder; expected a file to write"):
        export.main([str(checkpoint), str(first)])
    assert not first.exists()  # refused before it is written
    readme.rmdir()
    export.main([str(checkpoint), str(first)])
    card = readme.read_text().replace("ORG/NAME", "me/mine")
    readme.write_text(card)
    export.main([str(checkpoint), str(second)])
    assert f"kept {readme}: it describes my student.safetensors; in another folder, second" in capsys.readouterr().out
    assert readme.read_text() == card
    first.unlink()
    export.main([str(checkpoint), str(second), "--overwrite"])
    assert "NAME second.safetensors student.safetensors" in readme.read_text()


def test_a_checkpoint_says_that_its_results_are_older(
    small_data: Path, labeled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = f"retrieval.datasets={{small: {{format: mds, root: {labeled}}}}}", "retrieval.interval=3ba"
    options = *sets, "retrieval.baselines=[]", "max_duration=6ba", "save_num_checkpoints_to_keep=-1"
    monkeypatch.setattr("sys.argv", ["recipes/train.py"])
    train.main(small_run(tmp_path, small_data, *options))
    for batch, said in ((4, "after 3 batches (this student was trained for 4), in"), (6, "after 6 batches, in")):
        [checkpoint] = tmp_path.glob(f"*-ba{batch}-rank0.pt")
        out = tmp_path / str(batch) / "student.safetensors"
        export.main([str(checkpoint), str(out)])
        assert said in out.with_name("README.md").read_text()


@pytest.mark.parametrize(("pretrained", "license"), [(True, "apache-2.0-and-cc-by-nc-4.0"), (False, "apache-2.0")])
def test_weights_that_a_student_started_from_have_a_license_too(
    pretrained: bool, license: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model  # without the hub
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    teacher = load_teacher(QUICKSTART / "teacher.safetensors")
    student = teacher.build_student(model="timm/convnextv2_atto.fcmae", pretrained=pretrained)
    plan_model_card(student, str(tmp_path / "none.pt"), tmp_path / "mine.safetensors")()
    card = (tmp_path / "README.md").read_text()
    assert f"license_name: {license}\n" in card if pretrained else f"license: {license}\n" in card
    assert ("no commercial use" in card) == ("timm's weights" in card) == pretrained
