"""Zero-shot retrieval during training: do the representations get better?

Shapes: B images of a batch, N images of a set, Q queries, D channels.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.core import Callback, Event, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from tqdm.auto import tqdm

from d2v_composer.callbacks.trainer_state import due_every, unwrapped
from d2v_composer.data.labelled_sets import LabelledImages, LabelledSet
from d2v_composer.evaluation.metric_names import BANKS, Embed, headline_fallbacks, metric_key
from d2v_composer.evaluation.retrieval import nearest_neighbours, retrieval_hits

__all__ = ["ZeroShotRetrieval"]


class ZeroShotRetrieval(Callback):
    """Top-k retrieval accuracy on labelled sets, both ways, while the model trains without those labels.

    Every image is embedded once per evaluation, for both directions and all embeddings; over several ranks each
    image once by one of them. Evaluated at ``interval``, at the end, and never twice for one batch.

    What it needs of a model, in anybody's Composer run: a method ``embed_all`` or ``embed``, or a function given
    here, that takes (B, 3, height, width) uint8 images as the set holds them, already on the model's device, and
    returns one embedding, (B, D), or a dict of several by name. Resizing and normalising are its business. It is
    called in eval mode, under inference mode, in the run's precision.

    Logged: ``metrics/{dataset}/bank_{train|test}/top{k}`` for the headline,
    ``metrics/{dataset}/bank_{train|test}/top{k}/{embedding}`` for every named embedding, the same below
    ``metrics/{dataset}/{reference}/`` for each reference, and ``time/zero_shot_retrieval`` in seconds.

    Args:
        datasets: Name → labelled images; bank and queries by turns.
        interval: Composer time string.
        ks: For which k accuracy is measured.
        embed: Instead of the model's own method.
        headline: The embedding that the short key reports, where the model gives several.
        references: Name → embed function, measured once at the start: what the model is compared with. Default: the
            model's ``retrieval_references()``, where it has that method.
        at_start: Whether the untrained model is evaluated as well.
        device_batch_size: Images embedded at once on each device.
        progress_bar: Whether rank 0 shows one (on a terminal).

    Attributes:
        history: One entry an evaluation: ``{"batch": int, "metrics": {key: accuracy}}``, oldest first; kept in
            checkpoints.
        reference_metrics: key → accuracy of the references.
        neighbours: The headline's of the last evaluation: data set → bank ('train', 'test') → (Q, K) int32, the bank
            indices of each query's nearest images, nearest first, K the largest of ``ks``; kept in checkpoints.
    """

    def __init__(
        self,
        datasets: Mapping[str, LabelledSet],
        interval: str = "5000ba",
        ks: Sequence[int] = (1, 3),
        *,
        embed: Embed | None = None,
        headline: str = "output_cls",
        references: Mapping[str, Embed] | None = None,
        at_start: bool = False,
        device_batch_size: int = 256,
        progress_bar: bool = True,
    ) -> None:
        for name, labelled in datasets.items():
            smallest = min(labelled.num_images)
            if not 1 <= min(ks) <= max(ks) <= smallest:
                raise ValueError(f"{name}: ks must be from 1 to its smaller set's {smallest} images, got {list(ks)}")
        self.datasets = dict(datasets)
        self.ks = tuple(ks)
        self.embed = embed
        self.headline = headline
        self.references = references
        self.at_start = at_start
        self.device_batch_size = device_batch_size
        self.progress_bar = progress_bar
        self.is_due = due_every(interval, {Event.BATCH_END, Event.EPOCH_END})
        self.history: list[dict[str, Any]] = []
        self.reference_metrics: dict[str, float] = {}
        self.neighbours: dict[str, dict[str, Tensor]] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        model = unwrapped(state)
        if self.references is None:
            self.references = getattr(model, "retrieval_references", dict)()
        if not self.expected_reference_keys() <= self.reference_metrics.keys():  # none yet, or a resume wants others
            self.reference_metrics = {}
            for reference, embed in self.references.items():
                self.reference_metrics |= self.measure(embed, state, logger, reference)
        logger.log_metrics(self.reference_metrics)
        if self.at_start and state.timestamp.batch == 0:
            self.evaluate(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.BATCH_END):
            self.evaluate(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.EPOCH_END):
            self.evaluate(state, logger)

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "reference_metrics": self.reference_metrics,
            "headline": self.headline,
            "neighbours": self.neighbours,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was measured; the short keys are those of the present headline, and so are neighbours."""
        self.history = [{**entry, "metrics": self.with_headline(entry["metrics"])} for entry in state["history"]]
        self.reference_metrics = self.with_headline(state["reference_metrics"])
        # Checkpoints of earlier versions have none.
        self.neighbours = state["neighbours"] if state.get("headline") == self.headline else {}

    def with_headline(self, metrics: dict[str, float]) -> dict[str, float]:
        for name in reversed(headline_fallbacks(self.headline)):
            suffix = f"/{name}"
            metrics = metrics | {key.removesuffix(suffix): metrics[key] for key in metrics if key.endswith(suffix)}
        return metrics

    def expected_reference_keys(self) -> set[str]:
        """The short keys of every reference."""
        return {
            metric_key(dataset, bank, k, reference=reference)
            for dataset in self.datasets
            for bank in BANKS
            for k in self.ks
            for reference in self.references or {}
        }

    def evaluate(self, state: State, logger: Logger) -> None:
        """Measure the model and log it, unless this batch has been."""
        batch = int(state.timestamp.batch)
        if self.history and self.history[-1]["batch"] == batch:
            return
        metrics = self.measure(self.embed or embed_method(unwrapped(state)), state, logger)
        self.history.append({"batch": batch, "metrics": metrics})
        logger.log_metrics(metrics)

    def measure(self, embed: Embed, state: State, logger: Logger, reference: str | None = None) -> dict[str, float]:
        """The accuracies of one embed function, under their keys; its seconds are logged."""
        start = time.monotonic()
        model, was_training = state.model, state.model.training
        model.eval()
        try:
            # What FSDP gathers in inference mode is of no use to training.
            without_gradient = torch.no_grad() if state.fsdp_enabled else torch.inference_mode()
            with without_gradient, get_precision_context(state.precision, state.precision_config):
                metrics = {
                    key: accuracy
                    for dataset, labelled in self.datasets.items()
                    for key, accuracy in self.measure_set(embed, state, dataset, labelled, reference).items()
                }
        finally:
            model.train(was_training)
        logger.log_metrics({"time/zero_shot_retrieval": time.monotonic() - start})
        return metrics

    def measure_set(
        self, embed: Embed, state: State, dataset: str, labelled: LabelledSet, reference: str | None
    ) -> dict[str, float]:
        """One set's accuracies, both ways, for every embedding."""
        embedded = {
            bank: self.embed_my_share(embed, getattr(labelled, bank), state, f"{dataset} {bank}") for bank in BANKS
        }
        labels = {bank: state.device.tensor_to_device(getattr(labelled, bank).labels) for bank in BANKS}
        metrics: dict[str, float] = {}
        names = list(embedded["train"])
        headline = self.headline_among(names, reference)
        for name in names:
            # One embedding at a time: all ranks' images of all embeddings would be gigabytes.
            images = {bank: gather(embedded[bank].pop(name), len(labels[bank])) for bank in BANKS}
            for bank, query in (BANKS, BANKS[::-1]):
                nearest = self.look_up(images[bank], images[query])
                is_headline = name == headline
                if is_headline and reference is None:
                    self.neighbours.setdefault(dataset, {})[bank] = nearest.int().cpu()
                for k, hits in retrieval_hits(nearest, labels[bank], labels[query], self.ks).items():
                    accuracy = hits.double().mean().item()
                    if is_headline:
                        metrics[metric_key(dataset, bank, k, reference=reference)] = accuracy
                    if name:
                        metrics[metric_key(dataset, bank, k, name, reference)] = accuracy
        return metrics

    def headline_among(self, names: list[str], reference: str | None) -> str:
        """An embedding without a name ('') is its own headline; a reference may have another that stands in for it."""
        allowed = ["", self.headline] if reference is None else ["", *headline_fallbacks(self.headline)]
        found = next((name for name in allowed if name in names), None)
        if found is None:
            raise ValueError(f"headline must be one of {', '.join(names)}, got {self.headline!r}")
        return found

    def embed_my_share(self, embed: Embed, images: LabelledImages, state: State, label: str) -> dict[str, Tensor]:
        """Every world-size-th image, float32 on the device, padded so that all ranks have equally many."""
        mine = my_share(len(images.labels))
        hidden = None if self.progress_bar and dist.get_global_rank() == 0 else True  # None: only on a terminal
        batches: list[dict[str, Tensor]] = []
        for indices in tqdm(mine.split(self.device_batch_size), desc=f"retrieval {label}", disable=hidden, leave=False):
            embeddings = embed(state.device.tensor_to_device(images.images[indices]))
            embeddings = {"": embeddings} if isinstance(embeddings, Tensor) else embeddings
            # A function of the user's own may return them on the host.
            batches.append({name: state.device.tensor_to_device(each).float() for name, each in embeddings.items()})
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def look_up(self, bank: Tensor, queries: Tensor) -> Tensor:
        """The bank indices of each query's nearest, (Q, K); each rank looks up its share of the queries."""
        mine = my_share(len(queries)).to(queries.device)
        return gather(nearest_neighbours(bank, queries[mine], max(self.ks)), len(queries))


