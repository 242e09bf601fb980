# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Selectors: which experts does a token use, and how many? One class a selector; shapes as in routing.py."""

from dataclasses import dataclass
from math import inf, log
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .buffers import KeepsBufferDtype
from .routing import MAX_FACTOR, Routing, RoutingContext, shown, unknown_name
from .row_statistics import STATISTICS

LEARNED = "learned"  # the one importance that is predicted, not measured


class Selector(KeepsBufferDtype):
    """Base of all selectors. It stands at `mlp.selector` of its layer.

    A subclass names its typed options in `Options`, and in `slots_option` the one among them that bounds the experts of
    one token; None there follows the config's `num_experts_per_tok`.
    """

    Options: type
    slots_option: str
    fills_every_slot = False  # True when no slot of a real token is ever unused
    statistic: str | None = None  # the row statistic of attention that `context.importance` must hold
    has_threshold = False  # True if a controller may move its threshold, see `control`
    controlled = False

    def __init__(self, options: Any, config: Any) -> None:
        super().__init__()
        self.options = options
        self.num_slots = self.count_slots(options, config)

    @classmethod
    def default_slots(cls, num_experts: int) -> int:
        """The `num_experts_per_tok` of a config that names none: no cap."""
        return num_experts

    @classmethod
    def count_slots(cls, options: Any, config: Any) -> int:
        """K: the most experts one token can use, 1 ... E.

        Raises:
            ValueError: if these options cannot work with the config's numbers.
        """
        slots = getattr(options, cls.slots_option)
        name = cls.slots_option if slots is not None else "num_experts_per_tok"
        slots = config.num_experts_per_tok if slots is None else slots
        if not 1 <= slots <= config.num_experts:
            raise ValueError(f"{name} must be between 1 and num_experts ({config.num_experts}), got {slots}.")
        return slots

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        """Select from scores (T, E); weights and probabilities come back in the dtype of the scores."""
        raise NotImplementedError

    def init_weights(self, std: float) -> None:
        """Fill every parameter and buffer; most selectors have none."""

    def control(self, initial: float) -> None:
        """Let a controller move the threshold of this selector, which starts at `initial`."""
        self.controlled = True
        self.initial_threshold = initial
        self.threshold = nn.Buffer(torch.tensor(initial, dtype=torch.float32))


@strict
@dataclass
class TopKOptions:
    """Options of `top_k`.

    Args:
        k: experts per token, 1 ... E; None follows the config's `num_experts_per_tok`.
        score_function: `softmax` over all experts, or an independent `sigmoid` for each (DeepSeek-V3).
        norm_topk_prob: divide the kept weights by their sum.
        scale: factor on the weights after that (`routed_scaling_factor` of DeepSeek).
        num_groups: the experts form this many equal groups, and a token chooses from the best `top_groups` of them;
            a group is ranked by the sum of its two best experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        top_groups: groups that a token may choose from, 1 ... num_groups.
        bias: add a buffer `selection_bias` (E,) to the scores for ranking only, never to the weights.
        disable_top1: in evaluation, choose from all experts but the best one: a test of how well others replace it
            (CartesianMoE, Su et al. 2024, arXiv 2410.16077).
    """

    k: int | None = None
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    scale: float | int = 1.0
    num_groups: int = 1
    top_groups: int = 1
    bias: bool = False
    disable_top1: bool = False

    def __post_init__(self) -> None:
        if self.num_groups < 1 or not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"top_groups must be between 1 and num_groups, got top_groups={self.top_groups} and "
                f"num_groups={self.num_groups}."
            )
        if not abs(self.scale) <= MAX_FACTOR:
            raise ValueError(f"scale must be a finite number of at most {MAX_FACTOR:g}, got {self.scale}.")


