"""The formats that are read and written: for each its tensors and its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from dynmoe_hf.model import DynMoeConfig

from . import configs
from .tables import TRANSPOSED, Rule, View, same

LAYER = "model.layers.{layer}."
MLP = f"{LAYER}mlp."
MATRICES = ("gate_proj", "up_proj", "down_proj")

DECODER = same(
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(f"{LAYER}self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    *(f"{LAYER}self_attn.{name}_norm.weight" for name in "qk"),
)
NORMS = same(f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight")
DENSE = same(*(f"{MLP}{name}.weight" for name in MATRICES))
ROUTER = same(f"{MLP}gate.weight")
FUSED = same(f"{MLP}experts.gate_up_proj", f"{MLP}experts.down_proj")


def experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """One module an expert under `block`, with the names of its three matrices."""
    return (
        Rule(f"{MLP}experts.gate_up_proj", (f"{block}{{expert}}.{gate}.weight", f"{block}{{expert}}.{up}.weight")),
        Rule(f"{MLP}experts.down_proj", (f"{block}{{expert}}.{down}.weight",)),
    )


def renamed(ours: str, theirs: str, names: tuple[str, ...]) -> tuple[Rule, ...]:
    """The same names in another module."""
    return tuple(Rule(f"{ours}{name}", (f"{theirs}{name}",)) for name in names)


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Args:
        title: what it is.
        rules: its tensors and ours; of several rules for one of ours, the first says what is written.
        read_config: the arguments of `DynMoeConfig` for its configuration, and notes on what they leave out. It raises
            ValueError for what `DynMoeConfig` cannot say.
        config_class: transformers' class of its configuration; None for an official code, whose config.json is read as
            it stands.
        write_config: the way back, where there is one. It raises ValueError for what the format cannot say.
        dropped: tensors without a counterpart that say nothing.
        zeros: tensors of ours that are zero where the format has none.
        marker: text in the names of its tensors that tells it from another format of the same or no `model_type`.
        model_types: values of `model_type` in config.json; by default the format's name.
    """

    title: str
    rules: tuple[Rule, ...]
    read_config: Callable[[Any], tuple[dict[str, Any], list[str]]]
    config_class: type[PreTrainedConfig] | None = None
    write_config: Callable[[DynMoeConfig], tuple[PreTrainedConfig, list[str]]] | None = None
    dropped: tuple[str, ...] = (f"{LAYER}self_attn.rotary_emb.inv_freq",)
    zeros: tuple[str, ...] = ()
    marker: str = ""
    model_types: tuple[str, ...] = ()


PER_EXPERT = experts(f"{MLP}experts.", *MATRICES)
NO_OUTPUT_BIAS = (f"{LAYER}self_attn.o_proj.bias",)
MATRIX_NAMES = tuple(f"{name}.weight" for name in MATRICES)
MOE = (*DECODER, *NORMS, *ROUTER, *PER_EXPERT, *FUSED, *DENSE)
BLOCK = f"{LAYER}block_sparse_moe."
W123 = experts(f"{BLOCK}experts.", "w1", "w3", "w2")


# The gates of the recurrent cell one below the other, in the order of torch; the plain cell has a single one.
RMOE_CELL = tuple(
    Rule(
        f"model.shared_scorers.recurrent.cell.{kind}_{side}h",
        tuple(f"model.rnn_router.{kind}_{side}{gate}" for gate in gates),
        one_way=True,
    )
    for kind in ("weight", "bias")
    for side in "ih"
    for gates in ("rzn", "n")
)
RMOE = (
    *DECODER,
    *NORMS,
    *DENSE,
    *W123,
    *RMOE_CELL,
    Rule(f"{MLP}gate.in_proj", (f"{BLOCK}weight1",)),
    Rule(f"{MLP}gate.out_proj", (f"{BLOCK}weight2",)),
    Rule(f"{MLP}gate.weight", (f"{BLOCK}gate.weight",)),
    Rule(f"{MLP}output_bias", (f"{BLOCK}bias",)),
    *renamed(f"{MLP}shared_experts.", f"{LAYER}mlp_share.", MATRIX_NAMES),
)

