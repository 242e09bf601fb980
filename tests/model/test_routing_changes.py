"""set_routing, routing_override and overrides on load, on real models."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model, tokens


def experts_used(model) -> float:
    return model(tokens(2, 12), output_routing=True).experts_per_token.mean().item()


def test_fewer_experts_from_now_on() -> None:
    model = tiny_model("top_p")
    before = experts_used(model)
    model.set_routing(selector={"p": 0.1})
    assert experts_used(model) < before
    assert model.config.routing["selector"]["p"] == 0.1
    model.set_routing(selector={"p": 1.0, "max_experts": 3})
    assert experts_used(model) == 3.0


def test_a_layer_of_its_own() -> None:
    model = tiny_model("top_p")
    model.set_routing(layers=[2], selector={"p": 0.0})
    first, last = model(tokens(2, 12), output_routing=True).experts_per_token.tolist()
    assert last == 1.0 and first > 1.0


def test_another_selector_and_back() -> None:
    model = tiny_model("top_k")
    expected = model(tokens(2, 8)).logits
    with model.routing_override("top_p", selector={"p": 1.0}):
        assert experts_used(model) == 8.0
        assert model.config.routing["method"] == "top_p"
    assert model.config.routing["method"] == "top_k" and model.config.num_experts_per_tok == 2
    assert torch.equal(model(tokens(2, 8)).logits, expected)


def test_an_override_ends_with_an_error_too() -> None:
    model = tiny_model("top_p")
    before = model.config.to_dict()
    with pytest.raises(KeyError), model.routing_override(selector={"max_experts": 1}):
        assert experts_used(model) == 1.0
        raise KeyError
    assert model.config.to_dict() == before and experts_used(model) > 1.0


def test_a_refused_change_leaves_the_model_alone() -> None:
    model = tiny_model("top_p")
    before, used = model.config.to_dict(), experts_used(model)
    for changes in ({"selector": {"p": -1.0}}, {"selector": {"max_experts": 99}}, {"selectors": {}}):
        with pytest.raises(ValueError):
            model.set_routing(**changes)
    with pytest.raises(ValueError, match="layer 1, which"):
        model.set_routing(layers=[1], selector={"p": 0.2})
    assert model.config.to_dict() == before and experts_used(model) == used


def test_the_state_of_a_selector_survives_a_change() -> None:
    model = tiny_model({"selector": {"type": "top_k", "bias": True}})
    bias = torch.arange(8.0)
    for block in model.moe_blocks():
        block.selector.selection_bias.copy_(bias)
    model.set_routing(selector={"k": 1})
    for block in model.moe_blocks():
        assert torch.equal(block.selector.selection_bias, bias)
    assert (model(tokens(1, 5), output_routing=True).routing[0].expert_ids == 7).all()


def test_losses_change_without_touching_the_choice() -> None:
    model = tiny_model("top_k")
    model.set_routing(losses={"load_balance": 0.0, "router_z": 0.5})
    output = model(tokens(2, 8), labels=tokens(2, 8))
    assert set(output.aux_losses) == {"router_z"}
    torch.testing.assert_close(output.loss, output.lm_loss + 0.5 * output.aux_losses["router_z"])


def test_routing_on_load(tmp_path) -> None:
    tiny_model("top_p").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, routing={"selector": {"p": 0.0}}).eval()
    assert experts_used(model) == 1.0
    with pytest.raises(ValueError, match="max_experts must be between"):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing={"selector": {"max_experts": 9}})


def test_a_changed_routing_is_saved(tmp_path) -> None:
    model = tiny_model("top_p")
    model.set_routing(selector={"p": 0.2}, layers=None)
    model.set_routing(selector={"p": 0.7}, layers=[2])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert torch.equal(loaded(tokens(2, 8)).logits, model(tokens(2, 8)).logits)
    assert loaded.config.routing_for(2)["selector"]["p"] == 0.7


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"selector": {"standardize": True}}, "logit_norm.theta"),
        (
            {"selector": {"type": "importance", "statistic": "learned"}, "losses": {"importance": 0.01}},
            "importance_head.weight",
        ),
    ],
)
def test_a_selector_with_new_parameters_is_refused_in_a_model_and_taken_on_load(changes, parameter, tmp_path) -> None:
    model = tiny_model("top_p")
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=parameter):
        model.set_routing(**changes)
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, routing=changes)
    assert any(name.endswith(parameter) for name, _ in loaded.named_parameters())
    assert all(value.isfinite().all() for value in loaded.parameters())


def test_the_state_of_a_scorer_passes_a_layer_with_another_one() -> None:
    model = tiny_model("rmoe", mlp_layer_types=["sparse"] * 3, layer_routing={1: {"scorer": "linear"}})
    first, second, third = model(tokens(1, 5), output_routing=True).routing
    assert torch.equal(first.state, second.state) and not torch.equal(second.state, third.state)