class TopK(Selector):
    """The `k` experts with the highest score; ties go to the lower index (Shazeer et al. 2017, section 2.1)."""

    Options = TopKOptions
    slots_option = "k"
    fills_every_slot = True

    def __init__(self, options: TopKOptions, config: Any) -> None:
        super().__init__(options, config)
        if options.bias:
            self.selection_bias = nn.Buffer(torch.zeros(config.num_experts))

    @classmethod
    def default_slots(cls, num_experts: int) -> int:
        """Two experts a token, as in Mixtral."""
        return min(2, num_experts)

    @classmethod
    def count_slots(cls, options: TopKOptions, config: Any) -> int:
        slots = super().count_slots(options, config)
        if config.num_experts % options.num_groups:
            raise ValueError(f"num_groups={options.num_groups} must divide num_experts={config.num_experts}.")
        reachable = options.top_groups * (config.num_experts // options.num_groups) - options.disable_top1
        if slots > reachable:
            raise ValueError(
                f"k={slots} is more than the {reachable} experts that top_groups={options.top_groups} and "
                f"disable_top1={options.disable_top1} leave to choose from."
            )
        return slots

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        if self.options.score_function == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        ranking = scores + self.selection_bias.to(scores.dtype) if self.options.bias else scores
        if self.options.num_groups > 1:
            ranking = self._within_best_groups(ranking)
        if self.options.disable_top1 and not self.training:
            best = ranking.sort(dim=-1, descending=True, stable=True).indices[:, :1]
            ranking = ranking.scatter(1, best, -torch.inf)
        order = ranking.sort(dim=-1, descending=True, stable=True).indices[:, : self.num_slots]  # (T, K)
        weights = scores.gather(-1, order)
        if self.options.norm_topk_prob and self.options.score_function == "softmax":
            # Division by the sum gives the same weights, but leaves rounding errors as gradient of the other experts.
            weights = logits.gather(-1, order).softmax(-1)
        elif self.options.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(order, weights * self.options.scale, logits, probs)

    def _within_best_groups(self, ranking: Tensor) -> Tensor:
        num_tokens, num_experts = ranking.shape
        groups = ranking.view(num_tokens, self.options.num_groups, num_experts // self.options.num_groups)
        best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)  # (T, groups)
        best = best_two.sort(dim=-1, descending=True, stable=True).indices[:, : self.options.top_groups]
        outside = torch.ones_like(best_two, dtype=torch.bool).scatter(1, best, False)
        return groups.masked_fill(outside[:, :, None], -torch.inf).view(num_tokens, num_experts)

    def init_weights(self, std: float) -> None:
        if self.options.bias:
            init.zeros_(self.selection_bias)


@strict
@dataclass
class TopPOptions:
    """Options of `top_p`.

    Args:
        p: probability mass, >= 0, that the kept experts must exceed; 1 or more keeps every expert. Where a controller
            moves the threshold, its start; None there takes the one that suits the target (see controllers.py).
        max_experts: cap on the experts of one token, 1 ... E, the most probable first; None follows the config's
            `num_experts_per_tok`, which is E (no cap) unless it was given.
        norm_topk_prob: divide the kept weights by their sum. The paper does not: then a dropped expert, and a token
            with a single expert, still train the router.
        standardize: bring the logits of each token to mean 0 and variance 1 over the experts, and multiply them with a
            scale of the layer that is learnt (see `LogitNorm`).
    """

    p: float | int | None = 0.4
    max_experts: int | None = None
    norm_topk_prob: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        if self.p is not None and not 0 <= self.p <= MAX_FACTOR:
            raise ValueError(f"p must be a finite number >= 0 and at most {MAX_FACTOR:g}, got {self.p}.")


class LogitNorm(nn.Module):
    """Logits of a token with mean 0 and variance 1 over the experts, times a learnt scale `theta`.

    DTop-p (Jin et al. 2025, arXiv 2512.13996). The statistics are those of one token, so that routing stays causal and
    does not depend on the batch. The name keeps the Trainer from applying weight decay.
    """

    SMALLEST_SCALE = 1e-3  # a scale below 0 would turn the order of the experts round

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1))  # FSDP refuses parameters without a dimension

    def forward(self, logits: Tensor) -> Tensor:
        centred = logits - logits.mean(-1, keepdim=True)
        scale = self.theta.to(logits.dtype).clamp_min(self.SMALLEST_SCALE)
        return scale * centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    def init_weights(self, std: float) -> None:
        """Fill the scale."""
        init.ones_(self.theta)


