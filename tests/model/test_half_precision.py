"""bfloat16 and float16: close to float32, trainable, under autocast too."""

import copy

import pytest
import torch

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_model, tokens

HALF = [torch.bfloat16, torch.float16]
SPREADS = (0.02, 0.2)
CONTENT = tokens(4, 12)


def same_experts(first: DynMoeForCausalLM, second: DynMoeForCausalLM) -> float:
    """Share of (token, expert) decisions that are equal, of the router with the fewest."""
    pairs = zip(first.routing, second.routing, strict=True)
    shares = [(one.selected() == two.selected()).float().mean() for one, two in pairs if one is not None]
    return min(shares).item()


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_close_to_float32(method: str, dtype: torch.dtype, spread: float) -> None:
    """The float32 model has the rounded weights, so only the computation differs."""
    model = tiny_model(method, "ragged", initializer_range=spread).to(dtype).train()
    exact = copy.deepcopy(model).float()
    output = model(CONTENT, labels=CONTENT, output_routing=True)
    expected = exact(CONTENT, labels=CONTENT, output_routing=True)
    assert output.logits.dtype == dtype
    assert same_experts(output, expected) > 0.95
    assert abs(output.lm_loss - expected.lm_loss) < 0.02 * expected.lm_loss
    for name, value in expected.aux_losses.items():
        torch.testing.assert_close(output.aux_losses[name], value, rtol=0.05, atol=1e-3, msg=name)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_a_dtype(method: str, dtype: torch.dtype) -> None:
    ways = [lambda model: model.to(dtype), lambda model: model.to("cpu", dtype)]
    ways.append(torch.nn.Module.bfloat16 if dtype == torch.bfloat16 else torch.nn.Module.half)
    for way in ways:
        model = way(tiny_model(method))
        # Thresholds that move by small steps, and the frequencies of positions, would be others in 16 bits.
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
        assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.dtype == dtype
        assert model(CONTENT).logits.dtype == dtype
        back = model.float()
        assert back(CONTENT).logits.dtype == torch.float32
        for name, buffer in tiny_model(method).named_buffers():
            assert torch.equal(back.get_buffer(name), buffer), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_and_a_cache(method: str, dtype: torch.dtype) -> None:
    """A row of nothing but padding in half precision, where masks hold the smallest number there is."""
    model = tiny_model(method).to(dtype)
    mask = torch.ones_like(CONTENT)
    mask[0, :5] = 0
    mask[1] = 0
    output = model(CONTENT, attention_mask=mask, use_cache=True)
    assert output.logits.isfinite().all()
    longer = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
    step = model(CONTENT[:, :1], attention_mask=longer, past_key_values=output.past_key_values)
    assert step.logits.dtype == dtype and step.logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_learns(method: str) -> None:
    """Weights, gradients and optimizer in float32, products in bfloat16."""
    model = tiny_model(method, "ragged").train()
    content = tokens(2, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(content, labels=content)
        assert output.logits.dtype == torch.bfloat16
        optimizer.zero_grad()
        output.loss.backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
        optimizer.step()
        losses.append(output.lm_loss.item())
    assert losses[-1] < 0.5 * losses[0]
