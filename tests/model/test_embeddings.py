"""Input and output embeddings: resized, replaced, given as vectors, tied or not."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeForTokenClassification
from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_config, tiny_model, tokens

CONTENT = tokens(2, 8, vocab_size=90)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_resized_embeddings(method: str, tied: bool, tmp_path: Path) -> None:
    """Old tokens keep their logits, new ones can be learnt, and the new size is saved."""
    model = tiny_model(method, tie_word_embeddings=tied)
    with torch.no_grad():
        expected = model(CONTENT).logits
    for size, multiple, rows in ((100, 16, 112), (120, None, 120), (90, None, 90)):
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
        embedded, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert model.config.vocab_size == model.vocab_size == rows
        assert embedded.weight.shape == head.weight.shape == (rows, 32)
        assert embedded.num_embeddings == head.out_features == rows
        assert (head.weight is embedded.weight) == tied
        with torch.no_grad():
            logits = model(CONTENT).logits
        common = min(rows, 97)
        torch.testing.assert_close(logits[..., :common], expected[..., :common])
        newest = torch.full((2, 8), rows - 1)
        model(newest, labels=newest).loss.backward()
        gradient = embedded.weight.grad[rows - 1]
        assert gradient.isfinite().all() and gradient.any()
        model.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert loaded.config.vocab_size == 90 and torch.equal(loaded(CONTENT).logits, model(CONTENT).logits)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_can_be_replaced(method: str) -> None:
    model = tiny_model(method)
    model.set_input_embeddings(nn.Embedding(50, 32))
    model.set_output_embeddings(nn.Linear(32, 60, bias=False))
    assert model.get_input_embeddings() is model.model.embed_tokens is model.model.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head
    assert model(tokens(1, 4, vocab_size=50)).logits.shape == (1, 4, 60)
    head = DynMoeForTokenClassification(tiny_config(method))
    assert head.get_input_embeddings() is head.model.embed_tokens and head.get_output_embeddings() is None
    head.resize_token_embeddings(100)
    assert head.config.vocab_size == 100 and head(torch.full((1, 3), 99)).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_vectors_instead_of_ids(method: str) -> None:
    model = tiny_model(method)
    embedded = model.get_input_embeddings()(CONTENT).detach().requires_grad_()
    mask = torch.ones_like(CONTENT)
    mask[0, :2] = 0
    expected = model(CONTENT, attention_mask=mask, labels=CONTENT)
    output = model(inputs_embeds=embedded, attention_mask=mask, labels=CONTENT)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    output.loss.backward()
    assert (embedded.grad.abs().sum(-1) > 0)[0, 2:].all()
    for wrong in ({}, {"input_ids": CONTENT, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**wrong)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_can_be_made_to_require_gradients(method: str) -> None:
    """As adapters on a frozen model do, and re-entrant checkpointing."""
    model = tiny_model(method).requires_grad_(False)
    model.enable_input_require_grads()
    assert model(CONTENT).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(CONTENT).logits.requires_grad
