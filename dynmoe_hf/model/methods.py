# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Routing methods: presets over the parts of a router, and the expansion of what a user writes into what is stored.

A full specification is a plain dict, ready for JSON:

    {"method": "top_p",
     "scorer": {"type": "linear"},
     "selector": {"type": "top_p", "p": 0.4, "max_experts": None, "norm_topk_prob": False, "standardize": False},
     "experts": {"type": "swiglu"},
     "controller": {"type": "none"},
     "losses": {"load_balance": 0.01, "dynamic": 0.0001, "router_z": 0.0, "importance": 0.0}}
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .controllers import CONTROLLERS, gaussian_threshold
from .expert_layouts import EXPERTS
from .expert_selectors import LEARNED, SELECTORS
from .losses import LOSSES
from .routing import MAX_FACTOR, build_options, shown, unknown_name
from .scorers import SCORERS

RoutingSpec = dict[str, Any]

PARTS: dict[str, Mapping[str, type]] = {
    "scorer": SCORERS,
    "selector": SELECTORS,
    "experts": EXPERTS,
    "controller": CONTROLLERS,
}
AXES = tuple(PARTS)
NO_PART = {"type": "none"}  # only an axis that a specification may leave out knows this type
CUSTOM = "custom"  # the stored name of a combination that is no preset
DEFAULT_METHOD = "top_k"


@dataclass(frozen=True)
class Method:
    """A preset: the parts that make a paper.

    Args:
        title: what it does, in one line.
        paper: where it comes from.
        parts: scorer, selector, experts and losses, and the controller if there is one.
        fields: the method's own defaults of configuration fields whose default is None.
        page: its page in docs/methods, by default its name.
    """

    title: str
    paper: str
    parts: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    page: str | None = None


LINEAR, SWIGLU = {"type": "linear"}, {"type": "swiglu"}
BALANCE = {"load_balance": 1e-2}
BALANCE_AND_ENTROPY = {"load_balance": 1e-2, "dynamic": 1e-4}

METHODS: dict[str, Method] = {
    "top_k": Method(
        title="The k most probable experts for every token",
        paper="Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961 (loss)",
        parts={"scorer": LINEAR, "selector": {"type": "top_k"}, "experts": SWIGLU, "losses": BALANCE},
    ),
    "top_p": Method(
        title="As many experts as it takes for their summed probability to exceed p",
        paper="Huang et al. 2024, Harder Tasks Need More Experts, arXiv 2403.07652",
        parts={
            "scorer": LINEAR,
            "selector": {"type": "top_p", "p": 0.4},
            "experts": SWIGLU,
            "losses": BALANCE_AND_ENTROPY,
        },
    ),
    "rmoe": Method(
        title="Routers of all layers joined by a recurrent state",
        paper="Qiu et al. 2024, Layerwise Recurrent Router for Mixture-of-Experts, arXiv 2408.06793",
        parts={"scorer": {"type": "recurrent"}, "selector": {"type": "top_k"}, "experts": SWIGLU, "losses": BALANCE},
        fields={"routed_expert_weight": 0.5, "shared_expert_weight": 0.5},
    ),
    "aoe": Method(
        title="Experts rank themselves by the norm of their own activation",
        paper="Lv et al. 2025, Autonomy-of-Experts Models, arXiv 2501.13074",
        parts={
            "scorer": {"type": "activation_norm"},
            "selector": {"type": "top_k"},
            "experts": {"type": "low_rank"},
            "losses": BALANCE,
        },
    ),
    "cartesian": Method(
        title="Two banks of sub-experts in sequence, whose pairs are the experts",
        paper="Su et al. 2024, CartesianMoE, arXiv 2410.16077",
        parts={
            "scorer": LINEAR,
            "selector": {"type": "top_k", "norm_topk_prob": False},
            "experts": {"type": "cartesian"},
            "losses": BALANCE,
        },
        fields={"num_shared_experts": 1},
    ),
    "da_moe": Method(
        title="More experts for tokens whose attention is sharp",
        paper="Aghdam et al. 2024, DA-MoE, arXiv 2409.06669",
        parts={"scorer": LINEAR, "selector": {"type": "importance"}, "experts": SWIGLU, "losses": BALANCE},
        fields={"balance_normalize": True},
    ),
    "dtop_p": Method(
        title="top_p whose threshold a controller moves to meet a number of experts per token",
        paper="Jin et al. 2025, DTop-p MoE, arXiv 2512.13996",
        parts={
            "scorer": LINEAR,
            "selector": {"type": "top_p", "p": None, "norm_topk_prob": True, "standardize": True},
            "experts": SWIGLU,
            "controller": {"type": "budget"},
            "losses": {"load_balance": 1e-4, "dynamic": 1e-3},
        },
    ),
    "rmoe_top_p": Method(
        title="Recurrent routers that choose by top_p",
        paper="none; arXiv 2408.06793 with arXiv 2403.07652",
        parts={
            "scorer": {"type": "recurrent", "init": "uniform"},
            "selector": {"type": "top_p", "p": 0.4},
            "experts": SWIGLU,
            "losses": BALANCE_AND_ENTROPY,
        },
        page="combinations",
    ),
    "aoe_top_p": Method(
        title="Experts that rank themselves, chosen by top_p",
        paper="Lv et al. 2025, arXiv 2501.13074, has it as a variant; arXiv 2403.07652",
        parts={
            "scorer": {"type": "activation_norm"},
            "selector": {"type": "top_p", "p": 0.6},
            "experts": {"type": "low_rank"},
            "losses": BALANCE_AND_ENTROPY,
        },
        page="combinations",
    ),
    "rmoe_cartesian": Method(
        title="One recurrent chain through both banks of every layer",
        paper="none; arXiv 2408.06793 with arXiv 2410.16077",
        parts={
            "scorer": {"type": "recurrent", "init": "uniform"},
            "selector": {"type": "top_k", "norm_topk_prob": False},
            "experts": {"type": "cartesian"},
            "losses": BALANCE,
        },
        fields={"num_shared_experts": 1},
        page="combinations",
    ),
    "cartesian_top_p": Method(
        title="Two banks of sub-experts, in each as many as top_p keeps",
        paper="none; arXiv 2410.16077 with arXiv 2403.07652",
        parts={
            "scorer": LINEAR,
            "selector": {"type": "top_p", "p": 0.4},
            "experts": {"type": "cartesian"},
            "losses": BALANCE_AND_ENTROPY,
        },
        fields={"num_shared_experts": 1},
        page="combinations",
    ),
    "rmoe_da_moe": Method(
        title="Recurrent routers; attention decides how many experts",
        paper="none; arXiv 2408.06793 with arXiv 2409.06669",
        parts={
            "scorer": {"type": "recurrent", "init": "uniform"},
            "selector": {"type": "importance"},
            "experts": SWIGLU,
            "losses": BALANCE,
        },
        fields={"balance_normalize": True},
        page="combinations",
    ),
}


