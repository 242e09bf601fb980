# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Routing methods: presets over the three axes, and the expansion of what a user writes into what is stored.

A full specification is a plain dict, ready for JSON:

    {"method": "top_p",
     "scorer": {"type": "linear"},
     "selector": {"type": "top_p", "p": 0.4, "max_experts": None, "norm_topk_prob": False},
     "experts": {"type": "swiglu"},
     "losses": {"load_balance": 0.01, "dynamic": 0.0001, "router_z": 0.0}}
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from .expert_layouts import EXPERTS
from .expert_selectors import SELECTORS
from .losses import LOSSES
from .routing import build_options, unknown_name
from .scorers import SCORERS

RoutingSpec = dict[str, Any]

PARTS: dict[str, Mapping[str, type]] = {"scorer": SCORERS, "selector": SELECTORS, "experts": EXPERTS}
AXES = tuple(PARTS)
CUSTOM = "custom"  # the stored name of a combination that is no preset
DEFAULT_METHOD = "top_k"


@dataclass(frozen=True)
class Method:
    """A preset: the parts that make a paper."""

    title: str
    paper: str
    parts: Mapping[str, Any]


METHODS: dict[str, Method] = {
    "top_k": Method(
        title="The k most probable experts for every token",
        paper="Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961 (loss)",
        parts={
            "scorer": {"type": "linear"},
            "selector": {"type": "top_k"},
            "experts": {"type": "swiglu"},
            "losses": {"load_balance": 1e-2},
        },
    ),
    "top_p": Method(
        title="As many experts as it takes for their summed probability to exceed p",
        paper="Huang et al. 2024, Harder Tasks Need More Experts, arXiv 2403.07652",
        parts={
            "scorer": {"type": "linear"},
            "selector": {"type": "top_p", "p": 0.4},
            "experts": {"type": "swiglu"},
            "losses": {"load_balance": 1e-2, "dynamic": 1e-4},
        },
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
        routing: the name of a method; or a dict with any of `method`, `scorer`, `selector`, `experts`, `losses`. A part
            is a dict, or a string for its type alone. None gives `base`.
        base: the full specification that the dict changes when it names no method; without one, `top_k`.

    A part given without a type, or with the type it has already, changes single keys; another type starts from that
    type's defaults. Losses are changed one by one.

    Raises:
        ValueError: on any unknown name and on any value that a part refuses.
    """
    if not isinstance(routing, str | Mapping | None):
        raise ValueError(f"routing must be the name of a method or a dict, got {routing!r}.")
    changes: dict[str, Any] = {"method": routing} if isinstance(routing, str) else dict(routing or {})
    for key in changes:
        if key not in ("method", "losses", *AXES):
            raise ValueError(unknown_name("key in routing:", key, ("method", "losses", *AXES)))
    method = changes.get("method")
    if _names_every_part(changes):
        start: RoutingSpec = {axis: {"type": changes[axis]["type"]} for axis in AXES} | {"losses": {}}
    elif method is None or method == CUSTOM:
        start = expand(DEFAULT_METHOD) if base is None else base
    elif isinstance(method, str) and method in METHODS:
        start = dict(METHODS[method].parts)
    else:
        raise ValueError(unknown_name("routing method", method, METHODS))
    spec: RoutingSpec = {axis: _expand_part(axis, start[axis], changes.get(axis)) for axis in AXES}
    spec["losses"] = _expand_losses(start["losses"], changes.get("losses"))
    return {"method": _method_of(spec, method or start.get("method")), **spec}


def _names_every_part(changes: Mapping[str, Any]) -> bool:
    """A specification that was expanded before stands for itself, whatever its method's preset says today."""
    return "losses" in changes and all(
        isinstance(changes.get(axis), Mapping) and "type" in changes[axis] for axis in AXES
    )


def _expand_part(axis: str, start: Mapping[str, Any], change: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(change, str):
        change = {"type": change}
    elif change is not None and not isinstance(change, Mapping):
        raise ValueError(f"routing.{axis} must be a dict or the name of a part, got {change!r}.")
    change = dict(change or {})
    same_type = change.get("type", start["type"]) == start["type"]
    part = {**(start if same_type else {}), **change}
    return {"type": part["type"], **asdict(part_options(axis, part))}


def _expand_losses(start: Mapping[str, float], change: Mapping[str, float] | None) -> dict[str, float]:
    if change is not None and not isinstance(change, Mapping):
        raise ValueError(f"routing.losses must be a dict of name: coefficient, got {change!r}.")
    for name, coefficient in (change or {}).items():
        if name not in LOSSES:
            raise ValueError(unknown_name("loss in routing.losses:", name, LOSSES))
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not isfinite(coefficient):
            raise ValueError(f"routing.losses.{name} must be a finite number, got {coefficient!r}.")
    merged = {**start, **(change or {})}
    return {name: float(merged.get(name, 0.0)) for name in LOSSES}


def _method_of(spec: RoutingSpec, named: str | None) -> str:
    """The preset whose parts these are: the one that was named if it fits, else the first that does."""
    candidates = ([named] if named in METHODS else []) + list(METHODS)
    for name in candidates:
        if all(METHODS[name].parts[axis]["type"] == spec[axis]["type"] for axis in AXES):
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


def check(spec: RoutingSpec, config: Any) -> None:
    """Refuse a full specification that cannot work with the numbers of a config.

    Raises:
        ValueError: with the reason.
    """
    for axis in AXES:
        part_options(axis, spec[axis])
    SELECTORS[spec["selector"]["type"]].count_slots(part_options("selector", spec["selector"]), config)
