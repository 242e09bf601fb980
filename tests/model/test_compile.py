"""`torch.compile` and `torch.export`: every preset is one graph, in training, in prefill and in decoding."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

from dynmoe_hf import DynMoeForCausalLM, DynMoeForSequenceClassification
from dynmoe_hf.model.methods import METHODS
from tests.tiny import NEEDS_COMPILED_GROUPED_MM, tiny_config, tiny_model, tokens

COMPILED = [pytest.param(method, "grouped_mm", marks=NEEDS_COMPILED_GROUPED_MM) for method in METHODS]
COMPILED += [(method, "ragged") for method in METHODS]
COMPILED += [("top_p", "ragged_recompute"), ("top_k", "batched_mm"), ("top_p", "batched_mm")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def some(methods: Iterable[str], *usual: str) -> list[Any]:
    """All of them; those that are not `usual` only among the slow tests, because compiling takes seconds."""
    return [pytest.param(method, marks=() if method in usual else pytest.mark.slow) for method in methods]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(("method", "engine"), COMPILED)
def test_a_training_step_compiles_as_one_graph(method: str, engine: str) -> None:
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


@pytest.mark.parametrize("method", some(METHODS, "top_p", "aoe_top_p", "da_moe"))
@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_as_one_graph(method: str) -> None:
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
    torch.testing.assert_close(torch.cat(logits, 1), expected, **TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1


# The statistics of attention go over the queries in blocks, so there a graph knows the length of its sequences.
@pytest.mark.parametrize("method", some([method for method in METHODS if "da_moe" not in method], "top_p"))
@torch.no_grad()
def test_batches_of_all_sizes_share_a_graph(method: str) -> None:
    model = tiny_model(method, "ragged")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for batch_size, length in ((2, 8), (3, 11), (5, 6)):
        content = tokens(batch_size, length, seed=length)
        mask = torch.ones_like(content)
        mask[0, :3] = 0
        expected = model(content, attention_mask=mask, use_cache=False).logits
        found = compiled(content, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1


EXPORTED = [(method, "ragged") for method in METHODS]
for engine in ("grouped_mm", "batched_mm"):
    EXPORTED += [pytest.param(method, engine, marks=pytest.mark.slow) for method in METHODS]


@pytest.mark.parametrize(("method", "engine"), EXPORTED)
def test_export(method: str, engine: str) -> None:
    """The exported program routes other tokens than those it was exported with."""
    model = tiny_model(method, engine)
    inputs = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False).module()
    others = {"input_ids": tokens(2, 8, seed=9), "attention_mask": torch.tensor([[0] * 3 + [1] * 5, [1] * 8])}
    for batch in (inputs, others):
        check(program(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits, batch)


def check(found: Tensor, expected: Tensor, batch: dict[str, Tensor]) -> None:
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], **TOLERANCE)


def test_a_head_compiles_and_exports() -> None:
    torch.manual_seed(0)
    model = DynMoeForSequenceClassification(tiny_config("top_p")).eval()
    inputs = {"input_ids": tokens(2, 8), "attention_mask": torch.tensor([[1] * 5 + [0] * 3, [1] * 8])}
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, **TOLERANCE)
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False).module()
    torch.testing.assert_close(program(**inputs, use_cache=False).logits, expected, **TOLERANCE)


def test_a_compiled_model_is_saved_as_itself(tmp_path: Path) -> None:
    model = tiny_model("top_p", "ragged")
    model.compile(backend="eager")
    content = tokens(1, 6)
    expected = model(content).logits
    model.save_pretrained(tmp_path)
    loaded = DynMoeForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(content).logits, expected, **TOLERANCE)
