"""Quantised weights: which they are, what they compute, and that they are saved and loaded as they are.

The reference is a float model whose weights were rounded here, by the formula.
"""

import argparse
import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments

from dynmoe_hf.cli.model_arguments import add_model_arguments, load
from dynmoe_hf.evaluation import quantization
from dynmoe_hf.evaluation.loading import load_model
from dynmoe_hf.evaluation.quantization import int8_weight_only, weight_config
from dynmoe_hf.model import dispatch, packing
from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import ENGINES, greedy, tiny_model, tokens

torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")

WEIGHTS = "model.safetensors"
IDS = tokens(3, 9)
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([0, 1]), 0)
LAYOUTS = ["top_k", "top_p", "aoe", "aoe_top_p", "cartesian", "da_moe"]


def experts_only(model):
    ranking = "gate_down_proj"
    return {name for name, weight in model.named_parameters() if weight.dim() == 3 and not name.endswith(ranking)}


def quantizable(model):
    """Names of the weights (E, out, in) of experts, but for those that rank them, and of `nn.Linear` in layers."""
    names = experts_only(model)
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    return names | {name for name in linear if ".layers." in name and ".selector." not in name}


def rounded(weight):
    """int8 values of one scale a row, times that scale. The largest of a row lies between two values, 127 and 128."""
    scale = weight.float().abs().amax(-1, keepdim=True) / 127.5
    return ((weight.float() * (1 / scale)).round().clamp(-128, 127) * scale).to(weight.dtype)


def rounded_twin(model, engine="reference"):
    """A float model of the same weights, rounded."""
    twin = copy.deepcopy(model)
    twin.set_experts_implementation(engine)
    with torch.no_grad():
        for name in quantizable(model):
            twin.get_parameter(name).copy_(rounded(model.get_parameter(name)))
    return twin


def quantized_copy(model, engine="ragged"):
    model = copy.deepcopy(model)
    torchao.quantize_(model, int8_weight_only().quant_type, filter_fn=None)
    model.set_experts_implementation(engine)
    return model


def parts(weight):
    return [weight.qdata, weight.scale, weight.zero_point]


@torch.no_grad()
def logits(model, ids=IDS, mask=MASK):
    return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_quantised_saved_and_loaded(method, tmp_path):
    model = tiny_model(method)
    model.save_pretrained(tmp_path / "float")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=int8_weight_only())
    names = quantizable(model)
    for name, parameter in quantized.named_parameters():
        if name in names:
            values, scale, _ = parts(parameter)
            assert values.dtype == torch.int8 and values.shape == parameter.shape
            assert scale.shape == (*parameter.shape[:-1], 1)
    for name, value in quantized.state_dict().items():
        if name not in names:
            assert torch.equal(value, model.state_dict()[name]), name

    found = logits(quantized)
    torch.testing.assert_close(found, logits(rounded_twin(model)), rtol=0, atol=2e-5)
    assert (found - logits(model)).abs().max() > 1e-3

    quantized.save_pretrained(tmp_path / "int8")
    for reloaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "int8"), load_model(tmp_path / "int8")):
        assert torch.equal(logits(reloaded), found)
        for name in names:
            same = zip(parts(reloaded.get_parameter(name)), parts(quantized.get_parameter(name)), strict=True)
            assert all(torch.equal(*pair) for pair in same)


