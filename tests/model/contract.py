"""The seven rules of the routing contract, each as a check that raises AssertionError when it is broken.

`test_contract.py` runs them over every registered part and preset; `test_contract_sabotage.py` shows that each of them
notices a part that breaks it.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.model.losses import LOSSES
from dynmoe_hf.model.routing import Routing, RoutingContext
from tests.tiny import tiny_model, tokens

PADDING = 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def hidden_states(config: Any, num_tokens: int, seed: int = 3) -> Tensor:
    return torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def context_for(model: DynMoeForCausalLM, block: Any, num_tokens: int, **fields: Any) -> RoutingContext:
    """A context that holds whatever the scorer and the selector of a block may read."""
    shared = model.model.shared_scorers
    scorer = block.spec["scorer"]["type"]
    importance = torch.rand(num_tokens, generator=torch.Generator().manual_seed(9))
    return RoutingContext(
        block.layer_idx,
        shared=shared[scorer] if scorer in shared else None,
        importance=importance,
        hidden_states=hidden_states(model.config, num_tokens),
        **fields,
    )


def check_slots(routing: Routing) -> None:
    num_experts = routing.num_experts
    assert routing.expert_ids.dtype == torch.int64
    assert routing.expert_ids.shape == routing.weights.shape
    assert ((routing.expert_ids >= 0) & (routing.expert_ids <= num_experts)).all()
    assert (routing.weights[~routing.used] == 0).all(), "an unused slot has a weight"
    for row in routing.expert_ids.tolist():
        used = [expert for expert in row if expert < num_experts]
        assert len(set(used)) == len(used), "an expert stands twice in a row"


def rule_1_slots_and_ties(routing: Any) -> None:
    """Weight 0 exactly where the slot is unused; ids unique in a row; ties go to the lower index."""
    model = tiny_model(routing)
    for block in model.moe_blocks():
        routed = block.route(hidden_states(model.config, 50), context_for(model, block, 50))
        check_slots(routed)
        assert (routed.weights[routed.used] > 0).all() or routed.probs.min() == 0, "a used slot has no weight"
        tied = torch.zeros(3, model.config.num_experts)
        tied[2, [2, 5]] = 1.0
        chosen = block.selector(tied, context_for(model, block, 3))
        check_slots(chosen)
        for row, order in zip(chosen.expert_ids, ([0, 1, 2], [0, 1, 2], [2, 5, 0]), strict=True):
            used = [expert for expert in row.tolist() if expert < model.config.num_experts]
            expected = order + [expert for expert in range(model.config.num_experts) if expert not in order]
            # Groups may forbid an expert, but never change the order among those that are left.
            left = [expert for expert in expected if expert in used]
            assert used == left, f"ties were not broken by index: {used}"
            if not getattr(block.selector.options, "num_groups", 1) > 1:
                assert used == expected[: len(used)], f"a tie went to a higher index: {used}"


def rule_2_float32(routing: Any) -> None:
    """Scores and everything after them in float32, whatever the dtype of the model; weights cast at the end."""
    model = tiny_model(routing).to(torch.bfloat16)
    exact_model = copy.deepcopy(model).float()
    for block, exact in zip(model.moe_blocks(), exact_model.moe_blocks(), strict=True):
        hidden = hidden_states(model.config, 200).to(torch.bfloat16)
        context = context_for(model, block, 200)
        exact_context = context_for(exact_model, exact, 200)
        if block.gate.reads_norms:
            # The experts work in the dtype of the model; the norms of what they give are taken in float32.
            activations = block.experts.project(hidden)[1].float()
            exact_context = exact_context._replace(expert_norms=torch.linalg.vector_norm(activations, dim=-1))
        expected = exact.route(hidden.float(), exact_context)
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                routed = block.route(hidden, context)
            assert routed.logits.dtype == routed.probs.dtype == torch.float32
            assert routed.weights.dtype == torch.bfloat16
            assert torch.equal(routed.logits, expected.logits), "scores were not computed in float32"
            assert torch.equal(routed.probs, expected.probs), "probabilities were not computed in float32"
            assert torch.equal(routed.expert_ids, expected.expert_ids), "the choice was not made in float32"
            assert torch.equal(routed.weights, expected.weights.to(torch.bfloat16)), "weights were rounded too early"
            for tensor in (routed.logits, routed.probs, expected.weights):
                assert not torch.equal(tensor, tensor.bfloat16().float()), "something was rounded to the model's dtype"


def rule_3_padding(routing: Any) -> None:
    """Padding selects nothing, counts in no loss and no statistic, and changes no other token's output."""
    model = tiny_model(routing_with_losses(routing))
    content = tokens(2, 9)
    for side in ("left", "right"):
        mask = torch.ones(2, 9, dtype=torch.long)
        padded = slice(0, PADDING) if side == "left" else slice(9 - PADDING, 9)
        mask[1, padded] = 0
        other = content.clone()
        other[1, padded] = tokens(PADDING, seed=8)
        labels = content.masked_fill(mask == 0, -100)
        first = model(content, attention_mask=mask, labels=labels, output_routing=True)
        second = model(other, attention_mask=mask, labels=labels, output_routing=True)
        real = mask.bool()
        torch.testing.assert_close(first.logits[real], second.logits[real], **TOLERANCE)
        for name, value in first.aux_losses.items():
            torch.testing.assert_close(value, second.aux_losses[name], **TOLERANCE)
        torch.testing.assert_close(first.experts_per_token, second.experts_per_token)
        for routed in sparse(first.routing):
            assert (routed.num_selected.view(2, 9)[~real] == 0).all(), "padding selected an expert"
            assert (routed.num_selected.view(2, 9)[real] > 0).all()
        alone = model(content[1:][:, real[1]], output_routing=True)
        torch.testing.assert_close(alone.logits[0], first.logits[1][real[1]], **TOLERANCE)


