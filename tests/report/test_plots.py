"""The plot of quality over speed."""

from typing import Any

import numpy as np
import pytest
import torch

from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.labeled_retrieval import Lookup
from d2v_composer.evaluation.rows import LINEAR, Result, retrieval_from
from d2v_composer.report.plots import quality_over_speed


def test_each_measure_is_a_line_through_the_models_in_order_of_speed() -> None:
    load: Any = None
    speeds: dict[int, dict[str, float]] = {1: {"fast": 3, "slow": 5}, 64: {"fast": 900, "slow": 30}}
    right = {"pixels": 10, "fast": 40, "slow": 60}
    measures = [retrieval_from("train", 1), retrieval_from("train", 3), LINEAR]
    results = [
        Result(row, dataset, measure, "output_mean", True, torch.arange(100) < hits + 10 * i)
        for row, hits in right.items()
        for i, measure in enumerate(measures)
        for dataset in ("first", "second")
    ]
    lookup = Lookup("output_mean", (1, 3), ["linear"], None, 64)
    evaluation = Evaluation({}, {}, lookup, load, {"first": [], "second": []}, results, speeds)
    figure = quality_over_speed(evaluation, 64, "images")
    assert [axes.get_title("left") for axes in figure.axes] == [
        f"Quality over speed on {name}, with 95 % intervals" for name in ("first", "second")
    ]
    for axes in figure.axes:
        containers: Any = axes.containers
        texts: Any = axes.texts
        lines = {container.get_label(): np.asarray(container.lines[0].get_xydata()) for container in containers}
        assert lines.keys() == {"bank train top-1", "linear probe"}
        assert lines["bank train top-1"] == pytest.approx(np.array([[30, 0.6], [900, 0.4]]))
        assert lines["linear probe"] == pytest.approx(np.array([[30, 0.8], [900, 0.6]]))
        assert {text.get_text(): text.xy[0] for text in texts} == {"slow": 30, "fast": 900}
        assert axes.get_xlabel() == "images per second on this machine, in batches of 64"
        assert axes.get_xscale() == "log"
