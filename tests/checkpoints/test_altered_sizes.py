"""A file with one altered size is refused in one line, or its model embeds as before."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from torch import Tensor
from torch.testing import assert_close

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.export import TimmStudent
from d2v_composer.checkpoints.fairseq import convert_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.models.data2vec2 import ImageEncoderConfig
from d2v_composer.models.encoder import height_and_width
from d2v_composer.models.student import StudentConfig
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.errors import InputError
from helpers import GOLDEN

Sizes = dict[str, Any]

TEACHER = GOLDEN / "tiny_alibi.pt"  # with a scale of ALiBi for each layer and head

# As JSON; NaN is not JSON, but Python reads it.
HOSTILE = {
    "null": "null",
    "true": "true",
    "0": "0",
    "-1": "-1",
    "0.0": "0.0",
    "a fraction": "0.37",
    "tiny": "1e-320",
    "NaN": "NaN",
    "infinite": "Infinity",
    "minus infinite": "-Infinity",
    "beyond a double": "1e999",
    "many": "1000",
    "as wide as may be": "65536",
    "huge": "1000000000000000000",
    "of 5000 digits": "9" * 5000,
    "a word": '"abc"',
    "a number as text": '"3"',
    "lines": '"a\\nb"',
    "no list": "[]",
    "zeros": "[0, 0, 0]",
    "negative numbers": "[-1, -1, -1]",
    "huge numbers": "[1e300, 1e300, 1e300]",
    "NaN in a list": "[NaN, NaN, NaN]",
    "bools": "[true, true, true]",
    "too few": "[0.5]",
    "shape": "[1, 1, 1, 1, 1]",
    "huge shape": "[1000000, 1, 1000000, 1, 1]",
    "words": '["a", "b", "c"]',
    "nested": "[[0.5], [0.5], [0.5]]",
    "nests without end": "[" * 20_000 + "]" * 20_000,
    "a section": '{"a": 1}',
}
PLACE = "@place@"
# Values that no tensor contradicts: no ALiBi, a mean of 0.
MAY_DIFFER = [("student", "num_alibi_heads", "0"), ("encoder", "image_mean", "zeros"), ("image_mean", "zeros")]


def alterations(sizes: Sizes) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the path of a size, the alteration, and the JSON of the altered sizes."""
    for path in paths(sizes):
        *above, name = path

        def section(changed: Sizes, above: list[str] = above) -> Sizes:
            for each in above:
                changed = changed[each]
            return changed

        dropped = copy.deepcopy(sizes)
        del section(dropped)[name]
        yield path, "dropped", json.dumps(dropped)
        misspelt = copy.deepcopy(dropped)
        section(misspelt)[f"{name}s"] = section(sizes)[name]
        yield path, "misspelt", json.dumps(misspelt)
        replaced = copy.deepcopy(sizes)
        section(replaced)[name] = PLACE
        for what, value in HOSTILE.items():
            yield path, what, json.dumps(replaced).replace(f'"{PLACE}"', value)
        doubled = json.dumps(section(sizes)[name])
        yield path, "doubled", json.dumps(replaced).replace(f'"{PLACE}"', f'{doubled}, "{name}": {doubled}')


def paths(sizes: Sizes, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in sizes.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, (*above, name))


def with_sizes(source: Path, path: Path, text: str, tensor: str | None = None) -> Path:
    """Write the file with other sizes in its metadata and, for a student, in its tensor."""
    tensors, metadata = contents(source)
    sizes = {} if tensor is None else {"config_json": torch.tensor(list(tensor.encode()), dtype=torch.uint8)}
    save_file(tensors | sizes, path, metadata | {"config": text})
    return path


@functools.cache
def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def sizes_of(path: Path) -> Sizes:
    return json.loads(contents(path)[1]["config"])