def options_class(axis: str, part_type: str) -> type:
    """The typed options of a part.

    Raises:
        ValueError: when the axis has no part of that name.
    """
    table = PARTS[axis]
    if not isinstance(part_type, str) or part_type not in table:
        raise ValueError(unknown_name(f"routing.{axis} type", part_type, table))
    part = table[part_type]
    return getattr(part, "Options", part)


def part_options(axis: str, spec: Mapping[str, Any]) -> Any:
    """The options object of one part of a full specification."""
    values = {key: value for key, value in spec.items() if key != "type"}
    return build_options(options_class(axis, spec["type"]), values, f"routing.{axis}")


def expand(routing: str | Mapping[str, Any] | None, base: RoutingSpec | None = None) -> RoutingSpec:
    """Expand what a user wrote into a full specification.

    Args:
        routing: the name of a method; or a dict with any of `method`, `scorer`, `selector`, `experts`, `controller`,
            `losses`. A part is a dict, or a string for its type alone. None gives `base`.
        base: the full specification that the dict changes when it names no method; without one, `top_k`.

    A part given without a type, or with the type it has already, changes single keys; another type starts from that
    type's defaults. Losses are changed one by one.

    Raises:
        ValueError: on any unknown name and on any value that a part refuses.
    """
    if not isinstance(routing, str | Mapping | None):
        raise ValueError(f"routing must be the name of a method or a dict, got {shown(routing)}.")
    changes: dict[str, Any] = {"method": routing} if isinstance(routing, str) else dict(routing or {})
    for key in changes:
        if key not in ("method", "losses", *AXES):
            raise ValueError(unknown_name("key in routing:", key, ("method", "losses", *AXES)))
    method = changes.get("method")
    if _names_every_part(changes):
        start: RoutingSpec = {axis: {"type": changes[axis]["type"]} for axis in AXES if axis in changes} | {
            "losses": {}
        }
    elif method is None or method == CUSTOM:
        start = expand(DEFAULT_METHOD) if base is None else base
    elif isinstance(method, str) and method in METHODS:
        start = dict(METHODS[method].parts)
    else:
        raise ValueError(unknown_name("routing method", method, METHODS))
    spec: RoutingSpec = {axis: _expand_part(axis, start.get(axis, NO_PART), changes.get(axis)) for axis in AXES}
    spec["losses"] = _expand_losses(start["losses"], changes.get("losses"))
    return {"method": _method_of(spec, method or start.get("method")), **spec}


def _names_every_part(changes: Mapping[str, Any]) -> bool:
    """A specification that was expanded before stands for itself, whatever its method's preset says today."""
    return "losses" in changes and all(
        isinstance(changes.get(axis), Mapping) and "type" in changes[axis] for axis in AXES if "none" not in PARTS[axis]
    )


