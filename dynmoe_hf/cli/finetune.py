"""The command lines of `scripts/finetune_lm.py` and `scripts/finetune_glue.py`, read as that of `dynmoe train` is."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence

from dynmoe_hf.errors import UserError
from dynmoe_hf.training.arguments import help_text, parse_arguments

from .model_arguments import split_dotted_flags
from .train import REPORTED, print_metrics

# The two validation splits of mnli have their names before the metric.
SCORES = {
    f"eval_{split}{score}": f"{split}{score}".replace("_", " ")
    for split in ("", "matched_", "mismatched_")
    for metric in ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "experts_per_token")
    for score in (metric, f"majority_{metric}")
}


def main(job: Callable[..., dict[str, float]], data_class: type, argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        job: called with the arguments of model, data and training; returns metrics.
        data_class: the dataclass of its data arguments.
        argv: the flags, by default those of this process.

    Returns:
        The exit code: 0 fine, 2 a user's mistake (one line on stderr).
    """
    name = f"{job.__name__}.py"
    parser = argparse.ArgumentParser(
        prog=name, usage=f"{name} [--config FILE] [--json] [--NAME VALUE ...]", add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="show what can be given, and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML file of arguments; flags win")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    flags, dotted = split_dotted_flags(sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args(flags)
    if args.help:
        parser.print_help()
        print(help_text(data_class))
        return 0
    try:
        arguments = parse_arguments(rest + dotted, args.config, data_class)
        # The Trainer prints its logs where a reader of the JSON would look for it.
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            metrics = job(*arguments)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print_metrics(metrics, arguments[2], REPORTED if "eval_perplexity" in metrics else SCORES, args.json)
    return 0