def rule_4_causal(routing: Any) -> None:
    """A prefix gives the same outputs alone and inside a longer sequence; cached decoding equals the full forward."""
    model = tiny_model(routing)
    content = tokens(2, 10)
    full = model(content, output_routing=True)
    prefix = model(content[:, :6], output_routing=True)
    torch.testing.assert_close(prefix.logits, full.logits[:, :6], **TOLERANCE)
    for short, long in zip(sparse(prefix.routing), sparse(full.routing), strict=True):
        same_choice(short.expert_ids.view(2, 6, -1), long.expert_ids.view(2, 10, -1)[:, :6])
    cached = model(content[:, :6], use_cache=True)
    steps = [cached.logits]
    for position in range(6, 10):
        cached = model(content[:, position : position + 1], past_key_values=cached.past_key_values, use_cache=True)
        steps.append(cached.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full.logits, **TOLERANCE)


def rule_5_batches_and_nothing(routing: Any) -> None:
    """Batch 1 and batch N agree; T = 0 works; when nobody selects anything, every parameter still has a gradient."""
    model = tiny_model(routing)
    content = tokens(4, 7)
    together = model(content, output_routing=True)
    for row in range(4):
        alone = model(content[row : row + 1], output_routing=True)
        torch.testing.assert_close(alone.logits[0], together.logits[row], **TOLERANCE)
        for one, many in zip(sparse(alone.routing), sparse(together.routing), strict=True):
            same_choice(one.expert_ids, many.expert_ids.view(4, 7, -1)[row])
    for block in model.moe_blocks():
        empty = torch.zeros(1, 0, model.config.hidden_size)
        output, routed = block(empty, context_for(model, block, 0))
        assert output.shape == empty.shape and routed.expert_ids.shape[0] == 0
        nobody = torch.zeros(6, dtype=torch.bool)
        hidden = hidden_states(model.config, 6)[None].requires_grad_()
        block.zero_grad()
        output, routed = block(hidden, context_for(model, block, 6, token_mask=nobody))
        assert not routed.used.any()
        selectors_own = 0.0 if routed.token_loss is None else routed.token_loss.nan_to_num().sum()
        (output.sum() + selectors_own).backward()
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient when nobody selects anything"
            assert "shared_experts" in name or not parameter.grad.any()


