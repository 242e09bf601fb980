"""Our decoder with `top_k` routing against the models of transformers that it contains: same weights, same numbers.

Configurations and names of parameters are translated by `dynmoe_hf.convert`.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.convert import FORMATS, to_ours
from dynmoe_hf.model.attention import DynMoeRotaryEmbedding
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock, build_experts
from dynmoe_hf.model.routing import RoutingContext
from tests.tiny import ENGINES, tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
B, S, PADDING = 2, 9, 3
PADDINGS = ("none", "left", "right")
AUX_COEFFICIENT = 0.5

# Experts and heads must matter in the logits; transformers' default range of 0.02 hides a wrong routing.
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXTRAL: dict[str, Any] = SMALL | {"intermediate_size": 24, "router_aux_loss_coef": AUX_COEFFICIENT}
QWEN3: dict[str, Any] = SMALL | {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "router_aux_loss_coef": AUX_COEFFICIENT,
}
QWEN2: dict[str, Any] = {name: value for name, value in QWEN3.items() if name != "head_dim"} | {
    "shared_expert_intermediate_size": 20
}
OLMOE: dict[str, Any] = SMALL | {
    "intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "router_aux_loss_coef": AUX_COEFFICIENT,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
}


def rope(rope_type: str) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 500.0, **ROPES.get(rope_type, {})}


CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**MIXTRAL),
    "mixtral-window": MixtralConfig(**MIXTRAL, sliding_window=4),
    "olmoe": OlmoeConfig(**OLMOE),
    "qwen3_moe": Qwen3MoeConfig(**QWEN3, mlp_only_layers=[1]),
    "qwen3_moe-norm-bias": Qwen3MoeConfig(**QWEN3, norm_topk_prob=True, attention_bias=True),
    # Without the bias of its queries, keys and values, for which ours has one more, of the output (tests/convert).
    "qwen2_moe": Qwen2MoeConfig(
        **QWEN2, mlp_only_layers=[1], qkv_bias=False, use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
    "llama": LlamaConfig(
        **SMALL, intermediate_size=40, attention_bias=True, tie_word_embeddings=True, rope_parameters=rope("llama3")
    ),
}
SPARSE = [name for name in CONFIGS if name != "llama"]
ENGINE_CASES = [(name, engine) for name in SPARSE for engine in ENGINES] + [("llama", "eager")]


def our_config(theirs: PreTrainedConfig, **changes: Any) -> DynMoeConfig:
    arguments, notes = FORMATS[theirs.model_type].read_config(theirs)
    assert not notes
    return DynMoeConfig(**(arguments | changes))


def our_tensors(theirs: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_ours(FORMATS[theirs.model_type].rules, tensors)


def their_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@cache
def their_state_dict(name: str) -> dict[str, Tensor]:
    return their_model(CONFIGS[name]).state_dict()


def our_model(name: str, engine: str = "eager", **changes: Any) -> DynMoeForCausalLM:
    model = AutoModelForCausalLM.from_config(our_config(CONFIGS[name], **changes), experts_implementation=engine)
    assert isinstance(model, DynMoeForCausalLM)
    model.load_state_dict(our_tensors(CONFIGS[name], their_state_dict(name)))
    return model.eval()


def batch(padding: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs, the tokens that are real, and labels that no padding token predicts."""
    content = tokens(B, S)
    real = torch.ones(B, S, dtype=torch.bool)
    if padding == "none":
        return {"input_ids": content}, real, content
    real[1, slice(0, PADDING) if padding == "left" else slice(S - PADDING, S)] = False
    predicted = real.clone()
    predicted[:, 1:] &= real[:, :-1]
    return {"input_ids": content, "attention_mask": real.long()}, real, content.masked_fill(~predicted, -100)


