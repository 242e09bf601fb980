"""How many experts the tokens of a task use, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dynmoe_hf.analysis.cost import count_cost

if TYPE_CHECKING:
    from dynmoe_hf import DynMoeConfig


@dataclass
class ExpertCounts:
    """Sums over tokens of the experts that each used, in whole numbers: the order of the tokens changes nothing.

    Args:
        num_tokens: tokens counted.
        sums, squares: (L,) over the tokens, of the experts at each of the `L` routers and of their squares.
        token_squares: over the tokens, of the square of the experts at all routers together.
    """

    num_tokens: int = 0
    sums: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)
    token_squares: int = 0

    def add(self, counts: Tensor) -> None:
        """Add the tokens of a tensor (N, L) int64."""
        self.merge(
            ExpertCounts(
                num_tokens=counts.shape[0],
                sums=counts.sum(0).tolist(),
                squares=counts.square().sum(0).tolist(),
                token_squares=int(counts.sum(1).square().sum()),
            )
        )

    def merge(self, other: ExpertCounts) -> None:
        """Add the tokens of another one."""
        self.num_tokens += other.num_tokens
        self.sums = _added(self.sums, other.sums)
        self.squares = _added(self.squares, other.squares)
        self.token_squares += other.token_squares

    def summary(self) -> dict[str, Any] | None:
        """Mean and standard deviation over the tokens of a token's mean over the routers; `by_layer`, of each router.

        None without tokens or without routers. The deviation is that of these tokens, not an estimate for others.
        """
        if not self.num_tokens or not self.sums:
            return None
        mean, std = _mean_and_std(self.num_tokens, sum(self.sums), self.token_squares)
        by_layer = [_mean_and_std(self.num_tokens, *sums) for sums in zip(self.sums, self.squares, strict=True)]
        return {
            "tokens": self.num_tokens,
            "mean": mean / len(self.sums),
            "std": std / len(self.sums),
            "by_layer": [{"mean": mean, "std": std} for mean, std in by_layer],
        }


@dataclass
class TaskCounts:
    """The tokens that a model read for a task: prompts and continuations apart, in `num_requests` requests."""

    prompt: ExpertCounts = field(default_factory=ExpertCounts)
    continuation: ExpertCounts = field(default_factory=ExpertCounts)
    num_requests: int = 0

    def add(self, counts: Tensor, num_prompt: int) -> None:
        """Add a request: its tokens (N, L) int64, of which the first `num_prompt` are the prompt."""
        self.prompt.add(counts[:num_prompt])
        self.continuation.add(counts[num_prompt:])
        self.num_requests += 1

    @classmethod
    def pooled(cls, parts: Iterable[TaskCounts]) -> TaskCounts:
        """The tokens of several tasks together."""
        whole = cls()
        for part in parts:
            whole.prompt.merge(part.prompt)
            whole.continuation.merge(part.continuation)
            whole.num_requests += part.num_requests
        return whole


def task_compute(config: DynMoeConfig, counts: TaskCounts) -> dict[str, Any]:
    """What a task cost, by the rules of `count_cost` at the experts that each router really used.

    Returns:
        `experts_per_token`: summaries of `prompt`, of `continuation`, and of both, `all`;
        `active_parameters` and `flops_per_token` (forward) of a token, in the mean over all of them;
        `sequence_length`: mean tokens of a request, rounded up, for which the FLOPs count attention;
        `requests`: how many there were.
    """
    both = ExpertCounts()
    both.merge(counts.prompt)
    both.merge(counts.continuation)
    summary = both.summary()
    sequence_length = math.ceil(both.num_tokens / counts.num_requests)
    means = None if summary is None else [layer["mean"] for layer in summary["by_layer"]]
    (activity,) = count_cost(config, means, sequence_length).activity
    return {
        "experts_per_token": {
            "prompt": counts.prompt.summary(),
            "continuation": counts.continuation.summary(),
            "all": summary,
        },
        "active_parameters": activity.parameters,
        "flops_per_token": activity.flops,
        "sequence_length": sequence_length,
        "requests": counts.num_requests,
    }


def _added(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)] if left else right


def _mean_and_std(number: int, total: int, squares: int) -> tuple[float, float]:
    return total / number, math.sqrt(number * squares - total**2) / number
