"""Batches of clips of similar length: each sample once, the same on any number of ranks, little padding."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from d2v_composer.data.audio import Audio
from d2v_composer.data.modality import collate
from d2v_composer.sources.mds import Index
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.order import EpochOrder, padded_sizes
from helpers import write_mds
from streams import global_batches

SEED, EPOCH = 17, 3
Lengths = NDArray[np.int64]


def read_speech(rng: np.random.Generator, number: int) -> Lengths:
    """As LibriSpeech: 1 to 16 s, mostly more than 12."""
    lengths = np.where(rng.random(number) < 0.8, rng.uniform(12, 16.5, number), rng.uniform(1.3, 12, number))
    return (16_000 * lengths).astype(int)


def prompts(rng: np.random.Generator, number: int) -> Lengths:
    """As words and short sentences: 0.3 to 8 s, mostly less than 2."""
    return (16_000 * np.exp(rng.normal(0.2, 0.5, number)).clip(0.3, 8)).astype(int)


def build_order(lengths: Lengths | None, number: int, batch_size: int, **options: Any) -> EpochOrder:
    num_shards = number // 100 + 1
    shard_sizes = np.diff(np.arange(num_shards + 1) * number // num_shards)
    options |= {"global_batch_size": batch_size, "epoch_size": number // batch_size * batch_size}
    return EpochOrder(shard_sizes, lengths=lengths, seed=SEED, **options)


@pytest.mark.parametrize("canonical_nodes", [1, 2, 4])
def test_an_epoch_has_each_sample_once_and_the_same_batches_on_any_ranks(canonical_nodes: int) -> None:
    """3, 4, 8: also in an epoch that is resumed after any batch; a node keeps its part of the order."""
    lengths = prompts(np.random.default_rng(1), 1000)
    order = build_order(lengths, 1000, 48, shuffle_block_size=200, num_canonical_nodes=canonical_nodes)
    expected = np.sort(global_batches(order, EPOCH, 1, 1).reshape(-1, 48))
    counts = np.bincount(expected.ravel(), minlength=1000)
    assert counts.max() == 1
    assert counts.sum() == 960
    for nodes, ranks in [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (1, 3)]:
        if canonical_nodes % nodes:
            continue
        for first in (0, 1, 7, 19):
            batches = global_batches(order, EPOCH, nodes, ranks, first * 48)
            assert np.array_equal(np.sort(batches.reshape(-1, 48)), expected[first:])
        owners = global_batches(order, EPOCH, nodes, ranks)
        assert not any(set(owners[:, 0].ravel()) & set(owners[:, node].ravel()) for node in range(1, nodes))
    order.seed += 1
    assert not np.array_equal(np.sort(global_batches(order, EPOCH, 1, 1).reshape(-1, 48)), expected)


def test_a_nodes_samples_are_its_part_of_streamings_order() -> None:
    """8: so its shards are too."""
    lengths = prompts(np.random.default_rng(1), 4000)
    options = {"shuffle_block_size": 500, "num_canonical_nodes": 4}
    parts = [global_batches(build_order(sizes, 4000, 64, **options), EPOCH, 4, 1) for sizes in (lengths, None)]
    for node in range(4):
        assert set(parts[0][:, node].ravel()) == set(parts[1][:, node].ravel())
        # Also window by window: no shard is needed much earlier or later than in Streaming's order.
        assert set(parts[0][:7, node].ravel()) == set(parts[1][:7, node].ravel())


@pytest.mark.parametrize(
    ("draw", "number", "batch_size", "crop", "nodes"),
    [(read_speech, 60_000, 64, 249_600, 1), (read_speech, 60_000, 128, 249_600, 4), (prompts, 4000, 32, 80_000, 1)],
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_little_is_padding(
    draw: Callable[..., Lengths], number: int, batch_size: int, crop: int, nodes: int, is_compiled: bool
) -> None:
    """At most 10 % of the frames, for a compiled model with at most 16 different lengths."""
    lengths = np.minimum(draw(np.random.default_rng(2), number), crop)
    order = build_order(lengths, number, batch_size, shuffle_block_size=8192, num_canonical_nodes=nodes)
    batches = lengths[global_batches(order, EPOCH, 1, 1).reshape(-1, batch_size)]
    sizes = padded_sizes(lengths) if is_compiled else []
    padded = [collate([torch.empty(0, length) for length in batch], sizes)[0].shape[-1] for batch in batches[:400]]
    assert not is_compiled or len(set(padded)) <= 16
    frames, valid = (np.array(samples) // 320 - 1 for samples in (padded, batches[:400]))
    share = 1 - valid.sum() / (frames.sum() * batch_size)
    assert share < 0.1
    order.lengths = None
    unsorted = order.draw(EPOCH).reshape(-1, batch_size)
    assert 1 - lengths[unsorted].mean() / lengths[unsorted].max(axis=1).mean() > 2 * share


def test_batches_of_all_lengths_come_at_all_times() -> None:
    """And at other times in each window and in each epoch."""
    lengths = read_speech(np.random.default_rng(2), 20_000)
    order = build_order(lengths, 20_000, 32, shuffle_block_size=128 * 32)
    epochs = [global_batches(order, epoch, 1, 1).reshape(-1, 32) for epoch in (EPOCH, EPOCH + 1)]
    thirds = [part.mean() for part in np.array_split(lengths[epochs[0][:120]], 3)]
    assert max(thirds) < 1.15 * min(thirds)
    windows = np.concatenate([lengths[batches[: 4 * 128]].mean(axis=1).reshape(4, 128) for batches in epochs])
    assert np.triu(np.corrcoef(windows), 1).max() < 0.5


def test_without_shuffle_the_order_is_streamings() -> None:
    order = build_order(prompts(np.random.default_rng(1), 500), 500, 20, shuffle=False)
    assert global_batches(order, EPOCH, 1, 1).ravel().tolist() == list(range(500))


def test_collate_pads_to_a_size() -> None:
    samples = [torch.ones(3), torch.ones(5)]
    inputs, lengths = collate(samples, [4, 6, 9])
    assert inputs.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert lengths.tolist() == [3, 5]
    assert [tensor.shape[-1] for tensor in collate(samples, [4])] == [5, 2]  # longer than all sizes
    assert len(collate([torch.ones(4), torch.ones(4)], [4])) == 1


def open_clips(folder: Path, summary: str | None) -> Index:
    """Three clips, and the summary of their conversion."""
    write_mds(folder, [bytes(9)] * 3)
    if summary is not None:
        (folder / "conversion.json").write_text(summary)
    return Index(folder, Audio(), "image")


@pytest.mark.parametrize(
    ("summary", "problem"),
    [
        (None, "expected the lengths of 3 samples in conversion.json, got 0; convert the data set with d2v convert-"),
        ('{"clips": 3}', "got 0; convert"),
        ('{"lengths": [1, 2]}', "got 2; convert"),
        ('{"lengths": [1, 2', "conversion.json"),
        ('{"lengths": [1, 2, "long"]}', "conversion.json"),
        ("[]", "conversion.json"),
    ],
)
def test_lengths_must_be_there(tmp_path: Path, summary: str | None, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as raised:
        _ = open_clips(tmp_path, summary).lengths
    assert "\n" not in str(raised.value)


def test_other_lengths_are_another_data_set(tmp_path: Path) -> None:
    summaries = [json.dumps({"lengths": lengths}) for lengths in ([1, 2, 3], [2, 1, 3])]
    digests = {open_clips(tmp_path / str(i), summary).describe()["sha256"] for i, summary in enumerate(summaries)}
    assert len(digests) == 2
