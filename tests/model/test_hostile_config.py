"""Configurations from a stranger: a clean refusal, or a model that works."""

import dataclasses
import json
import math
import types
import typing
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.compat import ROPE_INIT_FUNCTIONS
from dynmoe_hf.model.losses import LOSSES
from dynmoe_hf.model.methods import METHODS, PARTS, options_class
from tests.tiny import all_routings

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 8,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "max_position_embeddings": 32,
}
DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"a": DEEP}
HOSTILE = st.sampled_from(
    [None, True, -1, 0, 10**18, -(10**18), 10**400, 0.0, 1e-300, 1e300, -1e300, 1.5, math.nan, math.inf, -math.inf]
    + ["", "8", "top_k", "x" * 5000, [], [None], [[]], ["sparse"], {}, {"a": 1}, {"type": "top_p"}, {"0": {}}, DEEP]
)
FLOATS = st.sampled_from([0, 1, -1, 1e-12, 1e-6, 0.1, 0.5, 1.0, 2.0, 9.0]) | st.floats(0, 1)
ROPE_KEYS = ("factor", "rope_theta", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "mscale")
ROPE_KEYS += ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "short_factor", "long_factor")

FIELDS = {field.name: field.type for field in dataclasses.fields(DynMoeConfig)}
OPTIONS = {
    (axis, part): {field.name: field.type for field in dataclasses.fields(options_class(axis, part))}
    for axis, table in PARTS.items()
    for part in table
}
KNOWN_NAMES = {*FIELDS, *PARTS, *(name for options in OPTIONS.values() for name in options), "rope_theta", "routing"}


def fitting(kind: Any) -> st.SearchStrategy:
    """Values of a type, most of them in range in a tiny model."""
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of([fitting(member) for member in typing.get_args(kind)])
    simple = {
        bool: st.booleans(),
        int: st.integers(1, 8) | st.integers(-2, 33),
        float: FLOATS,
        str: st.sampled_from(["row_entropy", "learned", "self", "silu", "top_p", "float32", "bfloat16"]),
        type(None): st.none(),
    }
    return simple.get(kind, HOSTILE)


@st.composite
def routings(draw: st.DrawFn) -> Any:
    """Any combination of registered parts, with any of their options."""
    if draw(st.booleans()):
        routing: dict[str, Any] = {"method": draw(st.sampled_from(sorted(METHODS)))}
    else:
        routing = {}
    for axis, table in PARTS.items():
        if draw(st.integers(0, 2)) == 0:
            part = draw(st.sampled_from(sorted(table)))
            routing[axis] = {"type": part} | draw(options(axis, part))
    if draw(st.integers(0, 3)) == 0:
        routing["losses"] = draw(st.dictionaries(st.sampled_from(sorted(LOSSES)), FLOATS | HOSTILE, max_size=2))
    return routing


@st.composite
def options(draw: st.DrawFn, axis: str, part: str) -> dict[str, Any]:
    hints = OPTIONS[axis, part]
    chosen = draw(st.lists(st.sampled_from(sorted(hints)), unique=True, max_size=3)) if hints else []
    return {name: draw(value_of(hints[name])) for name in chosen}


