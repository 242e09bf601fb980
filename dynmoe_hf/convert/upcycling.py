"""A dense model upcycled: its FFNs become experts, so that it starts where the dense model has arrived.

Komatsuzaki et al. 2022, Sparse Upcycling, arXiv 2212.05055; virtual groups and scaled weights: He et al. 2024,
Upcycling Large Language Models into Mixture of Experts, arXiv 2410.07524.

With f the dense FFN, N copies of G parts each, and weights w of the chosen experts, a layer answers

    s * sum_j w_j sum_g f_g(x),  where f = sum_g f_g and j runs over the chosen copies,

which is f(x) if the factor s on `down_proj` is G / (sum of all weights). So the sum must be the same for every token.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe_hf.model import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model.blocks import DynMoeBlock, DynMoeCartesianBlock, build_selector
from dynmoe_hf.model.methods import RoutingSpec, expand
from dynmoe_hf.model.modeling_dynmoe import build_experts, build_shared_scorers
from dynmoe_hf.model.routing import RoutingContext
from dynmoe_hf.model.routing_changes import build_controller

from .conversion import (
    LOSSLESS,
    OURS,
    Report,
    compare_with_source,
    detect_format,
    import_jobs,
    our_shapes,
    read_source_config,
    refuse_different,
    write,
)
from .formats import DENSE_FORMATS, FORMATS
from .sources import Checkpoint
from .writing import Job, new_folder

DENSE_FFN = "model.layers.{}.mlp.{}_proj.weight"
LAST = 4095  # number of what is no layer, in the seeds
ROUTER_MATRIX = {"linear": "weight", "recurrent": "out_proj"}


@dataclass(frozen=True)
class Plan:
    """What the experts of an upcycled layer are made of.

    Args:
        split: G, parts that each copy of the FFN is cut into.
        factor: on the routed experts' `down_proj`; 0 where routed experts start silent.
        is_flat: the router starts at zero, so that all experts are equally probable.
        noise: standard deviation of what is added to the weights of routed experts, as a share of their own.
        exact: whether the model answers as the dense one at first.
        promise: why, or why not.
    """

    split: int
    factor: float
    is_flat: bool
    noise: float
    exact: bool
    promise: str


def upcycle(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    num_experts: int = 8,
    num_experts_per_tok: int | None = None,
    routing: str | Mapping[str, Any] | None = None,
    split: int = 1,
    num_shared_experts: int = 0,
    noise: float = 0.0,
    layers: list[int] | None = None,
    seed: int = 0,
    source_format: str | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
    max_shard_size: int | str | None = None,
) -> Report:
    """Make a mixture of experts of a dense Llama, Mistral, Qwen2 or Qwen3.

    The report says whether the first output equals that of the dense model, and why. Where it should, and does not,
    nothing is written. Everything else is as in `convert`.

    Args:
        num_experts: E, routed experts of a layer.
        num_experts_per_tok: as in `DynMoeConfig`.
        routing: as in `DynMoeConfig`. Weights of the chosen experts are divided by their sum unless `norm_topk_prob` is
            given as False.
        split: G, the granularity; each expert is one of G parts of the FFN, and there are E / G copies of each. Needs
            `top_k` with k a multiple of G: the router starts with equal scores in each group of G parts, so that whole
            groups are chosen.
        num_shared_experts: 1 adds the dense FFN as an expert that every token uses, with half of the weight.
            `low_rank` and `cartesian` experts cannot hold a dense FFN: they need it, with all of the weight, and start
            silent, with `down_proj` zero.
        noise: added to the routed experts, see `Plan`.
        layers: those that become MoE layers; None for all.
        seed: of everything random.
    """
    checkpoint = Checkpoint(source, allow_pickle)
    name = detect_format(checkpoint, source_format)
    if name not in DENSE_FORMATS:
        known = ", ".join(DENSE_FORMATS)
        raise ValueError(f"{str(source)!r} has the format {name!r}; the dense models that can be upcycled are {known}.")
    read_config, arguments, notes = read_source_config(checkpoint, name)
    config = _config(arguments, num_experts, num_experts_per_tok, routing, split, num_shared_experts, layers)
    plan = _plan(config, split, noise)
    dense = import_jobs(
        checkpoint, FORMATS[name], our_shapes(DynMoeConfig(**arguments)), arguments["num_experts"], dtype
    )
    plan = _rounded(plan, dense)
    jobs = _jobs(config, plan, dense, seed)
    report = Report(str(source), str(target), name, OURS, notes=notes, exact=plan.exact, promise=plan.promise)
    with new_folder(target, checkpoint.folder, overwrite) as folder:
        write(folder, jobs, config, checkpoint, report, max_shard_size)
        if check:
            report.comparison = compare_with_source(checkpoint, name, read_config, folder, config)
            if plan.exact and dtype in LOSSLESS:
                refuse_different(report)
    return report


def _config(
    dense: Mapping[str, Any],
    num_experts: int,
    num_experts_per_tok: int | None,
    routing: str | Mapping[str, Any] | None,
    split: int,
    num_shared_experts: int,
    layers: list[int] | None,
) -> DynMoeConfig:
    """The configuration of the upcycled model. Raises ValueError for numbers that do not fit together."""
    width, num_layers = dense["intermediate_size"], dense["num_hidden_layers"]
    if split < 1 or width % split or num_experts % split:
        raise ValueError(
            f"split={split} must divide the width of the dense FFN, {width}, and num_experts={num_experts}."
        )
    if num_shared_experts not in (0, 1):
        raise ValueError(f"num_shared_experts must be 0 or 1, the dense FFN itself, got {num_shared_experts}.")
    if layers is not None and (not layers or any(not 0 <= layer < num_layers for layer in layers)):
        raise ValueError(f"layers must be among 0 ... {num_layers - 1}, got {layers}.")
    spec = _routing(routing)
    is_silent = spec["experts"]["type"] != "swiglu"
    if is_silent and not num_shared_experts:
        raise ValueError(
            f"{spec['experts']['type']!r} experts cannot hold a dense FFN: give one shared expert, which does, while "
            "the routed experts start silent."
        )
    share = 0.5 if num_shared_experts and not is_silent else 1.0
    changes = {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": width // split,
        "num_shared_experts": num_shared_experts,
        "shared_expert_intermediate_size": width if num_shared_experts else None,
        "routed_expert_weight": share,
        "shared_expert_weight": share,
        "mlp_layer_types": ["sparse" if layers is None or layer in layers else "dense" for layer in range(num_layers)],
        "routing": spec,
    }
    return DynMoeConfig(**(dict(dense) | changes))


def _routing(routing: str | Mapping[str, Any] | None) -> RoutingSpec:
    """The full specification, with weights that sum to 1 unless the opposite was asked for."""
    spec = expand(routing)
    asked = routing.get("selector") if isinstance(routing, Mapping) else None
    is_given = isinstance(asked, Mapping) and "norm_topk_prob" in asked
    if spec["experts"]["type"] == "swiglu" and not is_given:
        spec = expand({"selector": {"norm_topk_prob": True}}, spec)
    return spec


def _plan(config: DynMoeConfig, split: int, noise: float) -> Plan:
    """How the experts start. Raises ValueError for what is not defined."""
    spec = expand(config.routing)
    selector, experts = spec["selector"], spec["experts"]
    if not 0 <= noise <= 10:
        raise ValueError(f"noise must be between 0 and 10, got {noise}.")
    if experts["type"] != "swiglu":
        if split > 1 or noise:
            raise ValueError(f"split and noise are for copies of the dense FFN, not {experts['type']!r} experts.")
        if experts["type"] == "cartesian" and experts["composition"] != "prenorm":
            raise ValueError(
                f"composition={experts['composition']!r} has no place for a dense FFN that leaves it as it is; only "
                "'prenorm' has."
            )
        return Plan(1, 0.0, False, 0.0, True, "the shared expert is the dense FFN, and the routed experts start silent")
    if split > 1:
        _check_groups(config, selector, split)
    total, why = _total_weight(config, spec)
    is_flat = not selector["norm_topk_prob"]
    if total is None:
        return Plan(split, 1.0, False, noise, False, why)
    if noise:
        why = f"noise of {noise:g} times their own standard deviation was added to the weights of the experts"
    return Plan(split, split / total, is_flat, noise, not noise, why)


def _check_groups(config: DynMoeConfig, selector: Mapping[str, Any], split: int) -> None:
    if selector["type"] != "top_k":
        raise ValueError(
            f"split={split} needs the selector top_k: {selector['type']!r} may stop amid the parts of a copy."
        )
    k = config.num_experts_per_tok if selector["k"] is None else selector["k"]
    if k % split:
        raise ValueError(f"k={k} must be a multiple of split={split}, so that whole copies are chosen.")
    if selector["num_groups"] > 1 or selector["bias"] or selector["disable_top1"]:
        raise ValueError("split does not go together with num_groups, bias or disable_top1 of top_k.")


def _total_weight(config: DynMoeConfig, spec: RoutingSpec) -> tuple[float | None, str]:
    """The sum of a token's weights if it is the same for all tokens, and why it is or is not."""
    selector = spec["selector"]
    if selector["norm_topk_prob"]:
        return float(selector.get("scale", 1.0)) if selector["type"] == "top_k" else 1.0, (
            "the weights of the chosen experts always have the same sum, whatever the router says"
        )
    if selector["type"] == "importance":
        return None, "without norm_topk_prob the weights sum to a share that differs from token to token"
    layer = next(layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer))
    with torch.device("cpu"):
        flat = build_selector(config, layer, None)(torch.zeros(1, config.num_experts), RoutingContext(layer))
    return flat.weights.sum().item(), (
        "the router starts at zero, where all experts are equally probable, and the experts are scaled to match"
    )


