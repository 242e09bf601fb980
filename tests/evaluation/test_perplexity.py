"""Figures of packed evaluation against single documents, one after the other."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from dynmoe_hf.evaluation.perplexity import evaluate_text
from dynmoe_hf.training.data import pack
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import tiny_model

TEXTS = [
    "A text to learn from, with a few words in it.",
    "Ein zweiter, mit Umlauten: äöü, und mit Zahlen: 1234567890.",
    "short",
    "def function(argument):\n    return argument + 1\n" * 2,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=280)


def model_for(tokenizer, **changes):
    settings = {"vocab_size": len(tokenizer), "pad_token_id": None, "max_position_embeddings": 512}
    return tiny_model(**({"routing": "top_p"} | settings | changes))


def packed(tokenizer, block_size):
    return pack(Dataset.from_dict({"text": TEXTS}), tokenizer, block_size, keep_remainder=True)


def one_by_one(model, sequences):
    """Summed loss in nats, tokens predicted, expert loads (L, E) and tokens routed of token lists run alone."""
    nll, num_labels, num_tokens = 0.0, 0, 0
    loads = torch.zeros(len(model.moe_blocks()), model.config.num_experts)
    for ids in sequences:
        ids = torch.tensor([ids])
        with torch.no_grad():
            out = model(ids, output_routing=True)
        nll += F.cross_entropy(out.logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()
        num_labels += ids.shape[1] - 1
        num_tokens += ids.shape[1]
        loads += torch.stack([routing.selected().sum(0) for routing in out.routing if routing is not None])
    return nll, num_labels, loads / num_tokens


def test_whole_documents(tokenizer):
    model = model_for(tokenizer)
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    nll, num_labels, loads = one_by_one(model, documents)
    first_tokens = sum(len(tokenizer.decode(ids[0]).encode()) for ids in documents)
    num_bytes = sum(len(text.encode()) for text in TEXTS) - first_tokens

    found = evaluate_text(model, packed(tokenizer, sum(map(len, documents))))
    assert found["tokens"] == num_labels
    assert found["bytes"] == num_bytes
    assert found["lm_loss"] == pytest.approx(nll / num_labels, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / num_labels), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    torch.testing.assert_close(torch.tensor(found["expert_load"]), loads)
    assert found["experts_per_token_by_layer"] == pytest.approx(loads.sum(-1).tolist())
    assert found["experts_per_token"] == pytest.approx(loads.sum(-1).mean().item())


@pytest.mark.parametrize("block_size", [7, 16])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_documents_cut_into_blocks(tokenizer, block_size, batch_size):
    """The pieces between restarts of the positions are all that a token sees."""
    model = model_for(tokenizer)
    blocks = packed(tokenizer, block_size)
    pieces, labels = [], []
    for block in blocks:
        starts = [index for index, position in enumerate(block["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], block_size], strict=True):
            pieces.append(block["input_ids"][start:end])
            labels.append(block["labels"][start:end])
    nll = num_labels = 0
    for ids, wanted in zip(pieces, labels, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for index in range(1, len(ids)):
            if wanted[index] != -100:
                nll -= log_probs[index - 1, ids[index]].item()
                num_labels += 1

    found = evaluate_text(model, blocks, batch_size)
    assert found["tokens"] == num_labels == sum(label != -100 for part in labels for label in part)
    assert found["lm_loss"] == pytest.approx(nll / num_labels, rel=1e-5)
    _, _, loads = one_by_one(model, pieces)
    torch.testing.assert_close(torch.tensor(found["expert_load"]), loads)


def test_auxiliary_losses_do_not_count(tokenizer):
    blocks = packed(tokenizer, 16)
    losses = [{"load_balance": 0.0, "dynamic": 0.0}, {"load_balance": 10.0, "dynamic": 10.0}]
    found = [
        evaluate_text(model_for(tokenizer, routing={"method": "top_p", "losses": each}), blocks) for each in losses
    ]
    assert found[0] == found[1]


def test_dead_experts_are_counted(tokenizer):
    model = model_for(tokenizer, routing="top_k", num_experts_per_tok=1)
    with torch.no_grad():
        model.moe_blocks()[0].gate.weight.zero_()  # a tie in every token: the first expert takes them all
    found = evaluate_text(model, packed(tokenizer, 16))
    assert found["expert_load"][0] == [1.0] + [0.0] * 7
    assert found["dead_experts"] == 7 + sum(load == 0 for load in found["expert_load"][1])


def test_a_model_without_moe_layers(tokenizer):
    found = evaluate_text(model_for(tokenizer, mlp_layer_types=["dense"] * 3), packed(tokenizer, 16))
    assert set(found) == {"lm_loss", "perplexity", "bits_per_byte", "tokens", "bytes"}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tokenizer, training):
    model = model_for(tokenizer, attention_dropout=0.5).train(training)
    blocks = packed(tokenizer, 16)
    assert evaluate_text(model, blocks) == evaluate_text(model, blocks)
    assert model.training == training
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("attention", "num_blocks", "batch_size", "message"),
    [("sdpa", 0, 8, "no block"), ("sdpa", 2, 0, "batch_size"), ("flash_attention_2", 2, 2, "batch_size=1")],
)
def test_refusals(tokenizer, monkeypatch, attention, num_blocks, batch_size, message):
    model = model_for(tokenizer)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", attention)
    with pytest.raises(ValueError, match=message):
        evaluate_text(model, packed(tokenizer, 16).select(range(num_blocks)), batch_size)
