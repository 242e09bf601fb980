"""Autonomy-of-Experts (Lv et al. 2025, arXiv 2501.13074): what is particular to experts that rank themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.expert_layouts import matched_width
from dynmoe_hf.model.losses import TokenWeights, entropy, load_balance
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock, build_experts
from dynmoe_hf.model.routing import Routing, RoutingContext
from tests.model.plain_aoe import gradients, inputs_for, leaves_of, make_block

EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIGITS = {"rtol": 0, "atol": 1e-6}
CONTEXT = RoutingContext(0)

# The worked example: two experts of three for each token, weights written as they act on row vectors.
WORKED = {
    "gate_down_proj": [[[1, 0], [0, 1]], [[2, 0], [1, 0]], [[0, 1], [1, 1]]],
    "gate_up_proj_lowrank": [[[0.5, 0], [0, 0.5]], [[0.25, 0.5], [0, 1]], [[0.5, -0.5], [0.25, 0.5]]],
    "up_proj": [[[1, 1], [0, 1]], [[1, 0], [1, -1]], [[0, 1], [1, 0]]],
    "down_proj": [[[1, 0], [0, 1]], [[1, 1], [0, 1]], [[1, 0], [-1, 1]]],
}
WORKED_TOKENS = torch.tensor([[[1.0, 2.0], [1.0, -0.5]]], dtype=torch.float64)


def worked_example(**selector: Any) -> tuple[Tensor, Routing]:
    block = make_block(
        "eager", hidden_size=2, num_experts=3, rank=2, width=2, routing={"selector": {"k": 2, **selector}}
    )
    stacked = {name: torch.tensor(matrices).double().transpose(1, 2) for name, matrices in WORKED.items()}
    block.experts.load_state_dict(stacked)
    return block(WORKED_TOKENS, CONTEXT)


@pytest.mark.parametrize(
    ("renormalise", "gates", "output"),
    [
        (True, [[0.597353, 0.402647], [0.594347, 0.405653]], [2.385411, -0.669172]),
        (False, [[0.541882, 0.365256], None], [2.163897, -0.607031]),
    ],
)
def test_worked_example(renormalise: bool, gates: list[Any], output: list[float]) -> None:
    found, routing = worked_example(norm_topk_prob=renormalise)
    norms = torch.tensor([[2.236068, 4.0, 3.605551], [1.118034, 1.5, 0.707107]], dtype=torch.float64)
    torch.testing.assert_close(routing.logits, norms, **DIGITS)
    torch.testing.assert_close(routing.probs[0], torch.tensor([0.092862, 0.541882, 0.365256]), **DIGITS)
    assert routing.expert_ids.tolist() == [[1, 2], [1, 0]]
    for token, expected in enumerate(gates):
        if expected is not None:
            torch.testing.assert_close(routing.weights[token], torch.tensor(expected).double(), **DIGITS)
    torch.testing.assert_close(found[0, 0], torch.tensor(output, dtype=torch.float64), **DIGITS)


def test_worked_example_losses() -> None:
    _, routing = worked_example()
    routing = routing._replace(logits=routing.logits.float())
    weights = TokenWeights.build(None, None, (1, 2), torch.device("cpu"))
    torch.testing.assert_close(load_balance([routing], weights), torch.tensor([2.257691]), **DIGITS)
    normalised = load_balance([routing], weights, normalize=True)
    torch.testing.assert_close(normalised, torch.tensor([1.128845]), **DIGITS)
    torch.testing.assert_close(entropy(routing, weights), torch.tensor(0.984618), **DIGITS)


def test_one_product_for_all_experts_is_a_loop_over_them() -> None:
    block = make_block()
    hidden_states = inputs_for(block, 20)[0]
    norms, activations = block.experts.project(hidden_states)
    for expert, weight in enumerate(block.experts.gate_down_proj):
        alone = hidden_states @ weight.T
        torch.testing.assert_close(activations[:, expert], alone, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(norms[:, expert], (alone * alone).sum(-1).sqrt(), rtol=1e-13, atol=1e-13)


def test_norms_of_bfloat16_activations_are_float32() -> None:
    block = make_block("eager", torch.bfloat16, hidden_size=64, rank=32)
    hidden_states = inputs_for(block, 50)
    routing = block(hidden_states, CONTEXT)[1]
    activations = F.linear(hidden_states[0], block.experts.gate_down_proj.flatten(0, 1)).view(50, 6, 32)
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits.double(), activations.double().square().sum(-1).sqrt(), rtol=1e-6, atol=0)
    rounded = routing.logits.bfloat16().float()
    assert not torch.equal(rounded.topk(2).indices, routing.expert_ids), "rounded norms would choose the same experts"


def test_weights_divided_by_their_sum_or_raw() -> None:
    blocks = [make_block(routing={"selector": {"norm_topk_prob": value}}) for value in (True, False)]
    renormalised, raw = (block(inputs_for(block, 50), CONTEXT)[1] for block in blocks)
    assert torch.equal(renormalised.expert_ids, raw.expert_ids)
    torch.testing.assert_close(renormalised.weights.sum(-1), torch.ones(50, dtype=torch.float64), **EXACT)
    assert (raw.weights.sum(-1) < 1).all()
    own = renormalised.logits.gather(1, renormalised.expert_ids)
    torch.testing.assert_close(renormalised.weights, own.softmax(-1), **EXACT)


def test_a_louder_expert_wins_every_token() -> None:
    block = make_block()
    with torch.no_grad():
        block.experts.gate_down_proj[3] *= 10
    assert (block(inputs_for(block, 50), CONTEXT)[1].expert_ids[:, 0] == 3).all()


def test_silent_experts() -> None:
    block = make_block()
    nn.init.zeros_(block.experts.gate_down_proj)
    inputs = inputs_for(block, 5)
    output, routing = block(inputs, CONTEXT)
    assert (routing.logits == 0).all()
    assert routing.expert_ids.tolist() == [[0, 1]] * 5
    for gradient in gradients(output[0], routing.logits, True, leaves_of(block, inputs)).values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("renormalise", "aux", "reached"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_what_reaches_an_expert_that_no_token_uses(renormalise: bool, aux: bool, reached: bool) -> None:
    block = make_block(routing={"selector": {"norm_topk_prob": renormalise}})
    with torch.no_grad():
        block.experts.gate_down_proj[4] *= 1e-3
    inputs = inputs_for(block, 20)
    output, routing = block(inputs, CONTEXT)
    assert not (routing.expert_ids == 4).any()
    found = gradients(output[0], routing.logits, aux, leaves_of(block, inputs))
    assert bool((found["experts.gate_down_proj"][4] != 0).any()) == reached
    for name in ("gate_up_proj_lowrank", "up_proj", "down_proj"):
        assert (found[f"experts.{name}"][4] == 0).all()


def test_a_rotation_inside_the_gate_changes_nothing() -> None:
    block = make_block()
    inputs = inputs_for(block, 20)
    before, routing_before = block(inputs, CONTEXT)
    rotation = torch.linalg.qr(torch.randn(6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    with torch.no_grad():
        block.experts.gate_down_proj.copy_(rotation @ block.experts.gate_down_proj)
        block.experts.gate_up_proj_lowrank.copy_(block.experts.gate_up_proj_lowrank @ rotation.transpose(1, 2))
    after, routing_after = block(inputs, CONTEXT)
    torch.testing.assert_close(after, before, **EXACT)
    torch.testing.assert_close(routing_after.logits, routing_before.logits, **EXACT)


def test_all_experts_or_one() -> None:
    routing = (block := make_block(num_experts_per_tok=6))(inputs_for(block, 20), CONTEXT)[1]
    softmax = routing.logits.softmax(-1)
    torch.testing.assert_close(routing.weights, softmax.gather(1, routing.expert_ids), **EXACT)
    routing = (block := make_block(num_experts_per_tok=1))(inputs_for(block, 20), CONTEXT)[1]
    assert (routing.weights == 1).all()


def test_full_rank_norms() -> None:
    """An orthogonal projection keeps every norm; a multiple of the identity ranks by its factor, whatever the token."""
    block = make_block(rank=16)
    inputs = inputs_for(block, 20)
    orthogonal = torch.linalg.qr(torch.randn(6, 16, 16, generator=torch.Generator().manual_seed(3)))[0]
    block.experts.gate_down_proj = nn.Parameter(orthogonal.double())
    norms = block(inputs, CONTEXT)[1].logits
    torch.testing.assert_close(norms, inputs[0].norm(dim=-1, keepdim=True).expand(-1, 6), rtol=1e-5, atol=1e-5)
    factors = torch.tensor([0.3, 2.0, 0.1, 1.5, 0.7, 0.2], dtype=torch.float64)
    block.experts.gate_down_proj = nn.Parameter(factors[:, None, None] * torch.eye(16, dtype=torch.float64))
    assert (block(inputs, CONTEXT)[1].expert_ids == torch.tensor([1, 3])).all()


@pytest.mark.parametrize(
    ("hidden_size", "width", "rank", "exact"),
    [
        (768, 3072, 64, 4392.96),
        (768, 3072, 128, 4194.46),
        (768, 3072, 256, 3840),
        (768, 3072, 512, 3264),
        (1280, 5120, 400, 6469.19),
        (1536, 768, 512, 768),
    ],
)
def test_width_of_an_expert_with_as_many_parameters(hidden_size: int, width: int, rank: int, exact: float) -> None:
    found = matched_width(hidden_size, width, rank)
    assert found % 8 == 0
    assert abs(found - exact) <= 4
    sizes = {"hidden_size": hidden_size, "moe_intermediate_size": width, "num_attention_heads": 1, "num_experts": 2}
    counts = []
    for routing in ("top_k", {"method": "aoe", "experts": {"rank": rank}}):
        with torch.device("meta"):
            block = DynMoeBlock(DynMoeConfig(**sizes, routing=routing), 0, build_experts)
        counts.append(sum(parameter.numel() for parameter in block.experts.parameters()))
    assert counts[1] == pytest.approx(counts[0], rel=1e-3)


def test_rank_is_a_third_of_the_hidden_size_unless_it_is_given() -> None:
    for hidden_size, rank in ((768, 256), (1280, 424), (128, 40), (16, 8), (4, 4)):
        config = DynMoeConfig(hidden_size=hidden_size, num_attention_heads=1, routing="aoe")
        with torch.device("meta"):
            experts = DynMoeBlock(config, 0, build_experts).experts
        assert experts.gate_down_proj.shape == (8, rank, hidden_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": "swiglu"}, "low-rank activation"),
        ({"experts": "cartesian"}, "low-rank activation"),
        ({"experts": {"rank": 17}}, "rank=17 must not exceed hidden_size=16"),
        ({"experts": {"rank": 0}}, "rank must be at least 1"),
        ({"experts": {"intermediate_size": 0}}, "intermediate_size must be at least 1"),
        ({"experts": {"down_init_std": -0.1}}, "down_init_std must be a finite number"),
        ({"experts": {"down_init_std": float("nan")}}, "down_init_std must be a finite number"),
        ({"experts": {"rank": 16}, "moe_intermediate_size": 5}, "No low_rank expert of rank 16"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    width = changes.pop("moe_intermediate_size", 32)
    with pytest.raises(ValueError, match=message):
        DynMoeConfig(
            hidden_size=16, num_attention_heads=1, moe_intermediate_size=width, routing={"method": "aoe", **changes}
        )


def test_load_balance_at_perfect_balance_and_with_padding() -> None:
    """Token t is the unit vector t, and expert e answers it with a norm that falls with (t + e) mod E."""
    block = make_block(hidden_size=6, rank=3)
    circulant = 1 + 1e-3 * ((torch.arange(6)[:, None] + torch.arange(6)) % 6)
    with torch.no_grad():
        block.experts.gate_down_proj.zero_()
        block.experts.gate_down_proj[:, 0] = circulant.double()
    tokens = torch.eye(6, dtype=torch.float64)[None]

    def loss(inputs: Tensor, mask: Tensor | None) -> Tensor:
        routing = block(inputs, RoutingContext(0, mask))[1]
        shape = tuple(inputs.shape[:2])
        weights = TokenWeights.build(None if mask is None else mask.view(shape), None, shape, torch.device("cpu"))
        return load_balance([routing], weights)

    torch.testing.assert_close(loss(tokens, None), torch.tensor([2.0]), **DIGITS)
    padded = torch.cat([tokens, tokens[:, :1].expand(1, 3, 6)], dim=1)
    mask = torch.arange(9) < 6
    torch.testing.assert_close(loss(padded, mask), torch.tensor([2.0]), **DIGITS)
    assert loss(padded, None) > 2.00001


@pytest.mark.parametrize(
    ("hidden_size", "rank", "down_init_std", "norm", "spread", "uncertainty", "first"),
    [
        (768, 256, None, 8.85, 0.38, 2.014, 0.556),
        (768, 64, None, 4.40, 0.37, 2.016, 0.553),
        (128, 32, None, 1.27, 0.15, 2.069, 0.523),
        (128, 32, 0.02 * 6**0.5, 3.14, 0.38, 2.014, 0.556),
    ],
)
def test_start(
    hidden_size: int,
    rank: int,
    down_init_std: float | None,
    norm: float,
    spread: float,
    uncertainty: float,
    first: float,
) -> None:
    """Norms before the first step, of tokens as a norm layer returns them."""
    torch.manual_seed(0)
    experts = {"rank": rank, "intermediate_size": 8, "down_init_std": down_init_std}
    config = DynMoeConfig(hidden_size=hidden_size, num_attention_heads=1, routing={"method": "aoe", "experts": experts})
    block = DynMoeBlock(config, 0, build_experts)
    block.experts.init_weights(config.initializer_range)
    for name in ("gate_up_proj_lowrank", "up_proj", "down_proj"):
        assert getattr(block.experts, name).std().item() == pytest.approx(0.02, rel=0.1)
    tokens = F.rms_norm(torch.randn(1, 400, hidden_size), (hidden_size,))
    routing = block(tokens, CONTEXT)[1]
    assert routing.logits.mean().item() == pytest.approx(norm, rel=0.03)
    assert routing.logits.std(-1).mean().item() == pytest.approx(spread, rel=0.1)
    assert torch.special.entr(routing.probs).sum(-1).mean().item() == pytest.approx(uncertainty, abs=0.006)
    assert routing.weights[:, 0].mean().item() == pytest.approx(first, abs=0.01)


def test_top_p_reads_the_softmax_over_all_norms() -> None:
    block = make_block(routing={"method": "aoe_top_p"}, num_experts_per_tok=6)
    routing = block(inputs_for(block, 50), CONTEXT)[1]
    assert len(routing.num_selected.unique()) > 1
    for probs, used in zip(routing.logits.softmax(-1), routing.selected(), strict=True):
        ranked = probs.sort(descending=True).values
        needed = int((ranked.cumsum(0) <= 0.6).sum()) + 1
        assert torch.equal(used.bool(), probs >= ranked[needed - 1])
