"""`dynmoe methods`: the routing methods, their parts, options and defaults."""

import argparse
import json
from typing import Any

from .tables import new_console, new_table


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("name", nargs="?", help="show this method in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.errors import UserError
    from dynmoe_hf.model.methods import METHODS
    from dynmoe_hf.model.routing import unknown_name

    if args.name is not None and args.name not in METHODS:
        raise UserError(unknown_name("routing method", args.name, METHODS))
    methods = [_describe(name) for name in METHODS if args.name in (None, name)]
    if args.json:
        print(json.dumps(methods if args.name is None else methods[0], indent=2))
    elif args.name is None:
        _print_list(methods)
    else:
        _print_method(methods[0])


def _describe(name: str) -> dict[str, Any]:
    from dynmoe_hf.model.losses import LOSSES
    from dynmoe_hf.model.methods import AXES, METHODS, expand

    routing = expand(name)
    return {
        "name": name,
        "title": METHODS[name].title,
        "paper": METHODS[name].paper,
        "parts": {axis: _describe_part(axis, routing[axis]) for axis in AXES},
        "losses": [
            {"name": loss, "coefficient": coefficient, "doc": LOSSES[loss]}
            for loss, coefficient in routing["losses"].items()
        ],
        "routing": routing,
    }


def _describe_part(axis: str, part: dict[str, Any]) -> dict[str, Any]:
    """A part of a preset, whose values are the defaults of the method."""
    from dynmoe_hf.analysis.description import describe_part

    described = describe_part(axis, part)
    for option in described["options"]:
        option["default"] = option.pop("value")
    return described


def _print_list(methods: list[dict[str, Any]]) -> None:
    table = new_table("method", "parts", "what it does, and where it comes from")
    for method in methods:
        parts = "\n".join(f"{part['type']} {axis}" for axis, part in method["parts"].items() if part["type"] != "none")
        table.add_row(method["name"], parts, f"{method['title']}\n{method['paper']}", end_section=True)
    console = new_console()
    console.print(table)
    console.print("`dynmoe methods NAME` shows the options of one.")


def _print_method(method: dict[str, Any]) -> None:
    console = new_console()
    console.print(method["name"], style="bold")
    console.print(f"{method['title']}\n{method['paper']}")
    for axis, part in method["parts"].items():
        console.print(f"\n{axis}: {part['type']}", style="bold")
        console.print(part["doc"])
        if part["options"]:
            table = new_table("option", "type", "default", "meaning")
            for option in part["options"]:
                table.add_row(option["name"], option["type"], json.dumps(option["default"]), option["doc"])
            console.print(table)
    console.print("\nlosses", style="bold")
    table = new_table("loss", "coefficient", "meaning")
    for loss in method["losses"]:
        table.add_row(loss["name"], f"{loss['coefficient']:g}", loss["doc"])
    console.print(table)
