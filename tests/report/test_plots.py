"""The plot of quality over speed."""

from typing import Any

import numpy as np
import pytest
import torch

from d2v_composer.evaluation.evaluate import Evaluation
from d2v_composer.evaluation.labeled_retrieval import Candidate, Lookup, Result
from d2v_composer.evaluation.metrics import LINEAR, retrieval_from
from d2v_composer.report.plots import quality_over_speed


def test_each_measure_is_a_line_through_the_models_in_order_of_speed() -> None:
    embed: Any = None
    rates: dict[str, dict[int, float]] = {"pixels": {}, "fast": {1: 3, 64: 900}, "slow": {1: 5, 64: 30}}
    candidates = [Candidate(name, embed, rates=each) for name, each in rates.items()]
    right = {"pixels": 10, "fast": 40, "slow": 60}
    measures = [retrieval_from("train", 1), retrieval_from("train", 3), LINEAR]
    results = [
        Result(each.name, dataset, measure, "output_mean", True, torch.arange(100) < right[each.name] + 10 * i)
        for each in candidates
        for i, measure in enumerate(measures)
        for dataset in ("first", "second")
    ]
    lookup = Lookup("output_mean", (1, 3), ["linear"], None, 64)
    figure = quality_over_speed(Evaluation(candidates, lookup, {"first": [], "second": []}, results), 64, "images")
    assert [axes.get_title("left") for axes in figure.axes] == [
        f"Quality over speed on {name}, with 95 % intervals" for name in ("first", "second")
    ]
    for axes in figure.axes:
        containers: Any = axes.containers
        texts: Any = axes.texts
        lines = {each.get_label(): np.asarray(each.lines[0].get_xydata()) for each in containers}
        assert lines.keys() == {"bank train top-1", "linear probe"}
        assert lines["bank train top-1"] == pytest.approx(np.array([[30, 0.6], [900, 0.4]]))
        assert lines["linear probe"] == pytest.approx(np.array([[30, 0.8], [900, 0.6]]))
        assert {each.get_text(): each.xy[0] for each in texts} == {"slow": 30, "fast": 900}
        assert axes.get_xlabel() == "images per second on this machine, in batches of 64"
        assert axes.get_xscale() == "log"
