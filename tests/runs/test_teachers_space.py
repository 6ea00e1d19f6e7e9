"""A student in its teacher's space: the same map on any ranks, in every file, measured in the teacher's index."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from containers import write_parquet
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import load_models, save_student
from d2v_composer.commands import align, embed, evaluate, export
from d2v_composer.evaluation.labeled_retrieval import Lookup, measure_embeddings
from d2v_composer.evaluation.rows import AGREEMENT, STUDENT, TEACHER, UNTRAINED, retrieval_from, rows_of
from d2v_composer.models.names import PROJECTED
from d2v_composer.models.timm_network import NetworkStudent
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples
from d2v_composer.system.errors import InputError, RunError
from helpers import (
    GOLDEN,
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
    options = f"retrieval.{datasets_of(labeled)}", "retrieval.interval=2ba", "scheduler.t_warmup=0ba"
    in_index = "metrics/small/in_teacher_index/bank_train/top1"
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
    expected = trained.embed(pixels, representation="projected")
    fitted = map_of(uninterrupted)
    assert torch.equal(trained.alignment.weight, fitted["weight"])
    export.main([str(checkpoint), str(path)])
    assert "; representation='projected' → (B, 48), in another model's space\n" in (tmp_path / "README.md").read_text()
    student = load_student(path)
    assert torch.equal(student.embed(pixels, representation="projected"), expected)
    assert student.provenance["alignment"] == fitted["about"]
    export.main([str(path), str(program), "--representation", "projected", "--preprocessing", "in"])
    computed = torch.export.load(program).module()(pixels.movedim(1, -1).contiguous())
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)


def test_a_checkpoint_whose_map_is_of_other_weights_has_none(uninterrupted: Path) -> None:
    earlier, _ = load_models(str(uninterrupted / "ep1-ba12-rank0.pt"))
    assert earlier.alignment is None
    assert PROJECTED not in earlier.embedding_names


def test_timm_alone_computes_the_map_of_its_own_model(pixels: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = load_teacher(TEACHER_FILE).build_student(model="timm/test_byobnet")
    student.eval().align(torch.randn(24, student.encoder.num_pooled), torch.randn(24))
    save_student(student, tmp_path / "network.safetensors")
    export.main([str(tmp_path / "network.safetensors"), str(tmp_path / "student.safetensors")])
    again = load_student(tmp_path / "student.safetensors")
    assert isinstance(again, NetworkStudent)
    expected = student.embed(pixels, representation="projected")
    torch.testing.assert_close(again.embed(pixels, representation="projected"), expected)
    aligned = computed_by_timm_alone(tmp_path, "aligned", student.encoder.prepare(pixels))
    torch.testing.assert_close(aligned, expected)


def test_blocks_on_a_timm_vit_keep_their_map_in_a_file(tmp_path: Path) -> None:
    torch.save(random_vit("test_vit").state_dict(), tmp_path / "vit.pt")
    teacher = load_teacher(tmp_path / "vit.pt", model="timm/test_vit", image_size=32)
    student = teacher.build_student(depth=1).eval()
    student.align(torch.randn(24, 4 * student.embed_dim), torch.randn(24))
    save_student(student, tmp_path / "student.safetensors")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mapped = load_student(tmp_path / "student.safetensors").embed(images, representation="projected")
    assert torch.equal(mapped, student.embed(images, representation="projected"))


class Measured:
    """A student whose map is exact: its embeddings in the teacher's space are the teacher's."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (80, 3, 4, 4), dtype=torch.uint8, generator=generator)
        labels = torch.arange(80) % 4
        self.labeled = EvaluationSet(LabeledSamples(images[:40], labels[:40]), LabeledSamples(images[40:], labels[40:]))
        self.lookup = Lookup("own", (1,), ("agreement",), None, 16, {}, target="output_mean")
        self.num_taught = 0

    def student(self, images: Tensor) -> dict[str, Tensor]:
        flat = images.flatten(1).float()
        return {"own": flat[:, :4], PROJECTED: flat.square()}

    def teacher(self, images: Tensor) -> dict[str, Tensor]:
        self.num_taught += len(images)
        flat = images.flatten(1).float()
        return {"own": flat[:, 4:8], "output_mean": flat.square()}

    def hits(self, *models: str) -> dict[tuple[str, Any], Tensor]:
        embeds = {name: self.teacher if name == TEACHER else self.student for name in models}
        rows = [row for row in rows_of(embeds, "output_mean") if row.changes_in_training or not self.num_taught]
        results = list(measure_embeddings(rows, embeds, "set", self.labeled, self.lookup))
        assert all(result.is_primary for result in results if result.embedding != "output_mean")
        return {(result.row, result.measure): result.hits for result in results if result.is_primary}