def embeddings(model: Transformer) -> Tensor:
    """Return all embeddings of the same images, as uint8 and as normalized floats."""
    size, _ = height_and_width(model.encoder.config.image_size)
    images = torch.randint(
        0, 256, (2, 3, size + 8, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    with torch.inference_mode():
        both = (model.embed_all(images), model.embed_all(images[..., :size, :].float() / 255))
        return torch.cat([embedding for each in both for embedding in each.values()])


def timm_model(path: Path) -> Transformer:
    """Load like create_model with a checkpoint_path, into a smaller model than the paper's."""
    encoder = ImageEncoderConfig(embed_dim=8, num_heads=1, prenet_depth=0, image_size=32, num_extra_tokens=1)
    model = TimmStudent(encoder, StudentConfig(depth=1, num_heads=1, num_alibi_heads=1))
    load_checkpoint(model, str(path))
    return model.eval()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_student(load_teacher(TEACHER).build_student(depth=1), tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


def check(
    load: Callable[[Path], Transformer],
    source: Path,
    alter: Callable[[str], Path],
    step: int,
    prefix: str | None = None,
) -> None:
    """Check the answer to each alteration, or to one in ``step``; report all faults at once."""
    expected, wrong = embeddings(load(source)), []
    every = list(islice(alterations(sizes_of(source)), 0, None, step))
    num_refused = 0
    for path, what, text in every:
        altered = alter(text)
        try:
            found = embeddings(load(altered))
        except InputError as error:
            num_refused += 1
            if "\n" in str(error) or not str(error).startswith(prefix or str(altered)) or len(str(error)) > 500:
                wrong.append((path, what, str(error)))
            continue
        except Exception as error:  # noqa: BLE001
            wrong.append((path, what, repr(error)[:200]))
            continue
        if not torch.allclose(found, expected, atol=1e-4) and (*path, what) not in MAY_DIFFER:
            wrong.append((path, what, "other embeddings"))
    assert not wrong, "\n".join(map(str, wrong))
    assert num_refused > len(every) / 2


# Of some 34 alterations of each size, so that one in four has all of them, and all sizes.
with_steps = pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])


@with_steps
def test_timm_refuses_altered_sizes(exported: Path, tmp_path: Path, step: int) -> None:
    def alter(text: str) -> Path:
        return with_sizes(exported, tmp_path / "altered.safetensors", "", text)

    check(timm_model, exported, alter, step, prefix="config_json: ")


@with_steps
def test_load_teacher_refuses_altered_sizes(tmp_path: Path, step: int) -> None:
    converted = tmp_path / "teacher.safetensors"
    convert_teacher(TEACHER, converted)
    check(load_teacher, converted, lambda text: with_sizes(converted, tmp_path / "altered.safetensors", text), step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.complex64])
def test_load_student_and_timm_accept_the_same_dtypes(dtype: torch.dtype, exported: Path, tmp_path: Path) -> None:
    tensors, metadata = contents(exported)
    name = "blocks.0.mlp.fc1.weight"
    path = tmp_path / "other.safetensors"
    save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata)
    if dtype.is_floating_point:
        assert_close(embeddings(timm_model(path)), embeddings(load_student(path)))
        return
    for load, source in ((load_student, path), (timm_model, "config_json")):
        with pytest.raises(InputError, match=f"^{source}: tensor {name} is not a dense floating-point tensor$"):
            load(path)


@pytest.mark.parametrize("change", ["missing", "unknown", "not finite", "another shape"])
def test_load_student_and_timm_refuse_the_same_tensors(change: str, exported: Path, tmp_path: Path) -> None:
    tensors, metadata = contents(exported)
    tensors, name = dict(tensors), "blocks.0.norm1.weight"
    tensor = tensors.pop(name)
    if change != "missing":
        tensors[name] = {"not finite": tensor * torch.nan, "another shape": tensor[1:]}.get(change, tensor)
    if change == "unknown":
        tensors["surprise"] = torch.ones(2)
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata)
    answers = []
    for load in (load_student, timm_model):
        with pytest.raises(InputError) as caught:
            load(path)
        answers.append(str(caught.value).partition(": ")[2])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "stored",
    [torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(8), torch.tensor(7), torch.zeros(5 << 20, dtype=torch.uint8)],
    ids=["a table", "floats", "a number", "5 MB"],
)
def test_an_unusable_tensor_of_sizes_is_refused(stored: Tensor, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tensors, metadata = contents(exported)
    save_file(tensors | {"config_json": stored}, path, metadata)
    for load in (load_student, timm_model):
        with pytest.raises(InputError, match=r"config_json: unusable sizes \("):
            load(path)


def test_the_shape_of_alibis_scale_is_checked() -> None:
    sizes: Sizes = {"embed_dim": 48, "num_heads": 4, "prenet_depth": 2, "num_alibi_heads": 3}
    for layers in (1, 2, 7):
        for heads in (1, 3):
            assert ImageEncoderConfig(**sizes, alibi_scale_shape=(layers, 1, heads, 1, 1)).num_alibi_heads == 3
    for shape in (
        (0, 1, 3, 1, 1),
        (2, 1, 4, 1, 1),
        (2, 2, 3, 1, 1),
        (2, 1, 3),
        (2.0, 1, 3, 1, 1),
        5,
        ((2,), 1, 3, 1, 1),
    ):
        with pytest.raises(ValueError, match="alibi_scale_shape must be"):
            ImageEncoderConfig(**sizes, alibi_scale_shape=shape)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="null without ALiBi"):
        ImageEncoderConfig(alibi_scale_shape=(1, 1, 1, 1, 1))
