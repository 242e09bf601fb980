"""Checkpoints that are broken, or meant to do harm: one clear sentence, no memory taken, nothing executed."""

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from dynmoe_hf.cli import main
from dynmoe_hf.evaluation.loading import load_model, load_model_and_tokenizer
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import tiny_model, tokens

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.2.mlp.gate.weight"
DOWN = "model.layers.2.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    tiny_model("top_p", vocab_size=260).save_pretrained(folder)
    train_tokenizer(["a text to learn from"] * 3, vocab_size=260).save_pretrained(folder)
    return folder


@pytest.fixture
def path(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_weights(path: Path, change: Any) -> None:
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file(weights, path / WEIGHTS, {"format": "pt"})


def write_index(path: Path, file: Any) -> None:
    weights = load_file(path / WEIGHTS)
    (path / WEIGHTS).rename(path / "part.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, file)}))


class Harm:
    """What a pickle can do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harm-was-done",)


def pickle_behind_an_index(path: Path) -> None:
    torch.save({GATE: Harm()}, path / "pytorch_model.bin")
    write_index(path, "pytorch_model.bin")


def weights_elsewhere(path: Path) -> None:
    write_index(path, "../elsewhere/part.safetensors")
    (path.parent / "elsewhere").mkdir()
    (path / "part.safetensors").rename(path.parent / "elsewhere" / "part.safetensors")


def header(path: Path, content: bytes) -> None:
    (path / WEIGHTS).write_bytes(len(content).to_bytes(8, "little") + content)


HOSTILE = {
    "config nested without end": (
        lambda path: (path / "config.json").write_text('{"routing":' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}"),
        "not a valid JSON",
    ),
    "config with a number of 5,000 digits": (
        lambda path: (path / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"),
        "not a valid JSON",
    ),
    "config of huge sizes": (lambda path: edit_config(path, hidden_size=10**18), "hidden_size must be at most"),
    "config of NaN": (lambda path: edit_config(path, rms_norm_eps=float("nan")), "rms_norm_eps must be"),
    "config of a long name": (lambda path: edit_config(path, routing="x" * 10**6), "Unknown routing method"),
    "config of a long wrong value": (lambda path: edit_config(path, num_experts="x" * 10**6), "num_experts.*got str"),
    "config of a wrong type": (lambda path: edit_config(path, model_type=["x" * 10**5]), "is a model of type"),
    "config without fields": (
        lambda path: (path / "config.json").write_text('{"model_type": "dynmoe"}'),
        "bytes, too few for",
    ),
    "config that names a kernel": (
        lambda path: edit_config(path, attn_implementation="someone/kernel"),
        "must not have",
    ),
    "config that names a file": (lambda path: edit_config(path, transformers_weights="x.bin"), "must not have"),
    "config that names a method": (lambda path: edit_config(path, to_dict=1), "'to_dict' is no configuration field"),
    "config of another dtype": (lambda path: edit_config(path, dtype="nn"), "floating-point dtype"),
    "more parameters than bytes": (
        lambda path: edit_config(path, moe_intermediate_size=2**20, intermediate_size=2**20, num_experts=2**15),
        r"bytes, too few for the [\d,]{17,} parameters",
    ),
    "generation settings that are a list": (
        lambda path: (path / "generation_config.json").write_text("[]"),
        "generation_config.json' holds no JSON object",
    ),
    "weights with a huge header": (lambda path: (path / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x00" * 99), "corrupt"),
    "weights with no header": (lambda path: header(path, b"[]"), "corrupt"),
    "weights beyond the file": (
        lambda path: header(path, b'{"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,64]}}'),
        "corrupt",
    ),
    "index that is a list": (
        lambda path: ((path / INDEX).write_text("[]"), (path / WEIGHTS).unlink()),
        "no JSON object",
    ),
    "index without a map": (lambda path: ((path / INDEX).write_text("{}"), (path / WEIGHTS).unlink()), "no weight_map"),
    "index of numbers": (lambda path: write_index(path, 3), "must name safetensors files beside it, got '3'"),
    "index of absent files": (lambda path: write_index(path, "gone.safetensors"), "no complete set of safetensors"),
    "index of files elsewhere": (weights_elsewhere, "must name safetensors files beside it"),
    "index of a pickle": (pickle_behind_an_index, "must name safetensors files beside it"),
    "tokenizer that is no JSON": (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer"),
    "tokenizer that is a list": (lambda path: (path / "tokenizer.json").write_text("[]"), "tokenizer"),
    "tokenizer settings that are a list": (lambda path: (path / "tokenizer_config.json").write_text("[]"), "tokenizer"),
    "tokenizer with code": (
        lambda path: (path / "tokenizer_config.json").write_text(
            '{"auto_map": {"AutoTokenizer": ["x.Evil", null]}, "tokenizer_class": "Evil"}'
        ),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_refused(name, path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = HOSTILE[name]
    damage(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as caught:
        load_model_and_tokenizer(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "half a gigabyte, in kilobytes"
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--prompt", "a"]])
@pytest.mark.parametrize("name", ["config nested without end", "index of a pickle", "more parameters than bytes"])
def test_the_command_says_it_in_one_line(command, name, path, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    HOSTILE[name][0](path)
    assert main([command[0], str(path), *command[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"dynmoe {command[0]}: ") and "\n" not in error and "Traceback" not in error


def test_from_pretrained_makes_up_no_decoder(path) -> None:
    edit_weights(path, lambda weights: weights.pop(DOWN))
    for auto_class in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match="lacks (model.)?layers.2.mlp.experts.down_proj of the model"):
            auto_class.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True)
    assert model.state_dict()[DOWN].isfinite().all()
    _, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert report["missing_keys"] == {DOWN}


def test_from_pretrained_makes_up_heads_and_routers(path) -> None:
    AutoModelForSequenceClassification.from_pretrained(path)
    head, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert report["missing_keys"] == {"score.weight"}
    head.model.save_pretrained(path)
    _, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    changed = AutoModel.from_pretrained(path, routing={"method": "dtop_p", "scorer": {"type": "recurrent", "size": 4}})
    assert changed(tokens(1, 5)).last_hidden_state.isfinite().all()


def test_tied_weights_are_not_missing(tmp_path) -> None:
    model = tiny_model("top_p", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    torch.testing.assert_close(load_model(tmp_path, device="cpu")(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_from_pretrained_reads_pickles_only_when_asked(path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(path)
    AutoModelForCausalLM.from_pretrained(path, use_safetensors=False)


@pytest.mark.parametrize("name", ["index of a pickle", "index of files elsewhere", "index without a map"])
def test_from_pretrained_reads_nothing_beside_the_checkpoint(name, path, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = HOSTILE[name]
    damage(path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(path)
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_the_code_of_a_checkpoint_does_not_run(trust, path, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (path / "evil.py").write_text("import os\nos.mkdir('harm-was-done')\nclass Evil: pass\n")
    edit_config(path, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    load_model_and_tokenizer(path, device="cpu")
    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust)
    assert not Path("harm-was-done").exists()


def test_weights_are_saved_as_safetensors_only(saved) -> None:
    assert {file.suffix for file in saved.iterdir()} <= {".safetensors", ".json", ".py", ".jinja"}