def _expand_part(axis: str, start: Mapping[str, Any], change: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(change, str):
        change = {"type": change}
    elif change is not None and not isinstance(change, Mapping):
        raise ValueError(f"routing.{axis} must be a dict or the name of a part, got {shown(change)}.")
    change = dict(change or {})
    same_type = change.get("type", start["type"]) == start["type"]
    part = {**(start if same_type else {}), **change}
    return {"type": part["type"], **asdict(part_options(axis, part))}


def _expand_losses(start: Mapping[str, float], change: Mapping[str, float] | None) -> dict[str, float]:
    if change is not None and not isinstance(change, Mapping):
        raise ValueError(f"routing.losses must be a dict of name: coefficient, got {shown(change)}.")
    for name, coefficient in (change or {}).items():
        if name not in LOSSES:
            raise ValueError(unknown_name("loss in routing.losses:", name, LOSSES))
        is_number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
        if not is_number or not abs(coefficient) <= MAX_FACTOR:
            raise ValueError(
                f"routing.losses.{name} must be a finite number of at most {MAX_FACTOR:g}, got {shown(coefficient)}."
            )
    merged = {**start, **(change or {})}
    return {name: float(merged.get(name, 0.0)) for name in LOSSES}


def _method_of(spec: RoutingSpec, named: str | None) -> str:
    """The preset whose parts these are: the one that was named if it fits, else the first that does."""
    candidates = ([named] if named in METHODS else []) + list(METHODS)
    for name in candidates:
        if all(METHODS[name].parts.get(axis, NO_PART)["type"] == spec[axis]["type"] for axis in AXES):
            return name
    return CUSTOM


def default_slots(spec: RoutingSpec, num_experts: int) -> int:
    """The `num_experts_per_tok` of a config that names none, for the selector of a full specification."""
    return SELECTORS[spec["selector"]["type"]].default_slots(num_experts)


def with_own_slots(spec: RoutingSpec, base: RoutingSpec, num_experts: int) -> RoutingSpec:
    """A layer's specification whose selector is another than the model's: `num_experts_per_tok` is not meant for it."""
    option = SELECTORS[spec["selector"]["type"]].slots_option
    if spec["selector"]["type"] == base["selector"]["type"] or spec["selector"][option] is not None:
        return spec
    return {**spec, "selector": {**spec["selector"], option: default_slots(spec, num_experts)}}


def bank_spec(spec: RoutingSpec, bank: int | None) -> RoutingSpec:
    """The specification of one router and its experts: `spec` itself, or that of bank 0 or 1 of a cartesian layer."""
    if bank is None:
        return spec
    experts = spec["experts"]
    changes = experts["second_selector"] if bank == 1 else {}
    return {**spec, "selector": {**spec["selector"], **changes}, "experts": experts["bank"]}


def banks(spec: RoutingSpec) -> list[RoutingSpec]:
    """The specification of every router of a layer, in the order in which they run."""
    if spec["experts"]["type"] != "cartesian":
        return [spec]
    return [bank_spec(spec, bank) for bank in (0, 1)]


def num_choices(spec: RoutingSpec, config: Any) -> int:
    """Experts that a layer composes: E, or E * E pairs."""
    return config.num_experts ** len(banks(spec))


def initial_threshold(spec: RoutingSpec, config: Any) -> float:
    """Where a controlled threshold starts: `p`, or where each router would use its share of the target."""
    controller, start = spec["controller"], spec["selector"]["p"]
    if start is None:
        start = gaussian_threshold(config.num_experts, controller["target"] ** (1 / len(banks(spec))))
    return float(min(max(start, controller["p_min"]), controller["p_max"]))


def check(spec: RoutingSpec, config: Any) -> None:
    """Refuse a full specification that cannot work with the numbers of a config.

    Raises:
        ValueError: with the reason.
    """
    for axis in AXES:
        part_options(axis, spec[axis])
    routers = banks(spec)
    for router in routers:
        _check_router(router, config)
    if len({router["selector"].get("statistic") for router in routers}) > 1:
        raise ValueError("second_selector cannot have another statistic: attention measures one for the whole layer.")


def _check_router(spec: RoutingSpec, config: Any) -> None:
    scorer, selector = SCORERS[spec["scorer"]["type"]], SELECTORS[spec["selector"]["type"]]
    selector_options = part_options("selector", spec["selector"])
    selector.count_slots(selector_options, config)
    experts = part_options("experts", spec["experts"])
    if spec["experts"]["type"] == "low_rank":
        experts.width_for(config)
        experts.rank_for(config)
    elif scorer.reads_norms:
        raise ValueError(
            f"The scorer {spec['scorer']['type']!r} ranks experts by their low-rank activation, which "
            f"{spec['experts']['type']!r} experts do not have: give experts 'low_rank', or a cartesian bank of them."
        )
    if spec["selector"].get("statistic") == LEARNED and not spec["losses"]["importance"]:
        raise ValueError(
            "The statistic 'learned' is trained by the loss 'importance': give it a coefficient in routing.losses, for "
            "example 0.01."
        )
    controlled = spec["controller"]["type"] != "none"
    if controlled and not selector.has_threshold:
        raise ValueError(
            f"The controller {spec['controller']['type']!r} moves a threshold, and the selector "
            f"{spec['selector']['type']!r} has none."
        )
    if not controlled and selector.has_threshold and selector_options.p is None:
        raise ValueError("selector.p is None, which only a controller can set: give p a number.")
