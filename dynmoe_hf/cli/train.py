"""`dynmoe train`: train a model with the Hugging Face Trainer."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

from dynmoe_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

REPORTED = {
    "eval_lm_loss": "validation loss, nats per token",
    "eval_perplexity": "perplexity",
    "eval_bits_per_byte": "bits per byte",
    "eval_experts_per_token": "experts per token",
}


class _Help(argparse.Action):
    """The help of the arguments that transformers parses; they are not known until it is imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dynmoe_hf.training.arguments import help_text

        parser.print_help()
        print(help_text())
        parser.exit()


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.usage = f"{parser.prog} [--config FILE] [--json] [--NAME VALUE ...]"
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show what can be given, and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML file of arguments; flags win")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training needs {' and '.join(missing)}: pip install 'dynmoe-hf[train]'")
    from dynmoe_hf.training.arguments import parse_arguments
    from dynmoe_hf.training.train import train

    model_args, data_args, training_args = parse_arguments(args.rest, args.config)
    # The Trainer prints its logs where a reader of the JSON would look for it.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        metrics = train(model_args, data_args, training_args)
    print_metrics(metrics, training_args, REPORTED, args.json)


def print_metrics(
    metrics: dict[str, float], training_args: TrainingArguments, reported: dict[str, str], as_json: bool
) -> None:
    """All metrics of a run as JSON, or those that are reported with what they mean; from one process alone."""
    if training_args.process_index != 0:
        return
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    for name, meaning in reported.items():
        if name in metrics:
            print(f"{meaning:<32}{metrics[name]:.4g}")
    print(f"{'model':<32}{training_args.output_dir}")
