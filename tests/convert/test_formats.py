"""Every format of transformers against transformers' own class, in, out and back."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dynmoe_hf.convert import convert
from dynmoe_hf.evaluation.loading import load_model
from tests.convert.sources import (
    DENSE_CONFIGS,
    IN_ONLY_CONFIGS,
    MOE_CONFIGS,
    contents,
    new_model,
    save_tensors,
    tensors_of,
)
from tests.tiny import tokens

CONFIGS = {**MOE_CONFIGS, **IN_ONLY_CONFIGS, **DENSE_CONFIGS}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = new_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    before = contents(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (report.source_format, report.target_format) == (CONFIGS[name].model_type, "dynmoe")
    assert report.comparison.max_difference < 1e-5 and report.comparison.argmax_agreement == 1
    assert report.parameters == sum(tensor.numel() for tensor in tensors_of(tmp_path / "ours").values())
    assert contents(tmp_path / "theirs") == before
    ours = load_model(tmp_path / "ours")
    input_ids = tokens(2, 30)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_that_training_reads_is_kept(name: str, tmp_path: Path) -> None:
    """The loss with its auxiliary part, which also depends on fields that no logit shows."""
    theirs = new_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", check=False)
    ours, input_ids = load_model(tmp_path / "ours"), tokens(2, 30)
    routed = {"output_router_logits": True} if name not in DENSE_CONFIGS else {}
    expected = theirs(input_ids, labels=input_ids, **routed).loss
    torch.testing.assert_close(ours(input_ids, labels=input_ids, **routed).loss, expected, **CLOSE)
    for field in ("eos_token_id", "bos_token_id", "max_position_embeddings", "tie_word_embeddings", "hidden_act"):
        assert getattr(ours.config, field) == getattr(theirs.config, field)


@pytest.mark.parametrize("name", MOE_CONFIGS)
def test_back_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    new_model(MOE_CONFIGS[name]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "back", to=MOE_CONFIGS[name].model_type)
    assert report.comparison.max_difference < 1e-5 and not report.notes
    assert contents(tmp_path / "back") == contents(tmp_path / "theirs")


@pytest.mark.parametrize("name", MOE_CONFIGS)
def test_from_ours_and_back_to_the_same_weights(name: str, tmp_path: Path) -> None:
    new_model(MOE_CONFIGS[name]).save_pretrained(tmp_path / "start")
    convert(tmp_path / "start", tmp_path / "ours", check=False)
    convert(tmp_path / "ours", tmp_path / "theirs", to=MOE_CONFIGS[name].model_type, check=False)
    convert(tmp_path / "theirs", tmp_path / "again", check=False)
    assert contents(tmp_path / "again") == contents(tmp_path / "ours")


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "llama, bias, tied"])
def test_shards_and_bfloat16(name: str, tmp_path: Path) -> None:
    theirs = new_model(CONFIGS[name]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    report = convert(tmp_path / "shards", tmp_path / "ours", max_shard_size="16KB")
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) == report.files > 2
    convert(tmp_path / "whole", tmp_path / "from_whole")
    ours, from_whole = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "from_whole")
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert ours.keys() == from_whole.keys()
    assert all(torch.equal(ours[key], from_whole[key]) for key in ours)
    assert load_model(tmp_path / "ours").dtype == torch.bfloat16
    if name in MOE_CONFIGS:
        convert(tmp_path / "ours", tmp_path / "back", to=theirs.config.model_type)
        assert contents(tmp_path / "back") == contents(tmp_path / "whole")


def test_the_index_of_shards_is_that_of_transformers(tmp_path: Path) -> None:
    """Total size and names; which tensor stands in which file is ours to choose."""
    new_model(MOE_CONFIGS["mixtral"]).save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    convert(tmp_path / "theirs", tmp_path / "ours", check=False)
    convert(tmp_path / "ours", tmp_path / "back", to="mixtral", max_shard_size="8KB")
    indices = [
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text()) for side in ("theirs", "back")
    ]
    assert indices[0]["metadata"] == indices[1]["metadata"]
    assert indices[0]["weight_map"].keys() == indices[1]["weight_map"].keys()
    expected, found = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe"])
def test_both_layouts_of_experts(name: str, tmp_path: Path) -> None:
    """One module an expert, as transformers writes them, and fused ones, as it holds them in memory."""
    theirs = new_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "modules")
    assert not any(".experts.gate_up_proj" in key for key in tensors_of(tmp_path / "modules"))
    fused = theirs.state_dict()
    assert any(key.endswith(".experts.gate_up_proj") for key in fused)
    save_tensors(tmp_path / "fused", fused, json.loads((tmp_path / "modules" / "config.json").read_text()))
    convert(tmp_path / "modules", tmp_path / "ours")
    convert(tmp_path / "fused", tmp_path / "from_fused", check=False)
    assert contents(tmp_path / "ours")["model.safetensors"] == contents(tmp_path / "from_fused")["model.safetensors"]


def test_old_fields_of_config_json(tmp_path: Path) -> None:
    """`rope_theta`, `torch_dtype` and `rope_scaling`, as transformers 4 wrote them."""
    config = {**MOE_CONFIGS["mixtral"].to_dict(), "rope_theta": 777.0, "torch_dtype": "float32"}
    theirs = new_model(type(MOE_CONFIGS["mixtral"])(**{**config, "rope_parameters": None}))
    theirs.save_pretrained(tmp_path / "theirs")
    stored = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert stored.pop("rope_parameters")["rope_theta"] == 777.0
    del stored["dtype"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(stored | {"rope_theta": 777.0, "rope_scaling": None}))
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert not report.notes
    assert load_model(tmp_path / "ours").config.rope_parameters["rope_theta"] == 777.0


def test_frequencies_of_rotary_positions_in_old_files(tmp_path: Path) -> None:
    theirs = new_model(DENSE_CONFIGS["llama"])
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    save_tensors(tmp_path / "old", theirs.state_dict() | old, theirs.config.to_dict())
    theirs.save_pretrained(tmp_path / "new")
    convert(tmp_path / "old", tmp_path / "ours")
    convert(tmp_path / "new", tmp_path / "expected", check=False)
    assert contents(tmp_path / "ours")["model.safetensors"] == contents(tmp_path / "expected")["model.safetensors"]


def test_pickled_weights_only_when_asked_for(tmp_path: Path) -> None:
    theirs = new_model(DENSE_CONFIGS["llama"])
    theirs.save_pretrained(tmp_path / "safe")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    torch.save(theirs.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--allow-pickle"):
        convert(tmp_path / "pickled", tmp_path / "ours")
    convert(tmp_path / "pickled", tmp_path / "ours", allow_pickle=True, check=False)
    convert(tmp_path / "safe", tmp_path / "expected")
    assert contents(tmp_path / "ours")["model.safetensors"] == contents(tmp_path / "expected")["model.safetensors"]


def test_dtype_and_companions(tmp_path: Path) -> None:
    theirs = new_model(MOE_CONFIGS["olmoe"])
    theirs.generation_config.temperature = 0.7
    theirs.generation_config.do_sample = True
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (tmp_path / "theirs" / name).write_text(f"content of {name}")
    report = convert(tmp_path / "theirs", tmp_path / "ours", dtype="bfloat16")
    # Rounded weights may turn the choice of an expert, and then the difference of a token is large.
    assert report.comparison.max_difference > 0 and report.comparison.argmax_agreement > 0.9
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "ours").values()} == {torch.bfloat16}
    ours, source = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert ours[name] == source[name]
    assert "README.md" not in ours
    assert json.loads(ours["config.json"])["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_converted_model_carries_its_code(name: str, tmp_path: Path) -> None:
    """The files beside the weights are those that `save_pretrained` of a model of ours writes."""
    new_model(CONFIGS[name]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", check=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "saved")
    ours, saved = contents(tmp_path / "ours"), contents(tmp_path / "saved")
    assert ours.keys() == saved.keys()
    assert {key for key in ours if ours[key] != saved[key]} <= {"generation_config.json"}


def own_class(config: PreTrainedConfig) -> str:
    return AutoModelForCausalLM._model_mapping[type(config)].__name__


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_what_is_written_names_its_class(name: str, tmp_path: Path) -> None:
    """vLLM and llama.cpp read `architectures`; nothing of this family may be left."""
    new_model(CONFIGS[name]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", check=False)
    convert(tmp_path / "ours", tmp_path / "back", to=name)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == [own_class(CONFIGS[name])]
    assert "routing" not in config and "auto_map" not in config
    assert not list((tmp_path / "back").glob("*.py"))
