"""The `dynmoe` command: one module a sub-command.

A module offers `configure(parser)`, which declares its arguments, and `run(args) -> int | None`. It imports torch and
transformers inside `run`, so that `dynmoe --help` answers at once. One that parses further arguments itself sets a
default for `rest` and finds them there. Exit codes: 0 fine, 2 a user's mistake (one line on stderr), 1 anything else.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from dynmoe_hf import __version__
from dynmoe_hf.errors import UserError

from .model_arguments import split_dotted_flags

COMMANDS = {
    "methods": "list the routing methods, or show one with its parts, options and defaults",
    "validate": "build a configuration without memory: parameters, memory, FLOPs per token; of a run also its speed",
    "train": "train a model with the Hugging Face Trainer",
    "compare": "train several configurations on the same tokens and print one table",
    "convert": "turn checkpoints of other formats into models of this family, and back",
    "upcycle": "make a mixture of experts of a dense model",
    "evaluate": "perplexity on held-out text, or tasks of lm-evaluation-harness, with experts per token",
    "generate": "continue a prompt",
    "serve": "answer requests in the protocol of OpenAI",
    "push": "publish a model on the Hub, with its code and a model card",
    "bench": "compare engines, peers and methods: equal results first, then time and memory",
    "demo": "train top_k and top_p on the same text, compare, plot, reload, generate",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dynmoe", description="Mixture-of-experts language models with dynamic routing."
    )
    parser.add_argument("--version", action="version", version=f"dynmoe-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"dynmoe_hf.cli.{name}")
        description = f"{summary[0].upper()}{summary[1:]}."
        # `resolve` lets a command have a --help of its own.
        module.configure(commands.add_parser(name, help=summary, description=description, conflict_handler="resolve"))
    argv, dotted = split_dotted_flags(sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args(argv)
    rest += dotted
    if "rest" in args:
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return importlib.import_module(f"dynmoe_hf.cli.{args.command}").run(args) or 0
    except UserError as error:
        print(f"dynmoe {args.command}: {error}", file=sys.stderr)
        return 2
