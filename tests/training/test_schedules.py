"""Schedules and options of transformers' TrainingArguments that our YAML takes, seen in what a run does."""

import json
import math

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dynmoe_hf import cli
from dynmoe_hf.training import train as train_module

SETTINGS = {
    "model": {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    },
    "routing": "top_p",
    "vocab_size": 300,
    "block_size": 16,
    "max_steps": 20,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    rows = [{"text": f"{number} the router sends token {number * 7} to experts"} for number in range(60)]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder
    if were_on:
        datasets.enable_progress_bars()


def run(workplace, output_dir, **settings) -> list[dict[str, float]]:
    """Train with these settings in the YAML file; returns the training logs."""
    config = output_dir.with_suffix(".yaml")
    source = {"dataset": str(workplace / "documents.jsonl"), "output_dir": str(output_dir)}
    config.write_text(yaml.safe_dump(SETTINGS | source | settings))
    assert cli.main(["train", "--json", "--config", str(config)]) == 0
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [log for log in history if "loss" in log]


def rates(logs) -> list[float]:
    """The factor on the learning rate in steps 1, 2, ..."""
    return [log["learning_rate"] / 1e-2 for log in logs]


def warmup_stable_decay(step: int) -> float:
    """4 steps up, 8 level, 8 down to a tenth along half a cosine, the default; the way up begins at the tenth too."""
    if step < 4:
        return 0.1 + 0.9 * step / 4
    return 1.0 if step < 12 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 12) / 8)) / 2


def straight(step: int) -> float:
    """The same with straight lines down to zero, in the last 5 steps."""
    return step / 4 if step < 4 else min(1.0, (20 - step) / 5)


def cosine_with_floor(step: int) -> float:
    """4 steps up, then half a cosine down to a fifth."""
    return step / 4 if step < 4 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2


SCHEDULES = {
    "warmup_stable_decay": ({"num_decay_steps": 8, "min_lr_ratio": 0.1}, warmup_stable_decay),
    "warmup_stable_decay, straight": ({"num_decay_steps": 5, "decay_type": "linear"}, straight),
    "cosine_with_min_lr": ({"min_lr_rate": 0.2}, cosine_with_floor),
    "cosine": ({}, lambda step: step / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_follow_the_formula(workplace, tmp_path, name):
    options, formula = SCHEDULES[name]
    logs = run(
        workplace,
        tmp_path / "out",
        lr_scheduler_type=name.partition(",")[0],
        lr_scheduler_kwargs=options,
        warmup_steps=4,
    )
    assert rates(logs) == pytest.approx([formula(step) for step in range(20)], abs=1e-9)


def test_gradients_are_clipped(workplace, tmp_path, monkeypatch):
    """grad_norm is logged as it was before; what the optimizer gets has the norm that was asked for."""
    norms = []

    class Seen(train_module.RunTrainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            optimizer.register_step_pre_hook(
                lambda optimizer, *_: norms.append(
                    torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm()
                )
            )
            return optimizer

    monkeypatch.setattr(train_module, "RunTrainer", Seen)
    for limit, factor in ((0.05, 0.05), (1e6, None)):
        norms.clear()
        logs = run(workplace, tmp_path / f"{limit}", max_grad_norm=limit, max_steps=4)
        before = [log["grad_norm"] for log in logs]
        assert min(before) > 0.1
        expected = before if factor is None else [factor] * 4
        assert [norm.item() for norm in norms] == pytest.approx(expected, rel=1e-3)


def test_fused_adamw_is_the_plain_one_computed_at_once(workplace, tmp_path, monkeypatch):
    used, original = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: used.append(self.defaults["fused"]) or original(self, *args)
    )
    options = {"max_steps": 4, "weight_decay": 0.1, "adam_beta2": 0.95}
    fused = run(workplace, tmp_path / "fused", optim="adamw_torch_fused", **options)
    assert used == [True] * 4
    plain = run(workplace, tmp_path / "plain", optim="adamw_torch", **options)
    assert used[4:] in ([False] * 4, [None] * 4)
    assert [log["loss"] for log in fused] == pytest.approx([log["loss"] for log in plain], rel=1e-4)


def test_bf16_computes_in_bfloat16_and_keeps_float32(workplace, tmp_path, monkeypatch):
    seen, original = set(), torch.nn.functional.linear

    def linear(inputs, weight, *args):
        out = original(inputs, weight, *args)
        seen.add((weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    half = run(workplace, tmp_path / "half", bf16=True, max_steps=6)
    assert (torch.float32, torch.bfloat16) in seen
    seen.clear()
    full = run(workplace, tmp_path / "full", max_steps=6)
    assert seen == {(torch.float32, torch.float32)}
    losses = [[log["loss"] for log in logs] for logs in (half, full)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_run_learns_what_a_plain_one_does(workplace, tmp_path):
    options = {"max_steps": 3, "experts_implementation": "ragged"}
    plain = run(workplace, tmp_path / "plain", **options)
    compiled = run(workplace, tmp_path / "compiled", torch_compile=True, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert [log["loss"] for log in compiled] == pytest.approx([log["loss"] for log in plain], rel=1e-3)
