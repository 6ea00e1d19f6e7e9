"""The metrics of embeddings, in the order of tables."""

from d2v_composer.evaluation.metrics.agreement import AGREEMENT
from d2v_composer.evaluation.metrics.instance import INSTANCE
from d2v_composer.evaluation.metrics.knn import KNN
from d2v_composer.evaluation.metrics.linear import LINEAR
from d2v_composer.evaluation.metrics.retrieval import RETRIEVAL
from d2v_composer.evaluation.metrics.zero_shot import ZERO_SHOT

METRICS = (RETRIEVAL, KNN, LINEAR, ZERO_SHOT, AGREEMENT, INSTANCE)
PROBES = METRICS[1:]
"""The metrics that a YAML may choose as ``probes``."""