def test_a_student_whose_primary_embedding_is_the_map_keeps_its_row() -> None:
    measured, embeds = Measured(), {STUDENT: Measured().student}
    lookup = replace(measured.lookup, primary=PROJECTED, teacher_neighbors=None)
    results = measure_embeddings(rows_of(embeds, "output_mean"), embeds, "set", measured.labeled, lookup)
    primary = {(result.row, result.measure): result.hits for result in results if result.is_primary}
    for measure in (retrieval_from("train", 1), retrieval_from("test", 1)):
        assert torch.equal(primary[STUDENT, measure], primary[f"{STUDENT}, projected", measure])


def test_the_student_is_looked_up_in_its_teachers_index() -> None:
    measured, retrieval = Measured(), retrieval_from("train", 1)
    first, later = measured.hits(UNTRAINED, TEACHER), measured.hits(STUDENT, TEACHER)
    assert measured.num_taught == 80  # not again
    for measure in (retrieval, retrieval_from("test", 1), AGREEMENT):
        target = first[f"{TEACHER}, projected", measure]
        for hits, student in ((first, UNTRAINED), (later, STUDENT)):
            for row in (f"{student}, projected", f"{student} in the teacher's index"):
                assert torch.equal(hits[row, measure], target), (row, measure)
            assert not torch.equal(hits[student, measure], target)
    assert later[f"{STUDENT} in the teacher's index", AGREEMENT].min() == 1


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
    assert "R²: 0." in capsys.readouterr().out
    aligned = load_student(out).provenance["alignment"]
    assert aligned["pairs"] == 120
    assert aligned["r2"] > 0.2
    embed.main([str(out), str(photos), str(tmp_path / "q.npy"), "--representation", "projected", "--workers", "0"])
    error = np.square(np.load(tmp_path / "q.npy") - rows).sum() / np.square(rows - rows.mean(axis=0)).sum()
    assert error < 1 - aligned["r2"]


