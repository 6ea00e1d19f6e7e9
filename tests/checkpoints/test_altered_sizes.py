"""A file with one altered size is refused in one line, or its model embeds as before."""

import functools
import json
import re
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

from d2v_composer import load_student, load_teacher
from d2v_composer.checkpoints.fairseq import convert_teacher
from d2v_composer.checkpoints.load import save_student
from d2v_composer.export.programs import TimmStudent
from d2v_composer.models.backbone import Transformer
from d2v_composer.models.configs import height_and_width
from d2v_composer.system.errors import InputError
from helpers import GOLDEN, refused_by

Sizes = dict[str, Any]

TEACHER = GOLDEN / "tiny_alibi.pt"  # with a scale of ALiBi for each layer and head

# As JSON; NaN is not JSON, but Python reads it.
HOSTILE = {
    "null": "null",
    "true": "true",
    "0": "0",
    "-1": "-1",
    "a fraction": "0.37",
    "NaN": "NaN",
    "beyond a double": "1e999",
    "many": "1000",
    "as wide as may be": "65536",
    "a number as text": '"3"',
    "lines": '"a\\nb"',
    "huge numbers": "[1e300, 1e300, 1e300]",
    "huge shape": "[1000000, 1, 1000000, 1, 1]",
    "nests without end": "[" * 20_000 + "]" * 20_000,
    "a section": '{"a": 1}',
}
PLACE = "@place@"
MAY_DIFFER = ("num_alibi_heads", "0")  # no tensor contradicts it


def alterations(sizes: Sizes, section: Sizes) -> Iterator[tuple[str, str, str]]:
    """Yield the name of each size in a section of the sizes, the alteration, and the JSON of the altered sizes."""
    for name, value in list(section.items()):
        section[name] = PLACE
        for what, hostile in HOSTILE.items():
            yield name, what, json.dumps(sizes).replace(f'"{PLACE}"', hostile)
        del section[name]
        yield name, "dropped", json.dumps(sizes)
        section[f"{name}s"] = value
        yield name, "misspelt", json.dumps(sizes)
        del section[f"{name}s"]
        section[name] = value
        if isinstance(value, dict):
            yield from alterations(sizes, value)


@functools.cache
def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def sizes_of(path: Path) -> Sizes:
    tensors, metadata = contents(path)
    stored = tensors.get("config_json")
    return json.loads(metadata["config"] if stored is None else stored.numpy().tobytes())


def with_sizes(source: Path, text: str) -> Path:
    """Write the file with other sizes: a student's are in its tensor, a teacher's in its metadata."""
    tensors, metadata = contents(source)
    if "config_json" in tensors:
        tensors = tensors | {"config_json": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    path = source.with_name("altered.safetensors")
    save_file(tensors, path, metadata | {"config": text})
    return path


def embeddings(model: Transformer) -> Tensor:
    """Return all embeddings of the same images, as uint8 and as normalized floats.

    ``projected_cls`` is left out: without a linear layer, a file may have it or not.
    """
    size, _ = height_and_width(model.encoder.config.image_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, size + 8, size), generator=generator, dtype=torch.uint8)
    with torch.inference_mode():
        both = (model.embed_all(images), model.embed_all(images[..., :size, :].float() / 255))
        return torch.cat([result[name] for result in both for name in result if name != "projected_cls"])


def timm_model(path: Path) -> Transformer:
    """Load like create_model with a checkpoint_path."""
    model = TimmStudent()
    load_checkpoint(model, str(path))
    return model.eval()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_student(load_teacher(TEACHER).build_student(depth=1), tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


# Of 17 alterations of each size; one in five has all of them, and all sizes.
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("load", [load_teacher, load_student, timm_model])
def test_altered_sizes_are_refused(load: Callable[[Path], Any], step: int, exported: Path, tmp_path: Path) -> None:
    source = exported
    if load is load_teacher:
        source = tmp_path / "teacher.safetensors"
        convert_teacher(TEACHER, source)
    expected, wrong, num_refused = embeddings(load(source)), [], 0
    sizes = sizes_of(source)
    every = list(islice(alterations(sizes, sizes), 0, None, step))
    for name, what, text in every:
        altered = with_sizes(source, text)
        try:
            result = embeddings(load(altered))
        except InputError as error:
            num_refused += 1
            start = "config_json " if load is timm_model else str(altered)
            if "\n" in str(error) or not str(error).startswith(start) or len(str(error)) > 500:
                wrong.append((name, what, str(error)))
        except Exception as error:  # noqa: BLE001
            wrong.append((name, what, repr(error)[:200]))
        else:
            if not torch.allclose(result, expected, atol=1e-4) and (name, what) != MAY_DIFFER:
                wrong.append((name, what, "other embeddings"))
    assert not wrong, "\n".join(map(str, wrong))
    assert num_refused > len(every) / 2


def test_an_altered_width_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "student.safetensors"
    save_student(load_teacher(TEACHER).build_student(depth=1, embed_dim=20), source)
    sizes = sizes_of(source)
    altered = [text for name, _, text in alterations(sizes, sizes["student"]) if name == "embed_dim"]
    assert len(altered) == len(HOSTILE) + 2
    for text in altered:
        assert load_student(source).embed_dim == 20
        refused_by(load_student, with_sizes(source, text))


QKV = "blocks.0.attn.qkv.weight"
CHANGED: dict[str, Any] = {
    "missing": None,
    "not finite": torch.full((144, 48), torch.nan),
    "another shape": torch.ones(48, 144),
    "int8": torch.ones(144, 48, dtype=torch.int8),
}


@pytest.mark.parametrize("load", [load_student, timm_model])
def test_other_tensors_are_refused_and_16_bits_are_not(load: Callable[[Path], Any], exported: Path) -> None:
    """By timm, too, whose own loading is not strict about dtypes."""
    tensors, metadata = contents(exported)
    path = exported.with_name("other.safetensors")
    for what, changed in CHANGED.items():
        new_tensors = {name: tensor for name, tensor in (tensors | {QKV: changed}).items() if tensor is not None}
        save_file(new_tensors, path, metadata)
        with pytest.raises(InputError, match=re.escape(QKV)) as caught:
            load(path)
        assert "\n" not in str(caught.value), what
    for stored in (torch.zeros(1, 8, dtype=torch.uint8), torch.tensor(7), torch.zeros(5 << 20, dtype=torch.uint8)):
        save_file(tensors | {"config_json": stored}, path, metadata)
        with pytest.raises(InputError, match=r"^config_json cannot be read: "):
            timm_model(path)
    save_file(tensors | {QKV: tensors[QKV].half()}, path, metadata)
    torch.testing.assert_close(embeddings(load(path)), embeddings(load(exported)), atol=0.02, rtol=0)
