"""Every engine equals the reference, forward and gradients, for any Routing, in both forms of a call."""

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from dynmoe_hf.model import dispatch, ragged
from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.model.modeling_dynmoe import DynMoeExperts
from dynmoe_hf.model.routing import Routing
from tests.tiny import ENGINES, tiny_config, tiny_model, tokens

FORMS = {"flat": dispatch.run_flat, "padded": dispatch.run_padded}


def make_experts(engine: str, num_experts: int) -> DynMoeExperts:
    config = tiny_config(num_experts=num_experts, num_experts_per_tok=1, experts_implementation=engine)
    experts = DynMoeExperts(config)
    generator = torch.Generator().manual_seed(7)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return experts


def make_routing(used: Tensor, seed: int = 0) -> Routing:
    """A Routing in which token t uses the experts marked in row t of a (T, E) mask."""
    num_tokens, num_experts = used.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)
    ids = order.masked_fill(~used.gather(1, order), num_experts)
    weights = torch.rand(num_tokens, num_experts, generator=generator).masked_fill(ids == num_experts, 0.0)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    return Routing(ids, weights.requires_grad_(), logits, logits.softmax(-1))


def plain_loop(experts: DynMoeExperts, hidden: Tensor, routing: Routing) -> Tensor:
    """One token and one expert at a time, in float64."""
    rows = []
    for token in range(hidden.shape[0]):
        row = torch.zeros(hidden.shape[1], dtype=torch.float64)
        for slot, expert in enumerate(routing.expert_ids[token].tolist()):
            if expert < routing.num_experts:
                gate, up = (experts.gate_up_proj[expert].double() @ hidden[token].double()).chunk(2)
                output = experts.down_proj[expert].double() @ (gate * torch.sigmoid(gate) * up)
                row = row + routing.weights[token, slot].double() * output
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, hidden.shape[1], dtype=torch.float64)


def compare(engine: str, form: str, used: Tensor, hidden: Tensor | None = None) -> None:
    num_tokens, num_experts = used.shape
    results = []
    for name, run in (("plain", plain_loop), (engine, FORMS[form])):
        experts = make_experts(engine if name != "plain" else "eager", num_experts)
        inputs = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(2)) if hidden is None else hidden
        inputs = inputs.detach().requires_grad_()
        routing = make_routing(used)
        output = run(experts, inputs, routing)
        probe = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(5))
        if output.requires_grad:
            (output * probe).sum().backward()
        assert form == "padded" or name == "plain" or all(weight.grad is not None for weight in experts.parameters())
        leaves = [inputs, routing.weights, experts.gate_up_proj, experts.down_proj]
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append((output, gradients))
    (expected, expected_gradients), (output, gradients) = results
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    unused = ~make_routing(used).used
    for index, (gradient, reference) in enumerate(zip(gradients, expected_gradients, strict=True)):
        if index == 1:
            # A padded call cannot help giving a gradient to the weight of an unused slot; the selector's mask drops it.
            gradient, reference = gradient.masked_fill(unused, 0.0), reference.masked_fill(unused, 0.0)
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_routing(engine: str, form: str, data: st.DataObject) -> None:
    num_tokens, num_experts = data.draw(st.integers(1, 7)), data.draw(st.sampled_from([1, 2, 5]))
    rows = st.lists(st.booleans(), min_size=num_experts, max_size=num_experts)
    used = torch.tensor(data.draw(st.lists(rows, min_size=num_tokens, max_size=num_tokens)))
    compare(engine, form, used)


