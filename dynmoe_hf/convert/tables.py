"""How the tensors of a format become ours and ours become those of the format: rules that are read both ways.

Shapes: `E` experts, `I` expert width, `D` hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PLACEHOLDERS = {"{layer}": r"(?P<layer>\d+)", "{expert}": r"(?P<expert>\d+)", "{prefix}": r"(?P<prefix>(?:.+\.)?)"}


class View(NamedTuple):
    """How a source tensor is turned into ours and back, given the number of experts."""

    read: Callable[[Tensor, int], Tensor]
    write: Callable[[Tensor], Tensor]


PLAIN = View(lambda tensor, _: tensor, lambda tensor: tensor)
TRANSPOSED = View(lambda tensor, _: tensor.T, lambda tensor: tensor.T)


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, and the tensors of a format that it is made of.

    Args:
        ours: its name. `{layer}` stands for a number, `{prefix}` for what may stand before the names of a single layer.
        theirs: names of tensors of equal size, which are concatenated on their first dimension. With `{expert}` this is
            done for each expert, and the experts are stacked on a new first dimension.
        view: how a tensor of theirs is turned before that.
        one_way: it is only read, because a tensor of ours does not say by itself how many parts it has.
    """

    ours: str
    theirs: tuple[str, ...]
    view: View = PLAIN
    one_way: bool = False

    @property
    def stacks(self) -> bool:
        """Whether a tensor of ours holds all experts, and one of theirs holds one."""
        return "{expert}" in self.theirs[0]


class Group(NamedTuple):
    """A rule applied: the name of one tensor of ours, and a row of names of theirs for each expert (or one row)."""

    rule: Rule
    ours: str
    rows: tuple[tuple[str, ...], ...]

    def names(self) -> Iterator[tuple[int, int, str]]:
        """(row, part, name) of every tensor of theirs."""
        for row, parts in enumerate(self.rows):
            for part, name in enumerate(parts):
                yield row, part, name


def same(*names: str) -> tuple[Rule, ...]:
    """Rules for tensors that are ours as they are."""
    return tuple(Rule(name, (name,)) for name in names)


def match(pattern: str, name: str) -> dict[str, str] | None:
    """What the placeholders of a pattern stand for in a name; None if it does not fit."""
    regex = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
    for placeholder, expression in PLACEHOLDERS.items():
        regex = regex.replace(placeholder, expression, 1)
    found = re.fullmatch(regex, name)
    return None if found is None else found.groupdict()


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """A pattern with its placeholders replaced."""
    for key, value in values.items():
        pattern = pattern.replace(f"{{{key}}}", value)
    return pattern


def groups_of(rules: Iterable[Rule], names: Iterable[str]) -> tuple[dict[str, Group], list[str]]:
    """What the tensors of a format make, by the names of ours, and the names that no rule knows.

    Raises:
        ValueError: a tensor of ours lacks a part, or is there in two layouts.
    """
    rules, names = list(rules), set(names)
    found: dict[tuple[str, Rule], tuple[dict[str, str], set[int]]] = {}
    unknown = []
    for name in sorted(names):
        fitting = [
            (rule, values) for rule in rules for theirs in rule.theirs if (values := match(theirs, name)) is not None
        ]
        if not fitting:
            unknown.append(name)
            continue
        whole = (use for use in fitting if all(fill(theirs, use[1]) in names for theirs in use[0].theirs))
        rule, values = next(whole, fitting[0])
        expert = int(values.pop("expert", 0))
        found.setdefault((fill(rule.ours, values), rule), (values, set()))[1].add(expert)
    groups: dict[str, Group] = {}
    for (ours, rule), (values, experts) in found.items():
        rows = tuple(
            tuple(fill(theirs, {**values, "expert": str(expert)}) for theirs in rule.theirs)
            for expert in range(len(experts))
        )
        missing = sorted({name for row in rows for name in row} - names)
        if missing:
            raise ValueError(f"the checkpoint lacks weights: {_some(missing)}.")
        if ours in groups:
            raise ValueError(f"the checkpoint holds {ours} in two layouts: {rows[0][0]} and {groups[ours].rows[0][0]}.")
        groups[ours] = Group(rule, ours, rows)
    return groups, unknown


def groups_for(rules: Iterable[Rule], shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Group], list[str]]:
    """What tensors of ours with these shapes become, by our names, and the names that no rule knows.

    Of several rules for a tensor the first one counts.
    """
    rules = list(rules)
    groups: dict[str, Group] = {}
    unknown = []
    for ours, shape in shapes.items():
        for rule in rules:
            if not rule.one_way and (values := match(rule.ours, ours)) is not None:
                rows = tuple(
                    tuple(fill(theirs, {**values, "expert": str(expert)}) for theirs in rule.theirs)
                    for expert in range(shape[0] if rule.stacks else 1)
                )
                groups[ours] = Group(rule, ours, rows)
                break
        else:
            unknown.append(ours)
    return groups, unknown


def join(group: Group, load: Callable[[str], Tensor], num_experts: int) -> Tensor:
    """A tensor of ours. It takes the memory of itself and of one expert; on the meta device, none.

    Raises:
        ValueError: the shapes of its parts do not fit together.
    """
    joined = None
    for row, names in enumerate(group.rows):
        parts = [group.rule.view.read(load(name), num_experts) for name in names]
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"{' and '.join(names)} have different shapes.")
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not group.rule.stacks:
            return whole
        if joined is None:
            joined = whole.new_empty((len(group.rows), *whole.shape))
        if whole.shape != joined.shape[1:]:
            raise ValueError(f"{names[0]} has another shape than {group.rows[0][0]}.")
        joined[row] = whole
    return joined


def split(group: Group, row: int, part: int, load: Callable[[str, int | None], Tensor]) -> Tensor:
    """A tensor of theirs: the part of a row of a group. `load` reads a tensor of ours, or one index of it."""
    tensor = load(group.ours, row if group.rule.stacks else None)
    parts = len(group.rows[row])
    return group.rule.view.write(tensor if parts == 1 else tensor.chunk(parts)[part])


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor], num_experts: int = 0) -> dict[str, Tensor]:
    """Tensors of a format that are in memory, under our names.

    Args:
        num_experts: E, for a format that does not hold experts apart (the second layout of Autonomy-of-Experts).

    Raises:
        ValueError: a tensor is unknown or lacks a part.
    """
    groups, unknown = groups_of(rules, tensors)
    if unknown:
        raise ValueError(f"no rule knows {_some(unknown)}.")
    return {ours: join(group, tensors.__getitem__, num_experts) for ours, group in groups.items()}


def from_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back of `to_ours`, into the layout of the first rule that fits.

    Raises:
        ValueError: a tensor is unknown.
    """
    groups, unknown = groups_for(rules, {name: tensor.shape for name, tensor in tensors.items()})
    if unknown:
        raise ValueError(f"no rule knows {_some(unknown)}.")

    def load(name: str, index: int | None) -> Tensor:
        return tensors[name] if index is None else tensors[name][index]

    return {name: split(group, row, part, load) for group in groups.values() for row, part, name in group.names()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