def test_weights_take_a_byte_in_memory_and_in_the_file(tmp_path):
    model = tiny_model("top_p", hidden_size=128, moe_intermediate_size=64)
    model.save_pretrained(tmp_path / "float")
    quantized = load_model(tmp_path / "float", quantization_config=int8_weight_only())
    quantized.save_pretrained(tmp_path / "int8")
    saved = 0
    for name in quantizable(model):
        weight = quantized.get_parameter(name)
        num_bytes = sum(part.numel() * part.element_size() for part in parts(weight))
        assert num_bytes == weight.numel() + 5 * weight.numel() / weight.shape[-1]  # a scale of 4, a zero point of 1
        saved += 4 * weight.numel() - num_bytes
    sizes = [(tmp_path / kind / WEIGHTS).stat().st_size for kind in ("float", "int8")]
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", LAYOUTS)
def test_engines_agree_or_refuse(method, engine):
    model = tiny_model(method)
    quantized = quantized_copy(model, engine)
    if engine not in dispatch.ENGINES and not method.startswith("aoe"):
        with pytest.raises(ValueError, match=f"'{engine}' cannot read quantised experts: use .*ragged"):
            logits(quantized)
        return
    expected = logits(rounded_twin(model))
    torch.testing.assert_close(logits(quantized), expected, rtol=0, atol=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(quantized(IDS, attention_mask=MASK).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["top_p", "aoe"])
def test_the_grouped_engine_for_gpus_reads_quantised_weights(method, monkeypatch):
    model = tiny_model(method)
    quantized = quantized_copy(model)
    used = []

    def grouped(experts, hidden_states, expert_ids, weights, **_):
        used.append(experts)
        return dispatch.grouped_experts(experts, hidden_states, expert_ids, weights)

    monkeypatch.setattr(dispatch, "eager_experts", grouped)
    torch.testing.assert_close(logits(quantized), logits(rounded_twin(model)), rtol=0, atol=2e-5)
    assert used


def test_quantised_weights_that_rank_experts():
    """In memory only: transformers 5.20 to 5.23 does not find `gate_down_proj` in a file beside `down_proj`."""
    model = tiny_model("aoe")
    quantized, twin = quantized_copy(model), rounded_twin(model)
    name = r"re:.*\.experts\.gate_down_proj"
    torchao.quantize_(quantized, torchao.FqnToConfig({name: torchao.Int8WeightOnlyConfig()}), filter_fn=None)
    with torch.no_grad():
        for block in twin.moe_blocks():
            block.experts.gate_down_proj.copy_(rounded(block.experts.gate_down_proj))
    expected = logits(twin)
    for engine in ENGINES:
        quantized.set_experts_implementation(engine)
        torch.testing.assert_close(logits(quantized), expected, rtol=0, atol=2e-5)
    quantized(IDS, attention_mask=MASK, labels=IDS).loss.backward()


@pytest.mark.parametrize("method", LAYOUTS)
def test_generation_is_that_of_full_passes(method):
    quantized = quantized_copy(tiny_model(method))
    prompt = IDS[:2, :4]
    generated = quantized.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generated, greedy(quantized, prompt, 5))


@pytest.mark.parametrize("method", LAYOUTS)
def test_gradients_pass_through_to_what_stands_before(method):
    """As adapters of the layers below need it: experts as they are, everything else in float."""
    model = tiny_model(method)
    quantized, twin = copy.deepcopy(model), rounded_twin(model, "eager")
    only_experts = {quantization.WEIGHTS[0]: torchao.Int8WeightOnlyConfig()}
    torchao.quantize_(quantized, torchao.FqnToConfig(only_experts), filter_fn=None)
    quantized.set_experts_implementation("ragged")
    experts = experts_only(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in experts:
                twin.get_parameter(name).copy_(parameter)
    for one in (quantized, twin):
        one(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    compared = 0
    for name, parameter in quantized.named_parameters():
        grad = twin.get_parameter(name).grad
        assert (name in experts) == (not parameter.requires_grad)
        if name not in experts and grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared > 20


def test_adapters_of_attention_train_on_quantised_weights():
    peft = pytest.importorskip("peft")
    quantized = quantized_copy(tiny_model("top_p"))
    before = [part.clone() for part in parts(quantized.moe_blocks()[0].experts.down_proj)]
    model = peft.get_peft_model(quantized, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=0.5)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).lm_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(map(torch.equal, before, parts(quantized.moe_blocks()[0].experts.down_proj)))


def test_bfloat16_and_autocast():
    model = tiny_model("aoe", num_experts=2, num_experts_per_tok=2).bfloat16()
    found = logits(quantized_copy(model))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), logits(model.float()), rtol=0.1, atol=0.3)
    quantized = quantized_copy(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(quantized).float()
    torch.testing.assert_close(found, logits(quantized), rtol=0.1, atol=0.3)


def test_the_reference_engine_compiles_as_one_graph():
    model = quantized_copy(tiny_model("top_p", num_hidden_layers=1, mlp_layer_types=["sparse"]), "reference")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", ["Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("method", ["top_p", "aoe", "cartesian"])
def test_other_ways_of_torchao(how, method, tmp_path):
    model = tiny_model(method)
    model.save_pretrained(tmp_path / "float")
    config = weight_config(getattr(torchao, how)(set_inductor_config=False))
    quantized = load_model(tmp_path / "float", quantization_config=config)
    assert quantized.moe_blocks()[0].experts.down_proj.qdata.element_size() == 1
    quantized.save_pretrained(tmp_path / "small")
    found = logits(quantized)
    assert 1e-3 < (found - logits(model)).abs().max() < 4
    assert torch.equal(logits(load_model(tmp_path / "small")), found)


def test_without_the_names_experts_stay_in_float(tmp_path):
    """What the documentation warns of."""
    tiny_model("top_k").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    )
    assert model.model.layers[0].self_attn.q_proj.weight.qdata.dtype == torch.int8
    assert type(model.moe_blocks()[0].experts.down_proj) is nn.Parameter


