"""The other heads: they learn, they find the last token, their losses do not depend on how a batch is cut."""

import pytest
import torch

from dynmoe_hf import (
    DynMoeForCausalLM,
    DynMoeForQuestionAnswering,
    DynMoeForSequenceClassification,
    DynMoeForTokenClassification,
    DynMoeModel,
)
from tests.tiny import tiny_config, tokens

LOSSES = {"load_balance": 0.1, "dynamic": 0.1, "router_z": 0.1}


def make(head: type, routing: str = "top_p", **changes):
    torch.manual_seed(0)
    return head(tiny_config({"method": routing, "losses": LOSSES}, num_labels=3, **changes)).eval()


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
@pytest.mark.parametrize("routing", ["top_k", "top_p"])
def test_a_head_learns_its_labels(head: type, routing: str) -> None:
    model = make(head, routing).train()
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
def test_a_head_saves_loads_and_returns_tuples(head: type, tmp_path) -> None:
    model = make(head)
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
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
def test_the_last_real_token_is_classified(side: str, with_mask: bool) -> None:
    model = make(DynMoeForSequenceClassification)
    content = tokens(2, 8)
    padded = torch.zeros(2, 11, dtype=torch.long)
    where = slice(3, 11) if side == "left" else slice(0, 8)
    padded[:, where] = content
    mask = (padded != 0).long()
    arguments = {"attention_mask": mask} if with_mask or side == "left" else {}
    torch.testing.assert_close(model(padded, **arguments).logits, model(content).logits, rtol=1e-4, atol=1e-5)


def test_a_batch_without_any_sign_of_padding_is_refused() -> None:
    model = make(DynMoeForSequenceClassification, pad_token_id=None)
    assert model(tokens(1, 5)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(2, 5))


def test_kinds_of_sequence_labels() -> None:
    model = make(DynMoeForSequenceClassification, problem_type="multi_label_classification")
    assert model(tokens(2, 5), labels=torch.rand(2, 3)).loss.isfinite()
    torch.manual_seed(0)
    config = tiny_config("top_k", num_labels=1, problem_type="regression")
    assert DynMoeForSequenceClassification(config)(tokens(2, 5), labels=torch.rand(2)).loss.isfinite()


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


def test_a_head_loads_the_base_model_and_back(tmp_path) -> None:
    model = make(DynMoeForCausalLM)
    model.save_pretrained(tmp_path)
    base, info = DynMoeModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    content = tokens(1, 6)
    assert torch.equal(base.eval()(content).last_hidden_state, model.model(content).last_hidden_state)
    _, info = DynMoeForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
