"""One optimizer step is the same however its sequences are cut into micro-batches and spread over processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_hf.model.methods import METHODS

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_splits.py"


def compare(*flags: str) -> tuple[int, list[dict]]:
    done = subprocess.run([sys.executable, SCRIPT, "--json", *flags], capture_output=True, text=True, timeout=900)
    assert done.stdout, done.stderr[-4000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "flags", [["--balance_scope", "sequence"], ["--balance_scope", "global", "--idle"]], ids=["sequence", "global idle"]
)
def test_gradients_losses_thresholds_and_weights_do_not_depend_on_the_split(flags: list[str]) -> None:
    splits = ["accumulation 4", "DDP x 2, accumulation 2", "FSDP2 x 2"]
    code, rows = compare("--splits", *splits, "--tolerance", "1e-5", *flags)
    assert code == 0, [row for row in rows if not row["largest difference"] <= 1e-5]
    assert {row["method"] for row in rows} == set(METHODS)
    assert len(rows) == len(METHODS) * (1 + len(splits))
    assert all(row["experts"] > 0.1 and row["rest"] > 0.1 for row in rows)


def test_the_papers_scope_depends_on_the_split_and_that_is_noticed() -> None:
    code, rows = compare("--splits", "accumulation 4", "--balance_scope", "micro", "--methods", "top_k")
    assert code == 1
    assert rows[1]["largest difference"] > 0.1
