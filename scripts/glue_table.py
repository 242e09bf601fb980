"""The table of scripts/glue_da_moe_vs_top_k.sh: python scripts/glue_table.py FOLDER with METHOD/TASK/SEED below it.

Metrics are in per cent, mean and standard deviation over the seeds; beside them stands what the most frequent label of
the training examples gets, and the mean experts per token on the validation split.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from dynmoe_hf.training.glue_metric import METRICS

Runs = dict[tuple[str, str], list[dict[str, float]]]


def read(folder: Path) -> Runs:
    """The metrics of every seed, by task and method."""
    runs: Runs = defaultdict(list)
    for path in sorted(folder.glob("*/*/*/all_results.json")):
        seed = path.parent
        runs[seed.parent.name, seed.parent.parent.name].append(json.loads(path.read_text(encoding="utf-8")))
    return runs


def table(runs: Runs) -> str:
    """As Markdown, one row a metric."""
    methods = sorted({method for _, method in runs}, reverse=True)
    lines = [
        "| task | metric | majority | " + " | ".join(f"`{method}` | experts per token" for method in methods) + " |",
        "|---|---|---:|" + "---:|" * 2 * len(methods),
    ]
    for task in (task for task in METRICS if all((task, method) in runs for method in methods)):
        for metric in METRICS[task]:
            seeds = [runs[task, method] for method in methods]
            majority = mean(_value(run, f"majority_{metric}") for group in seeds for run in group)
            cells = [
                f"{_spread([100 * _value(run, metric) for run in group])} | "
                f"{mean(_value(run, 'experts_per_token') for run in group):.2f}"
                for group in seeds
            ]
            lines.append(f"| {task} | {metric.replace('_', ' ')} | {100 * majority:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(run: dict[str, float], name: str) -> float:
    """Of the matched validation split where there are two."""
    return run[f"eval_{name}"] if f"eval_{name}" in run else run[f"eval_matched_{name}"]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))))
