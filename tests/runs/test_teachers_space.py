"""A student in its teacher's space: the same map on any ranks, in every file, measured in the teacher's index."""

import csv
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from containers import write_parquet
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import load_models, save_student
from d2v_composer.commands import align, embed, evaluate, export, merge
from d2v_composer.config.reference import ModelReference
from d2v_composer.embedding.embed_source import IndexRecord
from d2v_composer.embedding.index import read_index
from d2v_composer.evaluation.embedded_set import embed_set
from d2v_composer.evaluation.measurement import measure
from d2v_composer.evaluation.results import Result
from d2v_composer.evaluation.rows import IN_INDEX, STUDENT, TEACHER, UNTRAINED, rows_of
from d2v_composer.evaluation.settings import Settings
from d2v_composer.models.alignment import EmbeddingInfo
from d2v_composer.models.names import EMBEDDING
from d2v_composer.models.timm_network import TimmStudent
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples
from d2v_composer.system.errors import InputError, RunError
from helpers import (
    GOLDEN,
    QUICKSTART,
    contents_of,
    datasets_of,
    encoded_image,
    load_checkpoint,
    log_of,
    map_of,
    refused_run,
    run_ranks,
    run_training,
    small_run,
    train_command,
    write_files,
)
from small_students import computed_by_timm_alone
from small_vits import random_vit

TEACHER_FILE = GOLDEN / "tiny_base.pt"


def test_two_ranks_fit_the_same_bits(small_data: Path, tmp_path: Path) -> None:
    """Without training, so that both have the same weights but for biases of 1e-30."""
    options = ("optimizer.lr=1e-30", "max_duration=2ba", "scheduler.t_warmup=0ba", "device_eval_batch_size=16")
    run_training(*small_run(tmp_path / "one", small_data, *options))
    run_ranks(*train_command(small_run(tmp_path / "two", small_data, *options))[1:])
    one, two = (map_of(tmp_path / name) for name in ("one", "two"))
    assert one["about"] == two["about"]
    assert one["about"]["pairs"] == 96
    assert all(torch.equal(one[name], two[name]) for name in ("weight", "bias"))


def test_the_map_is_fitted_only_at_the_end_if_no_retrieval_needs_it(
    small_data: Path, labeled: Path, tmp_path: Path
) -> None:
    """A run that then goes on measures no map of weights that it had before."""
    raw = "retrieval.pooling=cls", "retrieval.representation=output"
    options = f"retrieval.{datasets_of(labeled)}", *raw, "retrieval.interval=2ba", "scheduler.t_warmup=0ba"
    in_index = "metrics/small/in_index/bank_train/top1"
    run_training(*small_run(tmp_path / "run", small_data, *options, "max_duration=4ba"))
    assert list(log_of(tmp_path / "run")[in_index]) == [4]
    assert map_of(tmp_path / "run")["batch"] == 4
    run_training(*small_run(tmp_path / "run", small_data, *options, "max_duration=7ba"))
    assert list(log_of(tmp_path / "run")[in_index]) == [4, 6, 7]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_every_file_has_the_map_of_the_last_batch(uninterrupted: Path, pixels: Tensor, tmp_path: Path) -> None:
    checkpoint, path, program = uninterrupted / "latest-rank0.pt", tmp_path / "s.safetensors", tmp_path / "s.pt2"
    trained, _ = load_models(str(checkpoint))
    expected = trained.embed(pixels)
    fitted = map_of(uninterrupted)
    assert trained.alignment is not None
    assert torch.equal(trained.alignment.weight, fitted["weight"])
    export.main([str(checkpoint), str(path)])
    assert "| embedding | output_cls, 48 channels, estimated by an alignment |" in (tmp_path / "README.md").read_text()
    student = load_student(path)
    assert torch.equal(student.embed(pixels), expected)
    assert student.provenance["alignment"] == fitted["about"]
    export.main([str(path), str(program), "--preprocessing", "in"])
    computed = torch.export.load(program).module()(pixels.movedim(1, -1).contiguous())
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)


def test_a_checkpoint_before_the_first_map_has_none(uninterrupted: Path) -> None:
    earlier, _ = load_models(str(uninterrupted / "ep1-ba12-rank0.pt"))
    assert earlier.embedding[:4] == ("output_cls", "raw", 48, "")


