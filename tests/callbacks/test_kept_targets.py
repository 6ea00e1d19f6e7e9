"""Fixed views: they come again in another order, and their targets are computed once."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Timestamp

from d2v_composer.callbacks.kept_targets import KeptTargets
from d2v_composer.config.load import load_config
from d2v_composer.data.images import Images
from d2v_composer.objectives.objective import Outputs
from d2v_composer.runs.distill import build_kept_targets, build_model, train_student
from d2v_composer.sources.mds import Index
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.sampler import EpochOrder
from helpers import GOLDEN, losses_of, small_run

VIEWS, WIDTH = 3, 5


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_view_has_the_same_samples_in_another_order(nodes: int) -> None:
    """Each node has its own samples again, so that it finds their targets on its own disk."""
    sizes = np.full(40, 25)
    order = EpochOrder(sizes, seed=17, views=VIEWS, epoch_size=992, num_canonical_nodes=nodes, shuffle_block_size=128)
    for view in range(VIEWS):
        first, again, other = (order.draw(epoch).reshape(-1, nodes) for epoch in (view, view + VIEWS, view + 1))
        assert (first != again).mean() > 0.9
        assert np.array_equal(np.sort(first, axis=0), np.sort(again, axis=0))
        assert set(first.ravel()) != set(other.ravel())
        order.resume(view + VIEWS, 0)
        assert {sample.view for sample in order} == {view}


def open_kept(folder: Path, made_from: str = "a teacher") -> KeptTargets:
    kept = KeptTargets(folder / "targets", 4, 2, WIDTH, made_from)
    kept.fit_start(None, None)  # pyright: ignore[reportArgumentType]
    return kept


def sample(view: int, sample_id: int, pixel: int = 0) -> dict[str, Any]:
    image = torch.tensor([view, sample_id, pixel], dtype=torch.uint8)[:, None, None]
    return {"view": view, "sample_id": sample_id, "image": image}


def keep(kept: KeptTargets, samples: list[dict[str, Any]], targets: torch.Tensor) -> None:
    state: Any = SimpleNamespace(batch=kept.collate(samples), outputs=Outputs({}, targets.half()))
    kept.after_forward(state, None)  # pyright: ignore[reportArgumentType]


def targets_of(kept: KeptTargets, *samples: dict[str, Any]) -> torch.Tensor | None:
    return kept.collate(samples).get("targets")


def test_a_batch_has_targets_if_those_of_all_its_samples_were_kept(tmp_path: Path) -> None:
    kept, targets, first, second = open_kept(tmp_path), torch.randn(2, WIDTH), sample(1, 0), sample(0, 1)
    keep(kept, [first, second], targets)
    for reader in (kept, open_kept(tmp_path)):
        assert torch.equal(reader.collate([second, first])["targets"], targets.flip(0).half())
    assert [n for n in range(8) if targets_of(kept, sample(*divmod(n, 4))) is not None] == [1, 4]
    batch = kept.collate([first, sample(0, 0), second])
    assert "targets" not in batch
    assert batch["view"].tolist() == [1, 0, 0]


def test_only_a_whole_row_of_the_same_settings_is_read(tmp_path: Path) -> None:
    """Promise 26: what a loss of power may leave of a row counts as not written."""
    kept, first = open_kept(tmp_path), sample(1, 3)
    keep(kept, [first], torch.ones(1, WIDTH))
    assert targets_of(open_kept(tmp_path), first) is not None
    assert targets_of(open_kept(tmp_path, "another teacher"), first) is None
    contents = kept.path.read_bytes()
    for damaged in (contents[:-1], contents[: 3 * kept.row_bytes], contents[:-12] + b"0" + contents[-11:], b""):
        kept.path.write_bytes(damaged)
        assert targets_of(open_kept(tmp_path), first) is None


def test_a_row_is_of_one_image(tmp_path: Path) -> None:
    """Promise 12: rows that change places, and those of images that were made anew, count as not written."""
    kept, first, second = open_kept(tmp_path), sample(0, 0), sample(0, 1)
    keep(kept, [first, second], torch.randn(2, WIDTH))
    assert targets_of(kept, first, second) is not None
    assert targets_of(kept, sample(0, 0, pixel=1)) is None
    contents, size = kept.path.read_bytes(), kept.row_bytes
    kept.path.write_bytes(contents[size : 2 * size] + contents[:size])
    assert targets_of(kept, first) is targets_of(kept, second) is None


def test_a_finished_run_leaves_no_targets(tmp_path: Path) -> None:
    kept = open_kept(tmp_path)
    keep(kept, [sample(1, 3)], torch.ones(1, WIDTH))
    with kept.path.open("rb") as used_by_a_worker:
        for batch, is_left in ((3, True), (4, False), (4, False)):
            state: Any = SimpleNamespace(timestamp=Timestamp(batch=batch), max_duration="4ba")
            kept.close(state, None)  # pyright: ignore[reportArgumentType]
            assert kept.path.exists() == is_left
        assert os.fstat(used_by_a_worker.fileno()).st_blocks == 0
    assert [path.name for path in tmp_path.iterdir()] == [".in_use"]  # on each node, the folder is the run's


@pytest.mark.parametrize(("views", "workers"), [(1, 0), (2, 1)])
def test_the_teacher_runs_once_for_each_view(
    views: int, workers: int, tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view has 6 of the 14 batches; the losses are those of a run that computes all targets."""

    def train(name: str) -> tuple[dict[int, float], int]:
        """Return the losses, and the number of batches for which the teacher ran."""
        calls: list[Any] = []
        changes = (f"train_loader.views={views}", f"train_loader.num_workers={workers}", "alignment.max_samples=0")
        config = load_config(small_run(tmp_path / name, small_data, *changes, "callbacks={}"))

        def count_from_now(trainer: Any) -> None:
            trainer.state.model.teacher.blocks[0].register_forward_hook(lambda *_: calls.append(None))

        train_student(config, when_built=count_from_now)
        assert not list((tmp_path / name).glob("*targets*"))
        return losses_of(tmp_path / name), len(calls)

    losses, num_calls = train("kept")
    assert len(losses) == 14
    assert num_calls == 6 * views
    collate = KeptTargets.collate

    def without_targets(kept: KeptTargets, samples: Any) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in collate(kept, samples).items() if name != "targets"}

    monkeypatch.setattr(KeptTargets, "collate", without_targets)
    assert train("computed") == (losses, 14)


