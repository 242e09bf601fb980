"""Every file of configs/ is one that its commands accept, and the runs fit what their first lines launch them on."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers.optimization import get_scheduler

from dynmoe_hf.cli import main
from dynmoe_hf.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
RUNS = sorted((ROOT / "configs" / "train").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
GROWN = [path for path in RUNS if path.stem.endswith(("_160m", "_1b"))]
LAUNCH = re.compile(r"#   accelerate launch --config_file (\S+) \\\n#     scripts/train.py --config (\S+)")


def launch_file(path):
    """The accelerate configuration that the comment of a run names; None for runs without a launch."""
    found = LAUNCH.search(path.read_text())
    if found is None:
        return None
    assert found[2] == f"configs/train/{path.name}"
    return found[1]


def validate(path, capsys, *flags):
    assert main(["validate", str(path), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_fits_what_it_is_launched_on(path, capsys):
    launch = launch_file(path)
    assert launch is not None or path.stem.endswith(("_tiny", "_enwik8"))
    flags = [] if launch is None else ["--accelerate", launch]
    training = validate(path, capsys, *flags)["training"]
    assert training["fits"], f"{training['memory']['total'] / 2**30:.1f} GiB"
    if launch is not None and "fsdp" in launch:
        alone = validate(path, capsys, "--accelerate", "configs/accelerate/ddp_8.yaml")["training"]
        assert not alone["fits"], "no need to shard"


@pytest.mark.parametrize("path", GROWN, ids=lambda path: path.stem)
def test_a_grown_run_is_a_whole_recipe(path, capsys, monkeypatch):
    # Without a GPU, the Trainer refuses bfloat16 and compilation unless it is told that this is known.
    _, data, training = parse_arguments(["--use_cpu", "true"], str(path))
    found = validate(path, capsys, "--accelerate", launch_file(path))
    assert training.bf16 and training.optim == "adamw_torch_fused"
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.1)
    assert training.max_grad_norm == 1.0 and 0 < training.warmup_steps < 0.15 * training.max_steps
    assert 2**19 <= found["training"]["run"]["tokens_per_step"] <= 2**20
    size = {"160m": 160e6, "1b": 1e9}[path.stem.rpartition("_")[2]]
    target = {"rmoe_1b": 8}.get(path.stem, 2)
    (active,) = [p["parameters"] for p in found["activity"] if p["experts_per_token"] == target]
    assert active == pytest.approx(size, rel=0.03)
    model = yaml.safe_load(path.read_text())["model"]
    assert model["vocab_size"] % 128 == 0 and model["moe_intermediate_size"] % 128 == 0
    assert model["head_dim"] in (64, 128) and "attention_dropout" not in model
    assert data.block_size <= model["max_position_embeddings"]


@pytest.mark.parametrize("path", GROWN, ids=lambda path: path.stem)
def test_the_schedule_rises_stays_or_falls_as_said(path):
    _, _, training = parse_arguments(["--use_cpu", "true"], str(path))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    schedule = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.max_steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    rate = schedule.lr_lambdas[0]
    assert rate(0) == 0 and rate(training.warmup_steps) == pytest.approx(1.0)
    middle = rate(training.max_steps // 2)
    assert middle == 1.0 if training.lr_scheduler_type == "warmup_stable_decay" else 0.4 < middle < 0.7
    assert rate(training.max_steps) == pytest.approx(
        0.1 if "min_lr_rate" in training.lr_scheduler_kwargs else 0, abs=1e-6
    )


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_takes_its_file(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == int((re.search(r"_(\d)$", path.stem) or [0, 8 if "zero" in path.stem else 1])[1])
    assert config.mixed_precision in ("no", None), "the run's YAML says what is computed in bfloat16"
    if config.deepspeed_config:
        file = config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(Path(file).read_text())["zero_optimization"]["stage"] == 3


def test_all_runs_and_launches_were_found():
    assert len(RUNS) >= 27 and len(LAUNCHES) == 5 and len(GROWN) == 5


ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \|.*$", flags=re.MULTILINE)


def table_row(path, capsys):
    """A line of the table in docs/scaling.md, as `dynmoe validate` counts it now."""
    launch = launch_file(path)
    found = validate(path, capsys, "--accelerate", launch)
    training, target = found["training"], found["routing"]["controller"].get("target", 2)
    points = list(zip(found["activity"], training["throughput"], strict=True))
    active, point = points[0] if len(points) == 1 else next(p for p in points if p[0]["experts_per_token"] == target)
    gib, days = training["memory"]["total"] / 2**30, point["seconds"] / 86400
    return (
        f"| `{path.stem}` | `{Path(launch).stem}` | {found['total_parameters'] / 1e6:,.0f} M | "
        f"{active['parameters'] / 1e6:,.0f} M | {active['experts_per_token']:g} | "
        f"{gib:.1f} | {point['tokens_per_second']:,.0f} | {days:.2f} |"
    )


def test_the_table_of_the_docs_is_what_validate_counts(capsys):
    page = (ROOT / "docs" / "scaling.md").read_text()
    expected = [table_row(path, capsys) for path in RUNS if launch_file(path)]
    assert [match[0] for match in ROW.finditer(page)] == expected
