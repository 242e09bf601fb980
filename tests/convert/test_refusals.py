"""What cannot be converted is refused in one sentence, before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.convert import FORMATS, convert
from tests.convert.sources import CASES_OF_CONFIG, DENSE_CONFIGS, IN_ONLY_CONFIGS, MOE_CONFIGS, SMALL, new_model

OURS: dict[str, Any] = SMALL | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
FITTING: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {"qk_norm": "full"},
    "qwen3_moe": {"qk_norm": "per_head"},
}
NEVER = [
    ({"routing": "top_p"}, "selector 'top_p'"),
    ({"routing": "rmoe"}, "scorer 'recurrent'"),
    ({"routing": "aoe"}, "scorer 'activation_norm'.*experts 'low_rank'"),
    ({"routing": "cartesian"}, "experts 'cartesian'.*num_shared_experts"),
    ({"routing": "dtop_p"}, "controller 'budget'"),
    ({"routing": {"selector": {"score_function": "sigmoid"}}}, "score_function='sigmoid'"),
    ({"routing": {"selector": {"scale": 2.5}}}, "scale=2.5"),
    ({"routing": {"selector": {"num_groups": 2}}}, "num_groups=2"),
    ({"routing": {"selector": {"bias": True}}}, "bias=True"),
    ({"routing": {"selector": {"disable_top1": True}}}, "disable_top1=True"),
    ({"num_shared_experts": 1}, "num_shared_experts"),
    ({"moe_output_bias": True}, "moe_output_bias"),
    ({"layer_routing": {1: {"selector": {"k": 1}}}}, "layer_routing"),
    ({"mlp_layer_types": ["dense"] * 3}, "no layer has experts"),
]
FOR_ONE = [
    ("mixtral", {"routing": {"selector": {"norm_topk_prob": False}}}, "norm_topk_prob=False"),
    ("mixtral", {"qk_norm": "full"}, "qk_norm='full'"),
    ("mixtral", {"attention_bias": True}, "attention_bias=True"),
    ("mixtral", {"mlp_layer_types": ["dense", "sparse", "sparse"]}, "mlp_layer_types"),
    ("olmoe", {"mlp_layer_types": ["dense", "sparse", "sparse"]}, "mlp_layer_types"),
    ("olmoe", {"qk_norm": "none"}, "qk_norm='none'"),
    ("olmoe", {"sliding_window": 4}, "sliding_window=4"),
    ("olmoe", {"head_dim": 6}, "head_dim=6"),
    ("qwen3_moe", {"qk_norm": "none"}, "qk_norm='none'"),
    ("mixtral", {"sliding_window": 4, "layer_types": ["full_attention"] + ["sliding_attention"] * 2}, "layer_types"),
    ("qwen3_moe", {"sliding_window": 4, "layer_types": ["full_attention"] * 3}, "layer_types"),
]


@pytest.mark.parametrize("to", FITTING)
@pytest.mark.parametrize(("changes", "reason"), NEVER)
def test_what_no_format_can_say(to: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"the format '{to}' cannot say what this model computes: .*{reason}"):
        FORMATS[to].write_config(DynMoeConfig(**(OURS | FITTING[to] | changes)))


@pytest.mark.parametrize(("to", "changes", "reason"), FOR_ONE)
def test_what_one_format_cannot_say(to: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FORMATS[to].write_config(DynMoeConfig(**(OURS | FITTING[to] | changes)))


@pytest.mark.parametrize("to", FITTING)
def test_what_matters_in_training_only_is_noted(to: str) -> None:
    routing = {"losses": {"router_z": 1e-3, "load_balance": 0.02}}
    config = DynMoeConfig(**OURS, **FITTING[to], routing=routing, layer_routing={1: {"losses": {"load_balance": 0.5}}})
    written, notes = FORMATS[to].write_config(config)
    assert written.router_aux_loss_coef == 0.02
    assert [note.split()[0] for note in notes] == ["losses", "coefficients", "the"]


def test_a_refused_export_leaves_nothing(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(DynMoeConfig(**OURS, routing="top_p")).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="the format has only 'top_k'"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="mixtral")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(("kind", "changes", "reason"), CASES_OF_CONFIG)
def test_sources_that_ours_cannot_express(kind: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = {**MOE_CONFIGS, **IN_ONLY_CONFIGS, **DENSE_CONFIGS}[kind]
    new_model(config).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_fields_without_a_counterpart_are_noted(tmp_path: Path) -> None:
    new_model(MOE_CONFIGS["mixtral"]).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"router_jitter_noise": 0.1, "invented_field": 3}))
    notes = convert(tmp_path / "theirs", tmp_path / "ours").notes
    assert [note.split("=")[0] for note in notes][0] == "router_jitter_noise"
    assert notes[1] == "unknown fields of config.json are left out: invented_field"


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_a_stored_kernel_is_not_fetched(field: str, tmp_path: Path) -> None:
    """transformers would look for it on the Hub, and run it."""
    new_model(MOE_CONFIGS["mixtral"]).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "somebody/kernel"}))
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert report.comparison.is_equal and report.notes == [f"unknown fields of config.json are left out: {field}"]
    assert "implementation" not in (tmp_path / "ours" / "config.json").read_text()


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    new_model(MOE_CONFIGS["mixtral"]).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


BLOCK = "model.layers.1.block_sparse_moe"


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({f"{BLOCK}.experts.2.w3.weight": None}, f"lacks weights: {BLOCK}.experts.2.w3.weight"),
        ({f"{BLOCK}.experts.{e}.w{n}.weight": None for e in (3,) for n in (1, 2, 3)}, "would be .3, 48, 32."),
        ({f"{BLOCK}.gate.weight": None}, "lacks the weights of model.layers.1.mlp.gate.weight"),
        ({"model.layers.7.input_layernorm.weight": torch.ones(32)}, "does not explain: model.layers.7"),
        ({"model.layers.1.mlp.unheard_of": torch.ones(1)}, "does not explain: model.layers.1.mlp.unheard_of"),
        ({"model.norm.weight": torch.ones(31)}, "model.norm.weight would be .31,., but config.json says .32,."),
        ({f"{BLOCK}.experts.2.w1.weight": torch.ones(23, 32)}, "have different shapes"),
        ({f"{BLOCK}.experts.2.w2.weight": torch.ones(32, 23)}, "has another shape than"),
        ({"model.layers.1.mlp.gate.weight": torch.ones(4, 32)}, "in two layouts"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "quantised"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "differ by nan"),
    ],
)
def test_weights_that_do_not_fit(mixtral: Path, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rewrite(mixtral, changes)
    with pytest.raises(ValueError, match=reason):
        convert(mixtral, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_tied_head_that_is_another_one(tmp_path: Path) -> None:
    """A second copy of the embedding is left out; any other head would be lost."""
    theirs = new_model(MOE_CONFIGS["mixtral, window, tied"])
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "expected", check=False)
    embedding = theirs.get_input_embeddings().weight.detach()
    rewrite(tmp_path / "theirs", {"lm_head.weight": embedding.clone()})
    convert(tmp_path / "theirs", tmp_path / "ours")
    expected, ours = (tmp_path / name / "model.safetensors" for name in ("expected", "ours"))
    assert expected.read_bytes() == ours.read_bytes()
    rewrite(tmp_path / "theirs", {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        convert(tmp_path / "theirs", tmp_path / "again")


def test_formats_that_are_unknown_or_not_there_yet(mixtral: Path, tmp_path: Path) -> None:
    target = tmp_path / "ours"
    for options, reason in (
        ({"source_format": "moe_pp"}, "MoE\\+\\+ needs zero, identity and constant experts"),
        ({"source_format": "mixtrall"}, "mixtral"),
        ({"to": "olmoe"}, "--to names what it becomes"),
        ({"source_format": "olmoe"}, "does not explain: model.layers.0.block_sparse_moe"),
        ({"dtype": "int8"}, "dtype"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(mixtral, target, **options)
    convert(mixtral, target, check=False)
    for options, reason in (
        ({}, "--to names what it becomes"),
        ({"to": "dynmoe"}, "--to names what it becomes"),
        ({"to": "qwen2_moe"}, "is read and not written"),
        ({"to": "llama"}, "is read and not written"),
        ({"to": "moe_pp"}, "MoE\\+\\+"),
        ({"to": "gguf"}, "gguf"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(target, tmp_path / "theirs_again", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_wrong_conversion_is_not_kept(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is with transformers' own reading of the source: rules that swap two matrices do not pass."""
    rules = FORMATS["mixtral"].rules
    swapped = [rule if len(rule.theirs) == 1 else type(rule)(rule.ours, rule.theirs[::-1]) for rule in rules]
    monkeypatch.setitem(
        FORMATS, "mixtral", FORMATS["mixtral"].__class__(**vars(FORMATS["mixtral"]) | {"rules": swapped})
    )
    with pytest.raises(ValueError, match="the logits of source and target differ by"):
        convert(mixtral, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    convert(mixtral, tmp_path / "ours", check=False)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no model folder"):
        convert(tmp_path / "nowhere", tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        convert(tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        convert(tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        convert(tmp_path / "empty", tmp_path / "ours")
    save_file({"weight": torch.ones(1)}, tmp_path / "empty" / "model.safetensors")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="no format is known for model_type 'gpt2'"):
        convert(tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama_moe_rnn"}')
    with pytest.raises(ValueError, match="config.json has no 'num_hidden_layers'"):
        convert(tmp_path / "empty", tmp_path / "ours")


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(DENSE_CONFIGS["llama"].to_dict()))
    torch.save({"weight": Harmful()}, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        convert(tmp_path / "theirs", tmp_path / "ours", allow_pickle=True)
    assert not (tmp_path / "touched").exists()
