"""Packed copies of experts' weights give the same results, follow changes, and go when asked to."""

import pytest
import torch

from dynmoe_hf.model import packing, products
from tests.tiny import tiny_model, tokens

needs_onednn = pytest.mark.skipif(not products._has_onednn(), reason="this torch has no oneDNN")


def num_packed() -> int:
    return sum(len(entry.experts) for entry in packing._PACKED.values())


@needs_onednn
@pytest.mark.parametrize("routing", ["top_p", "aoe", "cartesian"])
@torch.no_grad()
def test_packed_experts_follow_their_weights(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "packing_pays", lambda dtype: True)
    model, content = tiny_model(routing, "ragged"), tokens(2, 8)
    expected = model(content).logits
    assert model.pack_experts() and num_packed() == 0, "an expert is packed when it is used"
    torch.testing.assert_close(model(content).logits, expected, rtol=1e-4, atol=1e-5)
    assert num_packed() > 0
    for block in model.moe_blocks():
        block.experts.down_proj.mul_(-1.5)
    changed = model(content).logits
    model.unpack_experts()
    assert not packing._PACKED
    assert not torch.allclose(changed, expected, atol=1e-2)
    torch.testing.assert_close(changed, model(content).logits, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_packed_weights_are_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "packing_pays", lambda dtype: True)
    model, content = tiny_model("top_k", "ragged"), tokens(1, 6)
    with torch.no_grad():
        model.pack_experts()
        expected = model(content).logits
        for entry in packing._PACKED.values():
            entry.experts = {index: products.pack(torch.zeros(weight.shape)) for index, weight in entry.experts.items()}
        assert not torch.allclose(model(content).logits, expected, atol=1e-2)
    model.train()(content, labels=content).loss.backward()  # training reads the weights themselves
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.unpack_experts()


def test_nothing_is_packed_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "packing_pays", lambda dtype: False)
    assert not tiny_model("top_k", "ragged").pack_experts() and not packing._PACKED
