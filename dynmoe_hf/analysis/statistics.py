"""What a model routes, counted while it runs."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed

from dynmoe_hf.model.routing import Routing, is_distributed, real_tokens

if TYPE_CHECKING:
    from dynmoe_hf.model import DynMoePreTrainedModel

Mode = Literal["train", "eval"]


@dataclass(frozen=True)
class RoutingSummary:
    """Means over the real tokens of many calls. `L` routers: one a MoE layer, two a cartesian one; `E` experts.

    Args:
        num_tokens: real tokens that were routed.
        num_labels: tokens that had a label.
        expert_load: (L, E) share of the tokens that used the expert; a row sums to the experts per token of its router.
        count_shares: (L, E + 1) share of the tokens that used 0, 1, ..., E experts; a row sums to 1.
        entropy: (L,) mean entropy of a token's probabilities, divided by ln E: 0 for one expert ... 1 for all alike.
        aux_losses: auxiliary losses by name, without their coefficients; the mean over calls, weighted by labels, or by
            tokens where a call had no labels.
        lm_loss: mean over the labels of the task's loss alone, None without labels.
    """

    num_tokens: int
    num_labels: int
    expert_load: list[list[float]]
    count_shares: list[list[float]]
    entropy: list[float]
    aux_losses: dict[str, float]
    lm_loss: float | None

    @property
    def experts_per_token_by_layer(self) -> list[float]:
        """(L,) mean number of experts that a token used, by router."""
        return [sum(loads) for loads in self.expert_load]

    @property
    def experts_per_token(self) -> float:
        """Mean over the routers of the mean number of experts that a token used."""
        return sum(self.experts_per_token_by_layer) / max(len(self.expert_load), 1)

    @property
    def dead_experts(self) -> int:
        """Experts, counted at every router, that no token used."""
        return sum(load == 0 for loads in self.expert_load for load in loads)

    @property
    def experts_per_token_p95(self) -> int:
        """The smallest number of experts that suffices 95 % of the tokens, over the tokens of all routers."""
        counts = [round(sum(shares) * self.num_tokens) for shares in zip(*self.count_shares, strict=True)]
        reached = itertools.accumulate(counts)
        return next(number for number, tokens in enumerate(reached) if 100 * tokens >= 95 * sum(counts))

    @property
    def load_cv_by_layer(self) -> list[float]:
        """(L,) coefficient of variation of `expert_load`, by router: 0 if all experts have the same load."""
        return [coefficient_of_variation(loads) for loads in self.expert_load]

    @property
    def largest_cv_by_layer(self) -> list[float]:
        """(L,) what `load_cv_by_layer` would be if all tokens preferred the same experts in the same order.

        Each token keeping its number of experts, no loads are more unequal (Gale-Ryser theorem).
        """
        nested = [list(itertools.accumulate(reversed(shares[1:])))[::-1] for shares in self.count_shares]
        return [coefficient_of_variation(loads) for loads in nested]

    @property
    def load_cv(self) -> float:
        """Mean over the routers of the coefficient of variation of their loads, 0 ... sqrt(E - 1)."""
        return fmean(self.load_cv_by_layer)

    @property
    def router_entropy(self) -> float:
        """Mean over the routers of their `entropy`."""
        return fmean(self.entropy)


def coefficient_of_variation(loads: Sequence[float]) -> float:
    """Standard deviation of all loads over their mean; 0 if there is no load."""
    mean = fmean(loads)
    return math.sqrt(fmean((load - mean) ** 2 for load in loads)) / mean if mean else 0.0


class RoutingStatistics:
    """Counts what the calls of a model route until `pop`, calls in training and in evaluation mode apart.

    Calls in training mode without gradients train nothing, and are not counted.

    It reads the output of the whole model, so a layer that activation checkpointing runs twice counts once, and no
    layer changes. The sums stay on the device; only `pop` waits for it. Use it as a context manager, or end it with
    `detach`.

    Args:
        model: any model of the family, with or without a head.
    """

    def __init__(self, model: DynMoePreTrainedModel) -> None:
        self.model = model
        self._signature = inspect.signature(model.forward)
        self._loss_names = list(dict.fromkeys(name for layer in model.loss_coefficients() for name in layer))
        self._sums: dict[Mode, dict[str, Tensor] | None] = {"train": None, "eval": None}
        self._hooks = (
            model.register_forward_pre_hook(self._ask_for_routing, with_kwargs=True),
            model.register_forward_hook(self._count, with_kwargs=True),
        )

    def __enter__(self) -> RoutingStatistics:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Stop counting; what has been counted can still be popped."""
        for hook in self._hooks:
            hook.remove()

    def reset(self, mode: Mode) -> None:
        """Forget the counts of one mode in this process."""
        self._sums[mode] = None

    def pop(self, mode: Mode) -> RoutingSummary | None:
        """Summarise the calls of one mode since the last `pop`, and forget them; None if nothing was routed.

        Under `torch.distributed` every process must call it, and gets the summary over all of them.
        """
        sums = self._sums[mode] or self._zeros(self.model.device)
        self.reset(mode)
        flat = torch.cat([value.flatten() for value in sums.values()])
        if is_distributed():
            distributed.all_reduce(flat)
        parts = flat.cpu().split([value.numel() for value in sums.values()])
        total = dict(zip(sums, parts, strict=True))
        num_tokens, num_labels = total["tokens"].item(), total["labels"].item()
        if num_tokens == 0:
            return None
        aux_means = (total["aux_losses"] / total["aux_weights"]).tolist()
        return RoutingSummary(
            num_tokens=int(num_tokens),
            num_labels=int(num_labels),
            expert_load=(total["pairs"].view_as(sums["pairs"]) / num_tokens).tolist(),
            count_shares=(total["counts"].view_as(sums["counts"]) / num_tokens).tolist(),
            entropy=(total["entropy"] / num_tokens / math.log(max(self.model.config.num_experts, 2))).tolist(),
            aux_losses={
                name: mean
                for name, mean, weight in zip(self._loss_names, aux_means, total["aux_weights"], strict=True)
                if weight > 0
            },
            lm_loss=total["lm_loss"].item() / num_labels if num_labels else None,
        )

    def _zeros(self, device: torch.device) -> dict[str, Tensor]:
        num_routers, num_experts = len(self.model.moe_blocks()), self.model.config.num_experts
        shapes = {
            "tokens": (),
            "labels": (),
            "lm_loss": (),
            "aux_losses": (len(self._loss_names),),
            "aux_weights": (len(self._loss_names),),
            "pairs": (num_routers, num_experts),
            "counts": (num_routers, num_experts + 1),
            "entropy": (num_routers,),
        }
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        # A tensor that is made in inference mode could not be added to outside of it.
        with torch.inference_mode(False):
            return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def _ask_for_routing(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"output_routing": True}

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        routings = [routing for routing in output.routing if routing is not None]
        if not routings or (module.training and not torch.is_grad_enabled()):
            return
        with torch.no_grad():
            self._add(routings, module.training, args, kwargs, output)

    def _add(
        self,
        routings: list[Routing],
        training: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        device = routings[0].logits.device
        mode: Mode = "train" if training else "eval"
        if self._sums[mode] is None:
            self._sums[mode] = self._zeros(device)
        real = _real_tokens(arguments, device)
        tokens = real.sum()
        labels = self._num_labels(arguments)
        weight = (tokens if labels is None else labels).to(device)
        aux_losses = getattr(output, "aux_losses", None) or {}
        aux_terms = [weight * aux_losses[name].to(device) if name in aux_losses else None for name in self._loss_names]
        counted = {
            "tokens": tokens,
            "aux_losses": torch.stack([weight * 0.0 if term is None else term for term in aux_terms]),
            "aux_weights": torch.stack([weight * (term is not None) for term in aux_terms]),
            "pairs": torch.stack([routing.selected().sum(0).to(device) for routing in routings]),
            "counts": torch.stack([_tokens_by_count(routing, real).to(device) for routing in routings]),
            "entropy": torch.stack([_summed_entropy(routing, real).to(device) for routing in routings]),
        }
        if labels is not None:
            # A call divides the sum over its labels by `num_items_in_batch`, the labels of the whole optimizer step,
            # where it is given; else by its own labels.
            divisor = arguments.get("num_items_in_batch")
            summed = output.lm_loss.to(device) * (
                weight if divisor is None else torch.as_tensor(divisor, device=device)
            )
            counted |= {"labels": weight, "lm_loss": summed.where(weight > 0, 0.0).sum()}
        for name, value in counted.items():
            self._sums[mode][name] += value

    def _num_labels(self, arguments: dict[str, Any]) -> Tensor | None:
        """How many labels the loss of a call is over, as the heads count them."""
        if arguments.get("start_positions") is not None:
            return torch.ones_like(arguments["start_positions"]).sum()
        labels = arguments.get("labels")
        if labels is None:
            return None
        if arguments.get("shift_labels") is not None:
            labels = arguments["shift_labels"]
        elif self.model.loss_type == "ForCausalLM":
            labels = labels[:, 1:]
        return (labels != -100).sum()


def _real_tokens(arguments: dict[str, Any], device: torch.device) -> Tensor:
    """(T,) float32, 1 on the tokens of a call that are not padding."""
    inputs = arguments.get("input_ids")
    inputs = arguments["inputs_embeds"] if inputs is None else inputs
    real = real_tokens(arguments.get("attention_mask"), *inputs.shape[:2])
    if real is None:
        return torch.ones(inputs.shape[:2].numel(), device=device)
    return real.flatten().to(device, torch.float32)


def _tokens_by_count(routing: Routing, real: Tensor) -> Tensor:
    """(E + 1,) real tokens that use 0, 1, ..., E experts. `bincount` would wait for the device."""
    counts = routing.logits.new_zeros(routing.num_experts + 1)
    return counts.scatter_add(0, routing.num_selected, real.to(counts.device))


def _summed_entropy(routing: Routing, real: Tensor) -> Tensor:
    """Entropy in nats of each token's probabilities, which are made to sum to 1, summed over the real tokens."""
    probs = routing.probs / routing.probs.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    entropy = torch.special.entr(probs).sum(-1)
    return entropy.where(real.to(entropy.device) > 0, 0.0).sum()
