"""Counted costs against published figures, built models and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.analysis.cost import PARTS, count_cost
from tests.tiny import tiny_config, tiny_model, tokens

# Huang et al. 2024, arXiv 2403.07652: 24 layers of 16 experts, 3.5 B parameters.
PAPER = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "moe_intermediate_size": 2816,
    "num_experts": 16,
}

CONFIGS = {
    "top_k": {"routing": "top_k"},
    "top_p": {"routing": "top_p"},
    "tied": {"tie_word_embeddings": True},
    "dense": {"mlp_layer_types": ["dense"] * 3},
    "gated shared experts": {"shared_expert_gate": True},
    "bias and norms": {"attention_bias": True, "qk_norm": "full"},
    "selection bias": {"routing": {"selector": {"bias": True}}},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize(("experts", "published"), [(1, 374e6), (2, 582e6), (1.76, 532e6), (16, 3.49e9)])
def test_active_parameters_of_the_top_p_paper(experts, published):
    cost = count_cost(DynMoeConfig(routing="top_p", **PAPER), experts_per_token=experts)
    assert [point.experts_per_token for point in cost.activity] == [experts]
    assert cost.activity[0].parameters == pytest.approx(published, rel=1.5e-3)


def test_total_parameters_of_the_top_p_paper():
    cost = count_cost(DynMoeConfig(routing="top_p", dtype="bfloat16", **PAPER))
    assert cost.total_parameters == 3_488_531_456
    assert cost.weight_bytes == 2 * cost.total_parameters
    assert [point.experts_per_token for point in cost.activity] == [1, 2, 16]
    assert cost.activity[-1].parameters == cost.total_parameters


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_parameters_and_memory_of_a_built_model(changes, tmp_path):
    model = tiny_model(**changes)
    cost = count_cost(model.config)
    assert tuple(cost.parameters) == PARTS
    assert cost.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert cost.weight_bytes == (tmp_path / "model.safetensors").stat().st_size - header


@pytest.mark.parametrize("name", ["top_k", "top_p", "dense"])
def test_inactive_parameters_are_the_experts_without_gradient(name):
    """One token, so that an expert is either used by it or not at all."""
    model = tiny_model(**CONFIGS[name])
    out = model(tokens(1, 1), use_cache=False, output_routing=True)
    out.logits.sum().backward()
    sizes = [
        gate_up.numel() + down.numel()
        for block in model.moe_blocks()
        for gate_up, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)
    ]
    gradients = [gradient for block in model.moe_blocks() for gradient in block.experts.down_proj.grad]
    inactive = sum(size for size, gradient in zip(sizes, gradients, strict=True) if not gradient.any())
    mean = out.experts_per_token.mean().item() if model.moe_blocks() else None
    cost = count_cost(model.config, mean)
    assert cost.activity[0].parameters == cost.total_parameters - inactive
    assert bool(inactive) == bool(model.moe_blocks())


@pytest.mark.parametrize("routing", ["top_k", "top_p", {"selector": {"k": 1}}], ids=["top_k", "top_p", "k=1"])
@pytest.mark.parametrize("length", [1, 17])
def test_flops_against_the_counter_of_torch(routing, length):
    """Eager attention and the eager engine multiply what the rules count, with the pairs that were really used."""
    model = tiny_model(routing, engine="eager")
    model.set_attn_implementation("eager")
    ids = tokens(1, length)
    with torch.no_grad():
        out = model(ids, use_cache=False, output_routing=True)
        with FlopCounterMode(display=False) as counter:
            model(ids, use_cache=False)
    cost = count_cost(model.config, out.experts_per_token.mean().item(), sequence_length=length)
    assert cost.activity[0].flops * length == pytest.approx(counter.get_total_flops(), abs=length)


def test_sliding_window_bounds_the_keys():
    windowed = tiny_config(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    flops = [count_cost(windowed, 1, length).activity[0].flops for length in (4, 5)]
    assert flops[1] - flops[0] == 4 * windowed.hidden_size  # one key more, in the one layer with full attention


def test_layers_with_their_own_routing():
    cost = count_cost(tiny_config("top_k", num_experts_per_tok=2, layer_routing={0: "top_p"}))
    assert [point.experts_per_token for point in cost.activity] == [1.5, 2, 5]
    uneven = count_cost(tiny_config("top_p", layer_routing={0: {"selector": {"max_experts": 3}}}))
    assert [point.experts_per_token for point in uneven.activity] == [1, 2, 5.5]
    capped = count_cost(tiny_config({"selector": {"type": "top_p", "max_experts": 2}}))
    assert [point.experts_per_token for point in capped.activity] == [1, 2]
    fixed = count_cost(tiny_config("top_k", num_experts_per_tok=3))
    assert [point.experts_per_token for point in fixed.activity] == [3]


def test_a_mean_of_each_router():
    config = tiny_config("top_p", layer_routing={0: {"experts": {"type": "low_rank", "rank": 5}}})
    one, both = (count_cost(config, means).activity[0] for means in ([2.0, 0.0], [2.0, 3.0]))
    assert both.experts_per_token == 2.5 and both.parameters - one.parameters == 3 * 3 * 32 * 24
    assert count_cost(config, [2.0, 2.0]).activity == count_cost(config, 2.0).activity


@pytest.mark.parametrize(
    "arguments",
    [{"experts_per_token": 9}, {"experts_per_token": -1}, {"experts_per_token": [1, 9]}, {"sequence_length": 0}],
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        count_cost(tiny_config(), **arguments)
