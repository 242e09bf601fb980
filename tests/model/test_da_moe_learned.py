"""The learned importance of DA-MoE: attention received is what it learns from, and never what it reads.

That it neither looks ahead nor differs in decoding is tested in test_da_moe.py.
"""

from math import log
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeForCausalLM
from tests.model.test_da_moe import causal_model, da_moe
from tests.tiny import tiny_config, tiny_model, tokens

LENGTH = 24
LEFT_PADDED = torch.tensor([[1] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)])


def heads(model: DynMoeForCausalLM) -> list[torch.nn.Module]:
    return [block.selector.importance_head for block in model.moe_blocks()]


def check_start(model: DynMoeForCausalLM, mean: float) -> None:
    for head in heads(model):
        assert not head.weight.any()
        assert head.bias.item() == pytest.approx(log(mean / (8 - mean)))
    output = model(tokens(2, LENGTH), output_routing=True)
    assert all((output.routing[layer].num_selected == mean).all() for layer in (0, 2))


@pytest.mark.parametrize("mean", [2.0, 3.0])
def test_a_new_head_gives_every_token_the_wanted_number(mean: float) -> None:
    check_start(tiny_model(da_moe("learned", learned_mean=mean)), mean)


def test_a_top_k_checkpoint_gets_new_heads(tmp_path) -> None:
    tiny_model("top_k").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, routing=da_moe("learned")).eval()
    check_start(model, 2.0)


@pytest.mark.parametrize("padded", [False, True])
def test_loss_is_the_error_against_the_attention_received(padded: bool) -> None:
    """From the probabilities of eager attention: sums over queries, relative to those of uniform rows."""
    model = causal_model("learned", attn_implementation="eager")
    mask = LEFT_PADDED if padded else torch.ones_like(LEFT_PADDED)
    content, inputs = tokens(2, LENGTH), {}
    for block in model.moe_blocks():
        block.register_forward_pre_hook(lambda block, args: inputs.update({block.layer_idx: args[0]}))
    labels = content.masked_fill(mask == 0, -100)
    output = model(content, attention_mask=mask, labels=labels, output_attentions=True)
    shares = (labels[:, 1:] != -100).sum(-1) / (labels[:, 1:] != -100).sum()
    layers = []
    for layer, head in zip((0, 2), heads(model), strict=True):
        probs = output.attentions[layer].mean(1).double()
        predicted = (inputs[layer] @ head.weight[0] + head.bias).sigmoid()
        for sequence, share in enumerate(shares.tolist()):
            real = mask[sequence].nonzero().flatten().tolist()
            errors = []
            for place, key in enumerate(real):
                if len(real) - place <= 16:
                    continue
                received = sum(probs[sequence, query, key].item() for query in real[place:])
                uniform = sum(1 / (number + 1) for number in range(place, len(real)))
                target = min(1.0, 2.0 / 8 * received / uniform)
                errors.append((predicted[sequence, key].item() - target) ** 2)
            assert len(errors) == len(real) - 16
            layers.append(share * sum(errors) / len(errors))
    assert output.aux_losses["importance"].item() == pytest.approx(sum(layers) / 2, rel=1e-4)
    expected = output.lm_loss + 0.01 * (output.aux_losses["load_balance"] + output.aux_losses["importance"])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}], ids=["full", "window"])
def test_only_the_head_learns_from_it(changes: dict[str, Any]) -> None:
    """And nothing does where no token is seen by 16 later ones."""
    model = causal_model("learned", **changes).train()
    model(tokens(2, LENGTH), labels=tokens(2, LENGTH)).aux_losses["importance"].backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    expected = {name for name, _ in model.named_parameters() if "importance_head" in name}
    assert len(expected) == 4
    assert moved == (set() if changes else expected)


def test_the_head_learns_which_tokens_receive_attention() -> None:
    model = causal_model("learned").train()
    optimizer = torch.optim.Adam([parameter for head in heads(model) for parameter in head.parameters()], lr=0.1)
    losses = []
    for _ in range(15):
        loss = model(tokens(2, LENGTH), labels=tokens(2, LENGTH)).aux_losses["importance"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_importance_itself_has_no_gradient() -> None:
    head = heads(causal_model("learned"))[0]
    importance, error = head(torch.randn(5, 32), torch.tensor([0.5, torch.nan, 2.0, 100.0, 0.0]))
    assert not importance.requires_grad and error.requires_grad
    target = torch.tensor([0.125, torch.nan, 0.5, 1.0, 0.0])
    torch.testing.assert_close(error.detach(), (importance - target).square(), equal_nan=True)


@pytest.mark.parametrize(
    ("selector", "losses", "message"),
    [
        ({"learned_mean": 0.0}, {"importance": 0.01}, "learned_mean must be"),
        ({"learned_mean": 8}, {"importance": 0.01}, "learned_mean=8 must be below num_experts=8"),
        ({}, {}, "trained by the loss 'importance'"),
    ],
)
def test_refused_options(selector: dict[str, Any], losses: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config({"method": "da_moe", "selector": {"statistic": "learned", **selector}, "losses": losses})
