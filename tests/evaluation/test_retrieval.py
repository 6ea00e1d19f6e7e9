"""Retrieval: exact neighbours, and the callback that measures it during training."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer import Callback, Logger, State, Trainer
from composer.devices import Device
from composer.models import ComposerModel
from composer.utils import dist
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from d2v_composer.benchmarks.measure import peak_allocated
from d2v_composer.callbacks import NanGuard, ZeroShotRetrieval
from d2v_composer.callbacks.trainer_state import unwrapped
from d2v_composer.data.labelled_sets import LabelledImages, LabelledSet, load_labelled_set
from d2v_composer.evaluation.labelled_retrieval import Ranks
from d2v_composer.evaluation.retrieval import nearest_neighbours, retrieval_accuracy, top_k
from d2v_composer.report.tables import retrieval_table
from helpers import QUICKSTART, ROOT, LabelledDevice, OnDevice, run_command


@pytest.fixture(scope="module")
def cifar() -> LabelledSet:
    """The shipped images: 4,480 for the bank, 2,000 queries."""
    return load_labelled_set("mds", QUICKSTART / "cifar10", image_size=32)


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1).float() - 127


def sklearn_neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices by brute force."""
    brute = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank.double().numpy())
    return brute.kneighbors(queries.double().numpy())


def assert_same_neighbours(bank: Tensor, queries: Tensor, k: int) -> None:
    """Index for index, except where scikit-learn's own distances tie to float32's last digits."""
    distances, expected = sklearn_neighbours(bank, queries, k + 1)
    ours = nearest_neighbours(bank, queries, k).numpy()
    gaps = np.diff(distances, axis=1)
    clear = np.minimum(gaps, np.pad(gaps, ((0, 0), (1, 0)), constant_values=1)[:, :k]) > 1e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(ours[clear], expected[:, :k][clear])


def test_neighbours_of_real_images_are_scikit_learns(cifar: LabelledSet) -> None:
    assert_same_neighbours(pixels(cifar.train.images), pixels(cifar.test.images[:500]), k=3)


def test_neighbours_in_a_bank_of_several_parts_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    bank, queries = (torch.randn(count, 192, generator=generator) for count in (10_000, 500))
    monkeypatch.setattr("d2v_composer.evaluation.retrieval.BANK_PART", 3_000)  # four parts, the last one short
    assert_same_neighbours(bank, queries, k=20)