def _rounded(plan: Plan, dense: Mapping[str, Job]) -> Plan:
    """The plan, without its promise where a factor that is no power of two is rounded to half precision."""
    dtypes = {job.dtype for job in dense.values()}
    if plan.exact and plan.factor and dtypes != {torch.float32} and math.frexp(plan.factor)[0] != 0.5:
        why = f"down_proj times {plan.factor:.4g} is rounded to {max(dtypes, key=str)}".replace("torch.", "")
        return replace(plan, exact=False, promise=why)
    return plan


def _jobs(config: DynMoeConfig, plan: Plan, dense: Mapping[str, Job], seed: int) -> list[Job]:
    """How to make every tensor of the upcycled model."""
    layers = FreshLayers(config, plan, dense, seed)
    buffers = dict(layers.model.named_buffers())
    jobs = []
    for name, shape in our_shapes(config).items():
        number, _, rest = name.removeprefix("model.layers.").partition(".mlp.")
        if rest and config.is_sparse(int(number)):
            kept = dense[DENSE_FFN.format(number, "down")].dtype
            make = partial(layers.tensor, int(number), rest)
        elif name in dense:
            jobs.append(dense[name])
            continue
        else:
            kept = dense["model.embed_tokens.weight"].dtype
            make = partial(layers.shared_tensor, name)
        jobs.append(Job(name, shape, buffers[name].dtype if name in buffers else kept, make))
    return jobs


