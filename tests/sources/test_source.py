"""Samples by number, whatever holds them."""

from pathlib import Path

import pytest

from d2v_composer.conversion.convert import hold_out
from d2v_composer.data.images import Images
from d2v_composer.sources.open import open_source
from d2v_composer.sources.source import Source
from helpers import encoded_image, write_mds


def images_of(source: Source) -> set[bytes]:
    return {source.load(number) for number in range(len(source))}


@pytest.mark.parametrize("shard_bytes", [3 << 10, 1 << 20])
def test_copies_of_held_out_samples_are_held_out_in_mds_too(tmp_path: Path, shard_bytes: int) -> None:
    """Each of 100 images is there twice, in small shards or in one."""
    images = [encoded_image(seed // 2) for seed in range(200)]
    write_mds(tmp_path / "mds", images, shard_bytes=shard_bytes)
    source = open_source(str(tmp_path / "mds"), Images())
    parts, num_copies = hold_out(source, tmp_path / "held_out.json")
    test, train = (images_of(parts[part]) for part in ("test", "train"))
    assert not test & train
    assert num_copies == len(parts["test"]) - len(test)
    assert len(parts["test"]) + len(parts["train"]) == 200