def test_timm_alone_computes_the_map_of_its_own_model(pixels: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = load_teacher(TEACHER_FILE).build_student(model="timm/test_byobnet")
    student.eval().align(torch.randn(24, student.width_of("output_cls")), torch.randn(24), "output_cls")
    save_student(student, tmp_path / "network.safetensors")
    export.main([str(tmp_path / "network.safetensors"), str(tmp_path / "student.safetensors")])
    again = load_student(tmp_path / "student.safetensors")
    assert isinstance(again, TimmStudent)
    expected = student.embed(pixels)
    torch.testing.assert_close(again.embed(pixels), expected)
    computed = computed_by_timm_alone(tmp_path, student.encoder.prepare(pixels))
    torch.testing.assert_close(computed, expected)


def test_blocks_on_a_timm_vit_keep_their_map_in_a_file(tmp_path: Path) -> None:
    torch.save(random_vit("test_vit").state_dict(), tmp_path / "vit.pt")
    teacher = load_teacher(tmp_path / "vit.pt", model="timm/test_vit", image_size=32)
    student = teacher.build_student(depth=1).eval()
    student.align(torch.randn(24, 4 * student.embed_dim), torch.randn(24), "output_cls")
    save_student(student, tmp_path / "student.safetensors")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mapped = load_student(tmp_path / "student.safetensors").embed(images)
    assert torch.equal(mapped, student.embed(images))


class Measured:
    """A student whose map is exact: its embedding is the teacher's."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (80, 3, 4, 4), dtype=torch.uint8, generator=generator)
        labels = torch.arange(80) % 4
        self.labeled = EvaluationSet(LabeledSamples(images[:40], labels[:40]), LabeledSamples(images[40:], labels[40:]))
        self.settings = Settings(EMBEDDING, (1,), ("agreement",), None, 16, has_teacher=True)
        mapped = EmbeddingInfo("output_mean", "alignment", 48, "of the map", "of the teacher")
        of_teacher = mapped._replace(made_by="teacher", fingerprint="")
        self.infos: dict[str, EmbeddingInfo] = {UNTRAINED: mapped, STUDENT: mapped, TEACHER: of_teacher}

    def student(self, images: Tensor) -> dict[str, Tensor]:
        flat = images.flatten(1).float()
        return {"own": flat[:, :4], EMBEDDING: flat.square()}

    def teacher(self, images: Tensor) -> dict[str, Tensor]:
        flat = images.flatten(1).float()
        return {"own": flat[:, 4:8], EMBEDDING: flat.square()}

    def results(self, *models: str) -> list[Result]:
        embeds = {name: self.teacher if name == TEACHER else self.student for name in models}
        embedded = embed_set(embeds, "set", self.labeled, self.settings, self.infos)
        return list(measure(rows_of(embeds, self.infos), embedded, "set", self.labeled, self.settings, self.infos))


def test_the_student_is_looked_up_in_its_teachers_index() -> None:
    hits = {(result.row, result.column): result.hits for result in Measured().results(UNTRAINED, STUDENT, TEACHER)}
    rows = dict.fromkeys(row for row, _ in hits)
    assert [*rows] == [UNTRAINED, STUDENT, IN_INDEX, TEACHER]
    columns = dict.fromkeys(column for _, column in hits)
    assert [column.name for column in columns] == ["retrieval", "retrieval", "agreement"]
    for row, column in hits:
        assert torch.equal(hits[row, column], hits[TEACHER, column]), (row, column)


def test_every_embedding_is_measured_by_its_name_alone() -> None:
    measured = Measured()
    measured.settings = measured.settings._replace(headline="own", needs_all=True)
    results = {
        (result.row, result.embedding, result.column.key): result for result in measured.results(STUDENT, TEACHER)
    }
    named = {(row, name) for row, name, _ in results}
    assert named == {*product((STUDENT, TEACHER), ("own", EMBEDDING)), (IN_INDEX, EMBEDDING)}
    for (row, name, _), result in results.items():
        assert result.is_headline == (name == "own" or row == IN_INDEX)
    own, mapped = (results[STUDENT, name, "agreement@10"].hits.mean() for name in ("own", EMBEDDING))
    assert own < mapped == 1  # each is compared with the teacher's of the same name
    assert results[STUDENT, "own", "bank_train/top1"].info == ("own", "raw", 4, "", "")


@pytest.mark.parametrize("space", ["", "of another teacher"])
def test_a_student_of_another_space_is_not_looked_up_in_its_teachers_index(space: str) -> None:
    measured = Measured()
    measured.infos[STUDENT] = measured.infos[STUDENT]._replace(space=space)
    assert {result.row for result in measured.results(STUDENT, TEACHER)} == {STUDENT, TEACHER}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    return write_files(folder, {f"{number:03}.jpg": encoded_image(number) for number in range(120)})


Index = tuple[np.ndarray, np.ndarray]
"""Ids, and the embedding of each."""


@pytest.fixture(scope="module")
def embedded(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "old.npy"
    embed.main([str(TEACHER_FILE), str(photos), str(path), "--workers", "0"])
    return path


@pytest.fixture
def index(embedded: Path) -> Index:
    """The photos as their teacher embeds them."""
    return np.load(embedded.with_suffix(".ids.npy")), np.load(embedded)


def write_index(path: Path, ids: np.ndarray, rows: np.ndarray) -> None:
    """Write ids and embeddings as ``d2v embed`` does."""
    if path.suffix == ".parquet":
        write_parquet(path, {"id": ids.tolist(), "embedding": list(rows)})
        return
    np.save(path.with_suffix(".ids.npy"), ids)
    np.save(path, rows)


def run_align(student: Path, photos: Path, out: Path, *options: str | Path) -> None:
    align.main(list(map(str, (student, photos, out, "--workers", 0, *options))))


@pytest.mark.parametrize("kind", ["old.npy", "old.parquet", "float16", "teacher"])
def test_a_student_finds_what_an_old_index_finds(
    kind: str, exported: Path, photos: Path, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, rows = index
    shuffled, out = np.random.default_rng(0).permutation(len(ids)), tmp_path / "out.safetensors"
    old = tmp_path / (kind if "." in kind else "old.npy")
    write_index(old, ids[shuffled], rows[shuffled].astype("float16" if kind == "float16" else "float32"))
    run_align(exported, photos, out, *(("--to", TEACHER_FILE) if kind == "teacher" else ("--index", old)))
    assert "held-out tenth of the samples: 0." in capsys.readouterr().out
    aligned = load_student(out).provenance["alignment"]
    assert aligned["pairs"] == 120
    assert aligned["r2"] > 0.2
    embed.main([str(out), str(photos), str(tmp_path / "q.npy"), "--workers", "0"])
    error = np.square(np.load(tmp_path / "q.npy") - rows).sum() / np.square(rows - rows.mean(axis=0)).sum()
    assert error < 1 - aligned["r2"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_an_index_says_which_embedding_of_which_model_it_holds(
    suffix: str, exported: Path, photos: Path, tmp_path: Path
) -> None:
    """So one knows which student's queries it answers, and the model is loaded again."""

    def record_of(name: str, model: Path, *options: str) -> IndexRecord:
        out = str(tmp_path / f"{name}{suffix}")
        embed.main([str(model), str(photos), out, "--workers", "0", *options])
        if options[-2:] == ("--part", "1/2"):
            embed.main([str(model), str(photos), out, "--workers", "0", "--part", "0/2"])
            merge.main([out])
        record = read_index(out).made_by
        assert record is not None
        return record

    default, mean = record_of("default", TEACHER_FILE), record_of("mean", TEACHER_FILE, "--pooling", "mean")
    records = default, mean, record_of("student", exported), record_of("raw", exported, "--pooling", "cls")
    embedding = load_student(exported).embedding
    assert [embedding.is_in_space_of(record["embedding"]) for record in records] == [True, False, True, False]
    assert record_of("merged", TEACHER_FILE, "--part", "1/2") == default
    again = ModelReference(**mean["reference"])
    teacher, _ = again.load()
    assert teacher.describe(teacher.choose_embedding(again.pooling, again.representation)) == mean["embedding"]
    run_align(exported, photos, tmp_path / "aligned.safetensors", "--index", tmp_path / f"mean{suffix}")
    aligned, own_teacher = load_models(str(tmp_path / "aligned.safetensors"), teacher=str(TEACHER_FILE))
    assert own_teacher is not None
    assert aligned.embedding.of == "output_mean"
    assert aligned.embedding.is_in_space_of(own_teacher.embedding)


def test_a_damaged_record_of_an_index_is_one_line(exported: Path, photos: Path, index: Index, tmp_path: Path) -> None:
    write_index(tmp_path / "old.npy", *index)
    (tmp_path / "old.model.json").write_text('{"reference": {}, "model": "", "embedding": {"of": [1]}}')
    with pytest.raises(InputError, match=r"old.model.json cannot be read: \d+ validation errors for IndexRecord$"):
        run_align(exported, photos, tmp_path / "out.safetensors", "--index", tmp_path / "old.npy")


def with_nan(rows: np.ndarray) -> np.ndarray:
    rows[7, 1] = np.nan
    return rows


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids, rows: (np.char.add("cats/", ids), rows), r"has no row for any sample of .*'cats/000.jpg#?0?'"),
        (lambda ids, rows: (ids.repeat(2), rows.repeat(2, 0)), "; left out 240 rows with repeated ids"),
        (
            lambda ids, rows: (ids[:23], rows[:23]),
            r"expected at least 24 readable samples, each with an embedding to align to, got 23",
        ),
        (
            lambda ids, rows: (ids, with_nan(rows)),
            r"the row with id '007.jpg\S*: expected only zeros, or finite numbers",
        ),
        (lambda ids, rows: (ids, rows[:-1]), r"old\.ids\.npy cannot be read: expected one id for each of the 119 rows"),
        (lambda ids, rows: (ids, rows[:1].repeat(120, 0)), "but they are alike in all 120 pairs"),
        (lambda ids, rows: (ids, np.roll(rows, 50, 0)), "check that its ids are those of the samples"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    spoil: Callable[..., Index], message: str, exported: Path, photos: Path, index: Index, tmp_path: Path
) -> None:
    write_index(tmp_path / "old.npy", *spoil(*index))
    before = contents_of(tmp_path)
    with pytest.raises((InputError, RunError), match=message):
        run_align(exported, photos, tmp_path / "out.safetensors", "--index", tmp_path / "old.npy")
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["out.safetensors", "--to", GOLDEN / "audio_base.pt"], "audio_base.pt takes clips, but .* takes images$"),
        (
            ["out.safetensors", "--index", "old.npy", "--pooling", "mean"],
            "--pooling and --representation can be used only with",
        ),
        (["out.onnx", "--to", TEACHER_FILE], "out.onnx must end in .safetensors"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: list[str | Path], message: str, exported: Path, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_align(exported, photos, tmp_path / options[0], *options[1:])


def test_the_fewest_pairs_make_a_map_and_fewer_readable_samples_none(
    exported: Path, embedded: Path, tmp_path: Path
) -> None:
    photos = write_files(tmp_path / "photos", {f"{number:03}.jpg": encoded_image(number) for number in range(24)})
    run_align(exported, photos, tmp_path / "out.safetensors", "--index", embedded)
    (photos / "007.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected at least 24 readable samples, each .*, got 23"):
        run_align(exported, photos, tmp_path / "again.safetensors", "--to", TEACHER_FILE)


def test_a_student_aligned_with_what_its_run_did_not_use_is_not_measured_in_its_teachers_index(
    exported: Path, photos: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"  # its teacher's layer_mean has fewer layers
    save_student(load_teacher(TEACHER_FILE, first_blocks=3).build_student(depth=1), other)
    cases = ((exported, GOLDEN / "tiny_alibi.pt", False), (other, TEACHER_FILE, False), (exported, TEACHER_FILE, True))
    for number, (path, teacher, is_own) in enumerate(cases):
        out = tmp_path / f"{number}.safetensors"
        run_align(path, photos, out, "--to", teacher, "--representation", "layer_mean")
        aligned, loaded = load_models(str(out), teacher=str(TEACHER_FILE))
        assert loaded is not None
        assert aligned.embedding.is_in_space_of(loaded.embedding) == is_own


def test_a_run_of_epochs_keeps_the_map_of_its_end(small_data: Path, tmp_path: Path) -> None:
    """Its last batch is saved before its last epoch ends."""
    options = "max_duration=1ep", "save_interval=3ba", "alignment.representation=layer_mean"
    run_training(*small_run(tmp_path / "run", small_data, *options))
    fitted = map_of(tmp_path / "run")
    assert fitted["batch"] == 6
    assert fitted["about"]["of"] == "layer_mean_cls"


def test_rows_that_share_an_id_are_left_out_and_counted(
    exported: Path, photos: Path, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, rows = index
    write_index(tmp_path / "old.npy", np.concatenate([ids, ids[:3]]), np.concatenate([rows, rows[:3] + 1]))
    run_align(exported, photos, tmp_path / "out.safetensors", "--index", tmp_path / "old.npy")
    assert (
        "117 pairs of a sample and a row with the same id, from 120 samples and 123 rows of the index; "
        "rows left out because of repeated ids: 6\n" in capsys.readouterr().out
    )


def test_an_evaluation_has_no_row_of_a_map_that_an_untrained_student_lacks(labeled: Path, tmp_path: Path) -> None:
    """A timm student has its map as classifier, which the untrained one has at random."""
    teacher, out = load_teacher(TEACHER_FILE), tmp_path / "student.safetensors"
    student = teacher.build_student(model="timm/test_byobnet").eval()
    space = teacher.embedding.space
    student.align(torch.randn(48, student.width_of("output_cls")), torch.randn(48), "output_cls", space=space)
    student.provenance |= {"teacher": teacher.provenance}
    save_student(student, out)
    options = [datasets_of(labeled), f"out={tmp_path}"]
    evaluate.main([f"model={out}", f"teacher={TEACHER_FILE}", *options])
    table = (tmp_path / "evaluation.csv").read_text()
    assert IN_INDEX in table
    assert "untrained student" not in table
    assert "encoder" not in table  # a student with an encoder of its own


def test_align_writes_one_file(exported: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    run_align(exported, photos, Path("out.safetensors"), "--to", TEACHER_FILE)
    assert os.listdir(here) == ["out.safetensors"]


def batches_of_rows(run: Path) -> dict[str, int]:
    """Return each row of a run's last table with the batch at which it was measured."""
    state = load_checkpoint(run / "latest-rank0.pt")["state"]
    return {result["row"]: result["batch"] for result in state["callbacks"]["ZeroShotRetrieval"]["results"]}


def test_a_resume_without_the_map_keeps_no_row_of_it(small_data: Path, labeled: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path, small_data, f"retrieval.{datasets_of(labeled)}", "scheduler.t_warmup=0ba")
    run_training(*run, "max_duration=2ba")
    run_training(*run, "max_duration=4ba", "alignment.max_samples=0")
    batches = batches_of_rows(tmp_path)
    assert batches["student"] == 4
    assert IN_INDEX not in batches


@pytest.mark.parametrize("number", [1, 19])
def test_too_few_samples_for_a_map_are_refused(number: int, small_data: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", small_data, f"alignment.max_samples={number}")
    assert f"alignment.max_samples: must be 0, or at least 20, got {number}" in refused_run(run)


def test_the_teachers_embedding_is_its_own_whatever_the_run_sets(small_data: Path, tmp_path: Path) -> None:
    """As d2v embed gives it."""
    teacher, images = load_teacher(TEACHER_FILE), torch.rand(2, 3, 32, 32)
    expected = teacher.embed(images, representation="layer_mean")
    teacher.name_embedding("layer_mean_cls")
    shared = teacher.embed_all(images, layer_mean=teacher.layer_mean.changed(normalization="layer"))
    torch.testing.assert_close(shared["embedding"], expected)
    assert not torch.allclose(shared["layer_mean_cls"], expected)
    line = refused_run(small_run(tmp_path, small_data, "alignment.representation=layer_mean", "teacher.first_blocks=3"))
    assert "alignment.representation: layer_mean needs all layers of the teacher" in line


def test_a_teacher_has_its_own_embedding_beside_a_student_without_a_map(labeled: Path, tmp_path: Path) -> None:
    """Such a timm student has timm's pooled feature, which is named otherwise."""
    teacher_file, out = QUICKSTART / "teacher.safetensors", tmp_path / "student.safetensors"
    teacher = load_teacher(teacher_file)
    student = teacher.build_student(model="timm/test_byobnet").eval()
    student.provenance |= {"teacher": teacher.provenance}
    save_student(student, out)
    evaluate.main([f"model={out}", f"teacher={teacher_file}", datasets_of(labeled), f"out={tmp_path}"])
    rows = csv.DictReader((tmp_path / "evaluation.csv").read_text().splitlines())
    found = {row["candidate"]: row["of"] for row in rows if row["candidate"] != "pixels"}
    assert found == {"untrained student": "output_cls", "student": "output_cls", "teacher": "output_mean"}
