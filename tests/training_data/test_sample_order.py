"""A checkpoint fixes what the order of samples depends on: each field of train_loader, for images and audio."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v_composer.config.schema import TrainerConfig, TrainLoaderConfig
from d2v_composer.data import MODALITIES
from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images
from d2v_composer.data.modality import Modality
from d2v_composer.runs.trainer import FIXED_IN_ANY_RUN
from d2v_composer.sources.mds import Index
from d2v_composer.training_data.loader import build_train_loader
from helpers import write_mds

NUM_SAMPLES, BATCH_SIZE = 400, 16
# Another value of each field. Where the data lie does not matter: the run compares their sha256.
CHANGES: dict[str, Any] = {
    "num_workers": 1,
    "prefetch_factor": 5,
    "crop_scale": (0.5, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "crop_seconds": 0.1,
    "timeout": 9.0,
    "shuffle": False,
    "shuffle_block_size": 256,
    "num_canonical_nodes": 2,
    "column": "other",
}
LOCATION = {"local", "remote", "cache_limit"}


def order_of(folder: Path, modality: Modality, is_compiled: bool = False, **changes: Any) -> list[int]:
    """Return the samples of two epochs."""
    loader = TrainLoaderConfig(local=str(folder), **{"column": "image", "num_workers": 0, **changes})
    config = TrainerConfig(seed=17, precision="fp32", global_train_batch_size=BATCH_SIZE)
    index = Index(folder, modality, "image")
    train_loader: Any = build_train_loader(config, loader, index, is_compiled=is_compiled)
    return [sample.sample_id for _ in range(2) for sample in train_loader.sampler]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_mds(tmp_path_factory.mktemp("order"), [bytes(600)] * NUM_SAMPLES)
    lengths = np.random.default_rng(0).integers(800, 8000, NUM_SAMPLES).tolist()
    (folder / "conversion.json").write_text(json.dumps({"lengths": lengths}))
    return folder


@pytest.mark.parametrize("modality", [Images(32), Audio()], ids=["image", "audio"])
def test_a_field_is_fixed_or_leaves_the_order_alone(modality: Modality, folder: Path) -> None:
    before = order_of(folder, modality)
    assert CHANGES.keys() | LOCATION == TrainLoaderConfig.model_fields.keys()
    refused = frozenset().union(*(kind.options for kind in MODALITIES.values())) - modality.options
    fixed = {name for name in CHANGES if f"config.train_loader.{name}" in FIXED_IN_ANY_RUN}
    free = {name: CHANGES[name] for name in CHANGES.keys() - fixed - refused}
    assert len(free) > 2
    for name, value in free.items():
        assert order_of(folder, modality, **{name: value}) == before, name
    assert order_of(folder, modality, is_compiled=True) == before
    assert order_of(folder, modality, shuffle_block_size=256) != before
