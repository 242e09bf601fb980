"""The metrics of GLUE against values worked by hand and plain loops over pairs."""

from __future__ import annotations

import inspect
import math
import random
import statistics

import pytest

evaluate = pytest.importorskip("evaluate")

from dynmoe_hf.training import glue_metric  # noqa: E402 (it needs evaluate)
from dynmoe_hf.training.finetune_glue import TASKS  # noqa: E402
from dynmoe_hf.training.glue_metric import METRICS, GlueMetric  # noqa: E402


def compute(task: str, found: list[float], true: list[float]) -> dict[str, float]:
    return GlueMetric(config_name=task, keep_in_memory=True).compute(predictions=found, references=true)


def counts(found: list[int], true: list[int]) -> tuple[int, int, int, int]:
    """True and false positives, false and true negatives."""
    pairs = list(zip(found, true, strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))


def ranks(values: list[float]) -> list[float]:
    """How many are smaller, and half of those that are equal."""
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def test_values_worked_by_hand() -> None:
    found, true = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]  # TP 3, FP 1, FN 1, TN 1
    assert compute("mrpc", found, true) == pytest.approx({"accuracy": 4 / 6, "f1": 3 / 4})
    assert compute("cola", found, true) == pytest.approx({"matthews_correlation": (3 - 1) / math.sqrt(4 * 4 * 2 * 2)})
    # Deviations -1 0 1 and -2 1 1; ranks 1 2 3 and 1 2.5 2.5.
    numbers = compute("stsb", [1, 2, 3], [0.5, 3.5, 3.5])
    assert numbers == pytest.approx({"pearson": 3 / math.sqrt(2 * 6), "spearmanr": 1.5 / math.sqrt(2 * 1.5)})


@pytest.mark.parametrize("seed", range(5))
def test_against_plain_loops(seed: int) -> None:
    source = random.Random(seed)
    true = source.choices([0, 1], k=50)
    found = [label if source.random() < 0.6 else 1 - label for label in true]
    tp, fp, fn, tn = counts(found, true)
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute("cola", found, true) == pytest.approx({"matthews_correlation": matthews})
    assert compute("qqp", found, true) == pytest.approx(
        {"accuracy": (tp + tn) / 50, "f1": statistics.harmonic_mean([tp / (tp + fp), tp / (tp + fn)])}
    )
    scores = [source.randint(0, 20) / 4 for _ in range(50)]
    guesses = [score + source.randint(-8, 8) / 4 for score in scores]
    assert compute("stsb", guesses, scores) == pytest.approx(
        {
            "pearson": statistics.correlation(guesses, scores),
            "spearmanr": statistics.correlation(ranks(guesses), ranks(scores)),
        }
    )


def test_three_classes() -> None:
    assert compute("mnli", [0, 1, 2, 2], [0, 2, 2, 1]) == {"accuracy": 0.5}


@pytest.mark.parametrize("constant", [0.1, 2.0])
def test_a_constant_answer_correlates_with_nothing(constant: float) -> None:
    """0.1 is not exact: a mean of many need not be equal to it."""
    assert compute("stsb", [constant] * 11, [number / 7 for number in range(11)]) == {"pearson": 0, "spearmanr": 0}
    assert compute("cola", [1] * 4, [0, 1, 1, 0]) == {"matthews_correlation": 0}
    assert compute("mrpc", [0] * 4, [0] * 4) == {"accuracy": 1, "f1": 0}


def test_evaluate_loads_the_file_by_its_path(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path))
    metric = evaluate.load(inspect.getfile(glue_metric), "cola")
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[1], references=[0])
    assert metric.compute()["matthews_correlation"] == pytest.approx(0.5)


def test_every_task_has_metrics_and_no_other_has() -> None:
    assert METRICS.keys() == TASKS.keys()
    with pytest.raises(ValueError, match="'ax' is no task of GLUE; there are cola, "):
        GlueMetric(config_name="ax")
