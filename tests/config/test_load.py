"""A YAML's keys, types and values are accepted as written, or refused in one line."""

import signal
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from d2v_composer.config.load import load_config, load_evaluate_config
from d2v_composer.config.schema import TrainConfig
from d2v_composer.system.errors import InputError
from d2v_composer.system.ranks import REPORT_SECONDS
from helpers import ROOT

QUICKSTART_YAML = str(ROOT / "yamls" / "quickstart.yaml")
REMOTE = "train_loader.remote=s3://bucket/imagenet/train"
DISTILL_YAML = str(ROOT / "yamls" / "distill.yaml")


def load(*overrides: str) -> TrainConfig:
    return load_config([QUICKSTART_YAML, *overrides])


def test_distill_is_the_papers_run() -> None:
    config = load_config([DISTILL_YAML, "precision=fp32", "compile=false", REMOTE])
    assert config.device_train_microbatch_size is None
    assert config.max_duration == "30000ba"
    assert config.global_train_batch_size == 256
    assert (config.student.depth, config.student.mlp_ratio, config.student.alibi) == (5, 3.0, True)
    assert (config.student.init, config.prediction, config.targets.extra_tokens) == ("random", "layer_mean", "regress")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (5e-4, [0.9, 0.98], 1e-6, 0.01)
    assert (config.scheduler.t_warmup, config.scheduler.alpha_f) == ("3000ba", 0.0)
    assert config.algorithms.gradient_clipping is not None
    assert config.algorithms.gradient_clipping.clipping_threshold == 2.0
    assert config.train_loader.crop_scale == [0.08, 1.0]
    assert config.train_loader.crop_ratio == pytest.approx([3 / 4, 4 / 3])
    assert config.train_loader.flip == 0.5
    assert (config.retrieval.interval, config.retrieval.ks) == ("5000ba", [1, 3])
    assert set(config.retrieval.datasets) == {"cifar10", "cifar100"}
    with pytest.raises(InputError, match=r"precision: amp_fp16 needs a GPU, .* precision=fp32 or amp_bf16"):
        load_config([DISTILL_YAML, REMOTE])


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_other_teachers_have_the_papers_budget(name: str) -> None:
    overrides = ["precision=fp32", "compile=false", REMOTE, "run_name=distill"]
    paper, other = (
        load_config([DISTILL_YAML, *overrides]),
        load_config([DISTILL_YAML.replace("distill", f"distill_{name}"), *overrides]),
    )
    assert other.teacher.model.startswith("timm/vit_base_patch1")
    assert (other.teacher.checkpoint, other.teacher.first_blocks, other.teacher.image_size) == (None, 2, 224)
    assert (other.retrieval.representation, other.train_loader.crop_scale) == ("layer_mean", [0.7, 1.0])
    other.teacher, other.retrieval.representation = paper.teacher, paper.retrieval.representation
    other.train_loader.crop_scale = paper.train_loader.crop_scale
    assert other == paper


def load_paper_like(name: str) -> TrainConfig:
    yaml = DISTILL_YAML.replace("distill", name)
    return load_config([yaml, "precision=fp32", "compile=false", REMOTE, "run_name=distill"])


def test_the_authors_code_differs_from_the_chapter_in_alibi_and_decay() -> None:
    paper, code = load_paper_like("distill"), load_paper_like("thesis_code")
    assert (code.student.alibi, code.optimizer.decay_norms_and_biases) == (False, True)
    code.student.alibi, code.optimizer.decay_norms_and_biases = True, False
    assert code == paper


def test_the_authors_later_student_copies_six_blocks_for_ten_epochs() -> None:
    paper, later = load_paper_like("distill"), load_paper_like("thesis_six_blocks")
    assert asdict(later.student) == asdict(paper.student) | {
        "depth": 6,
        "mlp_ratio": 4.0,
        "alibi": False,
        "init": "teacher_blocks",
    }
    assert (later.max_duration, later.scheduler.t_warmup) == ("50040ba", "0.1dur")
    assert later.algorithms.gradient_clipping is None
    for name in ("student", "max_duration", "scheduler", "algorithms"):
        setattr(later, name, getattr(paper, name))
    assert later == paper


