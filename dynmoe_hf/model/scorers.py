# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Scorers: how well does expert e suit token t? One class a scorer; shapes as in routing.py."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .routing import MAX_FACTOR, RoutingContext

MAX_STATE = 2**14  # width of the recurrent state


class Scores(NamedTuple):
    """The answer of a scorer."""

    logits: Tensor  # (T, E) float32
    state: Tensor | None = None  # (T, N) for the next router


class Scorer(nn.Module):
    """Base of all scorers. It stands at `mlp.gate` of its layer.

    A subclass names its typed options in `Options`, computes in float32 whatever the model's dtype, and looks at one
    token at a time, so that routing is causal and does not depend on the batch.
    """

    Options: type
    Shared: type[nn.Module] | None = None  # `Shared(options, config)` is built once a model, for `context.shared`
    reads_norms = False  # True for a scorer that ranks by `context.expert_norms`

    def __init__(self, options: Any, config: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        """Score the normalised input of the FFN block, (T, D) in any float dtype."""
        raise NotImplementedError

    def init_weights(self, std: float) -> None:
        """Fill every parameter and buffer, with functions of `transformers.initialization`."""


@strict
@dataclass
class LinearOptions:
    """`linear` has no options."""


class LinearScorer(Scorer):
    """`logits = x W^T` with `W` (E, D) and no bias, in float32 (Shazeer et al. 2017, arXiv 1701.06538, section 2.1)."""

    Options = LinearOptions

    def __init__(self, options: LinearOptions, config: Any) -> None:
        super().__init__(options, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        return Scores(F.linear(hidden_states.float(), self.weight.float()))

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)


@strict
@dataclass
class RecurrentOptions:
    """Options of `recurrent`.

    Args:
        size: p, width of the recurrent state, at least 1.
        cell: `gru`, `rnn` (tanh) or `lstm`.
        recurrent_state: `pass` the state of the router before; `detach` it, so that no gradient goes down; or `none`,
            every router starts from zeros.
        projector: the projection of the hidden states to the state's width is `per_layer`, or one `shared` by all.
        logit_residual_alpha: add this multiple of the logits of the router before.
        detach_logit_residual: no gradient goes through these logits.
        init: `normal`, as every matrix of the model, with biases 0. Routing then stays nearly uniform for a long time;
            `uniform` starts about as peaked as a linear router: the cell uniform in +-1/sqrt(p) as in torch,
            projection and head normal with 1/sqrt(fan-in).
    """

    size: int = 128
    cell: Literal["gru", "rnn", "lstm"] = "gru"
    recurrent_state: Literal["pass", "none", "detach"] = "pass"
    projector: Literal["per_layer", "shared"] = "per_layer"
    logit_residual_alpha: float | int = 0.0
    detach_logit_residual: bool = False
    init: Literal["normal", "uniform"] = "normal"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_STATE:
            raise ValueError(f"size must be at least 1 and at most {MAX_STATE:,}, got {self.size}.")
        if not abs(self.logit_residual_alpha) <= MAX_FACTOR:
            raise ValueError(
                f"logit_residual_alpha must be a finite number of at most {MAX_FACTOR:g}, got "
                f"{self.logit_residual_alpha}."
            )


NUM_GATES = {"gru": 3, "rnn": 1, "lstm": 4}


class RecurrentCell(nn.Module):
    """The parameters of `nn.GRUCell`, `nn.RNNCell` or `nn.LSTMCell` under their names.

    No torch cell, because transformers asks only the module that owns a parameter to fill it.
    """

    def __init__(self, options: RecurrentOptions) -> None:
        super().__init__()
        self.options = options
        rows = NUM_GATES[options.cell] * options.size
        self.weight_ih = nn.Parameter(torch.empty(rows, options.size))
        self.weight_hh = nn.Parameter(torch.empty(rows, options.size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def forward(self, inputs: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (T, p) and what was carried on -> the new state (T, p) and what to carry on; see `RecurrentCore`."""
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        weights = [parameter.float().to(inputs.device) for parameter in parameters]
        if self.options.cell == "lstm":
            state, memory = torch.lstm_cell(inputs, carried.chunk(2, dim=-1), *weights)
            return state, torch.cat((state, memory), dim=-1)
        step = torch.gru_cell if self.options.cell == "gru" else torch.rnn_tanh_cell
        state = step(inputs, carried, *weights)
        return state, state

    def init_weights(self, std: float) -> None:
        """Fill every parameter."""
        for name, parameter in self.named_parameters():
            if self.options.init == "uniform":
                init.uniform_(parameter, -(self.options.size**-0.5), self.options.size**-0.5)
            elif name.startswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)


class RecurrentCore(nn.Module):
    """What the recurrent routers of a model share: the cell, and the projection if it is not each layer's own."""

    def __init__(self, options: RecurrentOptions, config: Any) -> None:
        super().__init__()
        self.options = options
        self.cell = RecurrentCell(options)
        if options.projector == "shared":
            self.in_proj = nn.Parameter(torch.empty(options.size, config.hidden_size))

    def forward(self, hidden_states: Tensor, in_proj: Tensor | None, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of the recurrence over depth, in float32.

        Args:
            hidden_states: (T, D).
            in_proj: (p, D) projection of this layer; None takes the shared one.
            carried: (T, p), for the LSTM (T, 2p), what the router before carried on; None stands for zeros.

        Returns:
            The new state h (T, p), and what to carry on: h itself, for the LSTM h and its cell state.
        """
        projection = self.in_proj if in_proj is None else in_proj
        inputs = F.linear(hidden_states.float(), projection.float().to(hidden_states.device))
        if carried is None:
            carried = inputs.new_zeros(inputs.shape[0], self.carried_size)
        return self.cell(inputs, carried)

    @property
    def carried_size(self) -> int:
        return self.options.size * (2 if self.options.cell == "lstm" else 1)

    def init_weights(self, std: float) -> None:
        """Fill the projection; the cell fills itself."""
        if self.options.projector == "shared":
            _init_projection(self.in_proj, self.options, std)


class RecurrentScorer(Scorer):
    """A recurrence over depth: each router goes on from the state of the router before it.

    `h_i = cell(x A_i^T, h_(i-1))`, `logits = h_i B_i^T` with `A_i` (p, D) and `B_i` (E, p) of each layer and one cell
    for all (RMoE, Qiu et al. 2024, arXiv 2408.06793, section 3). The state is a token's own, so it needs no cache; it
    passes dense layers, and layers with another scorer, unchanged.
    """

    Options = RecurrentOptions
    Shared = RecurrentCore

    def __init__(self, options: RecurrentOptions, config: Any) -> None:
        super().__init__(options, config)
        self.in_proj = None
        if options.projector == "per_layer":
            self.in_proj = nn.Parameter(torch.empty(options.size, config.hidden_size))
        self.out_proj = nn.Parameter(torch.empty(config.num_experts, options.size))

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        carried, before = self._split(context.state)
        state, carried = context.shared(hidden_states, self.in_proj, carried)
        state, carried = state.to(hidden_states.device), carried.to(hidden_states.device)
        logits = F.linear(state, self.out_proj.float())
        if self.options.logit_residual_alpha:
            if before is not None:
                logits = logits + self.options.logit_residual_alpha * before
            carried = torch.cat((carried, logits), dim=-1)
        return Scores(logits, carried)

    def _split(self, state: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the router before handed on: the cell's state, and its logits if they are added."""
        if state is None:
            return None, None
        num_logits = self.out_proj.shape[0] if self.options.logit_residual_alpha else 0
        carried, logits = state.split((state.shape[-1] - num_logits, num_logits), dim=-1)
        if self.options.recurrent_state == "none":
            carried = None
        elif self.options.recurrent_state == "detach":
            carried = carried.detach()
        return carried, logits.detach() if self.options.detach_logit_residual else logits

    def init_weights(self, std: float) -> None:
        if self.in_proj is not None:
            _init_projection(self.in_proj, self.options, std)
        _init_projection(self.out_proj, self.options, std)


def _init_projection(weight: Tensor, options: RecurrentOptions, std: float) -> None:
    init.normal_(weight, mean=0.0, std=1 / sqrt(weight.shape[1]) if options.init == "uniform" else std)


@strict
@dataclass
class ActivationNormOptions:
    """`activation_norm` has no options."""


class ActivationNormScorer(Scorer):
    """Ranks experts by the Euclidean norm of their own low-rank activation of the token; it has no parameters.

    Autonomy-of-Experts (Lv et al. 2025, arXiv 2501.13074, section 3). The experts go on from the same activation.
    """

    Options = ActivationNormOptions
    reads_norms = True

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        return Scores(context.expert_norms)


SCORERS: dict[str, type[Scorer]] = {
    "linear": LinearScorer,
    "recurrent": RecurrentScorer,
    "activation_norm": ActivationNormScorer,
}
