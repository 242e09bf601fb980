"""Properties that top-p routing has for any logits and any threshold (Huang et al. 2024, arXiv 2403.07652)."""

from itertools import accumulate
from math import log
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.expert_selectors import TopP, TopPOptions
from dynmoe_hf.model.losses import TokenWeights, entropy, load_balance
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock, build_experts
from dynmoe_hf.model.routing import Routing, RoutingContext
from tests.tiny import ENGINES, greedy, tiny_config, tiny_model, tokens

CONTEXT = RoutingContext(0)
ROUNDING = 1e-6
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)

thresholds = st.one_of(st.floats(0.0, 0.999), st.sampled_from([0.0, 0.25, 0.5, 0.75]))


@st.composite
def logit_rows(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Tensor:
    """(T, E) logits from flat to one-hot. Multiples of 1/4, so that equal experts are common and shifts are exact."""
    num_experts = draw(st.integers(2, 10))
    scale = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return (4 * scale * torch.randn(16, num_experts, generator=generator)).round().to(dtype) / 4


def route(logits: Tensor, **options: Any) -> Routing:
    config = DynMoeConfig(num_experts=logits.shape[-1], routing={"method": "top_p", "selector": options})
    return TopP(TopPOptions(**options), config)(logits, CONTEXT)


def kept(logits: Tensor, **options: Any) -> Tensor:
    return route(logits, **options).selected().bool()


def plain_choice(probs: list[float], p: float, cap: int) -> list[int]:
    """The rule as the paper words it: add experts, the most probable first, until their sum exceeds p."""
    order = sorted(range(len(probs)), key=lambda expert: (-probs[expert], expert))
    sums = accumulate(probs[expert] for expert in order)
    needed = next((count for count, mass in enumerate(sums, start=1) if mass > p), len(probs))
    return order[: min(needed, cap)]


@PROPERTY
@given(logits=logit_rows(torch.float64), p=thresholds, data=st.data())
def test_choice_and_weights_follow_the_rule(logits: Tensor, p: float, data: st.DataObject) -> None:
    num_experts = logits.shape[-1]
    cap = data.draw(st.integers(1, num_experts))
    renormalised = data.draw(st.booleans())
    routing = route(logits, p=p, max_experts=cap, norm_topk_prob=renormalised)
    assert routing.expert_ids.shape == routing.weights.shape == (len(logits), cap)
    for token, probs in enumerate(logits.softmax(-1).tolist()):
        experts = plain_choice(probs, p, cap)
        unused = cap - len(experts)
        assert routing.expert_ids[token].tolist() == [*experts, *[num_experts] * unused]
        weights = [probs[expert] for expert in experts]
        if renormalised:
            weights = [weight / sum(weights) for weight in weights]
        assert routing.weights[token].tolist() == pytest.approx([*weights, *[0.0] * unused], rel=1e-12)


@PROPERTY
@given(logits=logit_rows())
def test_one_expert_for_zero_and_all_for_more_than_one(logits: Tensor) -> None:
    most_probable = logits.softmax(-1).argmax(-1, keepdim=True)
    assert torch.equal(route(logits, p=0).expert_ids[:, :1], most_probable)
    assert (route(logits, p=0).num_selected == 1).all()
    assert (route(logits, p=1.5).num_selected == logits.shape[-1]).all()


def test_all_experts_for_exactly_one() -> None:
    logits = 10 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert (route(logits, p=1.0).num_selected == 8).all()


@PROPERTY
@given(logits=logit_rows(), first=thresholds, second=thresholds)
def test_kept_sets_are_nested_in_the_threshold(logits: Tensor, first: float, second: float) -> None:
    smaller, larger = kept(logits, p=min(first, second)), kept(logits, p=max(first, second))
    assert (smaller <= larger).all()
    assert smaller.any(-1).all()


@PROPERTY
@given(logits=logit_rows(), p=thresholds)
def test_kept_mass_exceeds_the_threshold_by_the_last_expert(logits: Tensor, p: float) -> None:
    routing = route(logits, p=p)
    mass = routing.weights.sum(-1)
    last = routing.weights.gather(-1, routing.num_selected[:, None] - 1)[:, 0]
    assert (mass > p - ROUNDING).all()
    several = routing.num_selected > 1
    assert (mass[several] - last[several] <= p + ROUNDING).all()


@PROPERTY
@given(logits=logit_rows(), p=thresholds, shift=st.integers(-200, 200))
def test_a_constant_on_a_row_changes_nothing(logits: Tensor, p: float, shift: int) -> None:
    before, after = route(logits, p=p), route(logits + shift, p=p)
    assert torch.equal(before.expert_ids, after.expert_ids)
    assert torch.equal(before.weights, after.weights)


@PROPERTY
@given(logits=logit_rows(torch.float64), p=st.floats(0.0, 0.999), seed=st.integers(0, 2**20))
def test_permuting_experts_permutes_the_choice(logits: Tensor, p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Ties go by index, so equal experts are moved apart first.
    logits = logits + 0.01 * torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    permutation = torch.randperm(logits.shape[-1], generator=generator)
    permuted = kept(logits[:, permutation], p=p)
    assert torch.equal(permuted, kept(logits, p=p)[:, permutation])


@PROPERTY
@given(logits=logit_rows(), p=thresholds)
def test_weights_are_the_probabilities_of_the_kept_experts(logits: Tensor, p: float) -> None:
    routing = route(logits, p=p)
    own = routing.probs.gather(-1, routing.expert_ids.clamp(max=logits.shape[-1] - 1))
    assert torch.equal(routing.weights, own.masked_fill(~routing.used, 0.0))
    torch.testing.assert_close(routing.probs, logits.softmax(-1), rtol=0, atol=0)
    left_out = routing.probs.masked_fill(routing.selected().bool(), 0.0).sum(-1)
    torch.testing.assert_close(routing.weights.sum(-1), 1 - left_out, rtol=0, atol=ROUNDING)
    ones = torch.ones(len(logits))
    torch.testing.assert_close(route(logits, p=p, norm_topk_prob=True).weights.sum(-1), ones)


@PROPERTY
@given(logits=logit_rows(torch.float64), p=st.floats(0.0, 0.999), temperature=st.floats(1.0, 50.0))
def test_a_higher_temperature_never_keeps_fewer(logits: Tensor, p: float, temperature: float) -> None:
    sharp, flat = route(logits, p=p).num_selected, route(logits / temperature, p=p).num_selected
    assert (flat >= sharp).all()


@PROPERTY
@given(logits=logit_rows(), p=thresholds, data=st.data())
def test_a_cap_is_the_intersection_with_top_k(logits: Tensor, p: float, data: st.DataObject) -> None:
    num_experts = logits.shape[-1]
    cap = data.draw(st.integers(1, num_experts))
    best = logits.softmax(-1).argsort(dim=-1, descending=True, stable=True)[:, :cap]
    top_k = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, best, True)
    expected = kept(logits, p=p) & top_k
    assert torch.equal(kept(logits, p=p, max_experts=cap), expected)
    config = DynMoeConfig(num_experts=num_experts, num_experts_per_tok=cap, routing="top_p")
    by_config = TopP(TopPOptions(p=p), config)(logits, CONTEXT)
    assert torch.equal(by_config.selected().bool(), expected)


def upstream(logits: Tensor, seed: int) -> Tensor:
    """(T, E) float64, what each expert's output is worth to the loss: s_e = <u, FFN_e(x)>."""
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@PROPERTY
@given(logits=logit_rows(torch.float64), p=thresholds, seed=st.integers(0, 2**20))
def test_gradient_of_the_logits(logits: Tensor, p: float, seed: int) -> None:
    """`P_e (s_e - sum_i P_i s_i)` with s of the kept experts only: dropped experts have a gradient too."""
    logits = logits.requires_grad_()
    routing = route(logits, p=p)
    value = F.pad(upstream(logits, seed), (0, 1))
    (routing.weights * value.gather(-1, routing.expert_ids)).sum().backward()
    probs = logits.detach().softmax(-1)
    worth = value[:, :-1] * routing.selected()
    expected = probs * (worth - (probs * worth).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropped_experts_train_the_router_unless_renormalised(p: float, renormalised: bool) -> None:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    routing = route(logits, p=p, norm_topk_prob=renormalised)
    value = F.pad(upstream(logits, 1), (0, 1))
    (routing.weights * value.gather(-1, routing.expert_ids)).sum().backward()
    selected = routing.selected().bool()
    dropped, single = logits.grad[~selected].abs(), logits.grad[routing.num_selected == 1].abs()
    assert len(dropped) and len(single)
    if renormalised:
        # Zero by algebra; what is left is the rounding of the softmax's backward.
        assert dropped.max() < 1e-15 and single.max() < 1e-15
    else:
        assert dropped.min() > 1e-6 and single.min() > 1e-6


@pytest.mark.parametrize("renormalised", [False, True])
def test_a_single_expert_trains_the_gate_unless_renormalised(renormalised: bool) -> None:
    selector = {"p": 0.0, "norm_topk_prob": renormalised}
    model = tiny_model({"method": "top_p", "selector": selector, "losses": {"load_balance": 0.0, "dynamic": 0.0}})
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    for block in model.moe_blocks():
        size = block.gate.weight.grad.abs().max()
        assert size < 1e-7 if renormalised else size > 1e-4


def one_sequence(num_tokens: int) -> TokenWeights:
    return TokenWeights.build(None, None, (1, num_tokens), torch.device("cpu"))


@pytest.mark.parametrize("num_experts", [2, 8, 13])
def test_entropy_between_zero_and_the_logarithm_of_the_experts(num_experts: int) -> None:
    flat = route(torch.zeros(5, num_experts))
    assert entropy(flat, one_sequence(5)).item() == pytest.approx(log(num_experts), abs=1e-6)
    for scale in (20.0, 200.0):
        logits = (scale * torch.eye(num_experts)).requires_grad_()
        loss = entropy(route(logits), one_sequence(num_experts))
        assert 0 <= loss.item() < 1e-5
        loss.backward()
        assert logits.grad.isfinite().all()


@PROPERTY
@given(logits=logit_rows(), p=thresholds)
def test_perfect_balance_costs_the_mean_number_of_experts(logits: Tensor, p: float) -> None:
    """Every token's row in all its rotations: then usage and mean probability are the same for every expert."""
    num_experts = logits.shape[-1]
    row = logits[0] + 0.001 * torch.arange(num_experts)
    routing = route(torch.stack([row.roll(step) for step in range(num_experts)]), p=p)
    assume(routing.num_selected.unique().numel() == 1)
    mean = routing.num_selected.float().mean()
    for scope in ("sequence", "micro"):
        paper = load_balance([routing], one_sequence(num_experts), scope=scope)
        torch.testing.assert_close(paper, mean[None], rtol=1e-5, atol=0)
        normalised = load_balance([routing], one_sequence(num_experts), scope=scope, normalize=True)
        torch.testing.assert_close(normalised, torch.ones(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.4, 0.8, 1.5])
def test_content_of_padding_changes_no_loss_and_no_statistic(p: float) -> None:
    model = tiny_model({"method": "top_p", "selector": {"p": p}})
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    content, other = tokens(2, 9), tokens(2, 9, seed=5)
    other[mask == 1] = content[mask == 1]
    outputs = [model(part, attention_mask=mask, output_routing=True) for part in (content, other)]
    assert outputs[0].aux_losses.keys() == {"load_balance", "dynamic"}
    for name, value in outputs[0].aux_losses.items():
        torch.testing.assert_close(value, outputs[1].aux_losses[name], rtol=1e-6, atol=0)
    assert torch.equal(outputs[0].experts_per_token, outputs[1].experts_per_token)
    assert (outputs[0].experts_per_token >= 1).all()


def test_order_and_size_of_a_batch_leave_the_routing_alone() -> None:
    model = tiny_model("top_p")
    content = tokens(6, 7)
    together = model(content, output_routing=True).routing
    order = [3, 0, 5, 1]
    reordered = model(content[order], output_routing=True).routing
    for first, second in zip(together, reordered, strict=True):
        if first is not None:
            assert torch.equal(first.expert_ids.view(6, 7, -1)[order], second.expert_ids.view(4, 7, -1))


def test_cached_generation_equals_the_full_forward() -> None:
    model = tiny_model("top_p")
    prompt = tokens(2, 5)
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, greedy(model, prompt, 6))


def ragged_block(engine: str) -> tuple[DynMoeBlock, Tensor]:
    """A block and hidden states whose tokens use from one expert to all of them."""
    model = tiny_model({"method": "top_p", "selector": {"p": 0.8}}, engine, num_shared_experts=0)
    hidden_states = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    return model.moe_blocks()[0], hidden_states * torch.logspace(-3, 1, 24)[:, None]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_with_one_to_all_experts_a_token(engine: str) -> None:
    block, hidden_states = ragged_block(engine)
    inputs = hidden_states.clone().requires_grad_()
    output, routing = block(inputs[None], CONTEXT)
    assert {1, 4, 7} <= set(routing.num_selected.tolist())
    exact = inputs.detach().double().requires_grad_()
    gate, gate_up, down = (
        tensor.detach().double().requires_grad_()
        for tensor in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    )
    halves = torch.einsum("td,eid->tei", exact, gate_up).chunk(2, dim=-1)
    experts = torch.einsum("tei,edi->ted", F.silu(halves[0]) * halves[1], down)
    weights = (exact @ gate.T).softmax(-1) * routing.selected()
    expected = torch.einsum("te,ted->td", weights, experts)
    torch.testing.assert_close(output[0].double(), expected, rtol=1e-4, atol=1e-5)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (output[0] * probe).sum().backward()
    (expected * probe).sum().backward()
    ours = (inputs, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    for tensor, reference in zip(ours, (exact, gate, gate_up, down), strict=True):
        largest = reference.grad.abs().max().item()
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-4, atol=1e-5 * largest)


def test_permuting_the_experts_of_a_block_leaves_its_output() -> None:
    block, hidden_states = ragged_block("eager")
    before, _ = block(hidden_states[None], CONTEXT)
    permutation = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    with torch.no_grad():
        for parameter in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
            parameter.copy_(parameter[permutation].clone())
    after, _ = block(hidden_states[None], CONTEXT)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"p": -0.1}, "p must be"),
        ({"p": float("nan")}, "p must be"),
        ({"p": "0.4"}, "'p'"),
        ({"p": None}, "only a controller can set"),
        ({"p": True}, "'p'"),
        ({"max_experts": 0}, "max_experts must be between 1 and num_experts"),
        ({"max_experts": 9}, "max_experts must be between 1 and num_experts"),
        ({"max_experts": 2.0}, "'max_experts'"),
        ({"norm_topk_prob": "yes"}, "'norm_topk_prob'"),
    ],
)
def test_refused_options(selector: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynMoeConfig(num_experts=8, routing={"method": "top_p", "selector": selector})


@pytest.mark.parametrize("cap", [0, 9])
def test_refused_number_of_experts_per_token(cap: int) -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok must be between 1 and num_experts"):
        DynMoeConfig(num_experts=8, num_experts_per_tok=cap, routing="top_p")


def test_router_dtype_model_selects_in_the_dtype_of_the_hidden_states() -> None:
    routing = {"method": "top_p", "selector": {"p": 0.4}}
    torch.manual_seed(0)
    blocks = {}
    for router_dtype in ("model", "float32"):
        config = tiny_config(routing, num_experts=16, hidden_size=64, router_dtype=router_dtype)
        block = DynMoeBlock(config, 0, build_experts)
        blocks[router_dtype] = block.to(torch.bfloat16)
    with torch.no_grad():
        for block in blocks.values():
            block.gate.weight.copy_(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) / 8)
    hidden_states = torch.randn(3000, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    ours, in_float32 = (block.route(hidden_states, CONTEXT) for block in blocks.values())

    weight = blocks["model"].gate.weight
    probs = (hidden_states.float() @ weight.float().T).to(torch.bfloat16).softmax(-1)
    descending, order = probs.sort(dim=-1, descending=True, stable=True)
    exceeds = descending.cumsum(-1) > 0.4
    needed = torch.where(exceeds.any(-1), exceeds.int().argmax(-1) + 1, 16)
    dropped = torch.arange(16) >= needed[:, None]
    assert probs.dtype == descending.dtype == torch.bfloat16
    assert torch.equal(ours.expert_ids, order.masked_fill(dropped, 16))
    assert torch.equal(ours.weights, descending.masked_fill(dropped, 0))
    assert torch.equal(ours.probs, probs.float())
    assert ours.logits.dtype == torch.float32
    assert not torch.equal(ours.expert_ids, in_float32.expert_ids)
