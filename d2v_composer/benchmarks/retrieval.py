"""Measure how fast zero-shot retrieval is: neighbors, the preparation of images, and a whole evaluation.

All searches look up the same random vectors and must find the same neighbors. Their baseline is the bare matrix
product of queries and bank.
"""

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

from d2v_composer.benchmarks.measure import (
    Pass,
    Rates,
    Result,
    Row,
    Table,
    Target,
    interleave,
    peak_allocated,
    synchronize,
)
from d2v_composer.benchmarks.step import build_sized_model
from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.data.labeled import LabeledImages, LabeledSet
from d2v_composer.evaluation.nearest_neighbors import full_float32, nearest_neighbors
from d2v_composer.models.encoder import Encoder, height_and_width
from d2v_composer.models.execution import choose_precision

PACKAGES = ("torch", "faiss-cpu", "scikit-learn", "numpy", "pillow")
PRODUCT, OURS, WHOLE = "matrix product alone", "ours", "torch, all at once"
FAISS, SKLEARN = "faiss IndexFlatIP", "scikit-learn brute"
PIL_INPUT, OUR_INPUT = "PIL, one by one", "ours, in batches"
# Contender, baseline, and the ratio of their rates to reach.
TARGETS = (
    (OURS, PRODUCT, 0.77),
    (OURS, FAISS, 1.3),
    (OURS, SKLEARN, 4.0),
    (OUR_INPUT, PIL_INPUT, 5.0),
)
CIFAR_SIZE = 32
INPUT_BATCH, INPUT_BATCHES = 256, 4
PRODUCT_PART = 2048
# Neighbors whose similarities differ by no more may come in any order.
TIE = 1e-6


class Setting(NamedTuple):
    """The sizes and the device to measure with."""

    num_bank: int
    num_queries: int
    dim: int
    k: int
    size: str
    """Size of the model that embeds in the whole evaluation, and for which images are prepared."""
    device: str
    precision: str
    rounds: int
    evaluation_images: int
    """Images of the whole evaluation, a sixth of them in the smaller split; 0: measure none."""


def benchmark_retrieval(setting: Setting) -> Result:
    """Measure.

    Raises:
        RuntimeError: A search finds other neighbors than ours.
    """
    torch.manual_seed(0)
    neighbors, inputs = measure_neighbors(setting), measure_inputs(setting)
    rates = {row.name: row.rates for row in neighbors + inputs}
    seconds, notes = None, []
    if setting.evaluation_images:
        seconds = measure_evaluation(setting)
        notes.append(
            f"a whole evaluation, {setting.evaluation_images} images of {CIFAR_SIZE} px, both ways, six embeddings of "
            f"{setting.size}'s student, {setting.precision}: {seconds:.1f} s"
        )
    vectors = f"{setting.k} of {setting.num_bank} × {setting.dim}, {setting.device}"
    return Result(
        title=f"median and range of {setting.rounds} interleaved rounds; memory: the peak that torch allocates",
        packages=PACKAGES,
        facts={"setting": setting._asdict(), "evaluation_seconds": seconds},
        tables=[
            ("neighbors", Table(vectors, "queries/s", neighbors, {"memory MiB": _mebibytes})),
            ("inputs", Table(f"CIFAR images for {setting.size}", "images/s", inputs, {})),
        ],
        targets=list(find_targets(rates)),
        notes=notes,
    )


def _mebibytes(facts: dict[str, int | None]) -> str:
    peak_bytes = facts["peak_bytes"]
    return "" if peak_bytes is None else f"{peak_bytes / 2**20:.0f}"


def measure_neighbors(setting: Setting) -> list[Row]:
    """Measure queries per second of all searches, on the same random vectors."""
    bank = torch.randn(setting.num_bank, setting.dim).to(setting.device)
    queries = torch.randn(setting.num_queries, setting.dim).to(setting.device)
    searches = dict(build_searches(bank, queries, setting.k))
    check_neighbors(bank, queries, {name: search() for name, search in searches.items()})
    passes: dict[str, Pass] = {PRODUCT: matrix_product(bank, queries), **searches}
    peaks = {name: peak_allocated(passes[name], setting.device) for name in (OURS, WHOLE)}
    rates = interleave(passes, setting.num_queries, setting.rounds, "neighbors")
    names = (PRODUCT, OURS, WHOLE, FAISS, SKLEARN)
    return [Row(name, rates.get(name), {"peak_bytes": peaks.get(name)}) for name in names]


def matrix_product(bank: Tensor, queries: Tensor) -> Pass:
    """Return the least work of any search: multiply every query with every bank image, and keep nothing."""
    unit_bank = normalize(bank, dim=1)
    buffer = bank.new_empty(len(queries), min(PRODUCT_PART, len(bank)))

    def multiply() -> None:
        with full_float32(bank.device.type):
            for part in unit_bank.split(PRODUCT_PART):
                torch.mm(queries, part.T, out=buffer if len(part) == buffer.shape[1] else buffer.new_empty(0))
        synchronize(bank.device.type)

    return multiply


