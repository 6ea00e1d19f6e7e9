"""Each slip of a YAML or an override is one line that names its key, all at once, before anything is built."""

from pathlib import Path

import pytest
import yaml

from d2v_composer.config import schema
from d2v_composer.config.load import deep_merge, load_config, load_evaluate_config
from d2v_composer.config.schema import TrainConfig
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError
from helpers import ROOT

QUICKSTART_YAML = str(ROOT / "yamls" / "quickstart.yaml")
REMOTE = "train_loader.remote=s3://bucket/imagenet/train"
ON_CPU = ("precision=fp32", "compile=false", REMOTE, "run_name=distill")


def load(*overrides: str) -> TrainConfig:
    return load_config([QUICKSTART_YAML, *overrides])


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_config(arguments)
    return list(caught.value.args)


PAPER = {
    "max_duration": "30000ba",
    "global_train_batch_size": 256,
    "student": {"depth": 5, "mlp_ratio": 3.0, "alibi": True, "init": "random"},
    "objectives": {"tokens": {"prediction": "layer_mean", "extra_tokens": "regress"}},
    "optimizer": {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01},
    "scheduler": {"t_warmup": "3000ba", "alpha_f": 0.0},
    "algorithms": {"gradient_clipping": {"clipping_threshold": 2.0}},
    "train_loader": {"crop_scale": (0.08, 1.0), "crop_ratio": (0.75, pytest.approx(4 / 3)), "flip": 0.5},
    "retrieval": {"interval": "5000ba", "ks": [1, 3], "datasets": {"cifar10": {}, "cifar100": {}}},
}


def test_distill_is_the_papers_run() -> None:
    settings = load_config([str(ROOT / "yamls" / "distill.yaml"), *ON_CPU]).model_dump()
    assert deep_merge(settings, PAPER) == settings


def test_overrides_change_single_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPTH", "3")
    config = load("optimizer.lr=1e-4", "student={depth: 2}", "callbacks.memory_monitor={}", "callbacks.lr_monitor=null")
    assert (config.optimizer.lr, config.student.depth, config.student.mlp_ratio) == (1e-4, 2, 3.0)
    assert (config.callbacks["memory_monitor"], config.callbacks["lr_monitor"]) == ({}, None)
    assert Path(config.teacher.checkpoint or "").is_file()  # ${here:…} is beside the YAML
    config = load(
        "optimizer.betas[0]=0.8", "student.depth=${oc.decode:${oc.env:DEPTH}}", "retrieval.datasets={}", "run_name=2026"
    )
    assert (config.optimizer.betas, config.student.depth, config.retrieval.datasets) == ((0.8, 0.98), 3, {})
    assert (config.run_name, config.run_folder) == ("2026", RunFolder(Path("runs/2026")))
    assert load("run_name=a", "save_folder=${run_name}/b").run_folder == RunFolder(Path("a/b"))
    config = load("optimizer.lr=1e-3", "train_loader.cache_limit=2gb", "optimizer.weight_decay=0", "algorithms={}")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.train_loader.cache_limit) == (1e-3, 0, 2 * 10**9)


@pytest.mark.parametrize("text", ["010", "1.10", "5e10203", "on", "1_0", "2026-01-01", "a %20", "~"])
def test_a_text_field_keeps_the_text_of_its_override(text: str, tmp_path: Path) -> None:
    """In a YAML, quotes keep it; without them, what YAML makes of it is refused, if it is no text."""
    config = load(f"run_name={text}", f"train_loader.local=/{text} #1", f"retrieval.datasets.cifar10.column={text}")
    cifar10 = config.retrieval.datasets["cifar10"]
    assert cifar10 is not None
    assert (config.run_name, config.train_loader.local, cifar10.column) == (text, f"/{text} #1", text)
    assert load(f"run_name='{text}'").run_name == text
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(Path(QUICKSTART_YAML).read_text()), "run_name": 8}))
    [line] = [line for line in problems_of(str(path)) if line.startswith("run_name")]
    assert line == "run_name: must be text, in quotes if it is a number, got 8"


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load("save_folder=~/runs/{run_name}", "run_name=a", "train_loader.local=~")
    assert (config.run_folder, config.train_loader.local) == (RunFolder(Path("/home/me/runs/a")), "/home/me")
    assert load_evaluate_config(["model=~/a.pt", "datasets={a: {format: mds, root: ~/b}}"]).model == "/home/me/a.pt"
    assert load("save_folder=null").save_folder is None


