"""Alarms in words for the two ways in which routing goes wrong: all tokens to the same experts, or to too many."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import distributed

from dynmoe_hf.analysis.statistics import RoutingSummary
from dynmoe_hf.model.methods import RoutingSpec
from dynmoe_hf.model.routing import is_distributed

if TYPE_CHECKING:
    from dynmoe_hf.model import DynMoePreTrainedModel
    from dynmoe_hf.model.blocks import DynMoeBlock

PATIENCE = 3  # logs in a row: one bad log is chance, or the start of training
CHOICES_PER_EXPERT = 16  # fewer in a log, and idle experts may be chance
COLLAPSED_CV = 0.9  # of the largest that is possible; healthy small models stay below 0.8 but for single logs
LEAST_CV = 1.0  # at which half of the experts do as much as all, evenly loaded
IDLE_SHARE = 0.75  # of the experts of a layer; half are idle for a while at the start of a healthy run
NEARLY_ALL = 0.9  # of the experts of a layer
GROWTH = 2.0  # over the first log
OVER_TARGET = 1.5  # of the controller


class RoutingAlarms:
    """Watches the summaries of the training logs of one run.

    * `collapse`: for PATIENCE logs in a row, the coefficient of variation of the loads of a layer is COLLAPSED_CV of
      the largest that is possible with these numbers of experts per token, or of LEAST_CV if that is more; or
      IDLE_SHARE of its experts have no token. Logs of fewer than CHOICES_PER_EXPERT choices for each expert say nothing
      and change nothing.
    * `runaway`: for PATIENCE logs in a row, the tokens of a layer use NEARLY_ALL of its experts, or GROWTH times as
      many as in the first log. Under a controller it is the mean over its layers that counts, against OVER_TARGET times
      the target. A layer whose number of experts is fixed is left out.

    Each alarm warns once for each router, with what to try.

    Args:
        model: the model that is trained.
    """

    def __init__(self, model: DynMoePreTrainedModel) -> None:
        self.model = model
        self._first: list[float] | None = None
        self._streaks: dict[tuple[str, int], int] = {}
        self._told: set[tuple[str, int]] = set()

    def check(self, summary: RoutingSummary) -> dict[str, int]:
        """The routers in alarm, as `alarm/collapse` and `alarm/runaway`. Warns of those that were not before."""
        if self._first is None:
            self._first = summary.experts_per_token_by_layer
        found = {"collapse": self._collapsed(summary), "runaway": self._running_away(summary)}
        ringing = {}
        for name, figures in found.items():
            for router, figure in figures.items():
                streak = self._streaks.get((name, router), 0)
                self._streaks[name, router] = streak if figure is None else (streak + 1 if figure else 0)
            routers = [router for router in figures if self._streaks[name, router] >= PATIENCE]
            self._tell(name, {router: figures[router] for router in routers if figures[router]})
            ringing[f"alarm/{name}"] = len(routers)
        return ringing

    def _collapsed(self, summary: RoutingSummary) -> dict[int, str | None]:
        """Router -> what is wrong in words, "" if nothing is, None if the log is too short to tell."""
        found: dict[int, str | None] = {}
        figures = zip(summary.expert_load, summary.load_cv_by_layer, summary.largest_cv_by_layer, strict=True)
        for router, (loads, cv, largest) in enumerate(figures):
            idle = loads.count(0)
            unequal = cv >= COLLAPSED_CV * max(largest, LEAST_CV)
            if sum(loads) * summary.num_tokens < CHOICES_PER_EXPERT * len(loads):
                found[router] = None
            elif unequal or idle >= IDLE_SHARE * len(loads):
                found[router] = (
                    f"{idle} of {len(loads)} experts got no token, and the most used one got {max(loads):.0%} of them "
                    f"(load_cv {cv:.2f}, at most {largest:.2f})"
                )
            else:
                found[router] = ""
        return found

    def _running_away(self, summary: RoutingSummary) -> dict[int, str | None]:
        """As `_collapsed`."""
        found: dict[int, str | None] = {}
        used = summary.experts_per_token_by_layer
        over = self._over_target(used)
        num_experts = self.model.config.num_experts
        for router, block in enumerate(self.model.moe_blocks()):
            found[router] = ""
            if block.selector.fills_every_slot:
                continue
            figure = f"a token uses {used[router]:.1f} of {num_experts} experts"
            if block.selector.controlled:
                if over is not None:
                    found[router] = f"{figure}, and {over}"
            elif used[router] >= NEARLY_ALL * num_experts:
                found[router] = f"{figure}, so routing saves nothing"
            elif used[router] >= GROWTH * self._first[router]:
                found[router] = f"{figure}, at the first log {self._first[router]:.1f}"
        return found

    def _over_target(self, used: list[float]) -> str | None:
        """By how much the mean over the controlled layers exceeds their target."""
        choices: dict[int, list[float]] = {}
        for block, number in zip(self.model.moe_blocks(), used, strict=True):
            if block.selector.controlled:
                choices.setdefault(block.layer_idx, []).append(number)
                target = block.spec["controller"]["target"]
        if not choices:
            return None
        mean = sum(map(math.prod, choices.values())) / len(choices)  # the experts of a cartesian layer are pairs
        if mean < OVER_TARGET * target:
            return None
        return f"all layers of the controller {mean:.1f} in the mean, where its target is {target:g}"

    def _tell(self, name: str, figures: Mapping[int, str]) -> None:
        """Warn once for each router, in one process."""
        blocks = self.model.moe_blocks()
        for router, figure in figures.items():
            if (name, router) in self._told:
                continue
            self._told.add((name, router))
            if is_distributed() and distributed.get_rank():
                continue
            block = blocks[router]
            place = f"layer {block.layer_idx}" + ("" if block.bank is None else f", bank {block.bank}")
            what = "the router has collapsed" if name == "collapse" else "compute runs away"
            advice = against_collapse(block) if name == "collapse" else against_runaway(block.spec)
            warnings.warn(f"In {place} {what}: for {PATIENCE} logs {figure}. {advice}", stacklevel=2)


def against_collapse(block: DynMoeBlock) -> str:
    """What to try when all tokens use the same experts."""
    balance = block.spec["losses"]["load_balance"]
    return (
        f"The other experts learn nothing. Raise routing.losses.load_balance (now {balance:g}), lower "
        "router_learning_rate, or start again from a checkpoint before the collapse."
    )


def against_runaway(spec: RoutingSpec) -> str:
    """What to try when tokens use too many experts."""
    selector = spec["selector"]
    if spec["controller"]["type"] != "none":
        return (
            "The controller cannot hold its target: raise its gain_p and gain_i, lower its p_min (now "
            f"{spec['controller']['p_min']:g}), or lower the learning rate."
        )
    if selector["type"] == "top_p":
        return (
            f"Lower routing.selector.p (now {selector['p']:g}), raise routing.losses.dynamic (now "
            f"{spec['losses']['dynamic']:g}), cap it with routing.selector.max_experts, or hold a target with the "
            "method dtop_p."
        )
    if selector["type"] == "importance":
        return f"Lower routing.selector.scale (now {selector['scale']:g}), or cap it with routing.selector.k_max."
    return "Cap it with num_experts_per_tok."
