"""Attention through every backend: the same logits and the same experts, for every mask."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_model, tokens

BACKENDS = ("sdpa", "flex_attention")
CONTENT = tokens(2, 12)
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


def padding(side: str) -> Tensor:
    mask = torch.ones_like(CONTENT)
    mask[0, slice(0, 3) if side == "left" else slice(9, 12)] = 0
    return mask


@torch.no_grad()
def run(method: str, backend: str, mask: Any = None, **changes: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits and expert ids; of real tokens only, if a mask says which they are."""
    model = tiny_model(method, attn_implementation=backend, **changes)
    assert model.config._attn_implementation == backend
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes half a minute a mask
        output = model(CONTENT, attention_mask=mask, output_routing=True, use_cache=False)
    ids = [routing.expert_ids.view(2, 12, -1) for routing in output.routing if routing is not None]
    is_padding_mask = isinstance(mask, Tensor) and mask.ndim == 2
    real = mask.bool() if is_padding_mask else torch.ones(2, 12, dtype=torch.bool)
    return output.logits[real], [expert_ids[real] for expert_ids in ids]


def agree(first: tuple[Tensor, list[Tensor]], second: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=1e-4, atol=1e-5)
    for expected, found in zip(first[1], second[1], strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_backends_agree(method: str, side: str, windows: bool) -> None:
    mask = padding(side)
    changes = {"sliding_window": 4, "layer_types": WINDOWS} if windows else {}
    expected = run(method, "eager", mask, **changes)
    for backend in BACKENDS:
        agree(expected, run(method, backend, mask, **changes))


@pytest.mark.parametrize("qk_norm", ["none", "per_head", "full"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"sliding_window": 4}, {"head_dim": 10}], ids=str)
def test_variants_agree(qk_norm: str, changes: dict[str, Any]) -> None:
    expected = run("top_p", "eager", padding("left"), qk_norm=qk_norm, **changes)
    agree(expected, run("top_p", "sdpa", padding("left"), qk_norm=qk_norm, **changes))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
def test_masks_of_four_dimensions(method: str, backend: str) -> None:
    """True where a key is visible, or a number that is added; with a hole that no other mask can say."""
    visible = torch.ones(12, 12).tril().bool()
    added = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    causal = run(method, "eager")
    agree(causal, run(method, backend, visible.expand(2, 1, 12, 12)))
    agree(causal, run(method, backend, added.expand(2, 1, 12, 12)))
    visible[7:, 2] = False
    added = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    holes = run(method, backend, visible.expand(2, 1, 12, 12))
    agree(holes, run(method, "eager", added.expand(2, 1, 12, 12)))
    with pytest.raises(AssertionError):
        agree(causal, holes)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_agree(method: str) -> None:
    gradients = []
    for backend in ("eager", "sdpa"):
        model = tiny_model(method, attn_implementation=backend).train()
        model(CONTENT, attention_mask=padding("right"), labels=CONTENT).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_backend_is_chosen_by_name_at_any_time(method: str) -> None:
    model = tiny_model(method, attn_implementation="eager")
    expected = model(CONTENT, output_attentions=True)
    assert [probs.shape for probs in expected.attentions] == [(2, 4, 12, 12)] * 3
    for probs in expected.attentions:
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 12))
        assert not probs.triu(1).any()
    model.set_attn_implementation("sdpa")
    output = model(CONTENT, output_attentions=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert not output.attentions  # it computes none, and transformers warns


def test_dropout_of_attention() -> None:
    """It acts in training only."""
    for backend in ("eager", "sdpa"):
        model = tiny_model("top_k", attn_implementation=backend, attention_dropout=0.5)
        evaluated = model(CONTENT).logits
        assert torch.equal(model(CONTENT).logits, evaluated)
        assert not torch.allclose(model.train()(CONTENT).logits, evaluated)