class FreshLayers:
    """The FFN blocks of an upcycled model, each made when one of its tensors is asked for, and forgotten with the next.

    Args:
        config: of the upcycled model.
        plan: what becomes of the dense FFN.
        dense: how to read the dense model.
        seed: of everything random; that of a layer follows from it, so the order of the questions does not matter.
    """

    def __init__(self, config: DynMoeConfig, plan: Plan, dense: Mapping[str, Job], seed: int) -> None:
        self.config, self.plan, self.dense, self.seed = config, plan, dense, seed
        with torch.device("meta"):
            self.model = DynMoeForCausalLM(config)
        self._layer: int | None = None
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, layer: int, name: str) -> Tensor:
        """A tensor of the FFN block of a layer."""
        if layer != self._layer:
            self._tensors = {}
            self._tensors, self._layer = self._block(layer), layer
        return self._tensors[name]

    def shared_tensor(self, name: str) -> Tensor:
        """A tensor that all layers share, as a new model has it."""
        kind, _, rest = name.removeprefix("model.").partition(".")
        with self._seeded(LAST):
            module = {"shared_scorers": build_shared_scorers, "controller": build_controller}[kind](self.config)
            self._initialise(module)
        return module.state_dict()[rest]

    @torch.no_grad()
    def _block(self, layer: int) -> dict[str, Tensor]:
        ffn = [self.dense[DENSE_FFN.format(layer, name)].make().float() for name in ("gate", "up", "down")]
        spec = self.config.routing_for(layer)
        with self._seeded(layer):
            block_class = DynMoeCartesianBlock if spec["experts"]["type"] == "cartesian" else DynMoeBlock
            block = block_class(self.config, layer, build_experts)
            self._initialise(block)
            banks = list(block.sub_layers) if isinstance(block, DynMoeCartesianBlock) else [block]
            for number, bank in enumerate(banks):
                self._fill(bank, ffn, is_first=number == 0)
        return block.state_dict()

    def _fill(self, block: DynMoeBlock, ffn: list[Tensor], is_first: bool) -> None:
        """Put the dense FFN into a block; into the second bank of a layer nothing, so that it adds nothing."""
        if block.shared_experts is not None:
            shared = block.shared_experts
            for linear, matrix in zip((shared.gate_proj, shared.up_proj, shared.down_proj), ffn, strict=True):
                linear.weight.copy_(matrix)
            if not is_first:
                shared.down_proj.weight.zero_()
        if not self.plan.factor:
            block.experts.down_proj.zero_()
            return
        gate, up, down = ffn
        parts, width = self.plan.split, self.config.moe_intermediate_size
        for expert in range(self.config.num_experts):
            start = expert % parts * width
            rows = slice(start, start + width)
            block.experts.gate_up_proj[expert] = self._noisy(torch.cat([gate[rows], up[rows]]))
            block.experts.down_proj[expert] = self.plan.factor * self._noisy(down[:, rows])
        matrix = getattr(block.gate, ROUTER_MATRIX[block.spec["scorer"]["type"]])
        if self.plan.is_flat:
            matrix.zero_()
        matrix.copy_(matrix[::parts].repeat_interleave(parts, 0))

    def _noisy(self, weight: Tensor) -> Tensor:
        if not self.plan.noise:
            return weight
        return weight + self.plan.noise * weight.std() * torch.randn_like(weight)

    def _initialise(self, module: nn.Module) -> None:
        """Fill a module as a new model does."""
        for part in module.modules():
            self.model._init_weights(part)

    @contextlib.contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * (LAST + 1) + number)
            yield
