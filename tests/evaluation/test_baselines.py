"""Models on one encoder are evaluated in one pass."""

import pytest
import torch

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.data.labeled import LabeledImages, LabeledSet
from d2v_composer.evaluation.evaluate import build_embeds
from d2v_composer.evaluation.labeled_retrieval import embed_set
from d2v_composer.models.data2vec2 import Data2Vec2
from helpers import QUICKSTART


@pytest.fixture(scope="module")
def teacher() -> Data2Vec2:
    return load_teacher(QUICKSTART / "teacher.safetensors")


def random_images(count: int) -> LabeledImages:
    return LabeledImages(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.zeros(count).long())


def test_each_image_is_encoded_once_for_all_models(teacher: Data2Vec2) -> None:
    labeled = LabeledSet(random_images(7), random_images(3))
    student = teacher.build_student(depth=1)
    num_encoded: list[int] = []
    hook = teacher.encoder.register_forward_hook(lambda _, arguments, __: num_encoded.append(len(arguments[0])))
    try:
        with torch.inference_mode():
            embeds = build_embeds(teacher.encoder, {"student": student, "teacher": teacher})
            together = embed_set(embeds, labeled, 4, lambda tensor: tensor)
            assert num_encoded == [4, 3, 3]  # batches of 4 of the 7 training and the 3 test images
            alone = {"student": student.embed_all, "teacher": teacher.embed_all}
            for model, embed in alone.items():
                expected = embed_set({model: embed}, labeled, 4, lambda tensor: tensor)[model]
                for split, embeddings in expected.items():
                    torch.testing.assert_close(together[model][split], embeddings, rtol=0, atol=0)
    finally:
        hook.remove()
    assert together.keys() == {"pixels", "encoder", "student", "teacher"}
