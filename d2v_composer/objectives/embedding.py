"""An objective: 1 minus the cosine similarity of the student's embedding to the teacher's embedding.

Shapes: B inputs, P channels of the embedding.
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from d2v_composer.models.backbone import Backbone
from d2v_composer.models.features import Features
from d2v_composer.models.teacher import Teacher
from d2v_composer.objectives.objective import Objective, Regression, Term, Weight

# Least length of the predictions: they may point away from their targets.
LEAST_LENGTH = 1e-3


class EmbeddingRegression(Objective):
    """Train a student's embedding, the output of a trained linear map, to have the direction of the teacher's."""

    class Options(Term):
        weight: Weight = 0.0
        """Weight of the term, which is 1 minus the cosine similarity of the student's embedding to the teacher's
        embedding; 0 leaves the term out."""

    def __init__(self, options: Options, teacher: Teacher, student: Backbone) -> None:
        super().__init__(options, teacher, student)
        student.train_alignment(teacher.embedding)
        self.read_teacher, self.read_student = teacher.read, student.read

    def target(self, features: Features) -> Tensor:
        return normalize(self.read_teacher(features))

    def regression(self, features: Features, target: Tensor) -> Regression:
        """Return the prediction and the target, (B, P) each; all predictions have the same Euclidean norm."""
        prediction = normalize(self.read_student(features))
        length = (prediction * target).sum(dim=1).mean().clamp(min=LEAST_LENGTH)
        return Regression(length.detach() * prediction, target)

    def loss(self, regression: Regression) -> Tensor:
        return 1 - cosine_similarity(regression.prediction, regression.target).mean()
