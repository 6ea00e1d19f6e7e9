"""The retrieval callback, in any Composer run and on several ranks."""

from typing import Any, NamedTuple

import pytest
import torch
from composer.callbacks import EarlyStopper, RuntimeEstimator, SpeedMonitor
from composer.core import Callback, Evaluator, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from d2v_composer import neighbor_agreement
from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.data.images import RandomResizedCropFlip
from d2v_composer.data.modality import Augmentation
from d2v_composer.evaluation.nearest_neighbors import retrieval_accuracy
from d2v_composer.sources.labeled import EvaluationSet, LabeledSamples
from d2v_composer.system.errors import InputError
from foreign_models import Classifier, fit


def pixels(images: Tensor) -> Tensor:
    return images.flatten(1).float() - 127


class Watched(Classifier):
    """Records the images that are embedded, and in which mode."""

    def __init__(self) -> None:
        super().__init__(3 * 8 * 8)
        self.embedded: list[int] = []
        self.modes: list[bool] = []

    def embed(self, images: Tensor) -> Tensor:
        self.embedded += images[:, 0, 0, 0].tolist()
        self.modes.append(self.training)
        return super().embed(images)


def numbered_images(count: int, first: int) -> LabeledSamples:
    """Return images whose first pixel is their number."""
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(first))
    images[:, 0, 0, 0] = torch.arange(first, first + count)
    return LabeledSamples(images, torch.arange(count) % 4)


AUGMENT = Augmentation(RandomResizedCropFlip(8, scale=(0.6, 1)), seed=3)
SMALL = EvaluationSet(numbered_images(9, 0), numbered_images(5, 100))
FEWER = EvaluationSet(numbered_images(40, 0), numbered_images(40, 100))
WHOLE = EvaluationSet(numbered_images(90, 0), numbered_images(50, 100), class_embeddings=torch.eye(4))


