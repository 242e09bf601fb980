"""Every way in which a checkpoint can be broken is refused with one sentence."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from dynmoe_hf.evaluation.loading import load_model, load_model_and_tokenizer
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import tiny_model, tokens

WEIGHTS = "model.safetensors"
GATE = "model.layers.2.mlp.gate.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a text to learn from"] * 3, vocab_size=260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A checkpoint in two forms: whole, and cut into shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model("top_p", vocab_size=260)
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "shards", max_shard_size="100KB")
    tokenizer.save_pretrained(root / "whole")
    tokenizer.save_pretrained(root / "shards")
    return root


def edit_weights(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def cut(path, length=None):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if length is None else length])


def shard(path):
    return sorted(path.glob("model-*.safetensors"))[1]


def only_pickle(path):
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


BROKEN = {
    "gone": (lambda path: shutil.rmtree(path), "no model at"),
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], "no config.json"),
    "config is no JSON": (lambda path: cut(path / "config.json"), "not a valid JSON"),
    "other family": (lambda path: LlamaConfig().save_pretrained(path), "of type 'llama', not 'dynmoe'"),
    "unknown family": (lambda path: edit_config(path, model_type="dynmoo"), "dynmoo"),
    "config is no mapping": (lambda path: (path / "config.json").write_text("[1]"), "holds no JSON object"),
    "refused config": (lambda path: edit_config(path, num_experts=0), "num_experts must be at least 1"),
    "value of wrong type": (lambda path: edit_config(path, num_experts="8"), "num_experts.*expected int, got str"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "safetensors"),
    "pickled weights": (only_pickle, "safetensors"),
    "truncated": (lambda path: cut(path / WEIGHTS), "truncated or corrupt"),
    "truncated header": (lambda path: cut(path / WEIGHTS, 20), "truncated or corrupt"),
    "no bytes": (lambda path: cut(path / WEIGHTS, 0), "truncated or corrupt"),
    "not safetensors": (lambda path: (path / WEIGHTS).write_bytes(b"\xff" * 999), "truncated or corrupt"),
    "missing": (lambda path: edit_weights(path, lambda weights: weights.pop(GATE)), f"lacks weights: {GATE}"),
    "other layers": (
        lambda path: edit_config(path, num_hidden_layers=2, mlp_layer_types=None, layer_types=None),
        "and .* more",
    ),
    "unexpected": (
        lambda path: edit_weights(path, lambda weights: weights.update(foo=torch.ones(2))),
        "does not know: foo",
    ),
    "wrong shape": (
        lambda path: edit_config(path, moe_intermediate_size=12),
        r"\(8, 48, 32\) instead of \(8, 24, 32\)",
    ),
    "NaN": (lambda path: edit_weights(path, lambda weights: weights[GATE][3, 4].fill_(torch.nan)), f"NaN .* {GATE}"),
    "infinity": (lambda path: edit_weights(path, lambda weights: weights[GATE][0].fill_(-torch.inf)), f"{GATE}"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "tokenizer"),
    "shard gone": (lambda path: shard(path).unlink(), "no complete set of safetensors"),
    "shard truncated": (lambda path: cut(shard(path)), "truncated or corrupt"),
    "index truncated": (lambda path: cut(path / f"{WEIGHTS}.index.json"), "truncated or corrupt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(name, folder, tmp_path):
    damage, message = BROKEN[name]
    path = tmp_path / "model"
    shutil.copytree(folder / ("shards" if name.startswith(("shard", "index")) else "whole"), path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model_and_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["whole", "shards"])
def test_good_checkpoints_load(form, folder):
    original = tiny_model("top_p", vocab_size=260)
    model, tokenizer = load_model_and_tokenizer(folder / form)
    assert not model.training and len(tokenizer) == 260
    torch.testing.assert_close(model(tokens(2, 9)).logits, original(tokens(2, 9)).logits)


def test_options_reach_the_model(folder):
    model = load_model(folder / "whole", {"selector": {"p": 0.1}}, "ragged", "bfloat16", "cpu")
    assert model.config.routing["selector"]["p"] == 0.1
    assert model.moe_blocks()[0].selector.options.p == 0.1
    assert model.config._experts_implementation == "ragged"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": {"selector": {"q": 1}}}, "routing.selector"),
        ({"experts_implementation": "none_such"}, "none_such"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "toaster"}, "toaster"),
    ],
)
def test_impossible_options_are_refused(options, message, folder):
    with pytest.raises(ValueError, match=message):
        load_model(folder / "whole", **options)


def test_weights_too_large_for_the_dtype_are_refused(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "model")
    edit_weights(tmp_path / "model", lambda weights: weights[GATE][0].fill_(1e5))
    load_model(tmp_path / "model", dtype="bfloat16")
    with pytest.raises(ValueError, match="float16"):
        load_model(tmp_path / "model", dtype="float16")


def test_a_tokenizer_beyond_the_vocabulary_is_refused(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "model")
    train_tokenizer(["more text, with more pairs to merge"] * 3, vocab_size=265).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="265 tokens, but the model's vocabulary has only 260"):
        load_model_and_tokenizer(tmp_path / "model")


def test_the_report_of_transformers_is_not_logged_beside_the_error(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to where pytest listens
    shutil.copytree(folder / "whole", tmp_path / "model")
    edit_weights(tmp_path / "model", lambda weights: weights.pop(GATE))
    with pytest.raises(ValueError):
        load_model(tmp_path / "model")
    assert not caplog.records
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "MISSING" in caplog.text  # the report is still there for everybody else
