"""LoRA of PEFT on every part of every method: the right weights, used wherever the model reads them, saved whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training.adapters import lora_targets
from dynmoe_hf.training.callbacks import ControllerCallback, RoutingCallback
from tests.tiny import TOGETHER, all_routings, tiny_model, tokens

peft = pytest.importorskip("peft")

IDS = tokens(2, 10)
ENGINES = ("ragged", "ragged_recompute", "eager", "grouped_mm")
RANK, ALPHA = 3, 6
ALL_PARTS = ("attention", "experts", "shared_experts", "dense_ffn")
MIXED = {"layer_routing": {0: {"method": "aoe"}, 2: {"experts": {"type": "cartesian", "bank": {"type": "low_rank"}}}}}
WEIGHTS = {
    "attention": r"layers\.\d+\.self_attn\.[qkvo]_proj\.weight",
    "experts": r"layers\.\d+\.mlp\.(sub_layers\.[01]\.)?experts\.\w+",
    "shared_experts": r"layers\.\d+\.mlp\.(sub_layers\.[01]\.)?shared_experts\.(gate|up|down)_proj\.weight",
    "dense_ffn": r"layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
}


def lora(model: DynMoeForCausalLM, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **(lora_targets(model) | options))


def adapted(model: DynMoeForCausalLM, **options: Any) -> peft.PeftModel:
    """With adapters that change the model: those of PEFT start at zero."""
    wrapped = peft.get_peft_model(model, lora(model, **options))
    fill(wrapped)
    return wrapped.eval()


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)


def matrices(model: peft.PeftModel) -> dict[str, tuple[str, str]]:
    """Name of an adapted weight of the base model -> the names of its A and B in the wrapped one."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weight = name.replace(".base_layer", "").removeprefix("base_model.model.")
            found[f"{weight}.{getattr(module, 'parameter_name', 'weight')}"] = (
                f"{name}.lora_A.default.weight",
                f"{name}.lora_B.default.weight",
            )
    return found