CORNERS: dict[str, Any] = {
    "nobody": torch.zeros(5, 4, dtype=torch.bool),
    "everybody": torch.ones(5, 4, dtype=torch.bool),
    "one expert takes all": torch.tensor([[False, False, True, False]] * 5),
    "one token takes all": torch.tensor([[False] * 4, [True] * 4, [False] * 4]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("corner", CORNERS)
def test_corners(engine: str, form: str, corner: str) -> None:
    compare(engine, form, CORNERS[corner])


@pytest.mark.parametrize("engine", ENGINES)
def test_no_tokens(engine: str) -> None:
    experts = make_experts(engine, 4)
    hidden = torch.zeros(0, 32, requires_grad=True)
    routing = make_routing(torch.zeros(0, 4, dtype=torch.bool))
    for fills_every_slot in (False, True):
        output = dispatch.run_experts(experts, hidden, routing, engine, fills_every_slot)
        assert output.shape == (0, 32)
        output.sum().backward()
        assert all(parameter.grad is not None for parameter in experts.parameters())


@pytest.mark.parametrize("engine", dispatch.ENGINES)
@pytest.mark.parametrize("used", CORNERS.values(), ids=CORNERS)
def test_own_engines_skip_the_experts_of_other_processes(engine: str, used: Tensor) -> None:
    """Expert parallelism of transformers calls an engine with the id E and weight 0 in the place of such an expert."""
    experts, hidden = make_experts(engine, 4), torch.randn(used.shape[0], 32, requires_grad=True)
    routing = make_routing(used)
    output = experts(hidden, routing.expert_ids, routing.weights)
    torch.testing.assert_close(output.double(), plain_loop(experts, hidden, routing), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_that_are_not_contiguous(engine: str) -> None:
    used = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    compare(engine, "flat", used, hidden=torch.randn(32, 6, generator=torch.Generator().manual_seed(3)).t())


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_is_no_worse_than_the_plain_loop(engine: str) -> None:
    used = torch.rand(40, 8, generator=torch.Generator().manual_seed(1)) > 0.6
    routing = make_routing(used)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    routing = routing._replace(weights=routing.weights.detach().bfloat16())
    experts = make_experts(engine, 8).bfloat16()
    exact = plain_loop(experts, hidden, routing)
    eager = dispatch.run_flat(make_experts("eager", 8).bfloat16(), hidden, routing)
    output = dispatch.run_flat(experts, hidden, routing)
    assert output.dtype == torch.bfloat16
    error = (output.double() - exact).norm() / exact.norm()
    assert error < 1.5 * (eager.double() - exact).norm() / exact.norm() + 1e-3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("routing", METHODS)
def test_autocast_trains(engine: str, routing: str) -> None:
    model = tiny_model(routing, engine).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens(2, 8), labels=tokens(2, 8))
    output.loss.backward()
    exact = tiny_model(routing, "reference").train()
    exact_loss = exact(tokens(2, 8), labels=tokens(2, 8)).loss
    torch.testing.assert_close(output.loss, exact_loss, rtol=2e-2, atol=2e-2)
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("routing", METHODS)
def test_whole_model_equals_the_reference(engine: str, routing: str) -> None:
    content = tokens(2, 9)
    mask = torch.ones_like(content)
    mask[0, :4] = 0
    results = []
    for name in ("reference", engine):
        model = tiny_model(routing, name)
        output = model(content, attention_mask=mask, labels=content.masked_fill(mask == 0, -100))
        output.loss.backward()
        results.append((output, {key: value.grad for key, value in model.named_parameters()}))
    (expected, expected_gradients), (output, gradients) = results
    torch.testing.assert_close(output.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-5, msg=key)


def test_engines_of_transformers_see_the_used_pairs_only() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            seen.append(tuple(ids.shape))
            return hidden * weights

    used = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    dispatch.run_flat(Spy(), torch.randn(3, 8), make_routing(used))
    assert seen == [(5, 1)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("engine", ["eager", *dispatch.RAGGED])
def test_experts_per_token_equals_the_expert_calls(engine: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where an expert multiplies its rows, in each layer."""
    model = tiny_model("da_moe", engine)
    calls: list[list[int]] = []

    def count(ffn: Callable[..., Tensor], first: Any, rows: Tensor, *rest: Any) -> Tensor:
        calls[-1].append(rows.shape[0])
        return ffn(first, rows, *rest)

    for block in model.moe_blocks():
        monkeypatch.setattr(block.experts, "expert_ffn", partial(count, block.experts.expert_ffn))
        block.experts.register_forward_pre_hook(lambda *_: calls.append([]))
    part = staticmethod(partial(count, ragged.SwigluLayout.forward))
    monkeypatch.setattr(ragged.SwigluLayout, "forward", part)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, : 5 if padded else 0] = 0
    output = model(tokens(2, 12), attention_mask=mask if padded else None, output_routing=True)
    expected = [sum(rows) / mask.sum().item() for rows in calls]
    assert output.experts_per_token.tolist() == pytest.approx(expected)
    assert 1 < output.experts_per_token.min() and output.experts_per_token.max() < 8


def test_an_engine_is_chosen_by_name_at_any_time() -> None:
    model = tiny_model("top_p", "eager")
    content = tokens(1, 6)
    expected = model(content).logits
    for engine in ENGINES:
        model.set_experts_implementation(engine)
        assert model.config._experts_implementation == engine
        torch.testing.assert_close(model(content).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises((ValueError, KeyError)):
        model.set_experts_implementation("no_such_engine")
