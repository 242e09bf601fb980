# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Expert layouts: what is an expert? The options of each; the modules stand in modeling_dynmoe.py (`swiglu`, because
transformers looks for its experts decorator in the text of the file that defines the model), low_rank_experts.py and
blocks.py (`cartesian`)."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .routing import MAX_WIDTH, build_options, unknown_name


@strict
@dataclass
class SwigluOptions:
    """`swiglu` has no options: `down(act(gate x) * up x)` with fused weights (E, 2I, D) and (E, D, I)."""


@strict
@dataclass
class LowRankOptions:
    """Options of `low_rank`, experts whose gate projection is a product of two matrices (see low_rank_experts.py).

    Args:
        rank: r, rank of the gate projection, 1 ... D; None takes D / 3, the best in the paper's table, down to a
            multiple of 8.
        intermediate_size: W, width of an expert; None takes the one that gives an expert as many parameters as a
            `swiglu` expert of width `moe_intermediate_size` has, see `matched_width`.
        down_init_std: standard deviation of the D -> r matrices at the start; None follows `initializer_range`. Their
            norms are the scores of `activation_norm`: 0.02 * sqrt(768 / D) gives any width the start of the paper's.
    """

    rank: int | None = None
    intermediate_size: int | None = None
    down_init_std: float | int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_WIDTH:
                raise ValueError(f"{name} must be at least 1 and at most {MAX_WIDTH:,}, got {value}.")
        if self.down_init_std is not None and not 0 <= self.down_init_std <= 10:
            raise ValueError(f"down_init_std must be a finite number >= 0 and at most 10, got {self.down_init_std}.")

    def rank_for(self, config: Any) -> int:
        """r at the sizes of a config.

        Raises:
            ValueError: if the rank exceeds `hidden_size`.
        """
        rank = self.rank
        if rank is None:
            rank = min(max(config.hidden_size // 24 * 8, 8), config.hidden_size)
        if rank > config.hidden_size:
            raise ValueError(f"rank={rank} must not exceed hidden_size={config.hidden_size}.")
        return rank

    def width_for(self, config: Any) -> int:
        """W at the sizes of a config.

        Raises:
            ValueError: if the D -> r matrix alone has more parameters than the matched expert.
        """
        if self.intermediate_size is not None:
            return self.intermediate_size
        return matched_width(config.hidden_size, config.moe_intermediate_size, self.rank_for(config))


def matched_width(hidden_size: int, moe_intermediate_size: int, rank: int) -> int:
    """Width W of a low-rank expert with as many parameters as a SwiGLU expert of width F: `(3DF - rD) / (r + 2D)`.

    Rounded to a multiple of 8, which grouped products ask for (Lv et al. 2025, arXiv 2501.13074, section 3).

    Raises:
        ValueError: if no width does.
    """
    exact = hidden_size * (3 * moe_intermediate_size - rank) / (rank + 2 * hidden_size)
    if exact < 1:
        raise ValueError(
            f"No low_rank expert of rank {rank} has as few parameters as a swiglu expert of moe_intermediate_size="
            f"{moe_intermediate_size}; lower rank or give intermediate_size."
        )
    return max(round(exact / 8) * 8, 8)


@strict
@dataclass
class CartesianOptions:
    """Options of `cartesian`, two banks of sub-experts in sequence (see `DynMoeCartesianBlock`).

    Args:
        composition: where residuals and norms stand, with x the residual stream, a and b what the banks return:
            `prenorm`: n = norm(x + a), out = x + a + b. `prenorm_input_residual`: n = norm(x + a), out = x + b.
            `nested`: n = norm(a), out = x + b. `postnorm`: bank A reads x itself, n = norm(x + a),
            out = norm(n + b). `postnorm_input_residual`: the same with out = norm(x + b). Bank B reads n.
        bank: the layout of the sub-experts of both banks, `{"type": "swiglu"}` or a `low_rank` one.
        second_selector: changes to the selector for bank B, e.g. `{"k": 1}`.
    """

    composition: Literal["prenorm", "prenorm_input_residual", "nested", "postnorm", "postnorm_input_residual"] = (
        "prenorm"
    )
    bank: dict = field(default_factory=lambda: {"type": "swiglu"})
    second_selector: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {key: value for key, value in self.bank.items() if key != "type"}
        kind = self.bank.get("type")
        if kind not in BANKS:
            raise ValueError(unknown_name("bank type", kind, BANKS))
        self.bank = {"type": kind, **asdict(build_options(BANKS[kind], options, "bank"))}


BANKS: dict[str, type] = {"swiglu": SwigluOptions, "low_rank": LowRankOptions}
EXPERTS: dict[str, type] = {**BANKS, "cartesian": CartesianOptions}