class TopP(Selector):
    """Keep adding experts, the most probable first, until their summed probability exceeds `p`.

    Huang et al. 2024, arXiv 2403.07652, section 3. The expert that crosses `p` is kept, so every token uses at least
    one; weights are the softmax over all experts, not renormalised. Ties go to the lower index.
    """

    Options = TopPOptions
    slots_option = "max_experts"
    has_threshold = True

    def __init__(self, options: TopPOptions, config: Any) -> None:
        super().__init__(options, config)
        self.logit_norm = LogitNorm() if options.standardize else None

    @classmethod
    def count_slots(cls, options: TopPOptions, config: Any) -> int:
        if options.standardize and config.num_experts < 3:
            raise ValueError(
                "standardize needs num_experts of 3 or more: with fewer, the standardised logits of all tokens are the "
                "same numbers."
            )
        return super().count_slots(options, config)

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        scaled = logits if self.logit_norm is None else self.logit_norm(logits)
        probs = scaled.softmax(-1)
        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
        mass = sorted_probs.cumsum(-1)
        keep = torch.ones_like(mass, dtype=torch.bool)
        # Rounding may carry the sum past 1, and p = 1 keeps every expert.
        keep[:, 1:] = mass[:, :-1].clamp_max(1.0) <= (self.threshold if self.controlled else self.options.p)
        return keep_slots(logits, scaled, probs, order, keep, self.num_slots, self.options.norm_topk_prob)

    def init_weights(self, std: float) -> None:
        if self.controlled:
            init.constant_(self.threshold, self.initial_threshold)


def keep_slots(
    logits: Tensor, scaled: Tensor, probs: Tensor, order: Tensor, keep: Tensor, num_slots: int, normalize: bool
) -> Routing:
    """The Routing in which tokens keep the experts that `keep` (T, E) marks in their `order` (T, E) of preference.

    Args:
        logits: (T, E) raw scores.
        scaled: (T, E) what `probs` is the softmax of.
        normalize: weights of the kept experts sum to 1.
    """
    keep, order = keep[:, :num_slots], order[:, :num_slots]
    if normalize:
        # The softmax over the kept ones: experts that are not kept have no gradient at all.
        weights = scaled.gather(1, order).masked_fill(~keep, -inf).softmax(-1)
    else:
        weights = probs.gather(1, order).masked_fill(~keep, 0.0)
    return Routing(order.masked_fill(~keep, logits.shape[-1]), weights, logits, probs)


@strict
@dataclass
class ImportanceOptions:
    """Options of `importance`.

    Args:
        statistic: what of the token's attention is its importance, a mean over the heads (see row_statistics.py):
            `row_max`, its largest weight; `row_max_norm`, the same without the bias of short rows; `row_max_nosink`,
            without the first token it sees; `row_entropy`; `self`, its weight on itself. `learned` predicts the
            attention that the token will receive from later ones; the loss `importance` trains it.
        scale: factor on the importance, above 0.
        k_min: fewest experts of one token, 1 ... k_max.
        k_max: most experts of one token, 1 ... E; None follows the config's `num_experts_per_tok`, which is E unless it
            was given.
        ceil_eps: subtracted before rounding up, so that rounding errors do not add an expert to exact multiples.
        norm_topk_prob: divide the kept weights by their sum.
        learned_mean: experts that `learned` gives to a token of average importance, above 0.
    """

    statistic: str = "row_max"
    scale: float | int = 1.0
    k_min: int = 1
    k_max: int | None = None
    ceil_eps: float = 1e-4
    norm_topk_prob: bool = False
    learned_mean: float | int = 2.0

    def __post_init__(self) -> None:
        if self.statistic.startswith("col"):
            raise ValueError(
                f"statistic {shown(self.statistic)} is refused in a decoder: the attention that a token receives comes "
                "from tokens after it, so training would see the future and decoding could not."
            )
        if self.statistic not in (*STATISTICS, LEARNED):
            raise ValueError(unknown_name("statistic", self.statistic, (*STATISTICS, LEARNED)))
        for name in ("scale", "learned_mean"):
            if not 0 < getattr(self, name) <= MAX_FACTOR:
                raise ValueError(
                    f"{name} must be a finite number above 0 and at most {MAX_FACTOR:g}, got {getattr(self, name)}."
                )
        if self.k_min < 1:
            raise ValueError(f"k_min must be at least 1, got {self.k_min}.")
        if not 0 <= self.ceil_eps < 1:
            raise ValueError(f"ceil_eps must be at least 0 and below 1, got {self.ceil_eps}.")


