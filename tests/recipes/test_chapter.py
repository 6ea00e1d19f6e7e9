"""distill.yaml is the thesis chapter's run, thesis_code.yaml that of its author's code; both read $IMAGENET."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from d2v_composer.config.load import load_config
from d2v_composer.models.attention import Block
from d2v_composer.models.configs import RELEASED
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.student import Student
from gated_store import GatedStore
from helpers import QUICKSTART, ROOT, failure, log_of, map_of, run_command, succeed

YAMLS = ROOT / "yamls"
ON_CPU = ("precision=fp32", "compile=false")
COMPOSER = Path(sys.executable).parent / "composer"
DISTILL = (COMPOSER, ROOT / "recipes" / "train.py", YAMLS / "distill.yaml")
OF_IMAGENET = ("distill", "distill_dinov2", "distill_dinov3", "thesis_code", "thesis_six_blocks")


@pytest.fixture(autouse=True)
def no_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own ImageNet and GPU."""
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_distill_yaml_has_each_row_of_the_chapters_table() -> None:
    config, teacher = load_config([str(YAMLS / "distill.yaml"), *ON_CPU]), RELEASED["base"]
    assert config.teacher.checkpoint == "https://dl.fbaipublicfiles.com/fairseq/data2vec2/base_imagenet.pt"
    with torch.device("meta"):
        student = Data2Vec2(teacher).build_student(**config.student.model_dump())
    block, clipping = student.block_list[0], config.algorithms.gradient_clipping
    assert clipping is not None
    assert isinstance(student, Student)
    assert student.alibi is not None
    resolved = {
        "Transformer Blocks": len(student.blocks),
        "Embed Dim": student.embed_dim,
        "MHA Heads": block.attn.num_heads,
        "ALiBi Heads": student.alibi.num_heads,
        "MLP Ratio": block.mlp.fc1.out_features / student.embed_dim,
        "LayerNorm eps": {block.norm1.eps, block.norm2.eps},
        "LayerNorm First": not isinstance(block, Block),  # the golden numbers prove that it is post-norm
        "Steps": config.max_duration,
        "Validation Frequency": config.retrieval.interval,
        "Batch size": config.global_train_batch_size,
        "AdamW": (config.optimizer.name, config.optimizer.eps, config.optimizer.betas),
        "Peak learning rate": config.optimizer.lr,
        "Learning rate schedule": (config.scheduler.name, config.scheduler.t_warmup, config.scheduler.alpha_f),
        "Weight decay": (config.optimizer.weight_decay, config.optimizer.decay_norms_and_biases),
        "Gradient Clip Norm": clipping.clipping_threshold,
        "top-k": config.retrieval.ks,
    }
    assert resolved == {
        "Transformer Blocks": 5,
        "Embed Dim": 768,
        "MHA Heads": 12,
        "ALiBi Heads": 12,
        "MLP Ratio": 3.0,
        "LayerNorm eps": {1e-6},
        "LayerNorm First": False,
        "Steps": "30000ba",
        "Validation Frequency": "5000ba",
        "Batch size": 256,
        "AdamW": ("adamw", 1e-6, (0.9, 0.98)),
        "Peak learning rate": 5e-4,
        "Learning rate schedule": ("cosine_with_warmup", "3000ba", 0.0),
        "Weight decay": (0.01, True),
        "Gradient Clip Norm": 2.0,
        "top-k": [1, 3],
    }


def test_thesis_code_trains_what_the_authors_code_trains() -> None:
    config = load_config([str(YAMLS / "thesis_code.yaml"), *ON_CPU])
    with torch.device("meta"):
        student = Data2Vec2(RELEASED["base"]).build_student(**config.student.model_dump())
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    assert round(trained / 1e6, 1) == 17.7
    assert (config.student.alibi, config.seed, config.train_loader.num_workers) == (False, 42, 12)
    assert (config.train_loader.crop_scale, config.optimizer.decay_norms_and_biases) == ((0.08, 1.0), True)


@pytest.mark.parametrize("name", OF_IMAGENET)
def test_imagenet_is_read_from_the_address_in_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def remote() -> str | None:
        return load_config([str(YAMLS / f"{name}.yaml"), *ON_CPU]).train_loader.remote

    assert remote() is None
    monkeypatch.setenv("IMAGENET", "s3://bucket/imagenet/train")
    assert remote() == "s3://bucket/imagenet/train"


def test_the_bare_command_says_all_that_is_missing_before_it_fetches_anything(tmp_path: Path) -> None:
    ended = run_command(sys.executable, *DISTILL[1:], cwd=tmp_path, timeout=60)
    failure(ended, status=2)
    gpu, data = ended.stderr.splitlines()
    assert gpu.startswith("error: precision: amp_fp16 needs a GPU")
    assert data.startswith("error: train_loader.remote: must be the address of an MDS data set")
    assert "datasets/imagenet/train" in data
    assert "variable IMAGENET" in data
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_commissions_command_reads_a_store_and_ends_with_a_report(
    object_store: GatedStore, small_data: Path, tmp_path: Path
) -> None:
    """The whole of distill.yaml, with a random teacher of base's sizes and 3 batches of 8."""
    object_store.create_bucket_of_images("imagenet", small_data)
    succeed("random-teacher", "base", tmp_path / "teacher.safetensors")
    sets = [
        f"retrieval.datasets.{name}={{format: mds, root: {QUICKSTART / 'cifar10'}}}" for name in ("cifar10", "cifar100")
    ]
    ended = run_command(
        *DISTILL,
        *("precision=auto", "compile=false", f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}", *sets),
        *("max_duration=3ba", "global_train_batch_size=8", "device_eval_batch_size=8", "scheduler.t_warmup=1ba"),
        *("retrieval.interval=2ba", "retrieval.max_images=8", "alignment.max_samples=64", "train_loader.num_workers=1"),
        cwd=tmp_path,
        environment=object_store.environment | {"IMAGENET": "s3://imagenet/images", "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = tmp_path / "runs" / "distill"
    record, log = yaml.safe_load((run / "run.yaml").read_text()), log_of(run)
    assert record["config"]["train_loader"]["remote"] == "s3://imagenet/images"
    assert list((tmp_path / "datasets" / "imagenet" / "train").glob("shard.*"))
    assert "29.5 M trained parameters" in ended.stdout
    assert list(log["metrics/cifar10/bank_train/top1"]) == [2, 3]
    # The map into the teacher's space is fitted only at the end, because the headline does not need it.
    assert list(log["metrics/cifar100/in_index/bank_train/top1"]) == [3]
    assert map_of(run)["batch"] == 3
    assert (run / "report.html").is_file()
    assert "export runs/distill/latest-rank0.pt" in ended.stdout + ended.stderr
