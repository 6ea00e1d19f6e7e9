"""How fast zero-shot retrieval is: neighbours, the images' way into the model, and a whole evaluation.

Neighbours are looked for among random vectors, by everybody in the same ones, and have to be the same. The yardstick
is the bare matrix product of queries and bank.
"""

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from torchvision import transforms

from d2v_composer.benchmarks.measure import (
    Pass,
    Rates,
    Target,
    describe_setting,
    interleave,
    peak_allocated,
    progress_bar,
    synchronise,
    versions,
)
from d2v_composer.benchmarks.step import PRECISIONS, build_sized_model
from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.data.labelled_sets import LabelledImages, LabelledSet
from d2v_composer.evaluation.retrieval import MEMORY_BUDGET, full_float32, nearest_neighbours
from d2v_composer.models.image_encoder import ImageEncoder
from d2v_composer.system.machine_info import describe_machine

__all__ = ["RetrievalBenchmark", "Setting", "benchmark_retrieval"]

PACKAGES = ("torch", "faiss-cpu", "scikit-learn", "numpy", "pillow")
PRODUCT, OURS, WHOLE, FAISS, SKLEARN = (
    "matrix product alone",
    "ours",
    "torch, all at once",
    "faiss IndexFlatIP",
    "scikit-learn brute",
)
PIL_INPUT, OUR_INPUT = "PIL, one by one", "ours, in batches"
CIFAR_SIZE = 32
INPUT_BATCH, INPUT_BATCHES = 256, 4
PRODUCT_PART = 2048
# Neighbours that two programs may name in another order: their similarities differ by no more.
TIE = 1e-6


class Setting(NamedTuple):
    """What is measured."""

    num_bank: int
    num_queries: int
    dim: int
    k: int
    size: str
    """Of the model that a whole evaluation embeds with, and whose images the input is made for."""
    device: str
    precision: str
    rounds: int
    evaluation_images: int
    """How many images a whole evaluation embeds, a sixth of them as the smaller set; 0: none is measured."""


class Row(NamedTuple):
    """What was measured of one contender."""

    name: str
    rates: Rates | None
    """Queries or images a second; ``None``: not installed."""
    peak_bytes: int | None
    """What torch allocates at its peak, the result included; ``None``: not torch's."""


class RetrievalBenchmark(NamedTuple):
    """The whole measurement."""

    setting: Setting
    machine: dict[str, str | int]
    versions: dict[str, str | None]
    neighbours: list[Row]
    inputs: list[Row]
    evaluation_seconds: float | None
    targets: list[Target]

    def as_json(self) -> dict[str, Any]:
        tables = {name: [_row_json(row) for row in getattr(self, name)] for name in ("neighbours", "inputs")}
        targets = [target._asdict() for target in self.targets]
        return self._asdict() | {"setting": self.setting._asdict(), "targets": targets} | tables

    def as_text(self) -> str:
        """Two tables, and which targets are reached."""
        setting = self.setting
        product, pil = self.neighbours[0].rates, self.inputs[0].rates
        assert product is not None
        assert pil is not None
        lines = [
            *describe_setting(self.machine, self.versions),
            f"median and range of {setting.rounds} rounds, interleaved; memory: torch's, at its peak, of a budget of "
            f"{MEMORY_BUDGET / 2**20:.0f} MiB for ours",
            "",
            f"{f'{setting.k} of {setting.num_bank} × {setting.dim}, {setting.device}':28}  {'queries/s':>9}  "
            f"{'range':>15}  {'× time':>6}  {'memory MiB':>10}",
            *(_line(row, None if row.rates is None else product.ratio(row.rates)) for row in self.neighbours),
            "",
            f"{f'CIFAR images for {setting.size}':28}  {'images/s':>9}  {'range':>15}  {'×':>6}",
            *(_line(row, None if row.rates is None else row.rates.ratio(pil)) for row in self.inputs),
            "",
            *(target.verdict for target in self.targets),
        ]
        if self.evaluation_seconds is not None:
            lines.append(
                f"a whole evaluation, {setting.evaluation_images} images of {CIFAR_SIZE} px, both ways, six embeddings "
                f"of {setting.size}'s student, {setting.precision}: {self.evaluation_seconds:.1f} s"
            )
        return "\n".join(lines)