def my_share(num_images: int) -> Tensor:
    """The indices that are this rank's: every world-size-th, padded so that all ranks have equally many."""
    world_size = dist.get_world_size()
    mine = torch.arange(dist.get_global_rank(), num_images, world_size)
    missing = -(-num_images // world_size) - len(mine)
    return torch.cat([mine, mine.new_zeros(missing)])


def gather(share: Tensor, num_images: int) -> Tensor:
    """All ranks' shares in the order of the images, (N, …)."""
    if dist.get_world_size() == 1:
        return share[:num_images]
    return all_gather(share).transpose(0, 1).flatten(0, 1)[:num_images]


def all_gather(share: Tensor) -> Tensor:
    """The shares of all W ranks, which have one shape: (W, …)."""
    shares = share.new_empty(dist.get_world_size(), *share.shape)
    if not share.is_cpu:
        torch.distributed.all_gather_into_tensor(shares.flatten(0, 1), share.contiguous())
        return shares
    # Not gloo's all_gather: its threads copy the result, in parallel, for which each of them starts OpenMP threads of
    # its own. More than there are cores, these sleep at every barrier, and every later operation takes longer.
    shares[dist.get_global_rank()] = share
    for rank, received in enumerate(shares):
        torch.distributed.broadcast(received, src=rank)
    return shares


def embed_method(model: torch.nn.Module) -> Embed:
    """The model's own ``embed_all`` or ``embed``.

    Raises:
        ValueError: It has neither.
    """
    for name in ("embed_all", "embed"):
        if callable(getattr(model, name, None)):
            return getattr(model, name)
    raise ValueError(f"{type(model).__name__} has no method embed_all or embed: give ZeroShotRetrieval(embed=…)")
