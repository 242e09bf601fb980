"""The language model as a Transformers model: what it returns, and that it can be copied and cut short.

Beside this file: test_saving, test_devices, test_embeddings, test_attention_backends, test_batches, test_checkpointing,
test_half_precision, test_compile, test_generation; the other heads in test_heads and test_heads_training.
"""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_config, tiny_model, tokens

CONTENT = tokens(2, 8)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_attentions_and_router_logits(method: str) -> None:
    model = tiny_model(method, attn_implementation="eager")
    output = model(CONTENT, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [states.shape for states in output.hidden_states] == [(2, 8, 32)] * 4
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(CONTENT))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)  # the last one is after the norm
    assert [probs.shape for probs in output.attentions] == [(2, 4, 8, 8)] * 3
    routers = len(model.moe_blocks())
    assert routers == (4 if "cartesian" in method else 2)
    assert [logits.shape for logits in output.router_logits] == [(16, 8)] * routers
    assert output.aux_loss.isfinite() and output.loss is None
    plain = model(CONTENT)
    assert plain.keys() == {"logits", "past_key_values"}
    assert torch.equal(plain.logits, output.logits)


@pytest.mark.parametrize("method", METHODS)
def test_the_config_can_ask_for_outputs(method: str) -> None:
    model = tiny_model(method, output_hidden_states=True, output_router_logits=True, use_cache=False)
    output = model(CONTENT)
    assert output.keys() == {"logits", "hidden_states", "router_logits", "aux_loss", "aux_losses"}
    off = model(CONTENT, output_hidden_states=False, output_router_logits=False, use_cache=True)
    assert off.keys() == {"logits", "past_key_values"}


@pytest.mark.parametrize("method", METHODS)
def test_tuples_instead_of_named_outputs(method: str) -> None:
    model = tiny_model(method, attn_implementation="eager")
    wanted = {"labels": CONTENT, "output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    named = model(CONTENT, use_cache=False, **wanted)
    plain = model(CONTENT, use_cache=False, return_dict=False, **wanted)
    assert isinstance(plain, tuple) and len(plain) == len(named)
    assert torch.equal(plain[0], named.loss) and torch.equal(plain[1], named.logits)
    for one, two in zip(plain, named.to_tuple(), strict=True):
        same(one, two)
    model.config.return_dict = False
    assert isinstance(model(CONTENT, use_cache=False), tuple)
    assert torch.equal(model(CONTENT, use_cache=False, return_dict=True).logits, named.logits)


def same(first: object, second: object) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        items = first.values() if isinstance(first, dict) else first
        others = second.values() if isinstance(second, dict) else second
        for one, two in zip(items, others, strict=True):
            same(one, two)


@pytest.mark.parametrize("method", METHODS)
def test_logits_to_keep(method: str) -> None:
    model = tiny_model(method)
    full = model(CONTENT).logits
    assert torch.equal(model(CONTENT, logits_to_keep=0).logits, full)
    for wanted, kept in ((1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([0, 3]), [0, 3])):
        torch.testing.assert_close(model(CONTENT, logits_to_keep=wanted).logits, full[:, kept])


@pytest.mark.parametrize("method", METHODS)
def test_with_and_without_a_cache(method: str) -> None:
    model = tiny_model(method)
    without = model(CONTENT, use_cache=False)
    assert without.past_key_values is None
    output = model(CONTENT)
    assert output.past_key_values.get_seq_length() == 8
    assert torch.equal(output.logits, without.logits)


def test_layers_with_and_without_a_window() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("top_k", sliding_window=3, layer_types=types)
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [3, None, 3]
    # One layer with a window of 3 sees nothing before it.
    short = tiny_model("top_k", sliding_window=3, num_hidden_layers=1, mlp_layer_types=None)
    other = CONTENT.clone()
    other[:, :3] = tokens(2, 3, seed=7)
    torch.testing.assert_close(short(other).logits[:, 5:], short(CONTENT).logits[:, 5:])
    assert not torch.allclose(short(other).logits[:, 4], short(CONTENT).logits[:, 4])


@pytest.mark.parametrize("method", METHODS)
def test_copies(method: str) -> None:
    """Of a model, and of its config on the way to another process."""
    model = tiny_model(method)
    expected = model(CONTENT).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin.double().float()(CONTENT).logits, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(CONTENT).logits, expected)
    config = pickle.loads(pickle.dumps(model.config))
    assert config == model.config and config.to_dict() == model.config.to_dict()
    again = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(CONTENT).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_can_be_cut_to_its_first_layers(method: str) -> None:
    """As for a draft model: the state dict of the whole one fits what is left."""
    model = tiny_model(method)
    config = tiny_config(method, num_hidden_layers=1, mlp_layer_types=["sparse"])
    short = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    report = short.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    hidden = model(CONTENT, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(short(CONTENT).logits, model.lm_head(model.model.norm(hidden)))
