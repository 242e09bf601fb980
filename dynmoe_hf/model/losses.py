# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Auxiliary losses: pure functions of the Routing of each layer, over real tokens only.

They mean the same however a batch is cut. Every sequence b of a batch has a weight `w_b`, its share of the labels,
and a loss over tokens is `sum_b w_b * mean over the real tokens of b`. Cross-entropy under the HF Trainer is divided by
`num_items_in_batch`, the labels of the whole optimizer step; multiplied by (labels here / num_items_in_batch), these
sums add up over micro-batches and processes to the value, and the gradient, of the undivided batch.

Load balance is the product of two means, so it is additive only if the product is taken where the cut cannot reach:
inside a sequence (`balance_scope="sequence"`, the default), or with the usage of the whole optimizer step, in which the
other mean is linear (`balance_scope="global"`, after Qiu et al. 2025, arXiv 2501.11873). `balance_scope="micro"` takes
both means over all real tokens of one forward call, as the papers write it; its value depends on how the batch was cut.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, distributed

from .routing import Routing, is_distributed

BalanceScope = Literal["sequence", "micro", "global"]
AuxReduction = Literal["mean", "sum", "pooled"]


class TokenWeights(NamedTuple):
    """How much every token of a call counts."""

    real: Tensor  # (B, S) float32, 1 on real tokens
    sequence: Tensor  # (B,) float32, w_b: sums to 1 unless the call has no label at all
    num_labels: Tensor  # () float32, labels of the call

    @classmethod
    def build(
        cls, token_mask: Tensor | None, label_counts: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> "TokenWeights":
        """Weights of one forward call.

        Args:
            token_mask: (B, S) bool, or None when every token is real.
            label_counts: (B,) labels in each sequence, or None without labels: then sequences count by real tokens.
            shape: (B, S).
            device: where the losses are computed.
        """
        if token_mask is None:
            real = torch.ones(shape, dtype=torch.float32, device=device)
        else:
            real = token_mask.to(device=device, dtype=torch.float32)
        counts = real.sum(-1) if label_counts is None else label_counts.to(device=device, dtype=torch.float32)
        total = counts.sum()
        return cls(real, counts / total.clamp_min(1.0), total)

    def mean(self, values: Tensor) -> Tensor:
        """`sum_b w_b * mean over the real tokens of b` of per-token values (T,)."""
        per_sequence = (values.view_as(self.real) * self.real).sum(-1) / self.real.sum(-1).clamp_min(1.0)
        return (self.sequence * per_sequence).sum()


def group_means(values: Tensor, weights: TokenWeights, scope: BalanceScope) -> Tensor:
    """Means (G, E) of per-token values (T, E) over real tokens: over each of the G = B sequences for scope `sequence`,
    over all tokens alike for `micro` (G = 1), and over the means of the sequences with their weights for `global`."""
    if scope == "micro":
        tokens = weights.real / weights.real.sum().clamp_min(1.0)
    else:
        tokens = weights.real / weights.real.sum(-1, keepdim=True).clamp_min(1.0)
    if scope == "global":
        tokens = weights.sequence[:, None] * tokens
    means = torch.einsum("bs,bse->be", tokens, values.view(*weights.real.shape, -1))
    return means if scope == "sequence" else means.sum(0, keepdim=True)


def group_weights(weights: TokenWeights, scope: BalanceScope) -> Tensor:
    """(G,) how much each group of `group_means` counts; for `global`, the means themselves are weighted."""
    if scope == "sequence":
        return weights.sequence
    return weights.sequence.sum()[None] if scope == "micro" else weights.sequence.new_ones(1)


def expert_usage(routings: Sequence[Routing], weights: TokenWeights) -> Tensor:
    """(routers, E) float32, share of the tokens of this call that use each expert; sequences have their weights."""
    device = weights.real.device
    return torch.cat([group_means(routing.selected().to(device), weights, "global") for routing in routings])


def usage_of_all_processes(usage: Tensor, weights: TokenWeights) -> Tensor:
    """`expert_usage` over this call and those that the other processes make at the same time.

    Under `torch.distributed` every process must call it.
    """
    if not is_distributed():
        return usage
    sums = torch.cat([weights.num_labels * usage.flatten(), weights.num_labels[None]])
    distributed.all_reduce(sums)
    return (sums[:-1] / sums[-1].clamp_min(1.0)).view_as(usage)


def balance_product(usage: Tensor, probability: Tensor, group: Tensor, normalize: bool) -> Tensor:
    """`E * sum_e f_e Q_e`, averaged over groups with their weights."""
    if normalize:
        usage = usage / usage.sum(-1, keepdim=True).clamp_min(torch.finfo(usage.dtype).tiny)
    return usage.shape[-1] * (group * (usage * probability).sum(-1)).sum()


def entropy(routing: Routing, weights: TokenWeights) -> Tensor:
    """Mean entropy of the probabilities over all experts, 0 ... ln E nats.

    The dynamic loss of top-p routing (Huang et al. 2024, arXiv 2403.07652, section 3.2).
    """
    probs = routing.probs
    # The clamp keeps the gradient finite where a probability has underflowed to 0.
    return weights.mean(-(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1))


def router_z(routing: Routing, weights: TokenWeights) -> Tensor:
    """Mean squared log-sum-exp of the logits (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, equation 5)."""
    return weights.mean(routing.logits.logsumexp(-1).square())


def importance_error(routing: Routing, weights: TokenWeights) -> Tensor:
    """Mean squared error of a learned importance, over the tokens that have a target.

    The target is the attention that a token received, which is known in training only (see row_statistics.py).
    """
    has_target = routing.token_loss.isfinite()
    known = weights._replace(real=weights.real * has_target.view_as(weights.real))
    return known.mean(routing.token_loss.where(has_target, 0.0))


TOKEN_LOSSES: dict[str, Callable[[Routing, TokenWeights], Tensor]] = {
    "dynamic": entropy,
    "router_z": router_z,
    "importance": importance_error,
}
LOSSES: dict[str, str] = {
    "load_balance": "E * sum of expert usage x mean probability (Switch, arXiv 2101.03961, equations 4-6)",
    "dynamic": "entropy of the router's distribution (top-p, arXiv 2403.07652)",
    "router_z": "squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906)",
    "importance": "squared error of a learned importance (selector `importance` with statistic `learned`)",
}


def load_balance(
    routings: Sequence[Routing],
    weights: TokenWeights,
    scope: BalanceScope = "sequence",
    normalize: bool = False,
    pooled: bool = False,
    usage: Tensor | None = None,
) -> Tensor:
    """Load-balance loss of each layer, `E * sum_e f_e Q_e` (Switch, arXiv 2101.03961, equations 4-6).

    Args:
        routings: one Routing a layer.
        weights: which tokens are real, and the weight of each sequence.
        scope: the tokens that f and Q are averaged over: one `sequence`, the whole call (`micro`), or for f the whole
            optimizer step (`global`).
        normalize: divide f by its sum, so that perfect balance gives 1 instead of the mean number of experts.
        pooled: average f and Q over the layers before they are multiplied, as Mixtral in transformers and the released
            RMoE code do. A layer's overload then hides behind another layer's underload.
        usage: (routers, E), f for scope `global`; by default that of this call.

    Returns:
        (layers,) float32; with `pooled` a single element.
    """
    if usage is None:
        usages = [group_means(routing.selected(), weights, scope) for routing in routings]
    else:
        usages = list(usage[:, None])
    probabilities = [group_means(routing.probs, weights, scope) for routing in routings]
    if pooled:
        usages, probabilities = [torch.stack(usages).mean(0)], [torch.stack(probabilities).mean(0)]
    group = group_weights(weights, scope)
    return torch.stack([balance_product(*means, group, normalize) for means in zip(usages, probabilities, strict=True)])


def auxiliary_losses(
    routings: Sequence[Routing],
    coefficients: Sequence[dict[str, float]],
    weights: TokenWeights,
    scope: BalanceScope = "sequence",
    normalize: bool = False,
    reduction: AuxReduction = "mean",
    layer_ids: Sequence[int] | None = None,
    usage: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """All auxiliary losses of a model.

    Args:
        routings: one Routing a router.
        coefficients: for each of these routers, loss name -> coefficient; a loss with coefficient 0 is not computed.
        reduction: over layers. `mean`; `sum`; `pooled` as `mean`, with the load balance pooled (see `load_balance`).
        layer_ids: the layer of each router, by default one each. Routers of one layer are added before any mean, so
            that each of them feels the pressure that it would feel alone.
        usage: (routers, E), see `load_balance`.

    Returns:
        The losses by name, each reduced over the layers that have it and without its coefficient, and their weighted
        sum (a float32 scalar that carries gradient).
    """
    device = weights.real.device
    routings = [Routing(*(None if part is None else part.to(device) for part in routing)) for routing in routings]
    layer_ids = range(len(routings)) if layer_ids is None else layer_ids
    losses: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float32, device=device)
    for name in LOSSES:
        routers = [router for router, values in enumerate(coefficients) if values.get(name)]
        if name == "importance":
            routers = [router for router in routers if routings[router].token_loss is not None]
        if not routers:
            continue
        active = [routings[router] for router in routers]
        num_layers = len({layer_ids[router] for router in routers})
        factors = torch.tensor([float(coefficients[router][name]) for router in routers], device=device)
        if name == "load_balance":
            own = None if usage is None else usage[routers]
            values = load_balance(active, weights, scope, normalize, pooled=reduction == "pooled", usage=own)
        else:
            values = torch.stack([TOKEN_LOSSES[name](routing, weights) for routing in active])
        if reduction == "sum":
            losses[name], term = values.sum(), (factors * values).sum()
        else:
            losses[name] = values.mean() * (len(routers) / num_layers)
            term = (factors * values).sum() / len(set(layer_ids))
        total = total + term
    return losses, total