def train(model: Classifier, callback: ZeroShotRetrieval, max_duration: str, *others: Callback, **options: Any) -> None:
    samples = TensorDataset(torch.randn(40, 3 * 8 * 8), torch.arange(40) % 4)
    sampler = dist.get_sampler(samples)
    loader = DataLoader(samples, batch_size=8 // dist.get_world_size(), sampler=sampler)
    fit(model, loader, max_duration, callbacks=[callback, *others], device_train_microbatch_size=4, **options)


@pytest.mark.parametrize(
    ("interval", "max_duration", "at_start", "batches"),
    [
        ("5ba", "10ba", True, [0, 5, 10]),  # the last batch is an interval's, an epoch's and the run's end
        ("1ep", "2ep", False, [5, 10]),
        ("100ba", "7ba", False, [7]),
        ("100ba", "1ep", False, [5]),
    ],
)
def test_evaluates_at_the_interval_and_at_the_end(
    interval: str, max_duration: str, at_start: bool, batches: list[int]
) -> None:
    callback = ZeroShotRetrieval({"set": SMALL}, interval, at_start=at_start, device_batch_size=4)
    model = Watched()
    train(model, callback, max_duration)
    assert [entry["batch"] for entry in callback.history] == batches
    # Every image once per evaluation, in eval mode; then training continues in train mode.
    numbers = [*range(9), *range(100, 105)]
    assert sorted(model.embedded) == sorted(numbers * len(batches))
    assert not any(model.modes)
    assert model.training


class Observer(Callback):
    """Records what callbacks find in the state after each evaluation, and at the start of each batch."""

    def __init__(self) -> None:
        self.labels, self.values, self.training = list[str](), list[dict[str, float]](), set[tuple[Any, ...]]()

    def eval_start(self, state: State, logger: Logger) -> None:
        self.labels.append(str(state.dataloader_label))

    def eval_end(self, state: State, logger: Logger) -> None:
        assert self.labels[-1] == state.dataloader_label
        metrics = state.eval_metrics[self.labels[-1]]
        self.values.append({f"metrics/{name}": metric.compute().item() for name, metric in metrics.items()})

    def batch_start(self, state: State, logger: Logger) -> None:
        self.training.add((state.dataloader_label, int(state.dataloader_len or 0)))


@pytest.mark.parametrize("monitor", ["mean/top1", "set/bank_test/top3"])
@pytest.mark.parametrize(
    ("interval", "patience", "stops_at", "output"),
    [("2ba", "3ba", 6, "progress_bar"), ("1ep", "1ep", 15, "log_to_console")],
)
def test_composers_early_stopper_stops_a_run(
    monitor: str, interval: str, patience: str, stops_at: int, output: str
) -> None:
    """The pixels' accuracy never changes. Composer's other callbacks and loggers run beside it, as in any script."""
    callback, observer = ZeroShotRetrieval({"set": FEWER}, interval, embed=pixels), Observer()
    stopper = EarlyStopper(monitor, "retrieval", patience=patience)
    others = SpeedMonitor(), RuntimeEstimator(), observer
    train(Watched(), callback, "4ep", stopper, *others, **{output: True})
    assert callback.history[-1]["batch"] == stops_at
    assert observer.labels == ["retrieval"] * len(callback.history)
    assert observer.values == [pytest.approx(entry["metrics"]) for entry in callback.history]
    assert observer.training == {("train", 5)}


def test_an_evaluator_of_the_trainers_own_is_left_alone() -> None:
    observer, evaluator = Observer(), Evaluator(label="own", dataloader=DataLoader(TensorDataset(torch.ones(8, 192))))
    callback = ZeroShotRetrieval({"set": FEWER}, "5ba", embed=pixels)
    train(Watched(), callback, "5ba", observer, eval_dataloader=evaluator)
    assert observer.labels == ["retrieval", "own"]
    assert observer.values[1] == {}


def test_the_mean_is_of_both_banks_of_all_labeled_sets() -> None:
    unlabeled = EvaluationSet.without_labels(FEWER.test)
    sets = {"small": SMALL, "fewer": FEWER, "unlabeled": unlabeled}
    baselines = {"teacher": lambda images: corner(images)}
    callback = ZeroShotRetrieval(
        sets, "5ba", embed=two_embeddings, headline="whole", baselines=baselines, augment=AUGMENT
    )
    train(Watched(), callback, "5ba")
    metrics = callback.history[-1]["metrics"]
    top1 = [metrics[f"metrics/{name}/bank_{bank}/top1"] for name in ("small", "fewer") for bank in ("train", "test")]
    assert len(set(top1)) > 1
    assert metrics["metrics/mean/top1"] == pytest.approx(sum(top1) / 4)
    assert [key for key in callback.baseline_metrics if "mean" in key] == []
    of_unlabeled = ZeroShotRetrieval({"set": unlabeled}, "5ba", embed=pixels, augment=AUGMENT)
    train(Watched(), of_unlabeled, "5ba")
    assert "metrics/mean/top1" not in of_unlabeled.history[-1]["metrics"]


def nearest_shapes(callback: ZeroShotRetrieval) -> set[tuple[int, ...]]:
    """Return the shapes of the neighbors in the train images that are kept of student and teacher."""
    kept = [result for result in callback.results if result.column.bank == "train" and result.nearest is not None]
    assert {result.row for result in kept} == {"student", "teacher"}
    return {(*result.nearest.shape,) for result in kept if result.nearest is not None}


def two_embeddings(images: Tensor) -> dict[str, Tensor]:
    return {"whole": pixels(images), "corner": pixels(images[..., :2, :2])}


BANK_AND_QUERIES = pixels(WHOLE.train.samples), WHOLE.train.labels, pixels(WHOLE.test.samples), WHOLE.test.labels
RETRIEVAL, KNN = "metrics/set/bank_train/top1", "metrics/set/knn/top1"


def measuring_two_embeddings(most: int, **options: Any) -> ZeroShotRetrieval:
    """Return the callback of a run that looks for the nearest and for the ``most`` nearest neighbors."""
    embeds: dict[str, Any] = {"embed": two_embeddings, "baselines": {"teacher": two_embeddings}}
    return ZeroShotRetrieval(
        {"set": WHOLE}, "10ba", ks=(1, most), headline="whole", all_embeddings=True, **embeds, **options
    )


@pytest.fixture(scope="module", params=[3, 30])  # fewer and more than the 20 neighbors that vote
def first(request: pytest.FixtureRequest) -> ZeroShotRetrieval:
    """A run of 10 batches without probes."""
    callback = measuring_two_embeddings(request.param)
    train(Watched(), callback, "10ba")
    return callback


def test_retrieval_is_what_the_function_measures(first: ZeroShotRetrieval) -> None:
    metrics, accuracies = first.history[-1]["metrics"], retrieval_accuracy(*BANK_AND_QUERIES, ks=first.settings.ks)
    assert metrics[RETRIEVAL] == pytest.approx(accuracies[1])
    assert metrics[f"{RETRIEVAL}/whole"] == metrics[RETRIEVAL]
    most = first.settings.ks[-1]
    assert first.baseline_metrics[f"metrics/set/teacher/bank_train/top{most}"] == pytest.approx(accuracies[most])
    assert nearest_shapes(first) == {(len(WHOLE.test.labels), most)}


def test_a_resume_keeps_its_headline(first: ZeroShotRetrieval) -> None:
    other = ZeroShotRetrieval({"set": WHOLE}, "10ba", headline="corner")
    with pytest.raises(InputError, match=r"set\.embedding: checkpoint has whole, this run has corner; give the"):
        other.load_state_dict(first.state_dict())


CHANGES: dict[str, tuple[EvaluationSet, Augmentation]] = {
    "images": (FEWER, AUGMENT),
    "class_embeddings": (WHOLE._replace(class_embeddings=2 * torch.eye(4)), AUGMENT),
    "augmented views": (WHOLE, Augmentation(RandomResizedCropFlip(8, scale=(0.5, 1)), seed=3)),
}


@pytest.mark.parametrize("is_dropped_between", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_that_measures_something_else_is_refused(what: str, is_dropped_between: bool) -> None:
    """Else a teacher's accuracy among few images would stand beside a student's among many."""

    def callback(labeled: EvaluationSet, augment: Augmentation, probes: tuple[str, ...], name: str = "set") -> Any:
        return ZeroShotRetrieval({name: labeled}, probes=probes, augment=augment)

    probes = "instance", "zero_shot"
    state = callback(WHOLE, AUGMENT, probes).state_dict()
    for options in [(WHOLE, AUGMENT, ()), (FEWER, AUGMENT, probes, "other")] if is_dropped_between else ():
        between = callback(*options)
        between.load_state_dict(state)
        state = between.state_dict()
    callback(WHOLE, AUGMENT, probes).load_state_dict(state)
    with pytest.raises(InputError, match=rf"^retrieval\.datasets\.set\.{what}: checkpoint has .* name, or restore it"):
        callback(*CHANGES[what], probes).load_state_dict(state)
    callback(*CHANGES[what], probes, "another name").load_state_dict(state)
    if what != "images":  # nothing that is measured depends on it
        callback(*CHANGES[what], ()).load_state_dict(state)


def views(images: Tensor, number: int) -> Tensor:
    return torch.stack([AUGMENT(image, i, number) for i, image in enumerate(images)])


def corner(images: Tensor) -> Tensor:
    return pixels(images[..., :4, :4])


class Judged(NamedTuple):
    """A run that judges without labels: student and teacher give each other's embeddings."""

    sets: dict[str, EvaluationSet]
    options: dict[str, Any]
    callback: ZeroShotRetrieval
    images_of_teacher: list[int]


@pytest.fixture(params=[True, False], ids=["labels", "no labels"])
def judged(request: pytest.FixtureRequest) -> Judged:
    labeled = EvaluationSet(numbered_images(60, 0), numbered_images(50, 100))
    sets = {"set": labeled if request.param else EvaluationSet.without_labels(labeled.test)}
    images_of_teacher: list[int] = []

    def teacher(images: Tensor) -> dict[str, Tensor]:
        images_of_teacher.append(len(images))
        return {"whole": pixels(images), "corner": corner(images).square()}

    def student(images: Tensor) -> dict[str, Tensor]:
        return {"whole": corner(images), "corner": pixels(images)}

    options: dict[str, Any] = {
        "embed": student,
        "headline": "whole",
        "all_embeddings": True,
        "augment": AUGMENT,
        "device_batch_size": 16,
    }
    options |= {"baselines": {"teacher": teacher, "pixels": corner}, "probes": ["agreement", "instance"]}
    callback = ZeroShotRetrieval(sets, "5ba", at_start=True, **options)
    train(Watched(), callback, "5ba")
    return Judged(sets, options, callback, images_of_teacher)


def test_judges_without_labels_as_the_functions_do(judged: Judged) -> None:
    metrics, baselines = judged.callback.history[-1]["metrics"], judged.callback.baseline_metrics
    images = judged.sets["set"].test.samples
    for embedding, expected in {
        "": neighbor_agreement(corner(images), pixels(images)),
        "/whole": neighbor_agreement(corner(images), pixels(images)),
        "/corner": neighbor_agreement(pixels(images), corner(images).square()),
    }.items():
        assert metrics[f"metrics/set/agreement@10{embedding}"] == pytest.approx(expected), embedding
        assert baselines[f"metrics/set/teacher/agreement@10{embedding}"] == 1
    assert baselines["metrics/set/pixels/agreement@10"] == metrics["metrics/set/agreement@10"]
    assert ("metrics/set/bank_train/top1" in metrics) == judged.sets["set"].has_labels
    numbers = torch.arange(50)
    first, second = (corner(views(images, number)) for number in (0, 1))
    for k, expected in retrieval_accuracy(second, numbers, first, numbers).items():
        assert metrics[f"metrics/set/instance/top{k}"] == pytest.approx(expected)
        assert 0 < expected < 1


def test_a_resume_compares_with_the_teacher_again(judged: Judged) -> None:
    resumed = ZeroShotRetrieval(judged.sets, "5ba", **judged.options)
    resumed.load_state_dict(judged.callback.state_dict())
    judged.images_of_teacher.clear()
    resumed.history.clear()
    train(Watched(), resumed, "5ba")
    assert resumed.history[-1]["metrics"] == judged.callback.history[-1]["metrics"]
    labeled, views = judged.sets["set"], 2
    num_train, num_test = labeled.num_samples
    assert sum(judged.images_of_teacher) == num_train + (1 + views) * num_test  # once, for the agreement
    assert {result[:3] for result in resumed.results} == {result[:3] for result in judged.callback.results}


def test_a_baseline_without_layer_mean_falls_back_to_its_output() -> None:
    """As the bare encoder, which has no layers to average."""
    students = {"layer_mean_cls": pixels, "output_cls": lambda images: pixels(images[..., :2, :2])}
    callback = ZeroShotRetrieval(
        {"set": WHOLE},
        "10ba",
        embed=lambda images: {name: embed(images) for name, embed in students.items()},
        headline="layer_mean_cls",
        all_embeddings=True,
        baselines={"encoder": lambda images: {"output_cls": students["output_cls"](images)}, "pixels": pixels},
    )
    train(Watched(), callback, "10ba")
    metrics, baselines = callback.history[-1]["metrics"], callback.baseline_metrics
    assert metrics[RETRIEVAL] == metrics[f"{RETRIEVAL}/layer_mean_cls"]
    assert baselines["metrics/set/pixels/bank_train/top1"] == metrics[RETRIEVAL]
    assert baselines["metrics/set/encoder/bank_train/top1"] == metrics[f"{RETRIEVAL}/output_cls"]
    assert metrics[f"{RETRIEVAL}/output_cls"] != metrics[RETRIEVAL]
    without = ZeroShotRetrieval(
        {"set": WHOLE}, "10ba", headline="layer_mean_cls", all_embeddings=True, embed=two_embeddings
    )
    with pytest.raises(ValueError, match=r"^headline must be one of whole, corner, got 'layer_mean_cls'"):
        train(Watched(), without, "10ba")


def test_a_model_without_embed_is_refused() -> None:
    model = Watched()
    model.embed = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="Watched has no method embed_all or embed"):
        train(model, ZeroShotRetrieval({"set": SMALL}, "1ba"), "1ba")


@pytest.mark.parametrize(
    ("labeled", "options", "problem"),
    [
        (SMALL, {"ks": (1, 6)}, "ks: must be from 1 to 5, the number of samples in set's smallest split"),
        (SMALL, {"probes": ["knm"]}, "probes must be among knn, linear, zero_shot.*, got 'knm'"),
        (SMALL, {"probes": ["instance"]}, "set: instance retrieval needs the argument 'augment'"),
        (SMALL, {"probes": ["agreement"]}, "set: agreement needs more than 10 test samples, got 5"),
        (
            WHOLE,
            {"probes": ["agreement"], "baselines": {"pixels": pixels}},
            "agreement needs a baseline named 'teacher'",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(labeled: EvaluationSet, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ZeroShotRetrieval({"set": labeled}, **options)
