"""Dropout inside of experts (Switch, arXiv 2101.03961, section 2.4): what it drops, when, and under every engine."""

import pytest
import torch

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.methods import METHODS
from tests.tiny import ENGINES, tiny_model, tokens

RATE = 0.4


def one_expert(engine: str, routing):
    """The experts of a layer whose output is their inner activation: `down_proj` is the identity."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_experts_per_tok": 1, "expert_dropout": RATE}
    experts = tiny_model(routing, engine, **sizes).moe_blocks()[0].experts
    with torch.no_grad():
        experts.down_proj.copy_(torch.eye(32))
    return experts


def call(experts, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(512, 32, generator=torch.Generator().manual_seed(seed))
    ids = (torch.arange(512) % experts.num_experts)[:, None]
    return experts(rows, ids, torch.ones(512, 1))


@pytest.mark.parametrize("routing", ["top_k", {"method": "aoe", "experts": {"intermediate_size": 32}}], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_inner_activations_are_dropped_in_training_and_the_kept_ones_scaled(engine: str, routing) -> None:
    experts = one_expert(engine, routing)
    torch.manual_seed(0)
    whole, dropped = call(experts.eval()), call(experts.train())
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(1 - RATE, abs=0.02)
    # Of one activation, not of a whole row or a whole column.
    assert 0 < kept.float().mean(0).min() and kept.float().mean(1).max() < 1
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - RATE), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(call(experts.eval()), whole)


def test_no_dropout_by_default() -> None:
    assert DynMoeConfig().expert_dropout == DynMoeConfig().attention_dropout == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_it_and_evaluates_without(method: str) -> None:
    ids = tokens(2, 8)
    model = tiny_model(method, expert_dropout=RATE).train()
    plain = tiny_model(method).train()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits)
    losses = {model.train()(ids, labels=ids).lm_loss.item() for _ in range(2)}
    assert len(losses | {plain.train()(ids, labels=ids).lm_loss.item()}) == 3
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_in_which_no_token_uses_an_expert_reaches_every_parameter(engine: str) -> None:
    model = tiny_model("top_p", engine, expert_dropout=RATE).train()
    ids = tokens(1, 4)
    model(ids, attention_mask=torch.zeros_like(ids), labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".experts." in name:
            assert not parameter.grad.any()


def test_recomputed_layers_drop_the_same() -> None:
    ids, grads = tokens(2, 8), []
    for checkpointing in (False, True):
        model = tiny_model("top_p", expert_dropout=RATE).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*grads)