def build_searches(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Yield every installed search for the neighbors, (Q, k)."""

    def ours() -> np.ndarray:
        return nearest_neighbors(bank, queries, k).indices.cpu().numpy()

    def whole() -> np.ndarray:
        with full_float32(bank.device.type):
            similarities = normalize(queries, dim=1) @ normalize(bank, dim=1).T
            return similarities.topk(k, dim=1).indices.cpu().numpy()

    bank_array, query_array = bank.cpu().numpy(), queries.cpu().numpy()

    def faiss_flat() -> np.ndarray:
        import faiss

        unit_bank, unit_queries = bank_array.copy(), query_array.copy()
        faiss.normalize_L2(unit_bank)
        faiss.normalize_L2(unit_queries)
        index = faiss.IndexFlatIP(unit_bank.shape[1])
        index.add(unit_bank)
        return index.search(unit_queries, k)[1]

    def sklearn_brute() -> np.ndarray:
        from sklearn.neighbors import NearestNeighbors

        brute = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank_array)
        return brute.kneighbors(query_array, return_distance=False)

    yield OURS, ours
    yield WHOLE, whole
    if find_spec("faiss"):
        yield FAISS, faiss_flat
    if find_spec("sklearn"):
        yield SKLEARN, sklearn_brute


def check_neighbors(bank: Tensor, queries: Tensor, found: dict[str, np.ndarray]) -> None:
    """Refuse a search that finds other neighbors than ours, except for ties."""
    unit_bank, unit_queries = normalize(bank.double().cpu(), dim=1), normalize(queries.double().cpu(), dim=1)
    for name, neighbors in found.items():
        rows, columns = np.nonzero(neighbors != found[OURS])
        theirs, ours = (unit_bank[each[rows, columns]] for each in (neighbors, found[OURS]))
        differences = ((theirs - ours) * unit_queries[rows]).sum(dim=1).abs()
        if (differences > TIE).any():
            raise RuntimeError(f"{name!r} finds other neighbors than {OURS!r}")


def measure_inputs(setting: Setting) -> list[Row]:
    """Measure how many CIFAR images per second become inputs of the model."""
    encoder = build_sized_model(setting.size).to(setting.device).teacher.encoder
    images = random_images(INPUT_BATCHES * INPUT_BATCH)
    passes = {
        PIL_INPUT: functools.partial(prepare_with_pil, images, encoder),
        OUR_INPUT: functools.partial(prepare_in_batches, images, encoder, setting.device),
    }
    rates = interleave(passes, len(images), setting.rounds, "input")
    return [Row(name, rates[name], {"peak_bytes": None}) for name in passes]


def prepare_with_pil(images: Tensor, encoder: Encoder) -> None:
    config = encoder.config
    resize = transforms.Resize(config.image_size, transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize(config.image_mean, config.image_std)
    for batch in images.split(INPUT_BATCH):
        pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch)
        torch.stack([normalize(to_tensor(resize(picture))) for picture in pictures])


def prepare_in_batches(images: Tensor, encoder: Encoder, device: str) -> None:
    for batch in images.split(INPUT_BATCH):
        encoder.prepare(batch.to(device))
    synchronize(device)


def measure_evaluation(setting: Setting) -> float:
    """Return the seconds of the callback's second evaluation (the first compiles kernels) on a set of CIFAR's shape."""
    model = build_sized_model(setting.size)
    precision = choose_precision(setting.precision, on_gpu=setting.device == "cuda")
    model.teacher.cast_weights(precision.dtype)
    model.cpu_bf16 = precision.cpu_bf16
    num_test = max(3, setting.evaluation_images // 6)
    train, test = (
        LabeledImages(random_images(count), torch.arange(count) % 10)
        for count in (setting.evaluation_images - num_test, num_test)
    )
    shape = height_and_width(model.teacher.config.image_size)
    two_images = list(torch.zeros(2, 3, *shape, dtype=torch.uint8))
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(two_images, batch_size=1),  # pyright: ignore[reportArgumentType]: a list is enough
        max_duration="2ba",
        optimizers=torch.optim.SGD(model.student.parameters(), lr=0.0),
        callbacks=[ZeroShotRetrieval({"cifar": LabeledSet(train, test)}, "1ba", baselines={})],
        loggers=[log],
        precision=precision.trainer,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return float(log.data["time/zero_shot_retrieval"][-1][1])


def random_images(num_images: int) -> Tensor:
    """Return (N, 3, 32, 32) uint8 in torchvision's memory layout of CIFAR: channels last."""
    return torch.randint(0, 256, (num_images, CIFAR_SIZE, CIFAR_SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def find_targets(rates: dict[str, Rates | None]) -> Iterator[Target]:
    for contender, baseline, at_least in TARGETS:
        own, other = rates[contender], rates[baseline]
        yield Target(f"{contender} / {baseline}", None if own is None or other is None else own.ratio(other), at_least)