class ImportanceHead(nn.Module):
    """Predicts the importance of a token from the token alone; it starts at `mean` for every token."""

    def __init__(self, hidden_size: int, mean: float) -> None:
        super().__init__()
        self.mean = mean
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, hidden_states: Tensor, received: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Importance (T,) without gradient, and its squared error, NaN where the attention received is unknown.

        Args:
            hidden_states: (T, D).
            received: (T,) attention that the tokens received, 1 in the mean (see `received_attention`); None if no
                token's is known.
        """
        scores = F.linear(hidden_states.detach().float(), self.weight.float(), self.bias.float())
        importance = scores.squeeze(-1).sigmoid()
        if received is None:
            return importance.detach(), None
        error = importance - (self.mean * received.nan_to_num(0.0)).clamp_max(1.0)
        return importance.detach(), torch.where(received.isfinite(), error.square(), torch.nan)

    def init_weights(self, std: float) -> None:
        """Fill every parameter."""
        init.zeros_(self.weight)
        init.constant_(self.bias, log(self.mean / (1 - self.mean)))


class Importance(Selector):
    """More experts for tokens whose attention is sharp: `k_t = ceil(scale * importance_t * E)`, within k_min ... k_max.

    DA-MoE (Aghdam et al. 2024, arXiv 2409.06669). The importance is read from the token's own row of attention weights,
    which exists when the token is processed and never changes. It has no gradient: the router learns through the
    weights alone, the softmax over all experts. Ties go to the lower index.
    """

    Options = ImportanceOptions
    slots_option = "k_max"

    def __init__(self, options: ImportanceOptions, config: Any) -> None:
        super().__init__(options, config)
        self.statistic = options.statistic
        self.importance_head = None
        if options.statistic == LEARNED:
            self.importance_head = ImportanceHead(config.hidden_size, options.learned_mean / config.num_experts)
        self.fills_every_slot = options.k_min == self.num_slots

    @classmethod
    def count_slots(cls, options: ImportanceOptions, config: Any) -> int:
        slots = super().count_slots(options, config)
        if options.k_min > slots:
            raise ValueError(f"k_min={options.k_min} must not exceed the most experts of a token, {slots}.")
        if options.statistic == LEARNED and options.learned_mean >= config.num_experts:
            raise ValueError(f"learned_mean={options.learned_mean} must be below num_experts={config.num_experts}.")
        return slots

    def num_wanted(self, importance: Tensor, num_experts: int) -> Tensor:
        """(T,) int64 experts of each token, k_min ... k_max."""
        wanted = torch.ceil(self.options.scale * importance * num_experts - self.options.ceil_eps)
        return wanted.clamp(self.options.k_min, self.num_slots).to(torch.int64)

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        probs = logits.softmax(-1)
        order = probs.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(logits.shape[-1], device=logits.device)
        importance, token_loss = context.importance, None
        if self.importance_head is not None:
            importance, token_loss = self.importance_head(context.hidden_states, context.importance)
        keep = rank < self.num_wanted(importance, logits.shape[-1])[:, None]
        routing = keep_slots(logits, logits, probs, order, keep, self.num_slots, self.options.norm_topk_prob)
        return routing._replace(token_loss=token_loss)


SELECTORS: dict[str, type[Selector]] = {"top_k": TopK, "top_p": TopP, "importance": Importance}