def value_of(kind: Any) -> st.SearchStrategy:
    return st.one_of(fitting(kind), fitting(kind), fitting(kind), HOSTILE)


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a config that differ from a tiny one in up to three fields, and often in the routing."""
    special = {
        "routing": routings(),
        "layer_routing": st.dictionaries(st.sampled_from([0, 1, "1", 2, -1, "x", 1.0]), routings(), max_size=2),
        "hidden_act": st.sampled_from(sorted(ACT2FN)),
        "layer_types": st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=3),
        "mlp_layer_types": st.lists(st.sampled_from(["sparse", "dense"]), min_size=1, max_size=3),
        "rope_parameters": st.fixed_dictionaries(
            {"rope_type": st.sampled_from(["default", *ROPE_INIT_FUNCTIONS])},
            optional={name: FLOATS | HOSTILE | st.just([1.0] * 4) for name in ROPE_KEYS},
        ),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=3))
    chosen += ["routing"] if draw(st.booleans()) and "routing" not in chosen else []
    values = {name: draw(value_of(FIELDS[name])) for name in chosen if name not in special}
    special_values = {name: draw(st.one_of([special[name]] * 4 + [HOSTILE])) for name in chosen if name in special}
    return TINY | values | special_values


def check_refused_or_works(arguments: dict[str, Any]) -> bool:
    """Whether a model came of it. Anything else than a clean refusal or a model that works fails."""
    try:
        config = DynMoeConfig(**arguments)
    except (ValueError, StrictDataclassError) as error:
        message = str(error)
        assert any(name in message for name in KNOWN_NAMES), message
        assert isinstance(error, StrictDataclassError) or len(message) < 1000
        return False
    loaded = DynMoeConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert loaded.to_dict() == config.to_dict()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    input_ids = torch.arange(10).view(2, 5) % config.vocab_size
    out = model(input_ids, labels=input_ids, return_dict=True)
    out.loss.backward()
    assert out.loss.isfinite() and out.logits.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return True


RELAXED = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **RELAXED)
@given(fields())
def test_any_configuration_is_refused_or_works(arguments: dict[str, Any]) -> None:
    check_refused_or_works(arguments)


@pytest.mark.slow
@settings(max_examples=2500, **RELAXED)
@given(fields())
def test_any_configuration_is_refused_or_works_at_length(arguments: dict[str, Any]) -> None:
    check_refused_or_works(arguments)


@pytest.mark.parametrize("method", METHODS)
def test_the_search_starts_from_what_works(method: str) -> None:
    assert check_refused_or_works(TINY | {"routing": method})


NUMBERS = [name for name, kind in FIELDS.items() if int in (kind, *typing.get_args(kind)) and "token_id" not in name]


@pytest.mark.parametrize("value", [10**18, 10**400])
@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "chunk_size_feed_forward"])
def test_enormous_numbers_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        DynMoeConfig(**(TINY | {name: value}))


def test_a_size_changed_by_hand_is_refused_by_the_model() -> None:
    config = DynMoeConfig(**TINY)
    config.num_hidden_layers = 10**18
    with pytest.raises(ValueError, match="num_hidden_layers must be at most 2,048"):
        AutoModelForCausalLM.from_config(config)


def test_sizes_that_are_enormous_together_are_refused() -> None:
    wide = {"hidden_size": 2**16, "moe_intermediate_size": 2**16, "num_attention_heads": 512}
    DynMoeConfig(**wide, num_experts=2**9, num_hidden_layers=2)  # 13 trillion parameters
    with pytest.raises(ValueError, match="num_experts .* parameters, and more than 1e.14 are refused"):
        DynMoeConfig(**wide, num_experts=2**12, num_hidden_layers=2)


def test_the_largest_sizes_build_on_the_meta_device() -> None:
    """The start of the threshold of `dtop_p` is simulated all the same, in little memory."""
    config = DynMoeConfig(**(TINY | {"num_experts": 2**18, "moe_intermediate_size": 2**18, "routing": "dtop_p"}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 3 * 2**36 * TINY["hidden_size"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to_dict": 1}, "'to_dict' is no configuration field"),
        ({"base_model_tp_plan": {"a": "b"}}, "'base_model_tp_plan' is no configuration field"),
        ({"__class__": "x"}, "'__class__' is no configuration field"),
        ({"auto_map": 3}, "auto_map is of the wrong type"),
        ({"quantization_config": "x"}, "quantization_config is of the wrong type"),
        ({"per_layer_config": {1: {"num_experts": 2}}}, "per_layer_config is not supported"),
        ({"num_labels": 0}, "num_labels must be between 1"),
        ({"num_labels": 10**18}, "num_labels must be between 1"),
        ({"id2label": {"a": "b"}}, "id2label must have label numbers"),
        ({"dtype": "nn"}, "dtype must be the name of a floating-point dtype"),
        ({"torch_dtype": "int8"}, "dtype must be the name of a floating-point dtype"),
        ({"layer_routing": {1.0: "top_p"}}, "layer_routing must have layer numbers"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be at least 1e-12"),
        ({"routing": {"selector": {"scale": math.nan}}}, "scale must be a finite number"),
        ({"routing": {"selector": {"scale": 10**400}}}, "scale must be a finite number"),
        ({"routing": {"scorer": {"type": "recurrent", "size": 10**9}}}, "size must be at least 1 and at most 16,384"),
        ({"routing": "x" * 10**6}, "Unknown routing method"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e-320}}, "rope_parameters"),
    ],
)
def test_what_breaks_things_later_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DynMoeConfig(**(TINY | changes))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "stored",
    [
        {"attn_implementation": "kernels-community/flash-attn2"},  # transformers would fetch and run it
        {"_attn_implementation": "kernels-community/flash-attn2"},
        {"_experts_implementation_internal": "someone/kernel"},
        {"transformers_weights": "other.bin"},
        {"extra": DEEP},
    ],
)
def test_a_stored_config_chooses_no_code(stored: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="stored configuration must not have|nested more than 50 deep"):
        DynMoeConfig.from_dict(TINY | stored)


def test_the_choice_is_still_that_of_who_loads(tmp_path: Any) -> None:
    DynMoeConfig(**TINY, attn_implementation="eager").save_pretrained(tmp_path)
    config = DynMoeConfig.from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    assert config._attn_implementation == config._experts_implementation == "eager"


@pytest.mark.parametrize("name", all_routings())
def test_every_routing_survives_json(name: str) -> None:
    config = DynMoeConfig(**(TINY | {"num_experts": 8, "routing": all_routings()[name]}))
    assert DynMoeConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_a_config_that_returns_tuples_still_computes() -> None:
    model = AutoModelForCausalLM.from_config(DynMoeConfig(**TINY, return_dict=False))
    input_ids = torch.arange(10).view(2, 5)
    loss, logits, *_ = model(input_ids, labels=input_ids)
    assert loss.isfinite() and logits.shape == (2, 5, 31)
