"""What is saved comes back: weights, tied embeddings, dtypes, heads, in every way in which transformers can load."""

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeForCausalLM, DynMoeForSequenceClassification, DynMoeForTokenClassification, DynMoeModel
from dynmoe_hf.model.methods import METHODS
from tests.tiny import all_routings, tiny_config, tiny_model, tokens

KEPT_IN_FLOAT32 = ("selector.threshold", "controller.integral")
CONTENT = tokens(2, 8)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options).eval()


def stored(file: Path) -> dict[str, str]:
    """Name -> dtype of each tensor in a file."""
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}


@pytest.mark.parametrize("name", all_routings())
def test_save_and_load_give_the_same_logits(name: str, tmp_path: Path) -> None:
    model = tiny_model(all_routings()[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = load_with_report(tmp_path)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(CONTENT).logits, model(CONTENT).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def load_with_report(folder: Path, **options: Any) -> tuple[DynMoeForCausalLM, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager", **options
    )
    return model.eval(), info


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_model_saves_the_same_files(method: str, tmp_path: Path) -> None:
    tiny_model(method).save_pretrained(tmp_path / "first")
    for source, target in (("first", "second"), ("second", "third")):
        AutoModelForCausalLM.from_pretrained(tmp_path / source).save_pretrained(tmp_path / target)
        names = {path.name for path in (tmp_path / source).iterdir()}
        assert names == {path.name for path in (tmp_path / target).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors"} <= names
        _, mismatch, errors = filecmp.cmpfiles(tmp_path / source, tmp_path / target, names, shallow=False)
        assert not mismatch and not errors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_tied_and_untied_embeddings(method: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(method, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in stored(tmp_path / "model.safetensors")) == (not tied)
    loaded, info = load_with_report(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not info["missing_keys"]
    assert torch.equal(loaded(CONTENT).logits, model(CONTENT).logits)


@pytest.mark.parametrize("name", all_routings())
def test_every_parameter_is_initialised_also_from_meta(name: str, tmp_path: Path) -> None:
    """A checkpoint without the tensors of the MoE layers: they come out as they do in a new model."""
    model = tiny_model(all_routings()[name])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = [key for key in weights if ".mlp." in key or "shared_scorers" in key or "controller" in key]
    save_file({key: value for key, value in weights.items() if key not in missing}, tmp_path / "model.safetensors")
    loaded, info = load_with_report(tmp_path, ignore_mismatched_sizes=True)
    assert set(info["missing_keys"]) == set(missing)
    new = model.state_dict()
    for key, value in loaded.state_dict().items():
        if key in missing:
            assert value.isfinite().all(), key
            spread = new[key].abs().max() / value.numel() ** 0.5
            assert (value.mean() - new[key].mean()).abs() <= 2 * spread, key
            assert (value.std(correction=0) - new[key].std(correction=0)).abs() <= 2 * spread, key


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_types_build_save_and_load(rope: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("top_k", rope_parameters={"rope_theta": 10000.0, **rope})
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A dtype given on loading is that of every parameter; what a controller moves stays in float32."""
    model = tiny_model(method)
    model.save_pretrained(tmp_path / "float32")
    loaded = load(tmp_path / "float32", dtype=dtype)
    assert loaded.dtype == dtype and loaded.config.dtype == dtype
    check_values(loaded, model, dtype)
    loaded.save_pretrained(tmp_path / "again")
    check_values(load(tmp_path / "again", dtype="auto"), model, dtype)
    check_values(load(tmp_path / "again"), model, dtype)
    check_values(load(tmp_path / "again", dtype=torch.float32), loaded, torch.float32)


def check_values(loaded: DynMoeForCausalLM, model: DynMoeForCausalLM, dtype: torch.dtype) -> None:
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        kept = torch.float32 if name.endswith(KEPT_IN_FLOAT32) else dtype
        assert value.dtype == kept, name
        assert torch.equal(value, expected[name].to(kept)), name


@pytest.mark.parametrize("method", METHODS)
def test_a_variant_in_a_subfolder(method: str, tmp_path: Path) -> None:
    model = tiny_model(method)
    model.save_pretrained(tmp_path / "weights", variant="small", max_shard_size="50KB")
    files = list((tmp_path / "weights").glob("*.safetensors"))
    assert len(files) > 1 and all(file.name.startswith("model.small-") for file in files)
    loaded = load(tmp_path, subfolder="weights", variant="small")
    assert torch.equal(loaded(CONTENT).logits, model(CONTENT).logits)
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path, subfolder="weights")


@pytest.mark.parametrize("method", METHODS)
def test_weights_may_be_given_as_a_state_dict(method: str, tmp_path: Path) -> None:
    model = tiny_model(method)
    options = {"state_dict": model.state_dict(), "experts_implementation": "eager"}
    loaded = DynMoeForCausalLM.from_pretrained(None, config=model.config, **options).eval()
    assert torch.equal(loaded(CONTENT).logits, model(CONTENT).logits)
    model.save_pretrained(tmp_path, state_dict={name: 2 * value for name, value in model.state_dict().items()})
    assert torch.equal(load(tmp_path).model.norm.weight, 2 * model.model.norm.weight)


@pytest.mark.parametrize("method", METHODS)
def test_sizes_that_do_not_fit(method: str, tmp_path: Path) -> None:
    """A language model's vocabulary, and a head's number of labels, change only when that is asked for."""
    tiny_model(method).save_pretrained(tmp_path / "lm")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path / "lm", vocab_size=90)
    loaded, info = load_with_report(tmp_path / "lm", vocab_size=90, ignore_mismatched_sizes=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert loaded(tokens(1, 4, vocab_size=90)).logits.isfinite().all()

    head = DynMoeForTokenClassification(tiny_config(method, num_labels=3))
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        DynMoeForTokenClassification.from_pretrained(tmp_path / "head", num_labels=5)
    wider, info = DynMoeForTokenClassification.from_pretrained(
        tmp_path / "head", num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"score.weight", "score.bias"}
    logits = wider.eval()(CONTENT).logits
    assert logits.shape == (2, 8, 5) and logits.isfinite().all()
    same(wider.model, head.model)


@pytest.mark.parametrize("method", METHODS)
def test_the_decoder_moves_between_models(method: str, tmp_path: Path) -> None:
    """From a language model to the decoder, to another head, and back."""
    model = tiny_model(method)
    model.save_pretrained(tmp_path / "lm")
    base, info = DynMoeModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {"lm_head.weight"}
    same(base, model.model)
    base.save_pretrained(tmp_path / "base")
    head, info = DynMoeForSequenceClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    assert head.score.weight.std() > 0.1
    same(head.model, model.model)
    head.save_pretrained(tmp_path / "head")
    again, info = load_with_report(tmp_path / "head", ignore_mismatched_sizes=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"} and set(info["unexpected_keys"]) == {"score.weight"}
    same(again.model, model.model)


def same(first: DynMoeModel, second: DynMoeModel) -> None:
    expected: dict[str, Tensor] = second.state_dict()
    assert first.state_dict().keys() == expected.keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, expected[name]), name
