"""Upcycled models against the dense models that they are made of."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from dynmoe_hf.convert import convert, upcycle
from dynmoe_hf.evaluation.loading import load_model
from dynmoe_hf.evaluation.perplexity import evaluate_text
from tests.convert.sources import DENSE_CONFIGS, MOE_CONFIGS, SMALL, contents, new_model, tensors_of
from tests.tiny import tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CONFIG = LlamaConfig(**SMALL, intermediate_size=48)
RAW = {"selector": {"norm_topk_prob": False}}
EXACT: dict[str, dict[str, Any]] = {
    "top_k": {},
    "top_k, k = 1": {"num_experts_per_tok": 1},
    "top_k, raw": {"num_experts": 6, "routing": RAW},
    "top_k, raw, rmoe": {"routing": {"method": "rmoe", **RAW}},
    "top_k, scaled": {"routing": {"selector": {"scale": 2.5}}},
    "top_k, sigmoid": {"routing": {"selector": {"score_function": "sigmoid", "num_groups": 2, "bias": True}}},
    "top_k, sigmoid, raw": {"routing": {"selector": {"score_function": "sigmoid", "norm_topk_prob": False}}},
    "top_p": {"routing": "top_p"},
    "top_p, p = 0.9": {"routing": {"method": "top_p", "selector": {"p": 0.9}}},
    "top_p, raw": {"routing": {"method": "top_p", "selector": {"norm_topk_prob": False, "p": 0.6}}},
    "dtop_p": {"routing": "dtop_p"},
    "da_moe": {"routing": "da_moe"},
    "rmoe": {"routing": "rmoe"},
    "rmoe_top_p": {"routing": "rmoe_top_p"},
    "rmoe_da_moe": {"routing": "rmoe_da_moe"},
    "shared": {"num_shared_experts": 1},
    "shared, top_p": {"num_shared_experts": 1, "routing": "top_p"},
    "shared, rmoe": {"num_shared_experts": 1, "routing": "rmoe"},
    "aoe": {"num_shared_experts": 1, "routing": "aoe"},
    "aoe_top_p": {"num_shared_experts": 1, "routing": "aoe_top_p"},
    "cartesian": {"num_shared_experts": 1, "routing": "cartesian"},
    "cartesian_top_p": {"num_shared_experts": 1, "routing": "cartesian_top_p"},
    "rmoe_cartesian": {"num_shared_experts": 1, "routing": "rmoe_cartesian"},
    "groups of 2": {"split": 2, "num_experts_per_tok": 4},
    "groups of 4": {"split": 4, "num_experts_per_tok": 4},
    "groups, raw": {"split": 2, "num_experts_per_tok": 4, "routing": RAW},
    "groups, scaled": {"split": 2, "num_experts_per_tok": 2, "routing": {"selector": {"scale": 2.5}}},
    "groups, rmoe": {"split": 2, "num_experts_per_tok": 2, "routing": "rmoe"},
    "groups, shared": {"split": 2, "num_experts_per_tok": 2, "num_shared_experts": 1},
    "one layer": {"layers": [1]},
}


@cache
def dense() -> PreTrainedModel:
    return new_model(CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dense().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("name", EXACT)
def test_the_first_output_is_that_of_the_dense_model(name: str, source: Path, tmp_path: Path) -> None:
    before = contents(source)
    report = upcycle(source, tmp_path / "ours", check=False, **EXACT[name])
    assert report.exact and contents(source) == before
    model, input_ids = load_model(tmp_path / "ours"), tokens(2, 20)
    assert any("experts" in key for key in tensors_of(tmp_path / "ours"))
    torch.testing.assert_close(model(input_ids).logits, dense()(input_ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", DENSE_CONFIGS)
def test_every_dense_format(kind: str, tmp_path: Path) -> None:
    theirs = new_model(DENSE_CONFIGS[kind])
    theirs.save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "ours", num_experts=4)
    assert report.source_format == DENSE_CONFIGS[kind].model_type and report.exact
    assert report.comparison.max_difference < 1e-5
    input_ids = tokens(2, 20)
    torch.testing.assert_close(load_model(tmp_path / "ours")(input_ids).logits, theirs(input_ids).logits, **CLOSE)


def routing_of(folder: Path) -> list[Any]:
    return [
        routing for routing in load_model(folder)(tokens(4, 20), output_routing=True).routing if routing is not None
    ]


def test_copies_of_the_dense_ffn(source: Path, tmp_path: Path) -> None:
    upcycle(source, tmp_path / "ours", num_experts=3, layers=[0, 2], check=False)
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "ours")
    for layer in (0, 2):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (theirs[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        for expert in range(3):
            assert torch.equal(ours[f"{mlp}.experts.gate_up_proj"][expert], torch.cat([gate, up]))
            assert torch.equal(ours[f"{mlp}.experts.down_proj"][expert], down)
    kept = [name for name in theirs if ".mlp." not in name or ".1." in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in kept) and len(kept) > 20
    assert [routing.num_selected.unique().tolist() for routing in routing_of(tmp_path / "ours")] == [[2], [2]]


def test_the_router_sends_tokens_to_different_experts(source: Path, tmp_path: Path) -> None:
    """It is random, not flat, where the mathematics allows; otherwise identical experts would stay identical."""
    upcycle(source, tmp_path / "ours", num_experts=4, check=False)
    for layer, routing in enumerate(routing_of(tmp_path / "ours")):
        weight = tensors_of(tmp_path / "ours")[f"model.layers.{layer}.mlp.gate.weight"]
        assert 0.5 * CONFIG.initializer_range < weight.std() < 2 * CONFIG.initializer_range
        assert (routing.selected().sum(0) > 0).all()


def test_groups_are_chosen_whole_and_hold_each_part_once(source: Path, tmp_path: Path) -> None:
    upcycle(source, tmp_path / "ours", num_experts=8, num_experts_per_tok=4, split=2, check=False)
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "ours")
    mlp = "model.layers.1.mlp"
    down = ours[f"{mlp}.experts.down_proj"]
    for group in range(4):
        parts = torch.cat([down[2 * group], down[2 * group + 1]], dim=1)
        assert torch.equal(parts, 2 * theirs[f"{mlp}.down_proj.weight"])
    routings = routing_of(tmp_path / "ours")
    for routing in routings:
        groups = routing.selected().view(-1, 4, 2)
        assert torch.equal(groups[..., 0], groups[..., 1]) and (groups.sum((1, 2)) == 4).all()
    assert len({tuple(row) for routing in routings for row in routing.selected().tolist()}) > 1


def test_silent_experts_learn(source: Path, tmp_path: Path) -> None:
    """`down_proj` alone is zero, so it has a gradient, and after one step so has everything else."""
    upcycle(source, tmp_path / "ours", num_experts=4, num_shared_experts=1, routing="aoe", check=False)
    model = load_model(tmp_path / "ours").train()
    experts = model.model.layers[0].mlp.experts
    assert not experts.down_proj.any() and experts.up_proj.any()
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens(2, 20), labels=tokens(2, 20)).lm_loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in experts.parameters())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"noise": 0.1}, "noise of 0.1 times"),
        ({"noise": 0.1, "split": 2, "num_experts_per_tok": 2}, "noise of 0.1 times"),
        ({"routing": {"method": "da_moe", **RAW}}, "differs from token to token"),
    ],
)
def test_what_is_not_promised_says_so_and_why(
    options: dict[str, Any], reason: str, source: Path, tmp_path: Path
) -> None:
    report = upcycle(source, tmp_path / "ours", **options)
    assert report.exact is False and reason in report.promise
    assert report.comparison.max_difference > 1e-2


def test_noise_is_as_large_as_asked_for(source: Path, tmp_path: Path) -> None:
    upcycle(source, tmp_path / "ours", noise=0.1, check=False)
    ours, theirs = (
        tensors_of(tmp_path / "ours")["model.layers.0.mlp.experts.down_proj"],
        tensors_of(source)["model.layers.0.mlp.down_proj.weight"],
    )
    spread = ((ours - theirs).std(dim=(1, 2)) / theirs.std()).tolist()
    assert all(0.09 < value < 0.11 for value in spread)
    assert not torch.equal(ours[0], ours[1])


def test_the_seed_decides_alone(source: Path, tmp_path: Path) -> None:
    options = {"routing": "rmoe", "noise": 0.1, "check": False}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        state = torch.random.get_rng_state()
        upcycle(source, tmp_path / name, seed=seed, max_shard_size="20KB" if name == "b" else None, **options)
        assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    random = [key for key in a if not torch.equal(a[key], c[key])]
    assert {key.split("mlp.")[-1] for key in random if ".mlp." in key} == {
        "gate.in_proj",
        "gate.out_proj",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    assert any("shared_scorers" in key for key in random)
    assert not torch.equal(a["model.layers.0.mlp.gate.in_proj"], a["model.layers.1.mlp.gate.in_proj"])


def test_bfloat16(source: Path, tmp_path: Path) -> None:
    new_model(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    report = upcycle(tmp_path / "half", tmp_path / "exact", routing="rmoe", num_experts_per_tok=2)
    assert report.exact and report.comparison.max_difference < 1e-5
    dtypes = {tensor.dtype for tensor in tensors_of(tmp_path / "exact").values()}
    assert dtypes == {torch.bfloat16}
    rounded = upcycle(tmp_path / "half", tmp_path / "rounded", num_experts=6, num_experts_per_tok=2, routing=RAW)
    assert not rounded.exact and rounded.promise == "down_proj times 3 is rounded to bfloat16"
    assert rounded.comparison.max_difference > 1e-4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"split": 5}, "split=5 must divide the width of the dense FFN, 48, and num_experts=8"),
        ({"split": 3}, "split=3 must divide"),
        ({"split": 0}, "split=0 must divide"),
        ({"split": 2, "routing": "top_p"}, "may stop amid the parts"),
        ({"split": 2, "num_experts_per_tok": 3}, "k=3 must be a multiple of split=2"),
        ({"split": 2, "routing": {"selector": {"num_groups": 2}}}, "num_groups"),
        ({"num_shared_experts": 2}, "num_shared_experts must be 0 or 1"),
        ({"layers": [3]}, "layers must be among 0 ... 2"),
        ({"layers": []}, "layers must be among"),
        ({"noise": -0.1}, "noise must be between"),
        ({"routing": "aoe"}, "'low_rank' experts cannot hold a dense FFN"),
        ({"routing": "cartesian"}, "'cartesian' experts cannot hold a dense FFN"),
        ({"routing": "aoe", "num_shared_experts": 1, "noise": 0.1}, "not 'low_rank' experts"),
        (
            {"routing": {"method": "cartesian", "experts": {"composition": "nested"}}, "num_shared_experts": 1},
            "composition='nested'",
        ),
        ({"num_experts": 0}, "num_experts"),
        ({"routing": "top_q"}, "top_q"),
    ],
)
def test_refusals(options: dict[str, Any], reason: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        upcycle(source, tmp_path / "ours", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_only_dense_models_are_upcycled(tmp_path: Path) -> None:
    new_model(MOE_CONFIGS["mixtral"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="has the format 'mixtral'"):
        upcycle(tmp_path / "theirs", tmp_path / "ours")


def test_an_upcycled_model_leaves_as_mixtral(source: Path, tmp_path: Path) -> None:
    upcycle(source, tmp_path / "ours", num_experts=4, check=False)
    report = convert(tmp_path / "ours", tmp_path / "mixtral", to="mixtral")
    assert report.comparison.is_equal
    assert json.loads((tmp_path / "mixtral" / "config.json").read_text())["num_local_experts"] == 4


def perplexity(folder: Path, blocks: Any) -> float:
    return evaluate_text(load_model(folder), blocks, batch_size=2)["perplexity"]


def blocks_of(rows: Tensor) -> Any:
    from datasets import Dataset

    positions = list(range(rows.shape[1]))
    return Dataset.from_list(
        [{"input_ids": row, "labels": row, "position_ids": positions, "num_bytes": len(row)} for row in rows.tolist()]
    )


def test_the_perplexity_of_the_dense_model(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "dense_ours", check=False)
    upcycle(source, tmp_path / "ours", routing="top_p", check=False)
    blocks = blocks_of(tokens(4, 32))
    assert perplexity(tmp_path / "ours", blocks) == pytest.approx(perplexity(tmp_path / "dense_ours", blocks), rel=1e-6)
