"""The configuration: expansion of routing, overrides, round trips, refusals."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.losses import LOSSES
from dynmoe_hf.model.methods import METHODS, expand
from tests.tiny import all_routings, tiny_config


@pytest.mark.parametrize("name", all_routings())
def test_expansion_is_complete_and_stable(name: str) -> None:
    spec = expand(all_routings()[name])
    assert expand(spec) == spec
    assert expand(json.loads(json.dumps(spec))) == spec
    assert {"method", "scorer", "selector", "experts", "controller", "losses"} == set(spec)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_known_by_its_name(name: str) -> None:
    assert expand(name) == expand({"method": name})
    assert expand(name)["method"] == name


def test_single_keys_change_and_the_rest_stays() -> None:
    spec = expand({"method": "top_p", "selector": {"p": 0.3, "max_experts": 4}, "losses": {"router_z": 1e-3}})
    assert spec["selector"] == expand("top_p")["selector"] | {"p": 0.3, "max_experts": 4}
    assert spec["losses"] == expand("top_p")["losses"] | {"router_z": 1e-3}
    other = expand({"selector": {"type": "top_k"}}, spec)
    assert other["selector"] == expand("top_k")["selector"], "another type starts from its own defaults"
    assert other["method"] == "top_k"
    assert expand({"selector": "top_p"}, other)["selector"]["p"] == 0.4


def test_an_expanded_spec_stands_for_itself() -> None:
    """Also when a later release changes the preset."""
    spec = expand("top_p") | {"losses": {"load_balance": 0.5}}
    assert expand(spec)["losses"] == dict.fromkeys(LOSSES, 0.0) | {"load_balance": 0.5}


def test_save_and_load(tmp_path) -> None:
    config = tiny_config({"method": "top_p", "selector": {"p": 0.3}}, layer_routing={2: {"selector": {"p": 0.9}}})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DynMoeConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.routing_for(2)["selector"]["p"] == 0.9 and loaded.routing_for(0)["selector"]["p"] == 0.3


def test_routing_given_on_load_changes_the_stored_one(tmp_path) -> None:
    tiny_config({"method": "top_p", "selector": {"p": 0.3, "norm_topk_prob": True}}).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, routing={"selector": {"p": 0.2}})
    assert config.routing["selector"] == expand("top_p")["selector"] | {"p": 0.2, "norm_topk_prob": True}
    with pytest.raises(ValueError, match="'pp'.*Did you mean 'p'"):
        AutoConfig.from_pretrained(tmp_path, routing={"selector": {"pp": 0.2}})


def test_a_name_near_a_field_is_a_mistake_only_if_the_field_is_not_given(tmp_path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'rms_norm_eps'"):
        tiny_config(norm_eps=1.0)
    config = tiny_config(rms_norm_eps=1.0)
    config.norm_eps = 1.0  # as tools do that serve many kinds of models
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).norm_eps == 1.0


def test_the_parallel_plan_cannot_be_set() -> None:
    config = tiny_config(tie_word_embeddings=True)
    config.base_model_tp_plan = config.base_model_tp_plan
    with pytest.raises(ValueError, match="follows from the layers"):
        config.base_model_tp_plan = {}


def test_the_number_of_experts_follows_the_selector(tmp_path) -> None:
    assert tiny_config("top_k").num_experts_per_tok == 2
    assert tiny_config("top_p").num_experts_per_tok == 8
    tiny_config("top_k").save_pretrained(tmp_path)
    dynamic = AutoConfig.from_pretrained(tmp_path, routing="top_p")
    assert dynamic.num_experts_per_tok == 8, "k of top_k is no cap for top_p"
    capped = AutoConfig.from_pretrained(tmp_path, routing="top_p", num_experts_per_tok=3)
    assert capped.num_experts_per_tok == 3


def test_layers_may_differ() -> None:
    config = tiny_config("top_p", layer_routing={0: "top_k", 2: {"selector": {"p": 0.2}}})
    assert config.routing_for(0)["selector"]["k"] == 2, "the cap of top_p is no k for top_k"
    assert config.routing_for(2)["selector"]["p"] == 0.2
    assert config.routing["selector"]["p"] == 0.4
    mixed = tiny_config("top_k", layer_routing={2: "top_p"})
    assert mixed.routing_for(2)["selector"]["max_experts"] == 8


def test_a_refused_change_changes_nothing() -> None:
    config = tiny_config("top_p")
    before = config.to_dict()
    for changes in ({"selector": {"max_experts": 9}}, {"selector": {"q": 1}}, "top_q"):
        with pytest.raises(ValueError):
            config.change_routing(changes)
    assert config.to_dict() == before


REFUSED = {
    "unknown method": ({"routing": "top_o"}, "routing method 'top_o'.*Accepted: .*top_k, top_p"),
    "near method": ({"routing": "topk"}, "Did you mean 'top_k'"),
    "unknown part": ({"routing": {"selector": {"type": "topp"}}}, "Did you mean 'top_p'"),
    "unknown scorer": ({"routing": {"scorer": "lineer"}}, "Did you mean 'linear'"),
    "unknown experts": ({"routing": {"experts": "swigloo"}}, "Did you mean 'swiglu'"),
    "unknown axis": ({"routing": {"selectr": {}}}, "Did you mean 'selector'"),
    "unknown option": ({"routing": {"method": "top_p", "selector": {"P": 0.3}}}, "key in routing.selector: 'P'"),
    "unknown loss": ({"routing": {"losses": {"balance": 1}}}, "Did you mean 'load_balance'"),
    "wrong type of an option": ({"routing": {"method": "top_p", "selector": {"p": "0.3"}}}, "routing.selector: .*p"),
    "a flag for a number": ({"routing": {"selector": {"k": True}}}, "routing.selector: .*k"),
    "part that is no dict": ({"routing": {"selector": 3}}, "routing.selector must be"),
    "losses that are no dict": ({"routing": {"losses": 0.1}}, "routing.losses must be"),
    "loss that is no number": ({"routing": {"losses": {"router_z": "x"}}}, "router_z must be a finite number"),
    "loss that is infinite": ({"routing": {"losses": {"router_z": float("inf")}}}, "router_z must be a finite number"),
    "negative p": ({"routing": {"method": "top_p", "selector": {"p": -0.1}}}, "p must be a finite number >= 0"),
    "p that is no number": (
        {"routing": {"method": "top_p", "selector": {"p": float("nan")}}},
        "p must be a finite number",
    ),
    "infinite p": ({"routing": {"method": "top_p", "selector": {"p": float("inf")}}}, "p must be a finite number"),
    "k beyond E": ({"routing": {"selector": {"k": 9}}}, r"k must be between 1 and num_experts \(8\), got 9"),
    "k of zero": ({"num_experts_per_tok": 0}, "num_experts_per_tok must be between"),
    "cap of zero": ({"routing": {"method": "top_p", "selector": {"max_experts": 0}}}, "max_experts must be between"),
    "groups that do not divide": ({"routing": {"selector": {"num_groups": 3}}}, "must divide"),
    "too many top groups": ({"routing": {"selector": {"num_groups": 2, "top_groups": 3}}}, "top_groups must be"),
    "k beyond the groups": (
        {"routing": {"selector": {"num_groups": 4, "top_groups": 1, "k": 3}}},
        "more than the 2 experts",
    ),
    "misspelt field": ({"num_expert": 9}, "'num_expert'. Did you mean 'num_experts'"),
    "heads": ({"num_attention_heads": 5}, "not a multiple"),
    "key-value heads": ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    "odd head": ({"head_dim": 7}, "head_dim must be even"),
    "no layers": ({"num_hidden_layers": 0, "mlp_layer_types": []}, "num_hidden_layers must be at least 1"),
    "negative size": ({"moe_intermediate_size": -1}, "moe_intermediate_size must be at least 1"),
    "number of layer types": ({"mlp_layer_types": ["sparse"]}, "1 entries for 3 layers"),
    "kind of layer": ({"mlp_layer_types": ["sparse", "moe", "sparse"]}, "accepts sparse and dense"),
    "routing of a dense layer": ({"layer_routing": {1: "top_p"}}, "layer 1, which mlp_layer_types makes dense"),
    "routing of no layer": ({"layer_routing": {7: "top_p"}}, "layer 7, but there are 3 layers"),
    "window without a size": (
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        "sliding_window is not set",
    ),
    "pad outside the vocabulary": ({"pad_token_id": 97}, "outside the vocabulary"),
    "layer routing that is no dict": ({"layer_routing": {0: 5}}, "routing must be the name of a method or a dict"),
    "type that is no name": ({"routing": {"selector": {"type": ["top_k"]}}}, "routing.selector type"),
    "method that is no name": ({"routing": {"method": ["top_k"]}}, "routing method"),
    "unknown activation": ({"hidden_act": "sillu"}, "Did you mean 'silu'"),
    "unknown rope": ({"rope_parameters": {"rope_type": "yarm"}}, "Did you mean 'yarn'"),
    "incomplete rope": ({"rope_parameters": {"rope_type": "yarn"}}, "incomplete"),
    "rope base that is no number": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        "rope_theta must",
    ),
    "negative initializer": ({"initializer_range": -1.0}, "initializer_range must be at least 0"),
    "negative eps": ({"rms_norm_eps": -1.0}, "rms_norm_eps must be at least 1e-12"),
    "too much dropout of experts": ({"expert_dropout": 1.5}, "expert_dropout must be at least 0 and below 1"),
    "too much dropout": ({"attention_dropout": 3.0}, "attention_dropout must be at least 0 and below 1"),
    "negative shared experts": ({"num_shared_experts": -1}, "num_shared_experts must be at least 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("changes", [{"hidden_size": "8"}, {"num_experts": 8.0}, {"qk_norm": "half"}, {"routing": 3}])
def test_wrong_types_are_refused(changes: dict) -> None:
    with pytest.raises((StrictDataclassError, ValueError)):
        tiny_config(**changes)


def test_a_config_changed_by_hand_is_checked_again_by_the_model() -> None:
    from dynmoe_hf import DynMoeForCausalLM

    config = tiny_config("top_k")
    config.num_experts_per_tok = 99
    with pytest.raises(ValueError, match="num_experts_per_tok must be between"):
        DynMoeForCausalLM(config)


def test_a_truncated_model_needs_no_new_list_of_layer_types(tmp_path) -> None:
    from dynmoe_hf import DynMoeForCausalLM

    DynMoeForCausalLM(tiny_config("top_k", mlp_layer_types=None)).save_pretrained(tmp_path)
    model = DynMoeForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(model.model.layers) == len(model.config.layer_types) == 2


def test_no_field_leaks_into_generation() -> None:
    fields = set(DynMoeConfig.__dataclass_fields__)
    assert fields & set(GenerationConfig._get_default_generation_params()) <= {"use_cache"}


def test_names_that_other_programs_read() -> None:
    config = tiny_config({"losses": {"load_balance": 0.02}})
    assert config.num_local_experts == config.num_experts == 8
    assert config.router_aux_loss_coef == 0.02
    config.router_aux_loss_coef = 0.0
    assert config.routing["losses"]["load_balance"] == 0.0
    assert DynMoeConfig(num_local_experts=4).num_experts == 4
    assert DynMoeConfig(router_aux_loss_coef=0.5).routing["losses"]["load_balance"] == 0.5


def test_a_gate_needs_shared_experts() -> None:
    with pytest.raises(ValueError, match="shared_expert_gate needs shared experts"):
        DynMoeConfig(shared_expert_gate=True)
    assert DynMoeConfig(shared_expert_gate=True, num_shared_experts=1).shared_expert_gate