def test_overrides_change_single_keys() -> None:
    config = load("optimizer.lr=1e-4", "student={depth: 2}", "callbacks.memory_monitor={}", "callbacks.lr_monitor=null")
    assert config.optimizer.lr == 1e-4
    assert load("optimizer.betas[0]=0.8").optimizer.betas == [0.8, 0.98]
    flops = load("callbacks.speed_monitor={gpu_flops_available: 312000000000000}").callbacks["speed_monitor"]
    assert flops == {"gpu_flops_available": 312_000_000_000_000}
    assert (config.student.depth, config.student.mlp_ratio) == (2, 3.0)
    assert config.callbacks["memory_monitor"] == {}
    assert config.callbacks["lr_monitor"] is None
    assert load("retrieval.datasets={}").retrieval.datasets == {}
    assert Path(config.teacher.checkpoint or "").is_file()  # ${here:…} is beside the YAML


REFUSED = {
    "optimizer.lr=1": "optimizer: no such key; did you mean optimizer?",
    "student.dept=3": "student.dept: no such key; did you mean depth? (allowed: depth, mlp_ratio, alibi, init,",
    "retrieval.datasets.cifar10.rot=x": "retrieval.datasets.cifar10.rot: no such key; did you mean root?",
    "optimizer.lr=fast": "optimizer.lr: Value 'fast' of type 'str' could not be converted to Float",
    "student.depth=1.5": "student.depth: Value '1.5' of type 'float' could not be converted to Integer",
    "student.alibi=maybe": "student.alibi: must be true or false, got 'maybe'",
    "student.alibi=1": "student.alibi: must be true or false, got 1",
    "optimizer.lr=true": "optimizer.lr: must not be true or false, got True",
    "optimizer=3": "optimizer: must be a section of keys and values, got 3",
    "optimizer.lr=1e300": "optimizer.lr: must be at most 1e+30, got 1e+300",
    "optimizer.lr=1e-300": "optimizer.lr: must be at least 1e-30, got 1e-300",
    "retrieval.baselines=teacher": "retrieval.baselines: must be a list, got 'teacher'",
    "save_folder=''": "save_folder: must be text of printable characters, got ''",
    "save_folder=ftp://x/y": "save_folder: must be a folder or an address in one of s3, gs, oci, azure, dbfs",
    "student.depth=100000": "student.depth: must be at most 1000, got 100000",
    "student.init=copy": "student.init: Invalid value 'copy', expected one of ['random', 'teacher_attention', ",
    "teacher.checkpoint=null": "teacher.checkpoint: must not be null",
    "optimizer.lr=nan": "optimizer.lr: must be finite, got nan",
    "optimizer.lr=0": "optimizer.lr: must be at least 1e-30, got 0.0",
    "optimizer.betas=[0.9]": "optimizer.betas: must be two numbers from 0 to below 1, got [0.9]",
    "global_train_batch_size=0": "global_train_batch_size: must be at least 1, got 0",
    "seed=4294967296": "seed: must be at most 2147483647",
    "save_num_checkpoints_to_keep=0": "save_num_checkpoints_to_keep: must be at least 1, or -1 for all, got 0",
    "seed=-1": "seed: must be at least 0, got -1",
    "train_loader.crop_scale=[0.5,0.1]": "train_loader.crop_scale: must be two numbers, 0 < smallest <= largest",
    "train_loader.num_canonical_nodes=7": "num_canonical_nodes: must divide global_train_batch_size 32, got 7",
    "max_duration=1000": "max_duration: must be a duration such as '5ba' or '5ep', got '1000'",
    "max_duration=0.5ep": "max_duration: must be a duration such as '5ba' or '5ep', got '0.5ep'",
    "train_loader.cache_limit=abc": "train_loader.cache_limit: must be bytes or a size such as '100gb', got 'abc'",
    "train_loader.local=nowhere": "train_loader.local: nowhere: no index.json: no such folder; or set train_loader.rem",
    "train_loader.local=yamls": "train_loader.local: yamls: no index.json: not an MDS data set",
    "teacher.checkpoint=nowhere.pt": "teacher.checkpoint: nowhere.pt: no such file",
    "load_path=yamls": "load_path: yamls: is a folder, not a file",
    "save_folder=pyproject.toml/run": "pyproject.toml is not a folder",
    "save_folder=/proc/run": "save_folder: /proc/run: cannot be written: /proc is not writable (",  # not even by root
    "retrieval.datasets={x: {format: cifar100, root: nowhere}}": "x.root: nowhere/cifar-100-python: no such folder;",
    "retrieval.datasets={x: {format: cifar10, root: LICENSE/x, download: true}}": "LICENSE is not a folder",
    "retrieval.datasets={x: {format: mds, root: yamls}}": "datasets.x.root: yamls/train: no index.json: no such folder",
    "retrieval.datasets={x: {format: folder, root: yamls}}": "retrieval.datasets.x.root: yamls/train: no such folder",
    "max_duration=0ba": "max_duration: must be positive, got '0ba'",
    "save_interval=1ep": "save_interval: must be a duration such as '5ba', got '1ep'",
    "scheduler.t_warmup=2000ba": "scheduler.t_warmup: must not be longer than max_duration 1000ba, got 2000ba",
    "device_train_microbatch_size=half": "device_train_microbatch_size: must be at least 1, 'auto' or null, got 'half'",
    "callbacks.speed_monitr={}": "callbacks.speed_monitr: no such name; did you mean speed_monitor?",
    "callbacks.speed_monitor={window: 3}": "speed_monitor.window: no such argument; did you mean window_size?",
    "callbacks.speed_monitor=3": "speed_monitor: must be arguments by name, {} for none or null for off, got 3",
    "loggers.tensorbord={}": "loggers.tensorbord: no such name; did you mean tensorboard?",
    "retrieval.baselines=[student]": "retrieval.baselines: no such baseline 'student'",
    "retrieval.ks=[0]": "retrieval.ks: must be one or more numbers from 1, got [0]",
    "frozen_dtype=float16": "frozen_dtype: must be float32 or bfloat16 with precision amp_bf16, got float16",
    "frozen_dtype=half": "frozen_dtype: Invalid value 'half', expected one of ['float32', 'float16', 'bfloat16']",
    "parallelism_config.fsdp={}": "parallelism_config.fsdp: needs GPUs: between CPUs torch adds gradients",
    "parallelism_config.fsdp={shard: 1}": "parallelism_config.fsdp.shard: no such key",
    "parallelism_config.fdsp={}": "parallelism_config.fdsp: no such key; did you mean fsdp?",
    "run_name=a/b": "run_name: must be a name without '/', got 'a/b'",
    "just-a-word": "'just-a-word': an override is dotted.key=value",
    "student.depth=[1,2": "not a YAML of keys and values",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_a_wrong_value_is_refused_in_one_line(override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as caught:
        load("max_duration=1000ba", "precision=amp_bf16", override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_config(arguments)
    return list(caught.value.args)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    """Names, types, limits, arguments, this machine and its files, each once, in a line of its own."""
    wrong_yaml = tmp_path / "wrong.yaml"
    wrong_yaml.write_text(
        "optimizer: {lr: 1, eps: 1}\nstudent: {depth: 1.5, mlp_ratio: wide}\ntrain_loader: {local: x}\n"
    )
    overrides = ("seed=-1", "train_loader.flip=2", "precision=amp_fp16", "loggers.tensorbord={}", "load_path=y.pt")
    starts = [
        "optimizer: no such key; did you mean optimizer?",
        "student.depth: Value '1.5' of type 'float' could not be converted to Integer",
        "student.mlp_ratio: Value 'wide' of type 'str' could not be converted to Float",
        "seed: must be at least 0, got -1",
        "train_loader.flip: must be at most 1, got 2.0",
        "loggers.tensorbord: no such name; did you mean tensorboard?",
        "precision: amp_fp16 needs a GPU",
        "teacher.checkpoint: z.pt: no such file",
        "train_loader.local: x: no index.json",
        "load_path: y.pt: no such file",
    ]
    found = problems_of(str(wrong_yaml), *overrides, "teacher.checkpoint=z.pt")
    assert len(found) == len(starts)
    assert all(line.startswith(start) for line, start in zip(found, starts, strict=True)), found


def test_a_field_has_one_problem_at_a_time() -> None:
    """A value outside its limits is not looked for on the disk, and contradicts none."""
    wrong = ("save_folder=ftp://x/y", "max_duration=0ba", "global_train_batch_size=0", "train_loader.local=s3://b/x")
    found = [line.split(":")[0] for line in problems_of(QUICKSTART_YAML, *wrong)]
    assert found == ["max_duration", "global_train_batch_size", "save_folder", "train_loader.local"]


def test_what_is_missing_is_listed_with_what_is_wrong() -> None:
    evaluate_yaml = str(ROOT / "yamls" / "evaluate.yaml")
    with pytest.raises(InputError) as caught:
        load_evaluate_config([evaluate_yaml, "sead=1"])
    assert [line.split(":")[0] for line in caught.value.args] == ["sead", "model"]
    with pytest.raises(InputError) as caught:
        load_evaluate_config(
            [evaluate_yaml, "precision=amp_fp16", "model=x", "teacher=y", "out=/dev/null/z", "datasets.cifar10.root=w"]
        )
    assert [line.split(":")[0] for line in caught.value.args] == [
        *("precision", "model", "teacher", "datasets.cifar10.root", "out")
    ]


def test_a_required_value_of_a_wrong_type_is_not_missing_too(tmp_path: Path) -> None:
    own_yaml = tmp_path / "own.yaml"
    own_yaml.write_text(
        "seed: -1\nprecision: fp32\nload_path: gone.pt\nretrieval: {datasets: {x: {format: y, root: z}}}\n"
    )
    found = problems_of(str(own_yaml), "teacher.checkpoint=[1]", "train_loader.local={a: 1}")
    assert [line.split(":")[0] for line in found] == [
        *("retrieval.datasets.x.format", "teacher.checkpoint", "train_loader.local", "seed", "load_path")
    ], found


def test_an_override_longer_than_a_files_name_is_read() -> None:
    with pytest.raises(InputError, match=r"^sead: no such key") as caught:
        load_evaluate_config([f"sead={'x' * 300}"])
    assert "model: is required, and the command line does not give it" in caught.value.args


def test_distill_without_gpu_and_data_says_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert problems_of(DISTILL_YAML) == [
        "precision: amp_fp16 needs a GPU, and this machine has none; on a CPU: precision=fp32 or amp_bf16 or auto",
        "train_loader.local: datasets/imagenet/train: no index.json: no such folder; or set train_loader.remote to an "
        "address",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [(QUICKSTART_YAML, "seed=-1"), ("missing.yaml",), (QUICKSTART_YAML, "seed")])
def test_the_first_rank_reports_for_all(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait for the launcher's SIGTERM, and die of it."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(signal, "signal", lambda *handler: waited.extend(handler))
    problems_of(*arguments)
    assert not waited
    monkeypatch.setenv("LOCAL_RANK", "1")
    problems_of(*arguments)
    assert waited == [signal.SIGTERM, signal.SIG_DFL, REPORT_SECONDS]


def test_a_short_run_has_a_short_warmup() -> None:
    """max_duration alone makes a short run of quickstart.yaml; a warm-up in batches is refused with what helps."""
    assert load("max_duration=60ba").scheduler.t_warmup == "0.1dur"
    (line,) = problems_of(DISTILL_YAML, "max_duration=60ba", "precision=fp32", "compile=false", REMOTE)
    assert line == (
        "scheduler.t_warmup: must not be longer than max_duration 60ba, got 3000ba; "
        "scheduler.t_warmup=0.1dur is a tenth of any run"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device_train_microbatch_size=auto", "device_train_microbatch_size: Composer has no 'auto' with FSDP; give a"),
        ("frozen_dtype=bfloat16", "frozen_dtype: must be float32 with FSDP, which casts what it gathers, got bfloat16"),
    ],
)
def test_fsdp_refuses_other_settings(monkeypatch: pytest.MonkeyPatch, override: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fsdp = load("precision=amp_bf16", "parallelism_config.fsdp={reshard_after_forward: false}").parallelism_config.fsdp
    assert fsdp is not None
    assert not fsdp.reshard_after_forward
    with pytest.raises(InputError) as caught:
        load("precision=amp_bf16", "parallelism_config.fsdp={}", override)
    assert message in str(caught.value)


CONTRADICTIONS = {
    ("max_duration=10ba", "scheduler.t_warmup=11ba"): "scheduler.t_warmup: must not be longer than max_duration 10ba",
    ("max_duration=2ep", "scheduler.t_warmup=1.5dur"): "scheduler.t_warmup: must be from 0dur to 1dur, got '1.5dur'",
    ("global_train_batch_size=2",): "global_train_batch_size: must divide by the 3 ranks, got 2",
    ("global_train_batch_size=32",): "global_train_batch_size: must divide by the 3 ranks, got 32",
    ("precision=fp32", "frozen_dtype=bfloat16"): "frozen_dtype: must be float32 with precision fp32, got bfloat16",
    ("train_loader.crop_scale=[0.5,1.5]",): "train_loader.crop_scale: must be at most 1, got [0.5, 1.5]",
    ("precision=amp_fp16",): "precision: amp_fp16 needs a GPU, and this machine has none",
}


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS.items())
def test_contradictions_are_refused(overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value alone is allowed. There are three ranks."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    batch = [] if "global" in overrides[0] else ["global_train_batch_size=33"]
    with pytest.raises(InputError) as caught:
        load(*batch, *overrides)
    assert str(caught.value).startswith(message)


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load("compile=true").compile
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(InputError, match=r"^compile: needs a C\+\+ compiler, and neither g\+\+ nor clang\+\+ was"):
            load("compile=true")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        InputError, match=f"^compile: needs Python's headers .python3-dev., and {tmp_path} has no Python.h"
    ):
        load("compile=true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("- a\n- b\n", "expected keys and values"),
        ("seed: [1\n", "not a YAML of keys and values"),
        ("seed: 1\n", "teacher.checkpoint: is required, and"),
        ("student: {depht: 3}\n", "student.depht: no such key; did you mean depth?"),
        ("teacher: {checkpoint: x}\ntrain_loader: {local: y}\nsave_folder: ${nothing}\n", "'nothing' not found"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config([str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_the_locale_cannot_decode_is_refused() -> None:
    """Python passes on such bytes of an argument as lone surrogates, for example with LC_ALL=C."""
    with pytest.raises(InputError, match=r"^'save_folder=\\udcc3\\udcbc': cannot be read as .*LC_ALL=C\.UTF-8"):
        load_config([str(ROOT / "yamls" / "quickstart.yaml"), "save_folder=\udcc3\udcbc"])


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"missing.yaml: cannot be read \(No such file"):
        load_config(["missing.yaml"])
    with pytest.raises(InputError, match="no YAML given"):
        load_config([])


def test_files_of_several_nodes_are_checked_once_they_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(ROOT / "yamls" / "quickstart.yaml"), "teacher.checkpoint=missing.pt"]
    with pytest.raises(InputError, match=r"missing\.pt: no such file"):
        load_config(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert load_config(arguments).teacher.checkpoint == "missing.pt"