def _row_json(row: Row) -> dict[str, Any]:
    return row._asdict() | {
        "rates": None if row.rates is None else row.rates.each,
        "median": None if row.rates is None else row.rates.median,
    }


def _line(row: Row, ratio: float | None) -> str:
    if row.rates is None or ratio is None:
        return f"{row.name:28}  not installed"
    extent = f"{min(row.rates.each):.0f} – {max(row.rates.each):.0f}"
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
    return f"{row.name:28}  {row.rates.median:9.0f}  {extent:>15}  {ratio:6.2f}  {memory:>10}".rstrip()


def benchmark_retrieval(setting: Setting) -> RetrievalBenchmark:
    """Measure.

    Raises:
        RuntimeError: Somebody finds other neighbours: something else would be measured.
    """
    torch.manual_seed(0)
    neighbours = measure_neighbours(setting)
    inputs = measure_inputs(setting)
    return RetrievalBenchmark(
        setting,
        describe_machine(),
        versions(*PACKAGES),
        neighbours,
        inputs,
        measure_evaluation(setting) if setting.evaluation_images else None,
        list(find_targets({row.name: row.rates for row in neighbours + inputs})),
    )


def measure_neighbours(setting: Setting) -> list[Row]:
    """Queries a second of everybody, on the same random vectors."""
    bank = torch.randn(setting.num_bank, setting.dim).to(setting.device)
    queries = torch.randn(setting.num_queries, setting.dim).to(setting.device)
    searches = {name: search for name, search in build_searches(bank, queries, setting.k) if search is not None}
    check_neighbours(bank, queries, {name: search() for name, search in searches.items()})
    passes: dict[str, Pass] = {PRODUCT: matrix_product(bank, queries), **searches}
    peaks = {name: peak_allocated(passes[name], setting.device) for name in (OURS, WHOLE)}
    with progress_bar("neighbours", len(passes) * (setting.rounds + 1)) as progress:
        rates = interleave(passes, setting.num_queries, setting.rounds, progress)
    return [Row(name, rates.get(name), peaks.get(name)) for name in (PRODUCT, OURS, WHOLE, FAISS, SKLEARN)]


def matrix_product(bank: Tensor, queries: Tensor) -> Pass:
    """What nobody can do without, at its fastest: every query times every bank image, with nothing kept."""
    unit_bank = normalize(bank, dim=1)
    buffer = bank.new_empty(len(queries), min(PRODUCT_PART, len(bank)))

    def multiply() -> None:
        with full_float32(bank.device.type):
            for part in unit_bank.split(PRODUCT_PART):
                torch.mm(queries, part.T, out=buffer if len(part) == buffer.shape[1] else buffer.new_empty(0))
        synchronise(bank.device.type)

    return multiply


def build_searches(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[str, Callable[[], np.ndarray] | None]]:
    """Everybody's search for the neighbours, (Q, k); ``None``: not installed."""

    def ours() -> np.ndarray:
        return nearest_neighbours(bank, queries, k).cpu().numpy()

    def whole() -> np.ndarray:
        with full_float32(bank.device.type):
            similarities = normalize(queries, dim=1) @ normalize(bank, dim=1).T
            return similarities.topk(k, dim=1).indices.cpu().numpy()

    bank_array, query_array = bank.cpu().numpy(), queries.cpu().numpy()

    def faiss_flat() -> np.ndarray:
        import faiss

        unit_bank, unit_queries = (np.array(array) for array in (bank_array, query_array))
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
    yield FAISS, faiss_flat if find_spec("faiss") else None
    yield SKLEARN, sklearn_brute if find_spec("sklearn") else None