FORMATS: dict[str, Format] = {
    "mixtral": Format(
        "Mixtral of transformers",
        (
            *DECODER,
            *NORMS,
            Rule(f"{MLP}gate.weight", (f"{BLOCK}gate.weight",)),
            *W123,
            *ROUTER,
            *FUSED,
            *renamed(f"{MLP}experts.", f"{BLOCK}experts.", ("gate_up_proj", "down_proj")),
        ),
        configs.read_mixtral,
        configs.MixtralConfig,
        configs.write_mixtral,
    ),
    "olmoe": Format("OLMoE of transformers", MOE, configs.read_olmoe, configs.OlmoeConfig, configs.write_olmoe),
    "qwen3_moe": Format(
        "Qwen3-MoE of transformers", MOE, configs.read_qwen3_moe, configs.Qwen3MoeConfig, configs.write_qwen3_moe
    ),
    "qwen2_moe": Format(
        "Qwen2-MoE of transformers",
        (
            *MOE,
            *renamed(f"{MLP}shared_experts.", f"{MLP}shared_expert.", MATRIX_NAMES),
            *same(f"{MLP}shared_expert_gate.weight"),
        ),
        configs.read_qwen2_moe,
        configs.Qwen2MoeConfig,
        zeros=NO_OUTPUT_BIAS,
    ),
    "llama": Format(
        "Llama of transformers, dense", (*DECODER, *NORMS, *DENSE), configs.read_llama, configs.LlamaConfig
    ),
    "mistral": Format(
        "Mistral of transformers, dense", (*DECODER, *NORMS, *DENSE), configs.read_mistral, configs.MistralConfig
    ),
    "qwen2": Format(
        "Qwen2 of transformers, dense",
        (*DECODER, *NORMS, *DENSE),
        configs.read_qwen2,
        configs.Qwen2Config,
        zeros=NO_OUTPUT_BIAS,
    ),
    "qwen3": Format(
        "Qwen3 of transformers, dense", (*DECODER, *NORMS, *DENSE), configs.read_qwen3, configs.Qwen3Config
    ),
    "dynamic_moe": Format(
        "the released code of Dynamic_MoE (top_p)",
        (
            *DECODER,
            Rule(f"{LAYER}input_layernorm.weight", (f"{LAYER}input_norm.weight",)),
            Rule(f"{LAYER}post_attention_layernorm.weight", (f"{LAYER}post_attention_norm.weight",)),
            Rule(f"{MLP}gate.weight", (f"{MLP}router.weight",)),
            *PER_EXPERT,
            *renamed(MLP, f"{MLP}mlp.", MATRIX_NAMES),
        ),
        configs.read_dynamic_moe,
        marker=".mlp.router.weight",
        model_types=("llama",),
    ),
    "rmoe": Format(
        "the released code of RMoE (llama_moe_rnn)",
        RMOE,
        configs.read_rmoe,
        marker="model.rnn_router.",
        model_types=("llama_moe_rnn",),
    ),
}
DENSE_FORMATS = ("llama", "mistral", "qwen2", "qwen3")
NOT_YET = {
    "moe_pp": "MoE++ needs zero, identity and constant experts, which this package does not have yet.",
}


def _stacked(transpose: bool) -> View:
    """Experts one below the other (E n, m), or the same transposed."""
    return View(
        lambda tensor, num_experts: (tensor.T if transpose else tensor).unflatten(0, (num_experts, -1)),
        lambda tensor: tensor.flatten(0, 1).T if transpose else tensor.flatten(0, 1),
    )


LAST_TRANSPOSED = View(
    lambda tensor, num_experts: tensor.unflatten(0, (num_experts, -1)).transpose(1, 2),
    lambda tensor: tensor.transpose(1, 2).flatten(0, 1),
)
# Both official codes of Autonomy-of-Experts publish a layer and no model: for `to_ours` and `from_ours`, whose other
# side are the experts of a block.
AOE_FIRST = tuple(
    Rule(f"{{prefix}}{ours}", (f"{{prefix}}wander_experts.{{expert}}.{theirs}",), TRANSPOSED)
    for ours, theirs in {
        "gate_down_proj": "dim_to_dim4route",
        "gate_up_proj_lowrank": "dim4route_to_hidden_dim",
        "up_proj": "dim_to_hidden_dim",
        "down_proj": "hidden_dim_to_dim",
    }.items()
)
AOE_SECOND = (
    Rule("{prefix}gate_down_proj", ("{prefix}wg",), _stacked(transpose=True)),
    Rule("{prefix}gate_up_proj_lowrank", ("{prefix}experts.mlp.wup",), _stacked(transpose=False)),
    Rule("{prefix}up_proj", ("{prefix}experts.mlp.v1",), _stacked(transpose=False)),
    Rule("{prefix}down_proj", ("{prefix}experts.mlp.w2",), LAST_TRANSPOSED),
)