@pytest.mark.parametrize("k", [1, 3, 40, 129, 130, 4000])
@pytest.mark.parametrize("num_columns", [1, 64, 127, 8191, 8192])
def test_top_k_in_two_levels_is_topk(num_columns: int, k: int) -> None:
    similarities = torch.randn(5, num_columns, generator=torch.Generator().manual_seed(k))
    values, indices = top_k(similarities, k)
    expected = similarities.topk(min(k, num_columns), dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("megabytes", [2, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_budget_is_kept(megabytes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    bank, queries = (torch.randn(count, 64, generator=generator).to(dtype) for count in (9_000, 500))
    found: list[Tensor] = []
    budget = megabytes << 20
    held = peak_allocated(lambda: found.append(nearest_neighbours(bank, queries, 5, budget)), "cpu")
    assert held - found[0].nbytes <= budget
    if budget > 4 * len(bank) * len(queries):  # all at once would fit
        assert held > 4 * len(bank) * len(queries) / 2
    assert torch.equal(found[0], nearest_neighbours(bank, queries, 5))


def test_any_k_works_with_any_budget() -> None:
    bank, queries = torch.randn(300, 16), torch.randn(7, 16)
    everything = nearest_neighbours(bank, queries, 300, memory_budget=1)
    assert torch.equal(everything.sort(dim=1).values, torch.arange(300).expand(7, -1))
    assert torch.equal(everything[:, :9], nearest_neighbours(bank, queries, 9, memory_budget=1))
    assert nearest_neighbours(bank, queries[:0], 3).shape == (0, 3)


def test_accuracy_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0], [-1.0, 0.0]])
    bank_labels = torch.tensor([0, 1, 2, 3])
    queries = torch.tensor([[2.0, 0.01], [0.1, 1.0], [0.2, -0.01]])
    # Nearest first: (0, 1, 2), (2, 1, 0) and (0, 1, ...): right at once, only among three, and never.
    assert retrieval_accuracy(bank, bank_labels, queries, torch.tensor([0, 0, 3])) == {1: 1 / 3, 3: 2 / 3}


def test_the_length_of_vectors_does_not_matter() -> None:
    bank, queries = torch.randn(50, 8), torch.randn(20, 8)
    scaled = nearest_neighbours(bank * torch.rand(50, 1).add(0.1), queries * 1000, 5)
    assert torch.equal(scaled, nearest_neighbours(bank, queries, 5))


@pytest.mark.parametrize(
    ("bank", "queries", "ks", "message"),
    [
        ((4, 3), (2, 5), (1,), "must agree in D"),
        ((4, 3), (2, 3), (5,), "k must be from 1 to the bank's 4 images, got 5"),
        ((4, 3), (0, 3), (1,), "there is no query"),
    ],
)
def test_refuses_shapes_that_do_not_agree(
    bank: tuple[int, int], queries: tuple[int, int], ks: tuple[int], message: str
) -> None:
    labels = torch.zeros(bank[0], dtype=torch.int64), torch.zeros(queries[0], dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        retrieval_accuracy(torch.randn(bank), labels[0], torch.randn(queries), labels[1], ks)


class Classifier(ComposerModel):
    """Another model than ours."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3 * 8 * 8, 16)
        self.head = nn.Linear(16, 4)
        self.embedded: list[int] = []
        self.modes: list[bool] = []

    def forward(self, batch: Any) -> Tensor:
        return self.head(self.backbone(batch[0]))

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def embed(self, images: Tensor) -> Tensor:
        self.embedded += images[:, 0, 0, 0].tolist()
        self.modes.append(self.training)
        return self.backbone(images.flatten(1) / 255)


def numbered_images(count: int, first: int) -> LabelledImages:
    """Return images whose first pixel is their number."""
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(first))
    images[:, 0, 0, 0] = torch.arange(first, first + count)
    return LabelledImages(images, torch.arange(count) % 4)


def train(
    model: Classifier,
    callback: ZeroShotRetrieval,
    max_duration: str,
    device: Device | None = None,
    *others: Callback,
) -> None:
    samples = TensorDataset(torch.randn(40, 3 * 8 * 8), torch.arange(40) % 4)
    sampler = dist.get_sampler(samples)
    loader = DataLoader(samples, batch_size=8 // dist.get_world_size(), sampler=sampler)
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        max_duration=max_duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        callbacks=[*others, callback],
        progress_bar=False,
        device=device,
        device_train_microbatch_size=4,
    )
    trainer.fit()
    trainer.close()


@pytest.mark.parametrize(
    ("interval", "max_duration", "at_start", "batches"),
    [
        ("4ba", "10ba", False, [4, 8, 10]),
        ("5ba", "10ba", True, [0, 5, 10]),  # the last batch is an interval's, an epoch's and the run's end
        ("1ep", "2ep", False, [5, 10]),
        ("100ba", "7ba", False, [7]),
        ("100ba", "1ep", False, [5]),
    ],
)
def test_evaluates_at_the_interval_and_at_the_end(
    interval: str, max_duration: str, at_start: bool, batches: list[int]
) -> None:
    labelled = LabelledSet(numbered_images(9, 0), numbered_images(5, 100))
    callback = ZeroShotRetrieval({"set": labelled}, interval, at_start=at_start, device_batch_size=4)
    model = Classifier()
    train(model, callback, max_duration)
    assert [entry["batch"] for entry in callback.history] == batches
    # Every image once per evaluation, in eval mode; then training continues in train mode.
    numbers = [*range(9), *range(100, 105)]
    assert sorted(model.embedded) == sorted(numbers * len(batches))
    assert not any(model.modes)
    assert model.training


def test_logs_student_and_references_and_restores_them() -> None:
    labelled = LabelledSet(numbered_images(9, 0), numbered_images(5, 100))
    callback = ZeroShotRetrieval({"set": labelled}, "10ba", ks=(1, 2), references={"pixels": pixels})
    model = Classifier()
    train(model, callback, "10ba")
    keys = {f"metrics/set/bank_{bank}/top{k}" for bank in ("train", "test") for k in (1, 2)}
    assert set(callback.history[-1]["metrics"]) == keys
    assert set(callback.reference_metrics) == {key.replace("/set/", "/set/pixels/") for key in keys}
    bank, queries = (pixels(images.images) for images in labelled[:2])
    expected = retrieval_accuracy(bank, labelled.train.labels, queries, labelled.test.labels, (1, 2))
    assert callback.reference_metrics["metrics/set/pixels/bank_train/top1"] == pytest.approx(expected[1])
    assert callback.reference_metrics["metrics/set/pixels/bank_train/top2"] == pytest.approx(expected[2])

    restored = ZeroShotRetrieval({"set": labelled}, "10ba", ks=(1, 2))
    restored.load_state_dict(callback.state_dict())
    assert restored.history == callback.history


def two_embeddings(images: Tensor) -> dict[str, Tensor]:
    return {"whole": pixels(images), "corner": pixels(images[..., :2, :2])}


def test_a_resume_may_change_headline_and_k() -> None:
    labelled = LabelledSet(numbered_images(90, 0), numbered_images(50, 100))
    first = ZeroShotRetrieval(
        {"set": labelled}, "10ba", embed=two_embeddings, headline="whole", references={"teacher": two_embeddings}
    )
    train(Classifier(), first, "10ba")
    state = first.state_dict()
    key = "metrics/set/bank_train/top1"
    metrics = state["history"][-1]["metrics"]
    assert metrics[key] == metrics[f"{key}/whole"] != metrics[f"{key}/corner"]

    assert first.neighbours["set"]["train"].shape == (50, 3)
    other = ZeroShotRetrieval({"set": labelled}, "10ba", headline="corner", references={"teacher": two_embeddings})
    other.load_state_dict(state)
    assert other.neighbours == {}  # found with the other embedding
    assert other.history[-1]["metrics"][key] == metrics[f"{key}/corner"]
    assert f"{metrics[f'{key}/corner']:.1%}".rstrip("%") in retrieval_table(other)

    more = ZeroShotRetrieval(
        {"set": labelled},
        "10ba",
        ks=(1, 5),
        embed=two_embeddings,
        headline="whole",
        references={"teacher": two_embeddings},
    )
    more.load_state_dict(state)
    assert "student after" not in retrieval_table(more)  # its top-5 was not measured
    train(Classifier(), more, "10ba")
    assert "metrics/set/teacher/bank_train/top5" in more.reference_metrics


def test_a_reference_without_layer_mean_falls_back_to_its_output() -> None:
    """As the bare encoder, which has no layers to average."""
    labelled = LabelledSet(numbered_images(90, 0), numbered_images(50, 100))
    students = {"layer_mean_cls": pixels, "output_cls": lambda images: pixels(images[..., :2, :2])}
    callback = ZeroShotRetrieval(
        {"set": labelled},
        "10ba",
        embed=lambda images: {name: embed(images) for name, embed in students.items()},
        headline="layer_mean_cls",
        references={"encoder": lambda images: {"output_cls": students["output_cls"](images)}, "pixels": pixels},
    )
    train(Classifier(), callback, "10ba")
    key = "metrics/set/bank_train/top1"
    metrics, references = callback.history[-1]["metrics"], callback.reference_metrics
    assert metrics[key] == metrics[f"{key}/layer_mean_cls"] == references["metrics/set/pixels/bank_train/top1"]
    assert references["metrics/set/encoder/bank_train/top1"] == metrics[f"{key}/output_cls"] != metrics[key]
    restored = ZeroShotRetrieval({"set": labelled}, "10ba", headline="layer_mean_cls")
    restored.load_state_dict(callback.state_dict())
    assert (restored.history[-1]["metrics"], restored.reference_metrics) == (metrics, references)

    without = ZeroShotRetrieval({"set": labelled}, "10ba", headline="layer_mean_cls", embed=two_embeddings)
    with pytest.raises(ValueError, match="headline must be one of whole, corner, got 'layer_mean_cls'"):
        train(Classifier(), without, "10ba")


def test_refuses_a_model_without_embed_and_a_k_that_is_too_large() -> None:
    labelled = LabelledSet(numbered_images(9, 0), numbered_images(5, 100))
    model = Classifier()
    model.embed = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="Classifier has no method embed_all or embed"):
        train(model, ZeroShotRetrieval({"set": labelled}, "1ba"), "1ba")
    with pytest.raises(ValueError, match="set: ks must be from 1 to its smaller set's 5 images"):
        ZeroShotRetrieval({"set": labelled}, ks=(1, 6))


@pytest.mark.parametrize("wraps", [[], [0], [1], [0, 1], [1, 0], [0, 1, 0]])
def test_unwraps_ddp_and_compile_in_any_order(wraps: list[int], process_group: None) -> None:
    model: nn.Module = Classifier()
    wrapped = model
    for wrap in wraps:
        wrapped = (DistributedDataParallel, torch.compile)[wrap](wrapped)
    assert unwrapped(cast(Any, SimpleNamespace(model=wrapped))) is model


def test_embeddings_on_the_host_are_moved_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's embed may return them there, and NCCL gathers only tensors on the device."""
    gathered: list[Tensor] = []

    def gather(ranks: Ranks, share: Tensor, num_images: int) -> Tensor:
        gathered.append(share)
        return share[:num_images]

    monkeypatch.setattr(Ranks, "gather", gather)
    labelled = LabelledSet(numbered_images(9, 0), numbered_images(5, 100))
    callback = ZeroShotRetrieval({"set": labelled}, "1ba", embed=lambda images: pixels(images).as_subclass(Tensor))
    train(Classifier(), callback, "1ba", LabelledDevice())
    assert len(gathered) == 4  # two sets of images, and the neighbours both ways
    assert all(isinstance(share, OnDevice) for share in gathered)


class NoCollectives(Callback):
    """Lets collectives fail during training, except for the single numbers that Composer's loop sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def fit_start(self, state: State, logger: Logger) -> None:
        def refuse(sent: Any, *args: Any, **kwargs: Any) -> None:
            assert isinstance(sent, Tensor), "a collective in a world of one"
            assert sent.numel() == 1, "a collective in a world of one"

        for name in ("all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list"):
            self.monkeypatch.setattr(torch.distributed, name, refuse)


def test_one_rank_uses_no_collective(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's threads would copy with OpenMP, and slow every later batch down."""
    labelled = LabelledSet(numbered_images(9, 0), numbered_images(5, 100))
    callback = ZeroShotRetrieval({"set": labelled}, "1ba", at_start=True, references={"pixels": pixels})
    nan_guard = NanGuard(lambda state, event: True)
    train(Classifier(), callback, "2ba", None, NoCollectives(monkeypatch), nan_guard)
    assert len(callback.history) == 3


def test_two_ranks_measure_as_one(cifar: LabelledSet, tmp_path: Path) -> None:
    """Two processes share 1,199 and 601 images, and find scikit-learn's neighbours.

    Only the main thread may use OpenMP, which starts threads for each thread that uses it.
    """
    script = tmp_path / "two_ranks.py"
    places = [str(ROOT / "tests"), str(Path(__file__).parent)]
    script.write_text(
        f"import sys; sys.path[:0] = {places}\nfrom test_retrieval import measure_odd_set\n"
        f"measure_odd_set({str(tmp_path / 'metrics.pt')!r})\n"
    )
    launcher = Path(sys.executable).parent / "composer"
    result = run_command(launcher, "-n", "2", script, environment={"OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stderr
    metrics = torch.load(tmp_path / "metrics.pt")
    train_set, test_set, _ = odd_set(cifar)
    for bank, bank_set, query_set in (("train", train_set, test_set), ("test", test_set, train_set)):
        _, neighbours = sklearn_neighbours(pixels(bank_set.images), pixels(query_set.images), 3)
        right = bank_set.labels.numpy()[neighbours] == query_set.labels.numpy()[:, None]
        for k in (1, 3):
            expected = right[:, :k].any(axis=1).mean()
            assert metrics[f"metrics/odd/bank_{bank}/top{k}"] == pytest.approx(expected, abs=1e-9)


def odd_set(full: LabelledSet) -> LabelledSet:
    """Return odd numbers of images, so that the ranks' shares differ in length."""
    parts = (full.train, 1199), (full.test, 601)
    train_set, test_set = (LabelledImages(part.images[:count], part.labels[:count]) for part, count in parts)
    return LabelledSet(train_set, test_set)


class CountingThreads(ZeroShotRetrieval):
    """Fails if an evaluation leaves threads behind."""

    def evaluate(self, state: State, logger: Logger) -> None:
        assert torch.get_num_threads() == 2
        torch.ones(1 << 20).exp()  # starts the main thread's OpenMP threads
        tqdm([], disable=True)  # starts its monitor
        before = len(os.listdir("/proc/self/task"))
        super().evaluate(state, logger)
        assert len(os.listdir("/proc/self/task")) == before


def measure_odd_set(out: str) -> None:
    """Measure on each of two ranks; rank 0 saves the accuracies."""
    torch.set_num_threads(2)  # conftest.py sets one under pytest-xdist
    labelled = odd_set(load_labelled_set("mds", QUICKSTART / "cifar10", image_size=32))
    callback = CountingThreads({"odd": labelled}, "1ba", embed=pixels)
    train(Classifier(), callback, "1ba")
    if dist.get_global_rank() == 0:
        torch.save(callback.history[-1]["metrics"], out)


@pytest.mark.slow
def test_accuracy_rises_in_a_supervised_run() -> None:
    """recipes/supervised_resnet.py: another model, trained with labels, with only our callback."""
    ended = run_command(sys.executable, ROOT / "recipes" / "supervised_resnet.py", "--epochs", "1")
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("batch ")]
    assert [line.split(":")[0] for line in lines] == ["batch 0", "batch 70"]
    before, after = (dict(re.findall(r"metrics/cifar10/(\S+) ([\d.]+)%", line)) for line in lines)
    assert before.keys() == {f"bank_{bank}/top{k}" for bank in ("train", "test") for k in (1, 3)}
    assert all(float(after[key]) > float(before[key]) + 2 for key in before)
