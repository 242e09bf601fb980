"""Weights that are not where the computation is: the meta device, device maps, offloading to the disk."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeForCausalLM, DynMoeForSequenceClassification
from dynmoe_hf.model.methods import METHODS
from tests.tiny import BEFORE_5_23, tiny_config, tiny_model, tokens

CONTENT = tokens(2, 8)
PARTLY_ON_DISK = pytest.mark.skipif(
    BEFORE_5_23, reason="transformers 5.20 sends all of so small a model to the disk, which it then refuses"
)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(CONTENT, attention_mask=MASK).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_model_built_without_values(method: str, tmp_path: Path) -> None:
    """Built on the meta device, its buffers too, it takes the values of a checkpoint and nothing else is left empty."""
    model = tiny_model(method)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = DynMoeForCausalLM(tiny_config(method))
    state = (*empty.parameters(), *empty.buffers())
    assert state and all(tensor.is_meta for tensor in state)
    with accelerate.init_empty_weights():
        empty = DynMoeForCausalLM(tiny_config(method))
    assert all(parameter.is_meta for parameter in empty.parameters())
    filled = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}).eval()
    filled.set_experts_implementation("eager")
    assert torch.equal(logits(filled), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_buffers_are_right_after_loading(method: str, tmp_path: Path) -> None:
    """Those that are not saved are computed anew, those that are saved come from the file."""
    model = tiny_model(method)
    saved = [buffer for name, buffer in model.named_buffers() if name in model.state_dict()]
    assert len(saved) == (3 if method == "dtop_p" else 0)  # a threshold a layer, and the state of the controller
    for buffer in saved:
        buffer.add_(0.125)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], frequencies)


@pytest.mark.parametrize("method", METHODS)
def test_device_maps(method: str, tmp_path: Path) -> None:
    model = tiny_model(method)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    expected = logits(model)
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, experts_implementation="eager"
        ).eval()
        assert torch.equal(logits(loaded), expected)


@PARTLY_ON_DISK
@pytest.mark.parametrize("method", METHODS)
def test_layers_on_the_disk(method: str, tmp_path: Path) -> None:
    """Half of the model does not fit into the memory that it is given."""
    model = tiny_model(method)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": size // 2},
        offload_folder=tmp_path / "disk",
    ).eval()
    assert "disk" in loaded.hf_device_map.values()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    tokens_with_cache = loaded.generate(CONTENT[1:], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens_with_cache, model.generate(CONTENT[1:], max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_offloading_by_accelerate(method: str, where: str, tmp_path: Path) -> None:
    """Every weight is fetched when its module is called, and only then."""
    expected = logits(tiny_model(method))
    cpu = torch.device("cpu")
    if where == "cpu":
        model = accelerate.cpu_offload(tiny_model(method), cpu)
    else:
        model = accelerate.disk_offload(tiny_model(method), tmp_path, cpu)
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.is_meta for parameter in model.parameters())


@PARTLY_ON_DISK
@pytest.mark.parametrize("method", METHODS)
def test_a_head_with_layers_on_the_disk(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DynMoeForSequenceClassification(tiny_config(method)).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = DynMoeForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "disk"
    ).eval()
    assert "disk" in loaded.hf_device_map.values()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
