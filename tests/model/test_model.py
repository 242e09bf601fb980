"""The language model as a Transformers model: saving, caches, attention, positions, checkpointing, compilation."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, StaticCache

from dynmoe_hf.model.methods import METHODS
from tests.tiny import NEEDS_COMPILED_GROUPED_MM, all_routings, tiny_model, tokens


@pytest.mark.parametrize("name", all_routings())
def test_save_and_load_give_the_same_logits(name: str, tmp_path) -> None:
    model = tiny_model(all_routings()[name])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    content = tokens(2, 8)
    assert torch.equal(loaded.eval()(content).logits, model(content).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings(tied: bool, tmp_path) -> None:
    model = tiny_model("top_p", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


@pytest.mark.parametrize("name", all_routings())
def test_every_parameter_is_initialised_also_from_meta(name: str, tmp_path) -> None:
    """A checkpoint without the tensors of the MoE layers: they come out as they do in a new model."""
    model = tiny_model(all_routings()[name])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = [key for key in weights if ".mlp." in key or "shared_scorers" in key or "controller" in key]
    save_file({key: value for key, value in weights.items() if key not in missing}, tmp_path / "model.safetensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager", ignore_mismatched_sizes=True
    )
    assert set(info["missing_keys"]) == set(missing)
    new = model.state_dict()
    for key, value in loaded.state_dict().items():
        if key in missing:
            assert value.isfinite().all(), key
            spread = new[key].abs().max() / value.numel() ** 0.5
            assert (value.mean() - new[key].mean()).abs() <= 2 * spread, key
            assert (value.std(correction=0) - new[key].std(correction=0)).abs() <= 2 * spread, key


@pytest.mark.parametrize("qk_norm", ["none", "per_head", "full"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"sliding_window": 4}, {"head_dim": 10}])
def test_attention_variants_agree_across_backends(qk_norm: str, changes: dict) -> None:
    content = tokens(2, 12)
    mask = torch.ones_like(content)
    mask[0, :3] = 0
    outputs = []
    for backend in ("eager", "sdpa"):
        model = tiny_model("top_p", qk_norm=qk_norm, attn_implementation=backend, **changes)
        outputs.append(model(content, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_layers_with_and_without_a_window() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("top_k", sliding_window=3, layer_types=types)
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [3, None, 3]
    content = tokens(1, 10)
    full = model(content).logits
    cached = model(content[:, :7], use_cache=True)
    step = model(content[:, 7:], past_key_values=cached.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([cached.logits, step.logits], 1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_types_build_save_and_load(rope: dict, tmp_path) -> None:
    model = tiny_model("top_k", rope_parameters={"rope_theta": 10000.0, **rope})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert torch.equal(loaded(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_do_not_see_each_other(method: str) -> None:
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    model = tiny_model(method)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, :5], model(first).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, 5:], model(second).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_static_cache_gives_the_same_logits(method: str) -> None:
    model = tiny_model(method)
    content = tokens(2, 8)
    cache = StaticCache(config=model.config, max_cache_len=16)
    first = model(content[:, :5], past_key_values=cache, use_cache=True)
    rest = model(content[:, 5:], past_key_values=cache, position_ids=torch.arange(5, 8)[None], use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), model(content).logits, rtol=1e-5, atol=1e-5)


def test_logits_to_keep() -> None:
    model = tiny_model("top_p")
    content = tokens(2, 6)
    full = model(content).logits
    assert torch.equal(model(content, logits_to_keep=2).logits, full[:, -2:])
    assert model(content, logits_to_keep=torch.tensor([0, 3])).logits.shape == (2, 2, 97)


def test_embeddings_instead_of_ids() -> None:
    model = tiny_model("top_p")
    content = tokens(2, 6)
    embedded = model(inputs_embeds=model.get_input_embeddings()(content)).logits
    assert torch.equal(embedded, model(content).logits)


def test_resized_embeddings() -> None:
    model = tiny_model("top_p")
    model.resize_token_embeddings(120)
    assert model(tokens(1, 4)).logits.shape == (1, 4, 120) and model.config.vocab_size == 120


def test_a_checkpointed_layer_keeps_the_gradient_of_the_losses() -> None:
    """Re-entrant checkpointing detaches what a hook records; here the layer returns it."""
    content = tokens(2, 8)
    gradients = {}
    for reentrant in (None, False, True):
        model = tiny_model({"losses": {"load_balance": 1.0}}).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(content, labels=content)
        (output.loss - output.lm_loss).backward()
        gradients[reentrant] = [block.gate.weight.grad for block in model.moe_blocks()]
    assert all(gradient.abs().sum() > 0 for gradient in gradients[None])
    for reentrant in (False, True):
        for expected, gradient in zip(gradients[None], gradients[reentrant], strict=True):
            torch.testing.assert_close(gradient, expected)


COMPILED = [pytest.param(method, "grouped_mm", marks=NEEDS_COMPILED_GROUPED_MM) for method in METHODS]


COMPILED += [(method, "ragged") for method in METHODS]
COMPILED += [("top_p", "ragged_recompute"), ("top_k", "batched_mm"), ("top_p", "batched_mm")]


@pytest.mark.parametrize(("method", "engine"), COMPILED)
def test_a_training_step_compiles_as_one_graph(method: str, engine: str) -> None:
    torch._dynamo.reset()
    model = tiny_model(method, engine)
    content = tokens(2, 8)
    expected = model(content, labels=content)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(content, labels=content)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["top_p", "aoe_top_p", "da_moe"])
@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_as_one_graph(method: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(method, "ragged")
    content = tokens(1, 9)
    expected = model(content).logits
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = [model(content[:, :5], past_key_values=cache, use_cache=True).logits]
    for position in range(5, 9):
        row = content[:, position : position + 1]
        ids = torch.tensor([[position]])
        logits.append(step(row, past_key_values=cache, use_cache=True, position_ids=ids).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_runs(method: str) -> None:
    model = tiny_model(method).to(torch.bfloat16)
    output = model(tokens(2, 8), labels=tokens(2, 8))
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()


def test_parallel_plans_name_real_parameters() -> None:
    model = tiny_model("top_k")
    modules = dict(model.model.named_modules()) | dict(model.model.named_parameters())
    for plan in (model.config.base_model_tp_plan, model.config.base_model_ep_plan):
        for pattern in plan:
            assert pattern.replace("*", "0") in modules, pattern


def test_a_model_can_be_deep_copied_and_moved() -> None:
    import copy

    model = tiny_model("top_p")
    twin = copy.deepcopy(model).double().float()
    assert torch.equal(twin(tokens(1, 4)).logits, model(tokens(1, 4)).logits)
