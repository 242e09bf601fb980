"""`dynmoe convert` and `dynmoe upcycle`: exit codes, one line for a mistake, what is printed."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynmoe_hf.cli import main
from dynmoe_hf.evaluation.loading import load_config
from tests.convert.sources import DENSE_CONFIGS, MOE_CONFIGS, contents, new_model, save_official


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_model(MOE_CONFIGS["olmoe"]).save_pretrained(tmp_path / "olmoe")
    code, out, _ = call(capsys, "convert", tmp_path / "olmoe", tmp_path / "ours")
    assert code == 0
    text = " ".join(out.split())
    assert "(olmoe) ->" in text and "(dynmoe): 36 tensors" in text and "same most probable token 100.0% of 32" in text
    code, out, _ = call(capsys, "convert", tmp_path / "ours", tmp_path / "back", "--to", "olmoe", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["source_format"] == "dynmoe" and report["target_format"] == "olmoe"
    assert report["comparison"]["max_difference"] < 1e-5 and report["comparison"]["argmax_agreement"] == 1
    assert contents(tmp_path / "back") == contents(tmp_path / "olmoe")


def test_flags_of_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_official("topp_all_moe_p040", tmp_path / "official")
    words = ["convert", tmp_path / "official", tmp_path / "ours", "--from", "dynamic_moe", "--dtype", "bfloat16"]
    code, out, _ = call(capsys, *words, "--no-check", "--max-shard-size", "8KB")
    assert code == 0 and "The logits were not compared." in out
    assert "Note: experts_topk=2 is left out" in " ".join(out.split())
    assert str(load_config(tmp_path / "ours").dtype) == "torch.bfloat16"
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert call(capsys, *words)[0] == 2
    assert call(capsys, *words, "--overwrite")[0] == 0
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == 1


def test_upcycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_model(DENSE_CONFIGS["llama"]).save_pretrained(tmp_path / "dense")
    words = ["upcycle", tmp_path / "dense", tmp_path / "ours", "--num-experts", 4, "--shared-experts", 1]
    code, out, _ = call(
        capsys, *words, "--routing", "top_p", "--routing.selector.p", 0.3, "--layers", 0, 2, "--num-experts-per-tok", 3
    )
    assert code == 0
    assert "First output equals that of the dense model: yes, because" in " ".join(out.split())
    config = load_config(tmp_path / "ours")
    assert config.num_experts == 4 and config.num_shared_experts == 1 and config.num_experts_per_tok == 3
    assert config.routing["selector"]["p"] == 0.3 and config.mlp_layer_types == ["sparse", "dense", "sparse"]
    code, out, _ = call(
        capsys, "upcycle", tmp_path / "dense", tmp_path / "split", "--split", 2, "--noise", 0.1, "--seed", 3, "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["exact"] is False and report["promise"].startswith("noise of 0.1")
    assert load_config(tmp_path / "split").moe_intermediate_size == 20


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["convert", "dense", "ours", "--to", "mixtral"], "--to names what it becomes"),
        (["convert", "dense", "ours", "--from", "moe_pp"], "MoE++"),
        (["convert", "dense", "dense", "--overwrite"], "none in the other"),
        (["convert", "nowhere/at/all/x", "ours"], "nowhere"),
        (["upcycle", "dense", "ours", "--split", "7"], "split=7"),
        (["upcycle", "dense", "ours", "--routing", "top_q"], "top_q"),
        (["upcycle", "dense", "ours", "--model.hidden_size", "3"], "unrecognized"),
        (["upcycle", "dense", "ours", "--unheard-of", "3"], "unrecognized"),
        (["convert", "dense", "ours", "--max-shard-size", "much"], "much"),
    ],
)
def test_a_mistake_costs_one_line(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    new_model(DENSE_CONFIGS["llama"]).save_pretrained("dense")
    capsys.readouterr()
    code, out, err = call(capsys, *words)
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and reason in last and last.startswith(f"dynmoe {words[0]}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
