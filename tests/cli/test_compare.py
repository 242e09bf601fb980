"""`dynmoe compare` from end to end, with a corpus and models small enough for a test."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from dynmoe_hf.cli import main

MODEL = {"hidden_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs that differ in their routing, and their text."""
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{split} {line}: def f(x): return x\n" * 20}) for line in range(6)]
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(lines))
    for routing in ("top_k", "rmoe_da_moe"):
        settings = {
            "model": MODEL | {"num_experts": 4},
            "routing": routing,
            "vocab_size": 300,
            "dataset": str(tmp_path / "text"),
            "block_size": 16,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
        }
        (tmp_path / f"{routing}.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def compare(folder: Path, *flags: str) -> int:
    configs = [str(folder / f"{name}.yaml") for name in ("top_k", "rmoe_da_moe")]
    return main(["compare", *configs, "--output", str(folder / "out"), *flags])


def test_one_table_of_runs_on_the_same_tokens(folder: Path, capsys) -> None:
    assert compare(folder, "--gradient_accumulation_steps", "3") == 0
    printed = capsys.readouterr().out
    results = json.loads((folder / "out" / "results.json").read_text())
    assert list(results) == ["top_k", "rmoe_da_moe"]
    for name, result in results.items():
        trained = json.loads((folder / "out" / name / "eval_results.json").read_text())
        assert result["bits_per_byte"] == trained["eval_bits_per_byte"] > 0
        assert f"{result['bits_per_byte']:.3f}" in printed
        assert result["training_tokens"] == 2 * 2 * 3 * 16
        assert AutoModelForCausalLM.from_pretrained(folder / "out" / name).config.routing["method"] == name
    files = [(folder / "out" / name / "tokenizer.json").read_bytes() for name in results]
    assert files[0] == files[1]
    assert results["top_k"]["experts_per_token"] == 2.0 != results["rmoe_da_moe"]["experts_per_token"]


def test_an_earlier_comparison_is_kept_unless_asked(folder: Path, capsys) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text("{}")
    assert compare(folder) == 2
    assert "--overwrite deletes it" in capsys.readouterr().err
    (folder / "out" / "precious.txt").write_text("mine")
    assert compare(folder, "--overwrite") == 2, "results.json beside it does not make it ours"
    assert "'precious.txt', which is not from a comparison" in capsys.readouterr().err
    assert (folder / "out" / "precious.txt").exists()


def test_runs_that_would_not_see_the_same_tokens_are_refused(folder: Path, capsys) -> None:
    path = folder / "rmoe_da_moe.yaml"
    path.write_text(path.read_text().replace("block_size: 16", "block_size: 32"))
    assert compare(folder) == 2
    assert "block_size is 32 in rmoe_da_moe and 16 in top_k" in capsys.readouterr().err
    assert not (folder / "out").exists()
