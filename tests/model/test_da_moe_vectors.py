"""Selector, layer and loss of DA-MoE against an independent float64 computation, loops and an example worked by hand.

The file is described in `tests/vectors/README.md`. The importance itself is compared in test_row_statistics.py.
"""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock, build_experts
from dynmoe_hf.model.routing import Routing, RoutingContext
from dynmoe_hf.model.row_statistics import Visibility, row_statistics
from tests.model.test_da_moe import LEFT_PADDED, LENGTH, da_moe, random_logits, select
from tests.recorded import FOLDER
from tests.tiny import ENGINES, tiny_config, tiny_model, tokens

FILE = FOLDER / "da_moe_ref_f64.safetensors"
STATISTICS = ("row_max", "row_max_norm", "row_entropy")
ALIGNED = ("grouped_mm",)  # needs widths that are multiples of four; the recorded experts are 10 wide
WEIGHTS = {"raw": False, "renorm": True}
ROUTER_LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -0.5, 1.5, -2.0], dtype=torch.float64)


@cache
def vectors() -> dict[str, Tensor]:
    return load_file(FILE)


def real() -> Tensor:
    """(B * S,) bool."""
    return vectors()["attention_mask"].bool().flatten()


def importance(statistic: str, dtype: torch.dtype) -> Tensor:
    """(B * S,) computed from the recorded queries and keys."""
    mask = vectors()["attention_mask"]
    visibility = Visibility.build(mask, torch.arange(10)[None], None, 2, 10, 0, None, mask.device)
    states = (vectors()[name].to(dtype) for name in ("query", "key"))
    return row_statistics(*states, 6**-0.5, visibility, statistic).flatten()


def our_block(statistic: str, norm_topk_prob: bool, engine: str = "eager") -> DynMoeBlock:
    config = tiny_config(
        da_moe(statistic, norm_topk_prob=norm_topk_prob),
        hidden_size=24,
        moe_intermediate_size=10,
        num_shared_experts=0,
        experts_implementation=engine,
    )
    block = DynMoeBlock(config, 0, build_experts)
    gate_up = torch.cat([vectors()["expert_gate_proj"], vectors()["expert_up_proj"]], dim=1)
    block.load_state_dict(
        {
            "gate.weight": vectors()["router_weight"],
            "experts.gate_up_proj": gate_up,
            "experts.down_proj": vectors()["expert_down_proj"],
        }
    )
    return block