def rule_6_no_side_effects(routing: Any) -> None:
    """Forward changes nothing in the model, in training or evaluation, also when a layer is recomputed.

    But for a controller: a training forward is reported to it, once.
    """
    for training in (False, True):
        model = tiny_model(routing_with_losses(routing)).train(training)
        model.gradient_checkpointing_enable()
        before = module_state(model)
        content = tokens(2, 8)
        output = model(content, labels=content, output_routing=True)
        output.loss.backward()
        model.zero_grad()
        after = module_state(model)
        if training and model.model.controller is not None:
            check_counts(model, sparse(output.routing), after.pop("model.controller.counts"))
            assert after.pop("model.controller.num_calls") == 1
            before = {name: value for name, value in before.items() if name in after}
        assert before.keys() == after.keys(), f"forward left {before.keys() ^ after.keys()} behind"
        for name, value in before.items():
            assert same(value, after[name]), f"forward changed {name}"


def check_counts(model: DynMoeForCausalLM, routings: list[Routing], counts: Tensor) -> None:
    """The counts of a controller: experts, or pairs of them, that all tokens used in each layer; then the tokens."""
    used: dict[int, Tensor] = {}
    for block, routed in zip(model.moe_blocks(), routings, strict=True):
        used[block.layer_idx] = used.get(block.layer_idx, 1) * routed.num_selected
    expected = [layer.sum().item() for layer in used.values()] + [routings[0].logits.shape[0]]
    assert counts.tolist() == expected, "the controller was told other numbers than were routed"


def rule_7_checkpointing_and_modes(routing: Any) -> None:
    """The same loss, gradients and choice with and without gradient checkpointing, in train and eval mode."""
    content = tokens(2, 8)
    results = {}
    for name in ("eval", "plain", "non-reentrant", "reentrant"):
        model = tiny_model(routing_with_losses(routing)).train(name != "eval")
        if name.endswith("reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": name == "reentrant"})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        output = model(content, labels=content, output_routing=True)
        output.loss.backward()
        choice = [routed.expert_ids for routed in sparse(output.routing)]
        gradients = {key: value.grad for key, value in model.named_parameters()}
        results[name] = (output.loss.detach(), choice, gradients)
    loss, choice, gradients = results["plain"]
    for name, (other_loss, other_choice, other_gradients) in results.items():
        assert torch.equal(loss, other_loss), f"{name}: another loss"
        for first, second in zip(choice, other_choice, strict=True):
            assert torch.equal(first, second), f"{name}: another choice"
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[key], rtol=1e-6, atol=1e-7, msg=f"{name}: {key}")


RULES = [
    rule_1_slots_and_ties,
    rule_2_float32,
    rule_3_padding,
    rule_4_causal,
    rule_5_batches_and_nothing,
    rule_6_no_side_effects,
    rule_7_checkpointing_and_modes,
]


def routing_with_losses(routing: Any) -> dict[str, Any]:
    """The same routing with every loss on, so that a check sees all of them."""
    losses = dict.fromkeys(LOSSES, 0.1)
    return {**({"method": routing} if isinstance(routing, str) else routing), "losses": losses}


def sparse(routings: tuple[Routing | None, ...]) -> list[Routing]:
    return [routing for routing in routings if routing is not None]


def same_choice(first: Tensor, second: Tensor) -> None:
    assert torch.equal(first, second), "the choice of experts differs"


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


def module_state(model: DynMoeForCausalLM) -> dict[str, Any]:
    """Every tensor and every plain attribute of every module, by name."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor | int | float | str | bool | None):
                state[f"{path}.{name}"] = value.clone() if isinstance(value, Tensor) else value
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            state[f"{path}.{name}"] = value.detach().clone()
    return state
