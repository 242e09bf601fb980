"""The case `aoe_memory`: one AoE block in training, ours against plain autograd.

Every expert of a block runs its first projection on every token: C (T, E, r). Ours computes again what the backward
pass needs of it; plain autograd, written here, keeps it. Everything else is the same in both.

`paper` is a block of the paper's small model. `64 experts / 4` is one of a later paper's, every width divided by 4
(D=1536, r=512 and W=768 there, with 8 experts a token).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.blocks import DynMoeBlock
from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.model.low_rank_experts import LowRankExperts
from dynmoe_hf.model.methods import RoutingSpec, part_options
from dynmoe_hf.model.routing import RoutingContext

from .contest import Contest, Entrant
from .equality import failures_of
from .peers import REFERENCE
from .settings import Build, Settings
from .shapes import DTYPES

ENGINE = "ragged"
PLAIN = "plain"
CHECK_TOKENS = 64


@dataclass(frozen=True)
class AoeShape:
    """One block: T tokens, E experts of which a token uses K, hidden size D, rank r, expert width W."""

    name: str
    num_tokens: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    rank: int
    width: int


FULL = (
    AoeShape("aoe_tiny.yaml", 2048, 8, 2, 128, 40, 152),
    AoeShape("paper, r=256", 512, 8, 2, 768, 256, 3840),
    AoeShape("paper, r=512", 512, 8, 2, 768, 512, 3264),
    AoeShape("64 experts / 4, K=8", 1024, 64, 8, 384, 128, 192),
    AoeShape("64 experts / 4, K=2", 1024, 64, 2, 384, 128, 192),
)
QUICK = (AoeShape("tiny", 40, 4, 2, 32, 8, 24),)


class PlainLowRankExperts(LowRankExperts):
    """The same experts with the projection of all experts left to autograd."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.gate_down_proj
        activations = F.linear(hidden_states, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        return torch.linalg.vector_norm(activations, dim=-1), activations

    def select(self, hidden_states: Tensor, activations: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        return activations[token, expert]


CLASSES: dict[str, type[LowRankExperts]] = {"ours": LowRankExperts, PLAIN: PlainLowRankExperts}


class Block:
    """A block with one batch; the weights and the batch are the same for every class of experts."""

    def __init__(
        self,
        shape: AoeShape,
        experts_class: type[LowRankExperts],
        dtype: torch.dtype,
        seed: int,
        engine: str = ENGINE,
    ) -> None:
        config = DynMoeConfig(
            hidden_size=shape.hidden_size,
            num_attention_heads=1,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.experts_per_token,
            routing={"method": "aoe", "experts": {"rank": shape.rank, "intermediate_size": shape.width}},
            experts_implementation=engine,
        )

        def build_experts(spec: RoutingSpec, config: DynMoeConfig) -> LowRankExperts:
            return experts_class(part_options("experts", spec["experts"]), config)

        torch.manual_seed(seed)
        self.module = DynMoeBlock(config, 0, build_experts)
        self.module.experts.init_weights(config.initializer_range)
        self.hidden_states = F.rms_norm(torch.randn(1, shape.num_tokens, shape.hidden_size), (shape.hidden_size,))
        self.to(dtype)
        self.weights = TokenWeights.build(None, None, (1, shape.num_tokens), self.hidden_states.device)

    def to(self, dtype: torch.dtype) -> Block:
        """The block itself, computing in another dtype."""
        self.module.to(dtype)
        self.hidden_states = self.hidden_states.detach().to(dtype).requires_grad_()
        return self

    def clear(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.hidden_states.grad = None

    def forward(self) -> Tensor:
        """With the balance loss, which gives every norm a gradient."""
        output, routing = self.module(self.hidden_states, RoutingContext(0))
        return output.square().mean() + 0.01 * load_balance([routing], self.weights).sum()

    def step(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        return loss

    def results(self) -> dict[str, Tensor]:
        results = {"loss": self.step().detach(), "gradient of hidden_states": self.hidden_states.grad}
        results |= {f"gradient of {name}": weight.grad for name, weight in self.module.named_parameters()}
        self.clear()
        return results


def aoe_contest(shape: AoeShape, dtype: str, seed: int) -> Contest:
    """Ours over plain autograd: time, what is kept between the passes, and the peak."""
    small = replace(shape, num_tokens=min(shape.num_tokens, CHECK_TOKENS))
    exact = Block(small, CLASSES[PLAIN], DTYPES[dtype], seed, REFERENCE).to(torch.float64).results()
    contestants = {name: Block(small, kind, DTYPES[dtype], seed).results for name, kind in CLASSES.items()}
    failures = failures_of(contestants, exact, PLAIN, f"aoe_memory {shape.name} in {dtype}")
    entrants = []
    for name, kind in CLASSES.items():
        if name not in failures:
            block = Block(shape, kind, DTYPES[dtype], seed)
            entrants.append(Entrant(name, block.step, block.clear, None, block.forward, block.module))
    quantities = ("seconds", "kept_bytes", "peak_bytes")
    return Contest(shape.name, asdict(shape), dtype, entrants, PLAIN, failures, {"engine": ENGINE}, quantities)


def plan_aoe_memory(settings: Settings) -> list[Build]:
    """The contests of `aoe_memory`."""
    return [
        partial(aoe_contest, shape, dtype, settings.seed)
        for dtype in settings.dtypes
        for shape in (QUICK if settings.quick else FULL)
    ]
