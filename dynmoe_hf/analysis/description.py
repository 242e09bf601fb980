"""What the parts of a routing are, in the words of their docstrings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from dynmoe_hf.model.methods import PARTS, options_class

_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def option_docs(options_class: type) -> dict[str, str]:
    """What the `Args:` block of a docstring says about each option."""
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.getdoc(options_class).partition("Args:\n")[2].splitlines():
        if entry := _ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            docs |= dict.fromkeys(names, entry[2])
        elif line.startswith("     "):
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
        else:
            break
    return docs


def describe_part(axis: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """One part of a full specification: its type, what it does, and each option with type, value and meaning."""
    part_class = PARTS[axis][part["type"]]
    options = options_class(axis, part["type"])
    docs = option_docs(options)
    return {
        "type": part["type"],
        "doc": " ".join(inspect.getdoc(part_class).partition("\n\n")[0].split()),
        "options": [
            {
                "name": field.name,
                "type": _type_name(field.type),
                "value": part[field.name],
                "doc": docs[field.name],
            }
            for field in fields(options)
        ],
    }


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(value) for value in get_args(annotation))
    return inspect.formatannotation(annotation)
