"""The engine `ragged` in models of transformers, by its registered name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from dynmoe_hf.model import dispatch, ragged
from dynmoe_hf.model.compat import ExpertsInterface, use_experts_implementation
from tests.model.plain_experts import ACTIVATIONS, assert_equal
from tests.tiny import tokens

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "mixtral": lambda **changes: MixtralConfig(**SMALL, num_local_experts=6, **changes),
    "olmoe": lambda **changes: OlmoeConfig(**SMALL, **EXPERTS, **changes),
    "qwen3_moe": lambda **changes: Qwen3MoeConfig(**SMALL, **EXPERTS, moe_intermediate_size=24, head_dim=8, **changes),
}


def their_model(config: PreTrainedConfig, engine: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, experts_implementation=engine)


def logits_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    content = tokens(2, 9)
    output = model(content, labels=content)
    output.loss.backward()
    return {"logits": output.logits.detach()} | {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("engine", dispatch.RAGGED)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_their_own(name: str, engine: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args: Any) -> Any:
        calls.append(args)
        return ragged.experts_operator(*args)

    monkeypatch.setattr(dispatch, "experts_operator", spy)
    expected = logits_and_gradients(their_model(CONFIGS[name](hidden_act=activation), "eager"))
    assert not calls
    assert_equal(logits_and_gradients(their_model(CONFIGS[name](hidden_act=activation), engine)), expected)
    assert len(calls) == SMALL["num_hidden_layers"]


def test_the_engines_are_registered() -> None:
    for name, engine in dispatch.ENGINES.items():
        assert name == "eager" or ExpertsInterface()[name] is engine


def test_experts_with_biases_are_refused() -> None:
    config = GptOssConfig(**SMALL, num_local_experts=6, num_experts_per_tok=2, head_dim=8)
    model = their_model(config, "ragged")
    with pytest.raises(ValueError, match="without biases only, which GptOssExperts are not: use .*grouped_mm"):
        model(tokens(2, 9))


class Config:
    _experts_implementation = "ragged"


class PlainExperts(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_experts = 2
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 4))
        self.down_proj = nn.Parameter(torch.randn(2, 4, 3))
        self.act_fn = nn.SiLU()


def refused(experts: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        experts(torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))


KINDS = [{"is_transposed": True}, {"has_bias": True}, {"is_concatenated": False}, {"has_gate": False}]


@pytest.mark.parametrize("kind", [*KINDS, {"has_post_expert_norm": True}], ids=str)
def test_other_kinds_of_experts_are_refused(kind: dict[str, bool]) -> None:
    class OtherExperts(PlainExperts):
        def forward(self) -> None: ...

    refused(use_experts_implementation(OtherExperts, **kind)(Config()), "OtherExperts are not: use .*grouped_mm")


def test_experts_with_a_gate_of_their_own_are_refused() -> None:
    class ClampedExperts(PlainExperts):
        def forward(self) -> None: ...

        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return nn.functional.silu(gate).clamp(max=1) * up

    refused(use_experts_implementation(ClampedExperts)(Config()), "ClampedExperts are not: use .*grouped_mm")


def test_plain_experts_are_taken() -> None:
    class Experts(PlainExperts):
        def forward(self) -> None: ...

    experts = use_experts_implementation(Experts)(Config())
    assert dispatch.expert_weights(experts) == ("swiglu", [experts.gate_up_proj, experts.down_proj])


def test_an_activation_without_a_known_derivative_is_refused() -> None:
    model = their_model(CONFIGS["mixtral"](hidden_act="mish"), "ragged")
    with pytest.raises(ValueError, match="knows hidden_act silu, gelu, .*got Mish.*: use .*grouped_mm"):
        model(tokens(2, 9))


def test_activations_are_recognised_by_what_they_compute() -> None:
    """Whatever a configuration calls it: `swish` is `silu`."""
    inputs = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    for kind, name in ragged.ACTIVATION_NAMES.items():
        expected = ACTIVATIONS[name](inputs)
        torch.testing.assert_close(kind()(inputs), expected)
        activation = ragged.ACTIVATIONS[name]
        torch.testing.assert_close(activation.forward(inputs), expected)
        smooth = inputs.detach() != 0
        (grad,) = torch.autograd.grad(expected.sum(), inputs)
        ones = torch.ones_like(inputs)
        torch.testing.assert_close(activation.backward(ones, inputs.detach())[smooth], grad[smooth])
    assert set(ragged.ACTIVATION_NAMES.values()) == set(ragged.ACTIVATIONS)
