"""The other heads: they learn, they find the last token, their losses do not depend on how a batch is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from dynmoe_hf import (
    DynMoeForCausalLM,
    DynMoeForQuestionAnswering,
    DynMoeForSequenceClassification,
    DynMoeForTokenClassification,
    DynMoeModel,
)
from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_config, tokens

LOSSES = {"load_balance": 0.1, "dynamic": 0.1, "router_z": 0.1}


def make(head: type, routing: str = "top_p", **changes: Any) -> Any:
    torch.manual_seed(0)
    return head(tiny_config({"method": routing, "losses": LOSSES}, **({"num_labels": 3} | changes))).eval()


def labels_for(head: type, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    if head is DynMoeForSequenceClassification:
        return {"labels": torch.randint(0, 3, (batch_size,), generator=generator)}
    if head is DynMoeForTokenClassification:
        return {"labels": torch.randint(0, 3, (batch_size, length), generator=generator)}
    positions = torch.randint(0, length, (2, batch_size), generator=generator)
    return {"start_positions": positions[0], "end_positions": positions[1]}


HEADS = [DynMoeForSequenceClassification, DynMoeForTokenClassification, DynMoeForQuestionAnswering]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_its_labels(head: type) -> None:
    model = make(head).train()
    content, labels = tokens(4, 8), labels_for(head, 4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(content, **labels)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(content, **labels).loss
        loss.backward()
        optimizer.step()
    last = model.eval()(content, **labels)
    assert last.lm_loss < 0.3 * first.lm_loss
    weighted = sum(0.1 * value for value in last.aux_losses.values())
    torch.testing.assert_close(last.loss, last.lm_loss + weighted)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("routing", METHODS)
def test_a_head_saves_loads_and_returns_tuples(routing: str, head: type, tmp_path: Path) -> None:
    model = make(head, routing, experts_implementation="eager")
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True, experts_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    content = tokens(2, 8)
    expected = model(content)
    for name in ("logits", "start_logits", "end_logits"):
        if getattr(expected, name, None) is not None:
            assert torch.equal(getattr(loaded.eval()(content), name), getattr(expected, name))
    plain = model(content, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], expected.start_logits if head is DynMoeForQuestionAnswering else expected.logits)


@pytest.mark.parametrize("head", [DynMoeForSequenceClassification, DynMoeForTokenClassification])
@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_of_a_batch_add_up(head: type, pieces: int) -> None:
    content, labels = tokens(4, 8), labels_for(head, 4, 8)["labels"]
    if labels.ndim == 2:
        labels[0, :5] = -100
    count = (labels != -100).sum()
    results = []
    for number in (1, pieces):
        model = make(head)
        parts = zip(content.chunk(number), labels.chunk(number), strict=True)
        losses = [model(part, labels=target, num_items_in_batch=count).loss for part, target in parts]
        sum(losses).backward()
        results.append((sum(losses).detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("routing", METHODS)
def test_the_last_real_token_is_classified(routing: str, side: str, with_mask: bool) -> None:
    model = make(DynMoeForSequenceClassification, routing)
    content = tokens(2, 8)
    padded = torch.zeros(2, 11, dtype=torch.long)
    where = slice(3, 11) if side == "left" else slice(0, 8)
    padded[:, where] = content
    mask = (padded != 0).long()
    arguments = {"attention_mask": mask} if with_mask or side == "left" else {}
    torch.testing.assert_close(model(padded, **arguments).logits, model(content).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("routing", METHODS)
def test_neighbours_and_padding_change_nothing(routing: str, side: str, head: type) -> None:
    """Neither the predictions nor, with labels on real tokens only, the loss of the task."""
    model = make(head, routing)
    alone, padding = tokens(1, 6), 4
    where = slice(padding, None) if side == "left" else slice(0, 6)
    batch, mask = tokens(3, 6 + padding, seed=5), torch.ones(3, 6 + padding, dtype=torch.long)
    batch[1], mask[1] = 0, 0
    batch[1, where], mask[1, where] = alone, 1
    together = model(batch, attention_mask=mask)
    expected = model(alone)
    for name in ("logits", "start_logits", "end_logits"):
        if getattr(expected, name, None) is not None:
            found = getattr(together, name)[1:2]
            found = found if head is DynMoeForSequenceClassification else found[:, where]
            torch.testing.assert_close(found, getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_the_token_of_the_end_as_padding() -> None:
    """An attention mask tells a real one from padding; without one, the last other token is classified."""
    model = make(DynMoeForSequenceClassification, pad_token_id=7, eos_token_id=7)
    content = torch.tensor([[3, 4, 5, 7]])
    padded = torch.tensor([[3, 4, 5, 7, 7, 7], [3, 9, 4, 5, 8, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with_end = model(content, attention_mask=torch.ones_like(content)).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:1], with_end, rtol=1e-4, atol=1e-5)
    without_end = model(content[:, :3]).logits
    torch.testing.assert_close(model(padded).logits[:1], without_end, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(with_end, without_end)


def test_a_batch_without_any_sign_of_padding_is_refused() -> None:
    model = make(DynMoeForSequenceClassification, pad_token_id=None)
    assert model(tokens(1, 5)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(2, 5))


def test_kinds_of_sequence_labels() -> None:
    """Classes, many labels at once, one number or several; recognised by their type where the config does not say."""
    content, generator = tokens(4, 5), torch.Generator().manual_seed(2)
    classes, numbers = torch.tensor([0, 2, 1, 2]), torch.rand(4, 3, generator=generator)
    cases = [
        ({}, classes, lambda logits: F.cross_entropy(logits, classes)),
        ({}, numbers, lambda logits: F.binary_cross_entropy_with_logits(logits, numbers)),
        ({"problem_type": "regression"}, numbers, lambda logits: F.mse_loss(logits, numbers)),
        ({"num_labels": 1}, numbers[:, 0], lambda logits: F.mse_loss(logits[:, 0], numbers[:, 0])),
    ]
    for changes, labels, loss in cases:
        model = make(DynMoeForSequenceClassification, **changes)
        output = model(content, labels=labels)
        torch.testing.assert_close(output.lm_loss, loss(output.logits))
        assert output.loss > output.lm_loss


def test_tokens_and_sequences_without_a_label() -> None:
    """-100 says so: the loss is the mean over the others."""
    model = make(DynMoeForTokenClassification)
    content, labels = tokens(2, 6), torch.randint(0, 3, (2, 6), generator=torch.Generator().manual_seed(2))
    labels[0, :4] = labels[1, 5] = -100
    output = model(content, labels=labels)
    real = labels != -100
    torch.testing.assert_close(output.lm_loss, F.cross_entropy(output.logits[real], labels[real]))
    model = make(DynMoeForSequenceClassification)
    output = model(content, labels=torch.tensor([-100, 2]))
    torch.testing.assert_close(output.lm_loss, F.cross_entropy(output.logits[1:], torch.tensor([2])))


def test_positions_of_an_answer() -> None:
    """The mean of both losses; a position beyond the sequence, as of a cut text, counts for nothing."""
    model = make(DynMoeForQuestionAnswering)
    starts, ends = torch.tensor([1, 3]), torch.tensor([2, 9])
    output = model(tokens(2, 6), start_positions=starts, end_positions=ends)
    expected = F.cross_entropy(output.start_logits, starts) + F.cross_entropy(output.end_logits[:1], ends[:1])
    torch.testing.assert_close(output.lm_loss, expected / 2)


def test_labels_have_names(tmp_path: Path) -> None:
    model = DynMoeForSequenceClassification(tiny_config("top_p", id2label={0: "bad", 1: "fair", 2: "good", 3: "best"}))
    assert model.num_labels == model.config.num_labels == model.score.out_features == 4
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "bad", 1: "fair", 2: "good", 3: "best"} and loaded.num_labels == 4


@pytest.mark.parametrize("head", HEADS)
def test_inputs_stand_where_transformers_has_them(head: type) -> None:
    """Positions of arguments and vectors instead of ids, as in every other model."""
    model, content = make(head), tokens(2, 6)
    mask = torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    expected = model(input_ids=content, attention_mask=mask)
    embedded = model.get_input_embeddings()(content)
    shifted = torch.arange(6)[None] + 5
    for output in (
        model(content, mask),
        model(inputs_embeds=embedded, attention_mask=mask),
        model(content, mask, shifted),
        model(content, mask, use_cache=False),
    ):
        for name in ("logits", "start_logits"):
            if getattr(expected, name, None) is not None:
                torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert model(content, mask, use_cache=False).past_key_values is None


def test_the_base_model_gives_hidden_states_attentions_and_routing() -> None:
    torch.manual_seed(0)
    model = DynMoeModel(tiny_config("top_p", attn_implementation="eager")).eval()
    output = model(
        tokens(2, 6), output_hidden_states=True, output_attentions=True, output_router_logits=True, output_routing=True
    )
    assert len(output.hidden_states) == 4 and output.hidden_states[-1].shape == (2, 6, 32)
    assert len(output.attentions) == 3 and output.attentions[0].shape == (2, 4, 6, 6)
    assert [routing is None for routing in output.routing] == [False, True, False]
    assert torch.equal(output.router_logits[1], output.routing[2].logits)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_a_head_loads_the_base_model_and_back(tmp_path: Path) -> None:
    model = make(DynMoeForCausalLM)
    model.save_pretrained(tmp_path)
    base, info = DynMoeModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    content = tokens(1, 6)
    assert torch.equal(base.eval()(content).last_hidden_state, model.model(content).last_hidden_state)
    _, info = DynMoeForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