def dense_weights(routing: Routing) -> Tensor:
    """(T, E), 0 where an expert is not used."""
    dense = routing.weights.new_zeros(routing.weights.shape[0], 9)
    return dense.scatter(1, routing.expert_ids, routing.weights)[:, :8]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_selector_in_float64(statistic: str, weights: str) -> None:
    logits = (vectors()["input"] @ vectors()["router_weight"].T).flatten(0, 1)
    measured = importance(statistic, torch.float64)
    routing = select(logits, measured, statistic=statistic, norm_topk_prob=WEIGHTS[weights])
    recorded = {name: vectors()[f"moe.{statistic}.{name}"].flatten(0, 1) for name in ("num_experts", "selected")}
    assert torch.equal(routing.num_selected, recorded["num_experts"])
    assert torch.equal(routing.selected().long(), recorded["selected"])
    torch.testing.assert_close(routing.probs, vectors()["router_probs"].flatten(0, 1), rtol=0, atol=1e-12)
    expected = vectors()[f"moe.{statistic}.{weights}.weights"].flatten(0, 1)
    torch.testing.assert_close(dense_weights(routing), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in ALIGNED])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_layer(statistic: str, weights: str, engine: str) -> None:
    """From queries, keys and inputs to outputs and gradients, in float32; padding selects nothing here."""
    block = our_block(statistic, WEIGHTS[weights], engine)
    context = RoutingContext(0, token_mask=real(), importance=importance(statistic, torch.float32))
    output, routing = block(vectors()["input"].float(), context)
    expected = vectors()[f"moe.{statistic}.{weights}.output"]
    torch.testing.assert_close(output.double()[real().view(2, 10)], expected[real().view(2, 10)], rtol=0, atol=1e-5)
    selected = vectors()[f"moe.{statistic}.selected"].flatten(0, 1)
    assert torch.equal(routing.selected()[real()].long(), selected[real()])
    assert not routing.used[~real()].any()

    names = ("router_weight", "expert_gate_proj", "expert_up_proj", "expert_down_proj")
    router, gate, up, down = exact = [vectors()[name].clone().requires_grad_() for name in names]
    inputs = vectors()["input"].flatten(0, 1)
    chosen = (inputs @ router.T).softmax(-1) * selected * real()[:, None]
    if WEIGHTS[weights]:
        chosen = chosen / chosen.sum(-1, keepdim=True).clamp_min(1e-30)
    inner = F.silu(torch.einsum("td,eid->tei", inputs, gate)) * torch.einsum("td,eid->tei", inputs, up)
    again = torch.einsum("te,tei,edi->td", chosen, inner, down)
    torch.testing.assert_close(again[real()], expected.flatten(0, 1)[real()], rtol=0, atol=1e-12)
    probe = torch.randn(again.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (again * probe).sum().backward()
    (output.flatten(0, 1) * probe).sum().backward()
    ours = (block.gate.weight.grad, *block.experts.gate_up_proj.grad.chunk(2, dim=1), block.experts.down_proj.grad)
    for gradient, tensor in zip(ours, exact, strict=True):
        largest = tensor.grad.abs().max().item()
        torch.testing.assert_close(gradient.double(), tensor.grad, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_balance_loss(statistic: str) -> None:
    """Over all real tokens of the call, the form of the recorded value."""
    block = our_block(statistic, False)
    context = RoutingContext(0, token_mask=real(), importance=importance(statistic, torch.float32))
    routing = block.route(vectors()["input"].float().flatten(0, 1), context)
    weights = TokenWeights.build(real().view(2, 10), None, (2, 10), torch.device("cpu"))
    loss = load_balance([routing], weights, "micro", normalize=True)
    torch.testing.assert_close(loss.double(), vectors()[f"moe.{statistic}.aux_masked"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("statistic", "importance", "expected"),
    [
        ("row_max", [1.0, 0.7, 0.65, 0.425], [8, 6, 6, 4]),
        ("row_max_norm", [0.0, 0.4, 0.475, 0.233333], [1, 4, 4, 2]),
        ("row_entropy", [0.0, 0.734498, 0.797410, 0.892738], [1, 6, 7, 8]),
        ("self", [1.0, 0.3, 0.35, 0.425], [8, 3, 3, 4]),
        ("row_max_nosink", [0.0, 1.0, 0.708333, 0.5], [1, 8, 6, 4]),
    ],
)
def test_worked_example_number_of_experts(statistic: str, importance: list[float], expected: list[int]) -> None:
    routing = select(random_logits(4), torch.tensor(importance), statistic=statistic)
    assert routing.num_selected.tolist() == expected


@pytest.mark.parametrize(
    ("number", "raw", "renormalised"),
    [
        (4, [0.402728, 0.244267, 0.148155, 0.089861], [0.455054, 0.276004, 0.167405, 0.101536]),
        (
            6,
            [0.402728, 0.244267, 0.148155, 0.089861, 0.054503, 0.033058],
            [0.414085, 0.251156, 0.152334, 0.092395, 0.056040, 0.033990],
        ),
        (8, *[[0.402728, 0.244267, 0.148155, 0.089861, 0.054503, 0.033058, 0.020051, 0.007376]] * 2),
    ],
)
def test_worked_example_weights(number: int, raw: list[float], renormalised: list[float]) -> None:
    importance = torch.tensor([number / 8])
    for norm_topk_prob, expected in ((False, raw), (True, renormalised)):
        routing = select(ROUTER_LOGITS[None], importance, norm_topk_prob=norm_topk_prob)
        assert routing.expert_ids.tolist() == [[0, 6, 1, 4, 2, 5, 3, 7][:number] + [8] * (8 - number)]
        weights = torch.tensor([expected + [0.0] * (8 - number)], dtype=torch.float64)
        torch.testing.assert_close(routing.weights, weights, rtol=0, atol=5e-7)


def test_balance_loss_of_uniform_use_is_its_coefficient() -> None:
    """Every row in all its rotations, each row with its own number of experts."""
    rows = random_logits(8, dtype=torch.float32)
    logits = torch.cat([torch.stack([row.roll(step) for step in range(8)]) for row in rows])
    routing = select(logits, torch.arange(1, 9).repeat_interleave(8) / 8)
    assert set(routing.num_selected.tolist()) == set(range(1, 9))
    config = tiny_config("da_moe")
    assert config.balance_normalize and config.routing["losses"]["load_balance"] == 0.01
    weights = TokenWeights.build(None, None, (1, 64), torch.device("cpu"))
    for scope in ("sequence", "micro"):
        loss = load_balance([routing], weights, scope, config.balance_normalize)
        torch.testing.assert_close(loss, torch.ones(1))


def balance_by_hand(routing: Routing, rows: list[int]) -> float:
    """E sum_e f_e P_e of the tokens `rows`; f is the share of all their assignments."""
    assigned = [expert for row in rows for expert in routing.expert_ids[row].tolist() if expert < 8]
    shares = [assigned.count(expert) / len(assigned) for expert in range(8)]
    assert sum(shares) == pytest.approx(1)
    return 8 * sum(share * routing.probs[rows, expert].mean().item() for expert, share in enumerate(shares))


@pytest.mark.parametrize("scope", ["sequence", "micro"])
def test_balance_loss_of_the_model(scope: str) -> None:
    model = tiny_model("da_moe", balance_scope=scope)
    content = tokens(2, LENGTH)
    labels = content.masked_fill(LEFT_PADDED == 0, -100)
    output = model(content, attention_mask=LEFT_PADDED, labels=labels, output_routing=True)
    real = [[t + LENGTH * b for t in range(LENGTH) if LEFT_PADDED[b, t]] for b in range(2)]
    shares = (labels[:, 1:] != -100).sum(-1) / (labels[:, 1:] != -100).sum()
    layers = []
    for routing in (output.routing[0], output.routing[2]):
        if scope == "micro":
            layers.append(balance_by_hand(routing, real[0] + real[1]))
        else:
            layers.append(
                sum(w * balance_by_hand(routing, rows) for w, rows in zip(shares.tolist(), real, strict=True))
            )
    assert output.aux_losses["load_balance"].item() == pytest.approx(sum(layers) / 2, abs=1e-6)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.01 * output.aux_losses["load_balance"])