def plain_sum(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`W + alpha / r * B A`, for fused weights (E, out, in) one expert after the other.

    PEFT stores A of all experts as (E * r, in), one expert after the other, and B as (out, r * E), the experts of a
    rank beside each other.
    """
    if weight.dim() == 2:
        return weight + ALPHA / RANK * b @ a
    num_experts = weight.shape[0]
    experts = [
        weight[e] + ALPHA / RANK * b[:, e::num_experts] @ a[e * RANK : (e + 1) * RANK] for e in range(num_experts)
    ]
    return torch.stack(experts)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item() + 1e-9)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("routing", [*METHODS, "mixed", "one expert"])
def test_an_adapted_model_is_the_model_of_the_plain_sums(routing: str, engine: str) -> None:
    """Logits, loss and the gradient of every LoRA matrix; with `low_rank` experts that means the ranking too."""
    changes = {"mixed": MIXED, "one expert": {"num_experts": 1, "num_experts_per_tok": 1}}.get(routing, {})
    routing = routing if routing in METHODS else None
    model = adapted(tiny_model(routing, engine, **changes)).train()
    base = tiny_model(routing, "eager" if "ragged" in engine else "ragged", **changes).train()

    names, leaves = matrices(model), {name: p.detach().clone().requires_grad_() for name, p in trainable(model).items()}
    own = dict(base.named_parameters())
    weights = {name: plain_sum(own[name].detach(), leaves[a], leaves[b]) for name, (a, b) in names.items()}
    assert len(weights) == sum(bool(re.search("|".join(WEIGHTS.values()), name)) for name in own)
    # What is trained whole has a copy in the wrapped model.
    whole = {name: leaf for name, leaf in leaves.items() if "modules_to_save" in name}
    renamed = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): leaf
        for name, leaf in whole.items()
    }
    expected = functional_call(base, weights | renamed, (IDS,), {"labels": IDS})
    found = model(input_ids=IDS, labels=IDS)
    assert_close(found.logits, expected.logits)
    assert (found.logits - base(IDS).logits).abs().max() > 0.5, "the adapters change nothing"
    assert_close(found.loss, expected.loss)

    expected.loss.backward()
    found.loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif leaves[name].grad is not None:
            assert_close(parameter.grad, leaves[name].grad, 1e-4)
    assert all(leaves[name].grad.any() for pair in names.values() for name in pair)


@pytest.mark.parametrize("routing", METHODS)
@torch.no_grad()
def test_merging_gives_a_plain_checkpoint_and_unloading_the_base(routing: str, tmp_path: Path) -> None:
    base = tiny_model(routing)
    expected = base(IDS).logits
    model = adapted(tiny_model(routing, "ragged"))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, tiny_model(routing, "ragged")(IDS).logits)
    logits = model(input_ids=IDS).logits
    weights = dict(base.named_parameters())
    parts = dict(model.named_parameters())
    sums = {name: plain_sum(weights[name], parts[a], parts[b]) for name, (a, b) in matrices(model).items()}

    merged = model.merge_and_unload()
    assert type(merged) is DynMoeForCausalLM
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert_close(merged(IDS).logits, logits)
    for name, weight in merged.named_parameters():
        assert_close(weight, sums.get(name, weights[name]), 1e-6)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)

    unloaded = adapted(tiny_model(routing)).unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(unloaded(IDS).logits, expected)


@pytest.mark.parametrize("routing", METHODS)
@torch.no_grad()
def test_adapters_saved_and_loaded(routing: str, tmp_path: Path) -> None:
    tiny_model(routing, "ragged").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base)
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    onto = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    both = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for loaded in (onto, both):
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("routing", ["top_p", "aoe", "dtop_p", "rmoe_cartesian"])
@torch.no_grad()
def test_adapters_of_transformers_own_integration(routing: str, tmp_path: Path) -> None:
    tiny_model(routing, "ragged").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = model(IDS).logits
    model.add_adapter(lora(model))
    fill(model)
    logits = model.eval()(IDS).logits
    assert (logits - before).abs().max() > 0.5
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")

    onto = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    onto.load_adapter(tmp_path / "adapter")
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for loaded in (onto, both):
        assert torch.equal(loaded.eval()(IDS).logits, logits)
    onto.disable_adapters()
    assert torch.equal(onto(IDS).logits, before)


@pytest.mark.parametrize("routing", [*METHODS, *TOGETHER, "mixed"])
def test_names_are_exact(routing: str) -> None:
    """What PEFT adapts for all parts together, and for the presets for each one alone."""
    is_mixed = routing == "mixed"
    model = tiny_model(None if is_mixed else all_routings()[routing], **(MIXED if is_mixed else {}))
    names = {name for name, _ in model.named_parameters()}
    assert lora_targets(model) == lora_targets(model, ALL_PARTS)
    for parts in [ALL_PARTS, *([part] for part in ALL_PARTS if routing in METHODS or is_mixed)]:
        pattern = "|".join(WEIGHTS[part] for part in parts)
        wrapped = peft.get_peft_model(model, lora(model, **lora_targets(model, parts)))
        assert matrices(wrapped).keys() == {name for name in names if re.fullmatch(rf"model\.({pattern})", name)}
        wrapped.unload()
    left = [name for name in names if not re.fullmatch(rf"model\.({'|'.join(WEIGHTS.values())})", name)]
    assert all(re.search(r"norm|embed_tokens|lm_head|\.gate\.|selector|shared_scorers", name) for name in left)


def test_a_new_layout_is_covered_the_day_it_is_added() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ParameterDict({"stacked": torch.zeros(8, 4, 32), "bias": torch.zeros(8, 32)})

    model = tiny_model("top_k")
    for block in model.moe_blocks():
        block.experts = Experts()
    assert lora_targets(model, ["experts"])["target_parameters"] == ["mlp.experts.inner.stacked"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Unknown part.*'router'.*routers"):
        lora_targets(tiny_model("top_k"), ["attention", "router"])
    dense = tiny_model("top_k", mlp_layer_types=["dense"] * 3)
    with pytest.raises(ValueError, match="none of these parts: experts, routers"):
        lora_targets(dense, ["experts", "routers"])
    assert lora_targets(dense)["target_parameters"] == []
    for model in (adapted(tiny_model("top_k")), adapted(tiny_model("top_k")).get_base_model()):
        with pytest.raises(ValueError, match="adapters already"):
            lora_targets(model)


@pytest.mark.parametrize("routing", [*METHODS, "learned importance"])
def test_routers_are_trained_whole(routing: str, tmp_path: Path) -> None:
    model = tiny_model(all_routings()[routing], "ragged")
    routers = {name for name, _ in model.named_parameters() if re.search(r"\.gate\.|selector|shared_scorers", name)}
    targets = lora_targets(model, [*ALL_PARTS, "routers"])
    if not routers:
        assert targets == lora_targets(model)
        return
    wrapped = adapted(model, **targets)
    whole = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): parameter
        for name, parameter in trainable(wrapped).items()
        if "lora_" not in name
    }
    assert whole.keys() == routers
    content = tokens(2, 40)  # the importance of a token is learnt from those after it
    wrapped.train()(input_ids=content, labels=content).loss.backward()
    with torch.no_grad():
        for parameter in whole.values():
            assert parameter.grad.any()
            parameter -= 0.5 * parameter.grad / parameter.grad.abs().max()
    wrapped.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(all_routings()[routing], "ragged"), tmp_path).eval()
    logits = wrapped(input_ids=IDS).logits
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    assert_close(wrapped.merge_and_unload()(IDS).logits, logits)


@pytest.mark.parametrize("routing", METHODS)
def test_fine_tuning_lowers_the_loss(routing: str, tmp_path: Path) -> None:
    """With the Trainer, activation checkpointing and both callbacks; only adapters change, and what a controller moves.

    The adapter as saved gives the trained model back, its thresholds included.
    """
    model = tiny_model(routing, "ragged")
    model = peft.get_peft_model(model, lora(model))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = tokens(8, 12)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=2e-2,
        logging_steps=4,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    thresholds = model.thresholds()
    callbacks = [ControllerCallback(), RoutingCallback(model)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
    trainer.train()
    first, last = (log["lm_loss"] for log in trainer.state.log_history if "loss" in log)
    assert last < first - 0.4
    parameters = dict(model.named_parameters())
    assert len(frozen) > 20 and all(torch.equal(parameters[name], value) for name, value in frozen.items())

    trainer.save_model()
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
        loaded = peft.PeftModel.from_pretrained(tiny_model(routing, "ragged"), tmp_path).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, logits)
    assert loaded.thresholds() == (model.thresholds() if thresholds else {})
    if thresholds:
        assert loaded.thresholds() != thresholds
        before, after = (m.get_base_model().base_model.controller.integral.item() for m in (model, loaded))
        assert before == after != 0


def test_bfloat16_weights_under_adapters_in_float32() -> None:
    model = adapted(tiny_model("top_p", "ragged").bfloat16())
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    logits = model(input_ids=IDS).logits
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(model).values())
    with torch.no_grad():
        assert_close(model.merge_and_unload()(IDS).logits.float(), logits.float(), 0.1)
