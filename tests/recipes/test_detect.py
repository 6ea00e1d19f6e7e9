"""The detector as a user runs it: it trains, resumes, exports its backbone; its features are those of timm alone."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torchvision.ops import box_iou

import d2v_composer.timm_models  # noqa: F401  (registers the student)
from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.config.load import load_detect_config
from d2v_composer.models.timm_network import TimmStudent, config_of
from d2v_composer.runs.detect import detect as run
from d2v_composer.runs.detect import load_backbone
from d2v_composer.runs.detector import Detector, FeatureMaps
from d2v_composer.sources.coco import read_coco
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.boxes import BoxedSamples, collate_boxes
from helpers import (
    GOLDEN,
    ROOT,
    assert_same_student,
    encoded_image,
    failure,
    load_checkpoint,
    log_of,
    losses_of,
    run_command,
    run_ranks,
    slow,
    start_python,
    student_of,
    succeed,
    train_until_killed,
    wait_until,
    write_files,
)

SCRIPT = ROOT / "recipes" / "detect.py"
SMALL = "timm/test_resnet"
# timm's name → pixels per side, if the model takes one size; all have a map of stride 32 or, the ViT, of 16.
ARCHITECTURES = {
    "test_resnet": None,
    "mobilenetv4_conv_small": None,
    "test_convnext": None,
    "test_efficientnet": None,
    "swin_tiny_patch4_window7_224": 64,
    "test_vit": 64,
}


def write_coco(folder: Path, count: int, changes: Callable[[dict[str, Any]], object] = lambda content: None) -> Path:
    """Write images of 64 pixels with two boxes each, of the categories 3 and 7, and COCO's JSON after ``changes``."""
    images = [{"id": 10 + n, "file_name": f"{n}.jpg", "width": 64, "height": 64} for n in range(count)]
    rows = [
        {"id": n, "image_id": 10 + n // 2, "category_id": (3, 7)[n % 2], "bbox": [4 + 24 * (n % 2), 4 + n, 24, 20]}
        for n in range(2 * count)
    ]
    content = {"images": images, "annotations": rows, "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}
    changes(content)
    files = {f"{n}.jpg": encoded_image(n, 64) for n in range(count)}
    return write_files(folder, files | {"boxes.json": json.dumps(content).encode()})


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with boxes: 16 for training, 5 for testing."""
    folder = tmp_path_factory.mktemp("scenes")
    write_coco(folder / "train", 16)
    write_coco(folder / "test", 5)
    return folder


def small_detection(folder: Path, data: Path, *overrides: str) -> list[str]:
    """Return the arguments of a tiny run: 6 batches of 4, an epoch and a half; 3 checkpoints."""
    return [
        str(ROOT / "yamls" / "detect.yaml"),
        f"model={SMALL}",
        "pretrained=false",
        *boxes_of("train", data / "train"),
        *boxes_of("test", data / "test"),
        f"save_folder={folder}",
        "precision=fp32",
        "image_size=64",
        "channels=8",
        "max_duration=6ba",
        "global_train_batch_size=4",
        "device_eval_batch_size=2",
        "save_interval=2ba",
        "train_loader.num_workers=0",
        "report=false",
        *overrides,
    ]


def boxes_of(split: str, folder: Path) -> list[str]:
    return [f"dataset.{split}.images={folder}", f"dataset.{split}.annotations={folder / 'boxes.json'}"]


def detect(*arguments: str) -> subprocess.CompletedProcess[str]:
    ended = run_command(sys.executable, SCRIPT, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("detector") / "run"
    shown = detect(*small_detection(folder, scenes, "report=true"))
    assert "train     16 images, 32 boxes, 0 boxes left out (tiny or crowds)\n" in shown.stdout
    assert "test      5 images, 10 boxes, 0 boxes left out (tiny or crowds)\n" in shown.stdout
    assert "batch 6: metrics/test/map_50 " in shown.stderr
    assert re.search(
        "^test images, batch 6: average precision .* %, and .* % at an IoU of 0.5$", shown.stdout, re.MULTILINE
    )
    assert "Warning" not in shown.stderr
    return folder


def test_a_run_logs_its_losses_and_its_precision(detector: Path) -> None:
    log = log_of(detector)
    parts = "loss/train/classification", "loss/train/bbox_regression"
    for step, total in losses_of(detector).items():
        assert sum(log[part][step] for part in parts) == pytest.approx(total, rel=1e-5)
    assert log["metrics/test/map"].keys() == log["metrics/test/map_50"].keys() == {4, 6}
    assert "average precision at an IoU of 0.5 on the test images: " in (detector / "report.html").read_text()
    assert (detector / "report" / "accuracy.png").is_file()


@pytest.mark.parametrize("moment", ["batch_start 5", slow("eval_batch_end 4")])
def test_a_killed_run_resumes_bit_for_bit(moment: str, detector: Path, scenes: Path, tmp_path: Path) -> None:
    """With any number of workers, in the second epoch."""
    arguments = small_detection(tmp_path, scenes, "train_loader.num_workers=2")
    train_until_killed(arguments, moment, "detect")
    detect(*arguments)
    assert losses_of(tmp_path) == losses_of(detector)
    assert_same_student(tmp_path, detector)
    assert log_of(tmp_path)["metrics/test/map"] == log_of(detector)["metrics/test/map"]


def test_a_stopped_run_saves_and_resumes(detector: Path, scenes: Path, tmp_path: Path) -> None:
    program = start_python(SCRIPT, *small_detection(tmp_path, scenes, "save_interval=100ba"))
    try:
        wait_until(lambda: len(losses_of(tmp_path)) > 1, 60)
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 143, program.stderr
    finally:
        program.kill()
    assert "SIGTERM: saved at batch" in program.stdout + program.stderr
    detect(*small_detection(tmp_path, scenes, "save_interval=100ba"))
    assert losses_of(tmp_path) == losses_of(detector)


@pytest.mark.slow
def test_two_ranks_train_and_evaluate_on_the_same_images_as_one(scenes: Path, tmp_path: Path) -> None:
    """The second rank has fewer test images; losses differ, because each rank samples its own anchors."""
    run_ranks(SCRIPT, *small_detection(tmp_path / "two", scenes, "device_eval_batch_size=1"))
    assert log_of(tmp_path / "two")["metrics/test/map"].keys() == {4, 6}
    # The last evaluation again, by one rank.
    weights = student_of(tmp_path / "two")
    again = detect(*small_detection(tmp_path / "two", scenes, "device_eval_batch_size=1"))
    assert "this run is complete" in again.stdout
    assert log_of(tmp_path / "two")["metrics/test/map"][6] == pytest.approx(float(precision_in(again.stdout)), abs=6e-4)
    assert weights.keys() == student_of(tmp_path / "two").keys()


def precision_in(text: str) -> float:
    [percent] = re.findall(r"average precision (\S+) %,", text)
    return float(percent) / 100


@pytest.mark.slow
def test_a_detector_finds_what_it_was_trained_on(tmp_path: Path) -> None:
    """Also if the images are not square, and are flipped."""
    wide = {"width": 96, "height": 64}
    folder = write_coco(tmp_path / "set", 4, lambda content: [image.update(wide) for image in content["images"]])
    for number in range(4):
        write_box(folder / f"{number}.png", number)
    content = json.loads((folder / "boxes.json").read_text())
    content["images"] = [{"id": n, "file_name": f"{n}.png", **wide} for n in range(4)]
    content["annotations"] = [{"image_id": n, "category_id": 3, "bbox": box_of(n)} for n in range(4)]
    (folder / "boxes.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    student = TimmStudent(config_of(SMALL).changed(image_size=96))
    model = Detector(student, 2, channels=16).train()
    samples = BoxedSamples(read_coco(folder, folder / "boxes.json", with_crowds=False), (96, 96), "bicubic", flip=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        batch = collate_boxes([samples[sample] for sample in samples.order])
        optimizer.zero_grad()
        model.loss(model(batch), batch)["total"].backward()
        optimizer.step()
    model.eval()
    batch = collate_boxes([samples[number] for number in range(4)])
    with torch.no_grad():
        found = model(batch)
    for image, boxes in zip(found, batch[1], strict=True):
        assert box_iou(image["boxes"][:1], boxes[:1]) > 0.6
        assert image["labels"][0] == 1
    metrics = model.get_metrics(is_train=False)
    for metric in metrics.values():
        model.update_metric(batch, found, metric)
    assert float(metrics["map_50"].compute()) > 0.9


def box_of(number: int) -> list[int]:
    return [8 + 12 * number, 6 + 4 * number, 32, 32]


def write_box(path: Path, number: int) -> None:
    from PIL import Image

    image = Image.new("RGB", (96, 64), (40, 90, 40))
    left, top, width, height = box_of(number)
    image.paste((220, 60, 30), (left, top, left + width, top + height))
    image.save(path)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("students")

    def write(name: str) -> Path:
        """Write a student with random weights and statistics, whose classifier is an alignment of width 24."""
        path, size = folder / f"{name}.safetensors", ARCHITECTURES[name]
        if not path.exists():
            torch.manual_seed(1)
            student = TimmStudent(config_of(f"timm/{name}").changed(image_size=size or 64))
            for name_of_buffer, tensor in student.named_buffers():
                if "running_" in name_of_buffer:
                    tensor.add_(0.1 * torch.rand_like(tensor))
            student.align(torch.randn(24, student.encoder.num_pooled), torch.randn(24), "output_mean")
            save_student(student.eval(), path)
        return path

    return write


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timms_features_are_the_students_own(name: str, students: Callable[[str], Path]) -> None:
    """By the documented call; the detector computes from the same maps."""
    path, size = students(name), ARCHITECTURES[name]
    options: dict[str, Any] = {} if size is None else {"img_size": (size, size)}
    overlay = {"file": str(path), "num_classes": 24}
    model: Any = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    student, images = load_student(path), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        maps = [grid.movedim(3, 1) if name.startswith("swin") else grid for grid in model.eval()(images)]
        network: Any = student.encoder.model
        its = network.forward_features(images)  # with the last norm, if the model has one
        detected = FeatureMaps(student, 8).maps(images)
    assert len(detected) == (1 if "vit" in name else 3)
    for ours, expected in zip(detected, maps[-len(detected) :], strict=True):
        close(ours, expected)
        last = maps[-1]
        if its.ndim == 3:  # tokens, the first is CLS
            close(network.norm(last.flatten(2).transpose(1, 2)), its[:, 1:])
        elif name.startswith("swin"):
            close(network.norm(last.movedim(1, 3)), its)
        elif name == "test_efficientnet":  # its last features are one convolution behind the last stage
            close(network.bn2(network.conv_head(last)), its)
        else:
            close(network.norm_pre(last) if "convnext" in name else last, its)


def test_blocks_have_the_grid_of_timms_student(tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = tmp_path / "student.safetensors"
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=2), path)
    model: Any = timm.create_model(
        "d2v2_student",
        features_only=True,
        pretrained=True,
        representation="output",
        pretrained_cfg_overlay={"file": str(path)},
    )
    student = load_student(path)
    images = torch.randn(2, *student.encoder.example(1).shape[1:])
    with torch.no_grad():
        close(FeatureMaps(student, 8).maps(images)[0], model.eval()(images)[0])


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # timm's, where it resizes Swin's biases
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", slow("swin_tiny_patch4_window7_224")])
def test_a_backbone_takes_larger_images(
    name: str, students: Callable[[str], Path], scenes: Path, tmp_path: Path
) -> None:
    """A ViT's positions, and Swin's, are resized as timm resizes them."""
    path = students(name)
    config = load_detect_config(small_detection(tmp_path, scenes, f"model={path}", "pretrained=true", "image_size=128"))
    student, images = load_backbone(config), torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {} if ARCHITECTURES[name] is None else {"img_size": (128, 128)}
    overlay = {"file": str(path), "num_classes": 24}
    model: Any = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    with torch.no_grad():
        last = model.eval()(images)[-1]
        expected = last.movedim(3, 1) if name.startswith("swin") else last
        close(FeatureMaps(student, 8).maps(images)[-1], expected)


def test_the_backbone_goes_back_to_timm(detector: Path, tmp_path: Path) -> None:
    out = tmp_path / "backbone.safetensors"
    succeed("export", detector / "latest-rank0.pt", out)
    model: Any = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(out))
    trained = student_of(detector)
    prefix = f"{Detector.STUDENT}encoder.model."
    assert model.state_dict().keys() == {name.removeprefix(prefix) for name in trained if name.startswith(prefix)}
    assert all(torch.equal(tensor, trained[prefix + name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stages", [0, 2])
def test_frozen_stages_keep_their_weights_and_statistics(stages: int, scenes: Path, tmp_path: Path) -> None:
    """The backbone has a learning rate of its own."""
    changes = f"frozen_stages={stages}", "max_duration=2ba", "optimizer.backbone_lr_ratio=0.1"
    detect(*small_detection(tmp_path / "run", scenes, *changes))
    config = load_detect_config(small_detection(tmp_path, scenes))
    torch.manual_seed(config.seed)
    start, trained = load_backbone(config).state_dict(), student_of(tmp_path / "run")
    same = {name for name, tensor in start.items() if torch.equal(tensor, trained[Detector.STUDENT + name])}
    frozen = {name for name in start if re.match(r"encoder\.model\.(conv1|bn1|layer1)\.", name)}
    assert frozen & same == (frozen if stages else set())
    assert not {name for name in same - frozen if name.endswith(("running_mean", "conv1.weight"))}
    groups = load_checkpoint(tmp_path / "run" / "latest-rank0.pt")["state"]["optimizers"]["AdamW"]["param_groups"]
    rates = sorted({group["initial_lr"] for group in groups if "initial_lr" in group})
    assert rates == pytest.approx([1e-4, 1e-3])


def other_categories(content: dict[str, Any]) -> None:
    content["categories"][0]["name"] = "c"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["global_train_batch_size=17"], r"_size: must be at most 16, the number of images in .*train; got 17$"),
        (["model=timm/no_such_model"], "model: .*no_such_model"),
        (
            [f"model={GOLDEN / 'tiny_base.pt'}", "pretrained=true"],
            "model: expected a student that takes images, or timm/NAME; got .*base.pt$",
        ),
        ([f"model={GOLDEN / 'tiny_base.pt'}"], "pretrained: must be true unless the model is timm/NAME; the model is "),
        (boxes_of("test", Path("{other}")), r"dataset: train and test differ in the categories with the ids \[7\]$"),
        (boxes_of("train", Path("{other}/none")), r"dataset\.train: .*none/boxes\.json cannot be read: "),
        (["dataset.train.images={other}/none"], r"boxes\.json: images are not in .*/none, such as 0.*\(16 in all\)"),
    ],
)
def test_a_slip_is_one_line(changes: list[str], line: str, scenes: Path, tmp_path: Path) -> None:
    """And nothing is written."""
    other = write_coco(tmp_path / "other", 4, other_categories)
    arguments = small_detection(tmp_path / "run", scenes, *(change.format(other=other) for change in changes))
    with pytest.raises(InputError, match=line) as caught:
        run(load_detect_config(arguments))
    assert len(caught.value.args) == 1
    assert not (tmp_path / "run").exists()


def test_a_resume_keeps_its_boxes_and_its_detector(detector: Path, scenes: Path) -> None:
    for changes, line in (
        (["channels=16"], "channels: checkpoint has 8, this run has 16"),
        (boxes_of("test", scenes / "train"), "test data (sha256 of the samples): checkpoint has "),
    ):
        ended = run_command(sys.executable, SCRIPT, *small_detection(detector, scenes, "max_duration=8ba", *changes))
        assert line in failure(ended, 2)


def test_blocks_train_as_a_backbone(scenes: Path, tmp_path: Path) -> None:
    """The encoder stays as it is; the size of images is the student's."""
    path = tmp_path / "student.safetensors"
    save_student(load_teacher(GOLDEN / "tiny_base.pt").build_student(depth=2), path)
    size = load_student(path).encoder.config.image_size
    changes = f"model={path}", "pretrained=true", "max_duration=2ba"
    line = failure(run_command(sys.executable, SCRIPT, *small_detection(tmp_path / "run", scenes, *changes)), 2)
    assert line.endswith("because only a student that is a timm model can be resized; got 64")
    detect(*small_detection(tmp_path / "run", scenes, *changes, f"image_size={size}"))
    succeed("export", tmp_path / "run" / "latest-rank0.pt", tmp_path / "out.safetensors")
    before, after = (load_student(file) for file in (path, tmp_path / "out.safetensors"))
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed
    assert all(name.startswith("blocks.") for name in changed)