def test_a_file_in_a_folder_that_is_no_runs_is_left_alone(tmp_path: Path) -> None:
    """Promise 7: on a node without rank 0, which locks the run's folder."""
    (tmp_path / "targets").write_bytes(b"mine")
    with pytest.raises(
        InputError, match=r"save_folder: .*/targets is not a file of this run; choose another save_folder"
    ):
        open_kept(tmp_path)
    assert (tmp_path / "targets").read_bytes() == b"mine"


def test_a_full_disk_is_refused(tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(small_run(tmp_path / "runs" / "small", small_data, "train_loader.views=4"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        InputError,
        match=r"train_loader\.views: the targets of all views need 1 MB more .* set views to a smaller number",
    ):
        train_student(config)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_needs_no_room(
    tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("train_loader.views=4", "max_duration=1ba", "scheduler.t_warmup=0ba", "alignment.max_samples=0")
    config = load_config(small_run(tmp_path, small_data, *changes))
    train_student(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    train_student(config)
    assert "this run is complete at 1ba" in capsys.readouterr().out


def test_audio_has_no_views(small_data: Path) -> None:
    teacher = f"teacher.checkpoint={GOLDEN / 'audio_base.pt'}"
    with pytest.raises(InputError, match=r"train_loader\.views: must be null, because the teacher takes clips"):
        build_model(load_config(small_run(Path("run"), small_data, teacher, "train_loader.views=4")))


def test_what_targets_depend_on(small_data: Path, many_shards: Path) -> None:
    """Rows of another setting are not read, but those of a longer run or another machine are."""
    arguments = small_run(Path("run"), small_data, "train_loader.views=2")
    config = load_config(arguments)
    model = build_model(config)

    def seed(*changes: str, data: Path = small_data) -> int:
        kept = build_kept_targets(load_config([*arguments, *changes]), model, Index(data, Images()))
        assert kept is not None
        return kept.seed

    harmless = ("max_duration=30ba", "train_loader.num_workers=1", "save_interval=5ba", "save_folder=other")
    harmless = (*harmless, "train_loader.flip=0")  # another image, see above
    assert seed(*harmless) == seed()
    others = (
        *("seed=18", "precision=amp_bf16", "train_loader.views=3"),
        *("teacher.first_blocks=1", "student.depth=1"),
        *("objectives.tokens.extra_tokens=drop", "objectives.embedding.weight=1", "global_train_batch_size=32"),
    )
    seeds = [seed(), seed(data=many_shards), *map(seed, others)]
    model.teacher.provenance = model.teacher.provenance | {"sha256": "another"}
    assert len({*seeds, seed()}) == len(seeds) + 1