def with_nan(rows: np.ndarray) -> np.ndarray:
    rows[7, 1] = np.nan
    return rows


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids, rows: (np.char.add("cats/", ids), rows), r"has rows for 0 samples of .*'cats/000.jpg#?0?'"),
        (
            lambda ids, rows: (ids[:39], rows[:39]),
            r"39 samples of .*; expected at least 40 \(half the index's width, or 40 if ",
        ),
        (lambda ids, rows: (ids, with_nan(rows)), r"the row of 007.jpg\S* has numbers that are not finite"),
        (lambda ids, rows: (ids, rows[:-1]), r"one id each, got float32 \(119, \d+\), 120 ids"),
        (lambda ids, rows: (ids, rows[:1].repeat(120, 0)), "that differ, got 120 pairs that are alike"),
        (lambda ids, rows: (ids, np.roll(rows, 50, 0)), r"do the ids belong to these rows, in order\?"),
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
        (["out.safetensors", "--to", GOLDEN / "audio_base.pt"], "audio_base.pt takes audio, but .* takes image$"),
        (["out.safetensors", "--index", "old.npy", "--pooling", "mean"], "--pooling and --representation apply only"),
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
    photos = write_files(tmp_path / "photos", {f"{number:03}.jpg": encoded_image(number) for number in range(40)})
    run_align(exported, photos, tmp_path / "out.safetensors", "--index", embedded)
    (photos / "007.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="expected at least 40 samples that can be read, got 39"):
        run_align(exported, photos, tmp_path / "again.safetensors", "--to", TEACHER_FILE)


def test_a_student_aligned_with_what_its_run_did_not_use_is_not_measured_in_its_teachers_index(
    exported: Path, photos: Path, tmp_path: Path
) -> None:
    student, other = load_student(exported), tmp_path / "other.safetensors"
    student.provenance["config"]["teacher"]["first_blocks"] = 3
    save_student(student, other)
    cases = ((exported, GOLDEN / "tiny_alibi.pt", False), (other, TEACHER_FILE, False), (exported, TEACHER_FILE, True))
    for number, (path, teacher, has_target) in enumerate(cases):
        out = tmp_path / f"{number}.safetensors"
        run_align(path, photos, out, "--to", teacher, "--representation", "layer_mean")
        about = load_student(out).provenance["alignment"]
        assert about.get("target") == ("layer_mean_cls" if has_target else None)
        _, loaded = load_models(str(out), teacher=str(TEACHER_FILE))
        assert loaded is not None
        assert loaded.projection is None


def test_a_run_of_epochs_keeps_the_map_of_its_end(small_data: Path, tmp_path: Path) -> None:
    """Its last batch is saved before its last epoch ends."""
    options = "max_duration=1ep", "save_interval=3ba", "alignment.representation=layer_mean"
    run_training(*small_run(tmp_path / "run", small_data, *options))
    fitted = map_of(tmp_path / "run")
    assert fitted["batch"] == 6
    assert fitted["about"]["target"] == "layer_mean_mean"


def test_rows_that_share_an_id_are_left_out_and_counted(
    exported: Path, photos: Path, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, rows = index
    write_index(tmp_path / "old.npy", np.concatenate([ids, ids[:3]]), np.concatenate([rows, rows[:3] + 1]))
    run_align(exported, photos, tmp_path / "out.safetensors", "--index", tmp_path / "old.npy")
    assert "pairs: 117 of 120 samples and 123 rows; left out 6 rows with repeated ids" in capsys.readouterr().out


def test_an_evaluation_has_no_row_of_a_map_that_an_untrained_student_lacks(labeled: Path, tmp_path: Path) -> None:
    """A timm student has its map as classifier, which the untrained one has at random."""
    teacher, out = load_teacher(TEACHER_FILE), tmp_path / "student.safetensors"
    student = teacher.build_student(model="timm/test_byobnet").eval()
    student.align(torch.randn(48, student.encoder.num_pooled), torch.randn(48))
    student.provenance |= {"teacher": teacher.provenance, "alignment": {"target": "output_cls"}}
    save_student(student, out)
    options = [datasets_of(labeled), "pooling=cls", "representation=output", f"out={tmp_path}"]
    evaluate.main([f"model={out}", f"teacher={TEACHER_FILE}", *options])
    table = (tmp_path / "evaluation.csv").read_text()
    assert "student in the teacher's index" in table
    assert not re.search("untrained student(, projected| in)", table)


def batches_of_rows(run: Path) -> dict[str, int]:
    """Return each row of a run's last table with the batch at which it was measured."""
    state = load_checkpoint(run / "latest-rank0.pt")["state"]
    return {row: batch for row, *_, batch, _ in state["callbacks"]["ZeroShotRetrieval"]["results"]}


def test_a_resume_without_the_map_keeps_no_row_of_it(small_data: Path, labeled: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path, small_data, f"retrieval.{datasets_of(labeled)}", "scheduler.t_warmup=0ba")
    run_training(*run, "max_duration=2ba")
    run_training(*run, "max_duration=4ba", "alignment.max_samples=0")
    batches = batches_of_rows(tmp_path)
    assert batches["student"] == 4
    assert "student, projected" not in batches


def test_a_run_with_too_few_samples_for_a_map_says_so(small_data: Path, labeled: Path, tmp_path: Path) -> None:
    options = f"retrieval.{datasets_of(labeled)}", "scheduler.t_warmup=0ba", "max_duration=2ba"
    ended = run_training(*small_run(tmp_path, small_data, *options, "alignment.max_samples=19"))
    assert "the student is not aligned with its teacher: expected at least 20 pairs" in ended.stderr
    batches = batches_of_rows(tmp_path)
    assert "student" in batches
    assert "student, projected" not in batches


@pytest.mark.parametrize("change", ["targets.normalization=layer", "teacher.first_blocks=3"])
def test_a_layer_mean_that_is_not_the_teachers_own_is_refused(change: str, small_data: Path, tmp_path: Path) -> None:
    """d2v embed would give the index of the teacher's own layer mean."""
    line = refused_run(small_run(tmp_path / "run", small_data, "alignment.representation=layer_mean", change))
    assert "alignment.representation: layer_mean needs the teacher's own" in line