# Override → what the line names.
SLIPS = {
    "student.dept=3": "student.dept: no such key; did you mean depth",
    "callbacks.speed_monitor={window: 3}": "callbacks.speed_monitor.window",
    "callbacks.speed_monitor={window_size: .inf}": "callbacks.speed_monitor.window_size",
    "optimizer.lr=.nan": "optimizer.lr",
    "student=null": "student",
    "compile=0": "compile",
    "student.alibi=1": "student.alibi",
    "save_num_checkpoints_to_keep=0": "save_num_checkpoints_to_keep",
    "device_train_microbatch_size=half": "device_train_microbatch_size",
    "max_duration=1000": "max_duration",
    "save_interval=1ep": "save_interval",
    "train_loader.crop_scale=[0.5,0.1]": "train_loader.crop_scale",
    "train_loader.crop_scale=[0.5,1.5]": "train_loader.crop_scale",
    "train_loader.cache_limit=abc": "train_loader.cache_limit",
    "train_loader.local=s3://b/x": "train_loader.local",
    "retrieval.baselines=[student]": "retrieval.baselines[0]",
    "save_folder=ftp://x/y": "save_folder",
    "save_folder=runs/{rank}": "save_folder",
    "save_folder=''": "save_folder",
    "run_name=a/b": "run_name",
    "student.depth=[1,2": "'student.depth=[1,2'",
}


@pytest.mark.parametrize(("override", "named"), SLIPS.items())
def test_a_slip_is_one_line(override: str, named: str) -> None:
    (line,) = problems_of(QUICKSTART_YAML, override)
    assert line.startswith(named)
    assert "\n" not in line


# Each value alone is allowed.
CONTRADICTIONS = {
    ("scheduler.t_warmup=2000ba",): "scheduler.t_warmup",
    ("global_train_batch_size=32",): "global_train_batch_size",
    ("train_loader.num_canonical_nodes=7",): "train_loader.num_canonical_nodes",
    ("train_loader.remote=s3://bucket/images",): "train_loader.num_canonical_nodes",
    ("precision=amp_fp16",): "precision",
    ("device_train_microbatch_size=auto",): "device_train_microbatch_size",
}


@pytest.mark.parametrize(("overrides", "key"), CONTRADICTIONS.items())
def test_a_contradiction_is_one_line(overrides: tuple[str, ...], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(schema, "has_gpu", lambda: False)
    (line,) = problems_of(QUICKSTART_YAML, "global_train_batch_size=33", *overrides)
    assert line.startswith(f"{key}: ")


def test_nodes_may_divide_the_canonical_ones_or_share_a_local_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    remote = load("train_loader.remote=s3://bucket/images", "train_loader.num_canonical_nodes=4")
    local = load("train_loader.num_canonical_nodes=1")
    assert [config.train_loader.num_canonical_nodes for config in (remote, local)] == [4, 1]


def test_all_slips_are_listed_at_once(tmp_path: Path) -> None:
    """Names, types, limits, arguments and what is required, each once, in a line of its own."""
    assert "no YAML given" in problems_of()[0]
    (tmp_path / "wrong.yaml").write_text(
        "optimiser: {lr: 1}\nstudent: {depth: 1.5, mlp_ratio: wide}\nretrieval: {datasets: {x: {format: y, root: z}}}\n"
    )
    overrides = ("precision=fp32", "seed=-1", "train_loader.flip=2", "loggers.tensorbord={}", "teacher.weights=all")
    assert sorted(line.split(":")[0] for line in problems_of(str(tmp_path / "wrong.yaml"), "nothing", *overrides)) == [
        *("'nothing'", "loggers.tensorbord", "optimiser", "retrieval.datasets.x.format", "seed", "student.depth"),
        *("student.mlp_ratio", "teacher.checkpoint", "teacher.weights", "train_loader.flip", "train_loader.local"),
    ]
    with pytest.raises(InputError, match=r"^sead: no such key|; sead: no such key") as caught:
        load_evaluate_config([f"sead={'x' * 300}"])  # longer than a file's name
    assert "model: is required" in caught.value.args


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "seed: 1\nseed: 2\n": "found duplicate key seed",
        "- a\n- b\n": "expected a YAML mapping",
        "seed: [1\n": "cannot be parsed as YAML",
        "student: [1]\n": "student: must be a section of keys and values, got [1]",
    }.items(),
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    problems = problems_of(str(tmp_path / "run.yaml"))
    assert any(message in line for line in problems)
    assert not any("\n" in line for line in problems)