@cache
def expected(name: str, padding: str) -> dict[str, Any]:
    """What the model of transformers answers: logits, losses, and the gradients of the language-model loss."""
    model = their_model(CONFIGS[name])
    inputs, _, labels = batch(padding)
    output = model(**inputs, labels=labels)
    output.loss.backward()
    answer = {
        "logits": output.logits.detach(),
        "lm_loss": output.loss.detach(),
        "gradients": our_tensors(model.config, {name: weight.grad for name, weight in model.named_parameters()}),
    }
    if name in SPARSE:
        model.zero_grad()
        with_aux = model(**inputs, labels=labels, output_router_logits=True)
        with_aux.loss.backward()
        answer |= {
            "loss": with_aux.loss.detach(),
            "aux_loss": with_aux.aux_loss.detach(),
            "router_logits": with_aux.router_logits,
            "gradients_with_aux": our_tensors(
                model.config, {name: weight.grad for name, weight in model.named_parameters()}
            ),
        }
    return answer


def assert_same_gradients(model: DynMoeForCausalLM, gradients: dict[str, Tensor]) -> None:
    """Every gradient within 1e-5 of the largest entry of its tensor."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (ours[name] - gradient).abs().max()
        assert difference <= 1e-5 * gradient.abs().max(), f"{name}: {difference} of {gradient.abs().max()}"


@pytest.mark.parametrize(("name", "engine"), ENGINE_CASES)
def test_logits(name: str, engine: str) -> None:
    model = our_model(name, engine)
    for padding in PADDINGS:
        inputs, real, _ = batch(padding)
        logits = model(**inputs).logits
        torch.testing.assert_close(logits[real], expected(name, padding)["logits"][real], **CLOSE, msg=padding)


@pytest.mark.parametrize(("name", "engine"), ENGINE_CASES)
def test_prefill_and_cached_steps(name: str, engine: str) -> None:
    model = our_model(name, engine)
    inputs, real, _ = batch("left")
    answers, cache, start = [], None, 0
    for end in (6, 7, S):
        output = model(
            input_ids=inputs["input_ids"][:, start:end],
            attention_mask=inputs["attention_mask"][:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        answers.append(output.logits)
        cache, start = output.past_key_values, end
    torch.testing.assert_close(torch.cat(answers, dim=1)[real], expected(name, "left")["logits"][real], **CLOSE)


@pytest.mark.parametrize(("name", "engine"), ENGINE_CASES)
def test_gradients_of_the_language_model_loss(name: str, engine: str) -> None:
    model = our_model(name, engine)
    for padding in PADDINGS:
        inputs, _, labels = batch(padding)
        model.zero_grad()
        output = model(**inputs, labels=labels)
        torch.testing.assert_close(output.lm_loss, expected(name, padding)["lm_loss"], **CLOSE)
        output.lm_loss.backward()
        assert_same_gradients(model, expected(name, padding)["gradients"])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", SPARSE)
def test_pooled_load_balance_and_the_whole_loss(name: str, padding: str) -> None:
    model = our_model(name)
    inputs, _, labels = batch(padding)
    output = model(**inputs, labels=labels, output_router_logits=True)
    answer = expected(name, padding)
    torch.testing.assert_close(output.aux_loss, answer["aux_loss"], **CLOSE)
    torch.testing.assert_close(output.loss, answer["loss"], **CLOSE)
    output.loss.backward()
    assert_same_gradients(model, answer["gradients_with_aux"])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "pooled"])
def test_load_balance_of_one_layer_needs_no_pooling(reduction: str, padding: str) -> None:
    theirs = their_model(MixtralConfig(**(MIXTRAL | {"num_hidden_layers": 1})))
    ours = AutoModelForCausalLM.from_config(our_config(theirs.config, aux_reduction=reduction)).eval()
    ours.load_state_dict(our_tensors(theirs.config, theirs.state_dict()))
    inputs, _, _ = batch(padding)
    answers = [model(**inputs, output_router_logits=True).aux_loss for model in (ours, theirs)]
    torch.testing.assert_close(*answers, **CLOSE)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scope", ["micro", "sequence"])
def test_load_balance_by_layer_and_by_sequence(scope: str, padding: str) -> None:
    """The function of transformers, called on what our definition multiplies separately."""
    config = CONFIGS["mixtral"]
    inputs, real, _ = batch(padding)
    groups = [slice(None)] if scope == "micro" else [slice(row, row + 1) for row in range(B)]
    values = []
    for logits in expected("mixtral", padding)["router_logits"]:
        by_row = logits.view(B, S, -1)
        parts = [
            real[group].sum()
            / real.sum()
            * load_balancing_loss_func(
                (by_row[group].flatten(0, 1),), config.num_local_experts, config.num_experts_per_tok, real[group]
            )
            for group in groups
        ]
        values.append(torch.stack(parts).sum())
    for reduction in ("mean", "sum"):
        model = our_model("mixtral", aux_reduction=reduction, balance_scope=scope)
        output = model(**inputs, output_router_logits=True)
        reduced = getattr(torch.stack(values), reduction)()
        torch.testing.assert_close(output.aux_loss, reduced, **CLOSE)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (8, 3)])
def test_router_of_deepseek_v3(groups: int, top_groups: int, normalise: bool) -> None:
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=32,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=groups,
            topk_group=top_groups,
            norm_topk_prob=normalise,
            routed_scaling_factor=2.5,
        )
    )
    selector = {
        "type": "top_k",
        "score_function": "sigmoid",
        "norm_topk_prob": normalise,
        "scale": 2.5,
        "num_groups": groups,
        "top_groups": top_groups,
        "bias": True,
    }
    config = DynMoeConfig(**SMALL, num_experts=16, num_experts_per_tok=4, routing={"selector": selector})
    ours = DynMoeBlock(config, 0, build_experts)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs.weight.normal_(std=0.2, generator=generator)
        # As large as the differences between scores, so that ranking with and without it differ.
        theirs.e_score_correction_bias.normal_(std=0.3, generator=generator)
        ours.gate.weight.copy_(theirs.weight)
        ours.selector.selection_bias.copy_(theirs.e_score_correction_bias)
    hidden_states = torch.randn(200, 32, generator=generator)
    routing = ours.route(hidden_states, RoutingContext(0))
    logits, weights, indices = theirs(hidden_states)
    torch.testing.assert_close(routing.logits, logits, **CLOSE)
    answers = [
        torch.zeros(200, 16).scatter(1, chosen, weight)
        for chosen, weight in ((routing.expert_ids, routing.weights), (indices, weights))
    ]
    torch.testing.assert_close(*answers, **CLOSE)
    probe = torch.randn(200, 16, generator=generator)
    gradients = [
        torch.autograd.grad((answer * probe).sum(), router.weight)[0]
        for answer, router in zip(answers, (ours.gate, theirs), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[1].abs().max().item())


@pytest.mark.parametrize("rope_type", ["default", *ROPES])
def test_rotary_positions(rope_type: str) -> None:
    """At lengths below, beyond and again below the trained one: some rope types change their frequencies on the way."""
    theirs = LlamaConfig(**SMALL, rope_parameters=rope(rope_type))
    embeddings = [LlamaRotaryEmbedding(theirs), DynMoeRotaryEmbedding(our_config(theirs))]
    plain = LlamaRotaryEmbedding(LlamaConfig(**SMALL, rope_parameters=rope("default")))
    hidden_states = torch.zeros(1, 1, 32)
    changed = False
    for length in (10, 100, 70, 10):
        positions = torch.arange(length)[None]
        answers = [embedding(hidden_states, positions) for embedding in embeddings]
        for their_part, our_part in zip(*answers, strict=True):
            torch.testing.assert_close(our_part, their_part, rtol=1e-6, atol=1e-6)
        changed |= not torch.equal(answers[0][0], plain(hidden_states, positions)[0])
    assert changed == (rope_type != "default")
