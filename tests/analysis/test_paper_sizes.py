"""The parameter and FLOP figures of the papers, from configurations of their sizes on the meta device."""

from typing import Any

import pytest

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.analysis.cost import Cost, count_cost


def cost_of(**fields: Any) -> Cost:
    return count_cost(DynMoeConfig(**fields))


def cartesian(layers: int, hidden: int, width: int, heads: int, every: int, **changes: Any) -> Cost:
    kinds = ["dense"] * (every - 1) + ["sparse"]
    fields = {
        "routing": "cartesian",
        "vocab_size": 32000,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": width,
        "moe_intermediate_size": width // 2,
        "num_experts": 16,
        "mlp_layer_types": kinds * (layers // every),
    }
    return cost_of(**(fields | changes))


@pytest.mark.parametrize(
    ("sizes", "total", "active"),
    [
        ((12, 768, 3072, 12, 2), 841.9e6, 247.3e6),
        ((24, 1024, 4096, 16, 2), 2884.1e6, 770.2e6),
        ((16, 2048, 4096, 16, 1), 7.245e9, 1.607e9),
    ],
)
def test_cartesian_totals_and_active_parameters(sizes: tuple, total: float, active: float) -> None:
    """The published figures leave out the routers."""
    cost = cartesian(*sizes)
    assert cost.total_parameters - cost.parameters["router"] == pytest.approx(total, rel=1e-3)
    assert cost.activity[0].parameters - cost.parameters["router"] == pytest.approx(active, rel=1e-3)


def test_cartesian_equals_the_flat_fine_grained_model_but_for_one_norm_a_layer() -> None:
    twin = {"routing": "top_k", "num_experts": 32, "num_experts_per_tok": 4, "num_shared_experts": 2}
    composed, flat = cartesian(12, 768, 3072, 12, 2), cartesian(12, 768, 3072, 12, 2, **twin)
    assert composed.total_parameters - flat.total_parameters == 6 * 768
    assert composed.activity[0].flops == flat.activity[0].flops


def test_cartesian_flops_are_the_formula() -> None:
    """Section 12 of the specification: 4De + 6DF(k + 1) for each MoE layer."""
    layers, hidden, width, heads, sub_experts, k = 4, 64, 128, 4, 16, 2
    fields = {"vocab_size": 100, "max_position_embeddings": 10}
    sparse, dense = (cartesian(layers, hidden, width, heads, 1, **fields, **extra) for extra in ({}, DENSE))
    ffn = layers * (4 * hidden * sub_experts + 6 * hidden * width * (k + 1))
    assert sparse.activity[0].flops - dense.activity[0].flops == ffn - layers * 6 * hidden * width


DENSE = {"mlp_layer_types": ["dense"] * 4, "routing": "top_k"}


@pytest.mark.parametrize(("rank", "active"), [(64, 250.9e6), (128, 254.4e6), (256, 261.5e6), (512, 275.6e6)])
def test_aoe_small_counts_what_ranks_the_experts_as_active(rank: int, active: float) -> None:
    cost = aoe(768, 3072, 12, 12, 8, 2, {"rank": rank})
    assert cost.total_parameters - cost.parameters["head"] == pytest.approx(732.4e6, rel=1e-3)
    assert cost.activity[0].parameters == pytest.approx(active, rel=1e-3)
    assert cost.parameters["router"] == 0 and not cost.notes


def test_aoe_4b() -> None:
    cost = aoe(1280, 5120, 24, 20, 8, 2, {"rank": 400, "intermediate_size": 6470})
    assert cost.total_parameters == pytest.approx(4.0e9, rel=1e-2)
    # The paper's 1.18 B leave out the matrices that rank the experts which are not used.
    unused = 24 * 6 * 400 * 1280
    assert cost.activity[0].parameters - unused == pytest.approx(1.18e9, rel=5e-3)


def test_aoe_with_many_experts_is_warned_about() -> None:
    (note,) = aoe(1536, 768, 2, 12, 64, 8, {"rank": 512}).notes
    assert "156%" in note


def test_aoe_flops_are_the_formula() -> None:
    """Section 12 of the specification: 2EDr + K(2rW + 4DW) for each layer."""
    hidden, width, rank, experts, k = 96, 192, 32, 8, 2
    wide = (3 * hidden * width - rank * hidden) / (rank + 2 * hidden)
    fields = {"rank": rank, "intermediate_size": round(wide)}
    with_aoe = aoe(hidden, width, 1, 4, experts, k, fields).activity[0].flops
    dense = cost_of(**SMALL, hidden_size=hidden, num_hidden_layers=1, mlp_layer_types=["dense"], intermediate_size=1)
    ffn = 2 * experts * hidden * rank + k * (2 * rank * round(wide) + 4 * hidden * round(wide))
    assert with_aoe - dense.activity[0].flops == ffn - 2 * 3 * hidden


SMALL = {"vocab_size": 32000, "num_attention_heads": 4}


def aoe(hidden: int, width: int, layers: int, heads: int, experts: int, k: int, options: dict[str, int]) -> Cost:
    return cost_of(
        routing={"method": "aoe", "experts": options},
        vocab_size=32000,
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_experts=experts,
        num_experts_per_tok=k,
    )


def rmoe(method: str, layers: int, hidden: int, heads: int) -> Cost:
    return cost_of(
        routing=method,
        vocab_size=256,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_experts=16,
    )


def test_rmoe_router() -> None:
    recurrent, linear = rmoe("rmoe", 8, 352, 8), rmoe("top_k", 8, 352, 8)
    assert recurrent.parameters["router"] == 8 * (128 * 352 + 128 * 16) + 6 * 128**2 + 6 * 128 == 475_904
    assert linear.parameters["router"] == pytest.approx(0.045e6, rel=2e-2)
    # The cell is stored once and runs in every layer.
    router_flops = 2 * 8 * (128 * 352 + 128 * 16 + 6 * 128**2)
    assert recurrent.activity[0].flops - linear.activity[0].flops == router_flops - 2 * 8 * 16 * 352


def test_rmoe_large_adds_three_and_a_half_million() -> None:
    large = rmoe("rmoe", 24, 1280, 20).parameters["router"] - rmoe("top_k", 24, 1280, 20).parameters["router"]
    assert large == pytest.approx(3.59e6, rel=1e-3)


def test_da_moe_pays_for_the_row_statistics() -> None:
    fields = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    plain, dynamic = (cost_of(**fields, routing=method, max_position_embeddings=50) for method in ("top_p", "da_moe"))
    assert plain.parameters == dynamic.parameters
    for first, second in zip(plain.activity, dynamic.activity, strict=True):
        assert second.flops - first.flops == 3 * 2 * 4 * 16 * 50


def test_dtop_p_is_counted_at_its_target() -> None:
    """The 64-expert model of the paper: 1.3 B active of 6.9 B."""
    cost = cost_of(
        routing={"method": "dtop_p", "controller": {"target": 8}},
        vocab_size=50304,
        hidden_size=2048,
        moe_intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_experts=64,
    )
    assert cost.total_parameters == pytest.approx(6.9e9, rel=5e-3)
    assert [point.experts_per_token for point in cost.activity] == [1, 2, 8, 64]
    assert cost.activity[2].parameters == pytest.approx(1.3e9, rel=2e-2)