def test_biases_and_learned_statistics_stay_in_float(tmp_path):
    routing = {"selector": {"type": "importance", "statistic": "learned"}, "losses": {"importance": 0.01}}
    model = tiny_model(routing, attention_bias=True)
    model.save_pretrained(tmp_path)
    for quantized in (load_model(tmp_path, quantization_config=int8_weight_only()), quantized_copy(model)):
        found = {name for name, parameter in quantized.named_parameters() if hasattr(parameter, "qdata")}
        assert found == quantizable(model)


def test_a_quantised_model_is_not_trained(tmp_path):
    tiny_model("top_p").save_pretrained(tmp_path / "float")
    model = load_model(tmp_path / "float", quantization_config=int8_weight_only())
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, TrainingArguments(tmp_path / "run", report_to=[]))


def test_quantised_weights_are_not_packed(monkeypatch):
    monkeypatch.setattr(packing, "packing_pays", lambda dtype: True)
    model = quantized_copy(tiny_model("top_p"))
    assert not model.pack_experts()
    assert not packing._PACKED


def test_without_torchao_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(quantization, "OLDEST_TORCHAO", "99")
    with pytest.raises(ValueError, match=r"pip install 'dynmoe-hf\[quantization\]'"):
        int8_weight_only()


def test_the_commands_quantise(tmp_path):
    tokenizer = train_tokenizer(["a text to learn from"] * 3, vocab_size=260)
    tokenizer.save_pretrained(tmp_path)
    tiny_model("top_p", vocab_size=260).save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    line = [str(tmp_path), "--device", "cpu", "--dtype", "bfloat16"]
    model, _ = load(parser.parse_args([*line, "--quantize", "int8"]))
    assert model.moe_blocks()[0].experts.gate_up_proj.qdata.dtype == torch.int8
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert type(load(parser.parse_args(line))[0].moe_blocks()[0].experts.gate_up_proj) is nn.Parameter


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    tiny_model("top_p").save_pretrained(root / "float")
    load_model(root / "float", quantization_config=int8_weight_only()).save_pretrained(root / "int8")
    return root / "int8"


PART = "model.layers.0.mlp.experts._gate_up_proj_"


def halve(tensors, *names):
    for name in names:
        tensors[name] = tensors[name][:4].clone()


BROKEN = {
    "a part is missing": (lambda t: t.pop(PART + "scale"), "torchao cannot read"),
    "a weight is missing": (
        lambda t: [t.pop(PART + n) for n in ("scale", "qdata", "zero_point")],
        "lacks weights: .*gate_up_proj",
    ),
    "a part is short": (lambda t: halve(t, PART + "scale"), "do not fit together"),
    "a weight is short": (
        lambda t: halve(t, PART + "scale", PART + "qdata", PART + "zero_point"),
        r"gate_up_proj as \(4, 48, 32\) instead of \(8, 48, 32\)",
    ),
    "not a number": (lambda t: t[PART + "scale"].fill_(float("nan")), "NaN or infinite values in .*gate_up_proj"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_quantised_checkpoints_are_refused(case, int8_folder, tmp_path):
    change, reason = BROKEN[case]
    folder = shutil.copytree(int8_folder, tmp_path / "broken")
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata)
    with pytest.raises(ValueError, match=reason):
        load_model(folder)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"quant_method": "awq"}, "is quantised with 'awq'"),
        ({}, "is quantised with None"),
        ({"quant_method": "torchao"}, "torchao cannot read"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "X", "_data": {}}}}, "Failed to find class X"),
    ],
)
def test_broken_descriptions_of_a_quantisation_are_refused(stored, reason, int8_folder, tmp_path):
    folder = shutil.copytree(int8_folder, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(ValueError, match=reason):
        load_model(folder)