def check_neighbours(bank: Tensor, queries: Tensor, found: dict[str, np.ndarray]) -> None:
    """Refuse a search that names other neighbours than ours, ties aside."""
    unit_bank, unit_queries = normalize(bank.double().cpu(), dim=1), normalize(queries.double().cpu(), dim=1)
    for name, neighbours in found.items():
        rows, columns = np.nonzero(neighbours != found[OURS])
        theirs = unit_bank[neighbours[rows, columns]]
        ours = unit_bank[found[OURS][rows, columns]]
        differences = ((theirs - ours) * unit_queries[rows]).sum(dim=1).abs()
        if (differences > TIE).any():
            raise RuntimeError(f"{name!r} finds other neighbours than {OURS!r}")


def measure_inputs(setting: Setting) -> list[Row]:
    """Images a second from CIFAR's size to what the model computes with."""
    encoder = build_sized_model(setting.size).to(setting.device).teacher.encoder
    images = random_images(INPUT_BATCHES * INPUT_BATCH)
    passes = {
        PIL_INPUT: functools.partial(prepare_with_pil, images, encoder),
        OUR_INPUT: functools.partial(prepare_in_batches, images, encoder, setting.device),
    }
    with progress_bar("input", len(passes) * (setting.rounds + 1)) as progress:
        rates = interleave(passes, INPUT_BATCHES * INPUT_BATCH, setting.rounds, progress)
    return [Row(name, rates[name], None) for name in passes]


def prepare_with_pil(images: Tensor, encoder: ImageEncoder) -> None:
    config = encoder.config
    transform = transforms.Compose(
        [
            transforms.Resize(config.image_size, transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(config.image_mean, config.image_std),
        ]
    )
    for batch in images.split(INPUT_BATCH):
        tensors = [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in batch]
        torch.stack(tensors)  # pyright: ignore[reportArgumentType]: Compose is typed as if it gave what it gets


def prepare_in_batches(images: Tensor, encoder: ImageEncoder, device: str) -> None:
    for batch in images.split(INPUT_BATCH):
        encoder.prepare(batch.to(device))
    synchronise(device)


def measure_evaluation(setting: Setting) -> float:
    """Seconds that the callback takes for a set of CIFAR's shape, the second time (the first one compiles kernels)."""
    model = build_sized_model(setting.size)
    on_gpu = setting.device == "cuda"
    model.teacher.cast_weights(PRECISIONS[setting.precision])
    model.cpu_bf16 = setting.precision == "amp_bf16" and not on_gpu
    num_test = max(3, setting.evaluation_images // 6)
    labelled = LabelledSet(_random_set(setting.evaluation_images - num_test), _random_set(num_test))
    size = model.teacher.config.image_size
    two_images = list(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    seconds = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(two_images, batch_size=1),  # pyright: ignore[reportArgumentType]: a list will do
        max_duration="2ba",
        optimizers=torch.optim.SGD(model.student.parameters(), lr=0.0),
        callbacks=[ZeroShotRetrieval({"cifar": labelled}, "1ba", references={})],
        loggers=[seconds],
        precision=setting.precision if on_gpu else "fp32",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return float(seconds.data["time/zero_shot_retrieval"][-1][1])


def _random_set(num_images: int) -> LabelledImages:
    return LabelledImages(random_images(num_images), torch.arange(num_images) % 10)


def random_images(num_images: int) -> Tensor:
    """(N, 3, 32, 32) uint8, in memory as torchvision's CIFAR is: channels last."""
    return torch.randint(0, 256, (num_images, CIFAR_SIZE, CIFAR_SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def find_targets(rates: dict[str, Rates | None]) -> Iterator[Target]:
    """What should be reached."""
    ours, inputs = rates[OURS], rates[OUR_INPUT]
    assert ours is not None
    assert inputs is not None
    for what, contender, baseline, at_least in (
        ("ours / matrix product alone", ours, rates[PRODUCT], 0.77),
        ("ours / faiss IndexFlatIP", ours, rates[FAISS], 1.3),
        ("ours / scikit-learn brute", ours, rates[SKLEARN], 4),
        ("input in batches / PIL one by one", inputs, rates[PIL_INPUT], 5),
    ):
        yield Target(what, None if baseline is None else contender.ratio(baseline), at_least)
