"""`dynmoe convert`: checkpoints of other formats become models of this family, and back."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .tables import new_console, new_table

if TYPE_CHECKING:
    from dynmoe_hf.convert import Report


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_arguments(parser)
    parser.add_argument("--to", metavar="FORMAT", help="what a model of this family becomes: mixtral, olmoe, qwen3_moe")
    parser.epilog = "docs/converting.md says what each format can hold."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `convert` and `upcycle` share."""
    parser.add_argument("source", metavar="SOURCE", help="model folder or Hub id; it is only read")
    parser.add_argument("target", metavar="TARGET", help="folder to be made")
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="format of the source, default: as config.json says"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights, default: as stored"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB, default: as the largest of the source")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits of source and target")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in TARGET")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin where nothing else is there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def shared_options(args: argparse.Namespace) -> dict[str, str | bool | None]:
    """The options that `convert` and `upcycle` share, as arguments of both functions."""
    names = ("source_format", "dtype", "max_shard_size", "overwrite", "allow_pickle")
    return {name: getattr(args, name) for name in names} | {"check": not args.no_check}


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.convert import convert
    from dynmoe_hf.errors import user_errors

    with user_errors():
        report = convert(args.source, args.target, to=args.to, **shared_options(args))
    print_report(report, args.json)


def print_report(report: Report, as_json: bool) -> None:
    """What was written, what it does not say, and how far the logits are apart."""
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
        return
    console = new_console()
    console.print(
        f"{report.source} ({report.source_format}) -> {report.target} ({report.target_format}): {report.tensors:,} "
        f"tensors, {report.parameters:,} parameters, {report.num_bytes:,} bytes in {report.files} "
        f"{'file' if report.files == 1 else 'files'}."
    )
    for note in report.notes:
        console.print(f"Note: {note}.")
    if report.exact is not None:
        answer = "yes" if report.exact else "no"
        console.print(f"First output equals that of the dense model: {answer}, because {report.promise}.")
    if report.comparison is None:
        console.print("The logits were not compared.")
        return
    comparison = report.comparison
    table = new_table("logits of source and target, in float32", "", numbers=True)
    table.add_row("largest difference", f"{comparison.max_difference:.3g}")
    table.add_row("largest logit", f"{comparison.scale:.3g}")
    table.add_row("same most probable token", f"{comparison.argmax_agreement:.1%} of {comparison.positions} positions")
    console.print(table)
