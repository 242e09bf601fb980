"""Every preset trains under the Trainer: loss falls, nothing is NaN, routing is logged."""

import json
from pathlib import Path

import pytest
import yaml

from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training.arguments import parse_arguments
from dynmoe_hf.training.train import train

SETTINGS = {
    "model": {
        "hidden_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
    },
    "vocab_size": 300,
    "block_size": 16,
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 5,
    "save_strategy": "no",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_trains(method: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{split} {line}: def f(x): return x\n" * 20}) for line in range(6)]
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(lines))
    config = tmp_path / "run.yaml"
    output = {"routing": method, "dataset": str(tmp_path / "text"), "output_dir": str(tmp_path / "out")}
    config.write_text(yaml.safe_dump(SETTINGS | output))
    metrics = train(*parse_arguments([], str(config)))
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logs = [log for log in logs if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert all(value == value for value in log.values()), "a NaN was logged"
        assert 1 <= log["experts_per_token"] <= 4 and log["load_balance"] > 0
    assert logs[-1]["lm_loss"] < 0.8 * logs[0]["lm_loss"]
    assert metrics["eval_lm_loss"] < logs[0]["lm_loss"]
