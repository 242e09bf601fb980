"""Activation checkpointing changes the memory of a training step, and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe_hf import DynMoeForCausalLM, DynMoeForTokenClassification
from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_config, tiny_model, tokens

CONTENT = tokens(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
LABELS = CONTENT.masked_fill(MASK == 0, -100)
LOSSES = {"load_balance": 1.0, "dynamic": 0.5, "router_z": 0.1}


def step(model: Any, checkpointing: dict[str, Any] | None, labels: Tensor) -> dict[str, Tensor]:
    """Losses, gradients, and what the controller was told, of one training step."""
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
    torch.manual_seed(3)  # of the dropout
    output = model(CONTENT, attention_mask=MASK, labels=labels)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "lm_loss": output.lm_loss.detach()}
    found |= {name: value.detach() for name, value in output.aux_losses.items()}
    assert all(parameter.grad is not None for parameter in model.parameters())
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    controller = model.base_model.controller
    if controller is not None:
        found["counts"] = controller.counts
        assert controller.counts[-1] == MASK.sum() and controller.num_calls == 1
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("engine", ["eager", "ragged", "grouped_mm"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients(method: str, engine: str) -> None:
    def build() -> DynMoeForCausalLM:
        return tiny_model({"method": method, "losses": LOSSES}, engine, attention_dropout=0.2)

    expected = step(build(), None, LABELS)
    gates = [name for name in expected if ".gate." in name]
    assert all(expected[name].abs().sum() > 0 for name in gates)
    for reentrant in (False, True):
        same(step(build(), {"use_reentrant": reentrant}, LABELS), expected)


@pytest.mark.parametrize("method", METHODS)
def test_heads(method: str) -> None:
    results = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        torch.manual_seed(0)
        model = DynMoeForTokenClassification(tiny_config({"method": method, "losses": LOSSES}, num_labels=3))
        results.append(step(model, checkpointing, torch.where(MASK == 1, CONTENT % 3, -100)))
    same(results[1], results[0])
    same(results[2], results[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_the_losses_alone(method: str, reentrant: bool) -> None:
    """Re-entrant checkpointing detaches what a hook records; here the layer returns it."""
    gradients = []
    for enabled in (False, True):
        model = tiny_model({"method": method, "losses": {"load_balance": 1.0}}).train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(CONTENT, labels=CONTENT)
        (output.loss - output.lm_loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if ".mlp." in name})
    first = {name: gradient for name, gradient in gradients[0].items() if gradient is not None}
    assert sum(gradient.abs().sum() for gradient in first.values()) > 0
    for name, gradient in first.items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_it_can_be_switched_off_and_is_off_in_evaluation() -> None:
    model = tiny_model("top_p")
    expected = model(CONTENT).logits
    model.gradient_checkpointing_enable()
    assert torch.equal(model(CONTENT).logits, expected)
    assert model(CONTENT, use_cache=True).past_key_values.get_seq_length() == 8
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
