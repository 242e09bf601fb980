"""Checkpoints in the layout of the released codes against what was recorded of these codes (`tests/vectors/README.md`).

The layers of Autonomy-of-Experts, which has no checkpoints, are in `tests/model/test_aoe_vectors.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dynmoe_hf.convert import FORMATS, convert, from_ours
from dynmoe_hf.convert.plain import PLAIN_LOGITS
from dynmoe_hf.convert.sources import Checkpoint
from dynmoe_hf.evaluation.loading import load_model
from tests.convert.sources import save_official, save_tensors
from tests.model.plain_rmoe import released_model
from tests.model.test_rmoe_vectors import CASES, case_of
from tests.recorded import CLOSE

DYNAMIC_MOE = ("topp_all_moe_p040", "topp_interleaved_p070")


@pytest.mark.parametrize("name", DYNAMIC_MOE)
def test_dynamic_moe(name: str, tmp_path: Path) -> None:
    """Its config.json says `llama`; the names of its tensors say what it is."""
    recorded = save_official(name, tmp_path / "official", {"model_type": "llama"})
    report = convert(tmp_path / "official", tmp_path / "ours")
    assert report.source_format == "dynamic_moe" and report.comparison.max_difference < 1e-5
    assert report.notes == ["experts_topk=2 is left out: the released code stores it and does not use it"]
    model, real = load_model(tmp_path / "ours"), recorded.real
    logits = model(**recorded.inputs, attention_mask=recorded["in.attention_mask"]).logits
    torch.testing.assert_close(logits[real], recorded["out.logits"][real], **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_rmoe(name: str, tmp_path: Path) -> None:
    case = case_of(name)
    save_tensors(tmp_path / "official", case.under("weights."), case.official | {"model_type": "llama_moe_rnn"})
    report = convert(tmp_path / "official", tmp_path / "ours")
    assert report.source_format == "rmoe" and report.comparison.max_difference < 1e-5 and not report.notes
    model, real = load_model(tmp_path / "ours"), case.real
    logits = model(**case.inputs, attention_mask=case["in.attention_mask"]).logits
    torch.testing.assert_close(logits[real], case["out.logits"][real], **CLOSE)


@pytest.mark.parametrize("name", [*DYNAMIC_MOE, "rmoe_gru", "rmoe_gru_shared"])
def test_the_formulas_of_the_comparison_give_the_recorded_logits(name: str, tmp_path: Path) -> None:
    """In the row without padding, of which the formulas know nothing."""
    recorded = save_official(name, tmp_path / "official")
    formulas = PLAIN_LOGITS["rmoe" if name.startswith("rmoe") else "dynamic_moe"]
    logits = formulas(Checkpoint(tmp_path / "official").read, recorded.official, recorded["in.input_ids"][:1])
    torch.testing.assert_close(logits, recorded["out.logits"][:1], **CLOSE)


@pytest.mark.parametrize(("name", "format_"), [("topp_all_moe_p040", "dynamic_moe"), ("rmoe_gru", "rmoe")])
def test_without_a_model_type_the_names_of_tensors_decide(name: str, format_: str, tmp_path: Path) -> None:
    save_official(name, tmp_path / "official")
    assert convert(tmp_path / "official", tmp_path / "ours").source_format == format_


def test_defaults_of_the_class_of_dynamic_moe() -> None:
    """Every second layer, p = 0.4, as many heads for keys as for queries and base 10,000 whatever is stored."""
    stored = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_key_value_heads": 2,
        "rope_theta": 5000.0,
    }
    arguments, notes = FORMATS["dynamic_moe"].read_config(stored)
    assert arguments["mlp_layer_types"] == ["sparse", "dense", "sparse"]
    assert arguments["routing"]["selector"]["p"] == 0.4 and arguments["num_key_value_heads"] == 4
    assert arguments["rope_parameters"]["rope_theta"] == 10000.0
    assert [note.split("=")[0] for note in notes] == ["num_key_value_heads", "rope_theta"]


def test_the_last_layers_of_rmoe_are_sparse_and_widths_fall_back() -> None:
    stored: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_num_layers": 2,
        "moe_router_type": "something else",
    }
    arguments, _ = FORMATS["rmoe"].read_config(stored)
    assert arguments["mlp_layer_types"] == ["dense", "sparse", "sparse"]
    assert arguments["moe_intermediate_size"] == 24
    assert arguments["routing"]["scorer"] == {"type": "linear"}


def test_bfloat16_is_kept_and_compared_in_float32(tmp_path: Path) -> None:
    case = case_of("rmoe_gru_shared")
    weights = {name: value.bfloat16() for name, value in case.under("weights.").items()}
    save_tensors(tmp_path / "official", weights, case.official)
    assert convert(tmp_path / "official", tmp_path / "ours").comparison.max_difference < 1e-5
    model = load_model(tmp_path / "ours", dtype="float32")
    inputs = [case[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels")]
    expected = released_model({name: value.float() for name, value in weights.items()}, case.official, *inputs)
    logits = model(**case.inputs, attention_mask=case["in.attention_mask"]).logits
    torch.testing.assert_close(logits[case.real], expected["out.logits"][case.real], **CLOSE)


def test_the_gates_of_the_recurrent_cell_are_not_written() -> None:
    """A stacked tensor does not say how many gates it holds, so the way back would be a guess."""
    with pytest.raises(ValueError, match="no rule knows model.shared_scorers.recurrent.cell.weight_ih"):
        from_ours(FORMATS["rmoe"].rules, {"model.shared_scorers.recurrent.cell.weight_ih": torch.zeros(6, 2)})
