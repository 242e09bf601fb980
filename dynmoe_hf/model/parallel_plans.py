# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""What transformers' tensor and expert parallelism divide: name of a module or parameter -> style of division, with `*`
for any layer. A plan follows from the parts that a config uses; what it does not name, every process holds whole."""

from typing import Any

from .ragged import LAYOUTS

EXPERTS_BY_TENSOR = {
    "swiglu": {"gate_up_proj": "packed_colwise", "down_proj": "rowwise"},
    # The gradient of the D -> r matrices would be a sum over processes, for which transformers has no style.
    "low_rank": {},
}


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """Plan for `DistributedConfig(tp_size=...)`: attention by heads, FFNs by their width."""
    plan = {"embed_tokens": "embedding_rowwise", **_attention_plan(config)}
    for layer in range(config.num_hidden_layers):
        if not config.is_sparse(layer):
            plan |= _ffn_plan("layers.*.mlp")
    for prefix, layout, _ in _banks(config):
        if weights := EXPERTS_BY_TENSOR[layout]:
            plan |= {f"{prefix}.experts.{name}": style for name, style in weights.items()}
            plan[f"{prefix}.experts"] = "moe_tp_experts"
        if config.num_shared_experts:
            plan |= _ffn_plan(f"{prefix}.shared_experts")
    return plan


def expert_parallel_plan(config: Any) -> dict[str, str]:
    """Plan for `DistributedConfig(ep_size=...)`: whole experts, except those that rank themselves (`activation_norm`),
    because every token asks all of them."""
    plan = {}
    for prefix, layout, scorer in _banks(config):
        if scorer != "activation_norm":
            plan |= {f"{prefix}.experts.{name}": "grouped_gemm" for name in LAYOUTS[layout].weight_names}
            plan[f"{prefix}.experts"] = "ep_dispatch_experts"
    return plan


def _banks(config: Any) -> set[tuple[str, str, str]]:
    """Prefix of its names, layout, and scorer type of everything that has routed experts."""
    banks = set()
    for layer in filter(config.is_sparse, range(config.num_hidden_layers)):
        spec = config.routing_for(layer)
        if spec["experts"]["type"] == "cartesian":
            banks.add(("layers.*.mlp.sub_layers.*", spec["experts"]["bank"]["type"], spec["scorer"]["type"]))
        else:
            banks.add(("layers.*.mlp", spec["experts"]["type"], spec["scorer"]["type"]))
    return banks


def _attention_plan(config: Any) -> dict[str, str]:
    reads_attention = any("statistic" in config.routing_for(n)["selector"] for n in range(config.num_hidden_layers))
    # A norm over all heads, and a statistic of them, need the heads of all processes.
    gathers = config.qk_norm == "full" or reads_attention
    into, back = ("colwise_gather_output", "rowwise_split_input") if gathers else ("colwise", "rowwise")
    plan = {f"layers.*.self_attn.{name}": into for name in ("q_proj", "k_proj", "v_proj")}
    plan["layers.*.self_attn.o_proj"] = back
    if config.qk_norm == "per_head" and not gathers:
        plan |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
    return plan


def _ffn_plan(prefix: str) -> dict[str, str]:
    styles = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    return {f"{prefix}.{name}": style for name, style in styles.items()}
