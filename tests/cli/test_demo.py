"""The demo from end to end, with a corpus and a model small enough for a test."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, DatasetInfo

from dynmoe_hf.cli import demo, main
from dynmoe_hf.training import corpus, data


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of a few lines in place of the standard library, and a model to match."""
    info = DatasetInfo(description="A few lines.")
    texts = {split: [f"{split} line {line}: def f(x): return x\n" * 12 for line in range(4)] for split in data.SPLITS}
    splits = {split: Dataset.from_dict({"name": text, "text": text}, info=info) for split, text in texts.items()}
    for module in (corpus, data):
        monkeypatch.setattr(module, "stdlib_corpus", lambda: DatasetDict(splits))
    model = {"hidden_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(demo.SETTINGS, "model", model | {"num_experts": 8})
    monkeypatch.setitem(demo.SETTINGS, "per_device_train_batch_size", 2)
    monkeypatch.setattr(demo, "VOCAB_SIZE", 300)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)


def test_the_demo_trains_compares_plots_reloads_and_generates(small: None, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(demo.__file__).parents[2]))
    output = tmp_path / "demo"
    assert main(["demo", "--output", str(output), "--steps", "3"]) == 0
    results = json.loads((output / "results.json").read_text())
    printed = capfd.readouterr().out
    assert set(results) == {"top_k", "top_p"}
    for method, result in results.items():
        trained = json.loads((output / method / "eval_results.json").read_text())
        assert result["bits_per_byte"] == trained["eval_bits_per_byte"] > 0
        assert f"{result['bits_per_byte']:.3f}" in printed
        assert result["training_tokens"] == 3 * 2 * demo.BLOCK_SIZE
        mean = sum(result["experts_per_token_by_layer"]) / len(result["experts_per_token_by_layer"])
        assert mean == pytest.approx(result["experts_per_token"])
        assert (output / method / "model.safetensors").is_file()
    assert results["top_k"]["experts_per_token"] == 2.0
    assert results["top_p"]["experts_per_token_first_step"] != 2.0
    for plot in ("experts_over_training.png", "experts_per_layer.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")
    assert demo.PROMPT.strip() in printed.partition("in a new process")[2]


def test_the_demo_overwrites_nothing_unless_asked(tmp_path: Path, capsys) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for flags in ([], ["--overwrite"]):
        assert main(["demo", "--output", str(tmp_path), *flags]) == 2
        assert "'precious.txt', which is not from a demo" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine"
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "results.json").write_text("{}")
    assert main(["demo", "--output", str(tmp_path / "earlier")]) == 2
    assert "--overwrite deletes it" in capsys.readouterr().err
    assert main(["demo", "--output", str(tmp_path / "new"), "--steps", "0"]) == 2
    assert not (tmp_path / "new").exists()
