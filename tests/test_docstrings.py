"""Every public name has an example, and the examples run; the README's too."""

import doctest
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import d2v_composer
from d2v_composer.checkpoints.load import save_student
from d2v_composer.models.backbone import Transformer
from d2v_composer.models.teacher import Teacher
from helpers import QUICKSTART, encoded_image
from reference import PUBLIC, resolve

METHODS = (
    Transformer.encode,
    Transformer.forward_blocks,
    Transformer.embed,
    Transformer.embed_all,
    Teacher.targets,
    Teacher.build_student,
)
NAMES = [
    member
    for module in ("d2v_composer", "d2v_composer.timm_models", "d2v_composer.callbacks")
    for member in resolve(module)
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Make the files, models and images that examples use; their files are in the working folder."""
    folder = tmp_path_factory.mktemp("examples")
    for path in (QUICKSTART, QUICKSTART / "teacher.safetensors", QUICKSTART / "cifar10"):
        (folder / path.name).symlink_to(path)
    text = QUICKSTART.with_suffix(".yaml").read_text()
    settings, count = re.subn(r"max_samples: \d+", "max_samples: 0", text)  # the map takes seconds
    assert count == 1
    (folder / "quickstart.yaml").write_text(f"{settings}\nreport: false\n")
    teacher = d2v_composer.load_teacher(folder / "teacher.safetensors")
    student = teacher.build_student(depth=2).eval()
    save_student(student, folder / "student.safetensors")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    files = [encoded_image(seed) for seed in range(2)]
    names = {name: getattr(d2v_composer, name) for name in PUBLIC["d2v_composer"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield {"torch": torch, "teacher": teacher, "student": student, "images": images, "files": files, **names}


@pytest.mark.parametrize("documented", [d2v_composer, *NAMES, *METHODS], ids=lambda member: member.__name__)
def test_an_example_runs(documented: Callable[..., Any], given: dict[str, Any]) -> None:
    name, output = documented.__name__, list[str]()
    example = doctest.DocTestParser().get_doctest(documented.__doc__ or "", dict(given), name, None, None)
    results = doctest.DocTestRunner().run(example, out=output.append)
    assert results.attempted, f"{name} has no example"
    assert not results.failed, "".join(output)
