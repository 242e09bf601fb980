"""The metrics of the GLUE paper (Wang et al. 2019, arXiv 1804.07461, section 3) as a metric of `evaluate`.

`evaluate.load("glue", task)` fetches a script from the Hub, which needs scikit-learn and SciPy. This file needs numpy
alone and no network: `GlueMetric(config_name="mrpc")`, or `evaluate.load` with the path of this file.
"""

import datasets
import evaluate
import numpy as np

METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


class GlueMetric(evaluate.Metric):
    """`compute(predictions=..., references=...)` gives the metrics of the task that `config_name` names.

    Predictions and references are classes (N,), or for `stsb` numbers. `matthews_correlation`, `pearson` and
    `spearmanr` lie in -1 ... 1 and are 0 where one side is constant; `accuracy` and `f1`, that of class 1, in 0 ... 1.

    Raises:
        ValueError: there is no such task.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise ValueError(f"{self.config_name!r} is no task of GLUE; there are {', '.join(METRICS)}.")
        kind = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="Metrics of the nine tasks of GLUE.",
            citation="Wang et al. 2019, GLUE: A Multi-Task Benchmark and Analysis Platform, arXiv 1804.07461",
            inputs_description="predictions and references: classes, or numbers for stsb",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        found, true = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
        return {name: float(FUNCTIONS[name](found, true)) for name in METRICS[self.config_name]}


def accuracy(found: np.ndarray, true: np.ndarray) -> float:
    """The share of equal answers."""
    return (found == true).mean()


def f1(found: np.ndarray, true: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where nothing is of it."""
    hits, named = ((found == 1) & (true == 1)).sum(), (found == 1).sum() + (true == 1).sum()
    return 2 * hits / named if named else 0.0


def pearson(found: np.ndarray, true: np.ndarray) -> float:
    """The correlation of two series; of two classes it is Matthews' (1975)."""
    if not (np.ptp(found) and np.ptp(true)):
        return 0.0
    found, true = found - found.mean(), true - true.mean()
    return (found * true).sum() / np.sqrt((found**2).sum() * (true**2).sum())


def spearmanr(found: np.ndarray, true: np.ndarray) -> float:
    """The correlation of ranks, where equal values share their mean rank."""
    return pearson(_ranks(found), _ranks(true))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


FUNCTIONS = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": pearson,
    "pearson": pearson,
    "spearmanr": spearmanr,
}
