"""The case `decode`: a few new tokens through many layers, whose weights are in no cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dynmoe_hf.model.routing import Routing

from .contest import Contest, Entrant
from .equality import failures_of
from .limits import READERS, fastest_call, read
from .peers import REFERENCE, Builder, Experts, build_engine, entrants_of
from .settings import Build, Settings
from .shapes import DTYPES, Shape, Weights, draw_routing, shapes

NUM_TOKENS = (1, 8)
TOTAL_BYTES = 2**30  # of all layers, several times the cache of any CPU
PLAIN = "module_loop"


class Layers:
    """Layers of one shape, and a choice of experts that comes back to an expert only after all others.

    Which slots of a call share an expert is random, but drawn once: every pass reads the same number of bytes.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, num_layers: int, seed: int) -> None:
        self.shape = shape
        self.weights = [Weights.draw(shape, dtype, seed + layer) for layer in range(num_layers)]
        generator = torch.Generator().manual_seed(seed)
        self.hidden_states = torch.randn(shape.num_tokens, shape.hidden_size, generator=generator).to(dtype)
        self.patterns = [draw_routing(shape, dtype, seed + layer) for layer in range(num_layers)]
        self.hits = [pattern.expert_ids.unique() for pattern in self.patterns]  # sorted expert ids, (H,) of each layer
        self.next_expert = [0] * num_layers
        self.routings: list[Routing] = []

    @property
    def bytes_read(self) -> int:
        """Of the weights that one pass needs."""
        hits = sum(hit.numel() for hit in self.hits)
        return hits * self.shape.expert_parameters * self.hidden_states.element_size()

    def advance(self) -> None:
        """Choose the next experts of every layer."""
        self.routings = []
        for layer, (pattern, hits) in enumerate(zip(self.patterns, self.hits, strict=True)):
            start = self.next_expert[layer]
            ids = (torch.searchsorted(hits, pattern.expert_ids) + start) % self.shape.num_experts
            self.routings.append(pattern._replace(expert_ids=ids))
            self.next_expert[layer] = (start + hits.numel()) % self.shape.num_experts

    def chosen(self) -> list[Tensor]:
        """The weights that this pass needs, as contiguous pieces."""
        pieces = []
        for weights, hits, start in zip(self.weights, self.hits, self.next_expert, strict=True):
            first = (start - hits.numel()) % self.shape.num_experts
            end = first + hits.numel()
            for weight in weights:
                pieces.append(weight[first:end])
                if end > self.shape.num_experts:
                    pieces.append(weight[: end - self.shape.num_experts])
        return pieces


@torch.no_grad()
def _through(experts: list[Experts], layers: Layers) -> None:
    for one, routing in zip(experts, layers.routings, strict=True):
        one.call(layers.hidden_states, routing)


def check(builders: Mapping[str, Builder], layers: Layers, where: str) -> dict[str, str]:
    """The output of every entrant in the first layer against the reference's in float64."""
    layers.advance()
    weights, hidden_states, routing = layers.weights[0], layers.hidden_states, layers.routings[0]

    def output(build: Builder, dtype: torch.dtype) -> dict[str, Tensor]:
        own = routing._replace(weights=routing.weights.to(dtype))
        with torch.no_grad():
            return {"output": build(weights.to(dtype)).call(hidden_states.to(dtype), own)}

    def of(build: Builder) -> Callable[[], dict[str, Tensor]]:
        return lambda: output(build, hidden_states.dtype)

    exact = output(partial(build_engine, REFERENCE, "varying"), torch.float64)
    return failures_of({name: of(build) for name, build in builders.items()}, exact, PLAIN, where)


def decode_contest(base: Shape, num_tokens: int, dtype: str, quick: bool, seed: int) -> Contest:
    """A pass of some tokens through all layers, without gradients, over the time to read the used weights once."""
    shape = replace(base, num_tokens=num_tokens)
    layer_bytes = shape.num_experts * shape.expert_parameters * DTYPES[dtype].itemsize
    num_layers = 2 if quick else -(-TOTAL_BYTES // layer_bytes)
    layers = Layers(shape, DTYPES[dtype], num_layers, seed)
    title = f"{shape.name}, T={num_tokens}"
    builders, left_out = entrants_of(shape, DTYPES[dtype], trains=False)
    failures = check(builders, layers, f"decode {title} in {dtype}")
    entrants = []
    for name, build in builders.items():
        if name not in failures:
            experts = [build(weights) for weights in layers.weights]
            entrants.append(Entrant(name, partial(_through, experts, layers), layers.advance))

    def stream(reader: str) -> None:
        for piece in layers.chosen():
            read(reader, piece)

    def read_next(reader: str) -> None:
        layers.advance()
        stream(reader)

    reader = fastest_call({name: partial(read_next, name) for name in READERS})
    entrants.append(Entrant("stream", partial(stream, reader), layers.advance))
    notes = {"num_layers": num_layers, "bytes_read": layers.bytes_read, "reader": reader}
    return Contest(title, shape.describe(), dtype, entrants, "stream", left_out | failures, notes)


def plan_decode(settings: Settings) -> list[Build]:
    """The contests of `decode`: each shape, number of tokens and dtype."""
    return [
        partial(decode_contest, shape, num_tokens, dtype, settings.quick, settings.seed)
        for dtype in settings.dtypes
        for shape in shapes(settings.quick).values()
        for num_tokens in NUM_TOKENS
    ]
