"""`dynmoe compare`: several training runs on the same tokens, and one table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from dynmoe_hf.errors import UserError

from .folders import empty_folder
from .tables import new_console, new_table

RESULTS = "results.json"
LOGGING = ("--logging_first_step", "true", "--log_experts_per_layer", "true")  # what the table is made of
# What makes runs see the same tokens; the data arguments must be equal as a whole.
BUDGET = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files as for `dynmoe train`")
    parser.add_argument("--output", default="runs/compare", help="folder for models and results.json (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier comparison left there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = "Any other --NAME VALUE is given to every run, as in `dynmoe train`: --max_steps 100."
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    output = Path(args.output)
    configs = {Path(config).stem: config for config in args.configs}
    if len(configs) < len(args.configs):
        raise UserError("two of the files have the same name, which is the name of a run.")
    _check_runs(configs, args.rest)
    empty_folder(output, {RESULTS, *configs}, "comparison", args.overwrite)
    results: dict[str, dict[str, Any]] = {}
    tokenizer: list[str] = []
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        for name, config in configs.items():
            print(f"\n== {name} ==", flush=True)
            results[name] = train_and_measure(config, output / name, [*LOGGING, *args.rest, *tokenizer])
            # Every run has the same tokenizer; the first one has trained it if none was given.
            tokenizer = ["--tokenizer", str(output / name)]
            results[name].pop("log_history")
            (output / RESULTS).write_text(json.dumps(results, indent=2), encoding="utf-8")
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print_table(results)
    print(f"Models and {RESULTS} are in {output}.")


def _check_runs(configs: dict[str, str], flags: list[str]) -> None:
    """Refuse runs that would not see the same tokens, before any of them starts."""
    from dynmoe_hf.training.arguments import parse_arguments

    first: dict[str, Any] | None = None
    for name, config in configs.items():
        model_args, data_args, training_args = parse_arguments(flags, config)
        shared = dataclasses.asdict(data_args) | {key: getattr(training_args, key) for key in BUDGET}
        shared |= {"tokenizer": model_args.tokenizer, "vocab_size": model_args.vocab_size}
        first = shared if first is None else first
        for key, value in shared.items():
            if value != first[key]:
                raise UserError(
                    f"{key} is {value!r} in {name} and {first[key]!r} in {next(iter(configs))}: they would not see the "
                    f"same tokens. Give --{key} to set it for all."
                )


def train_and_measure(config_file: str, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Train one run into a folder; the figures of the table, all from this run."""
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.analysis.cost import count_cost
    from dynmoe_hf.training.arguments import parse_arguments
    from dynmoe_hf.training.train import train

    arguments = parse_arguments([*flags, "--output_dir", str(folder)], config_file)
    _, data_args, training_args = arguments
    metrics = train(*arguments)
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    history = state["log_history"]
    sequences = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    training = [entry["experts_per_token"] for entry in history if "experts_per_token" in entry]
    config = DynMoeConfig.from_pretrained(folder)
    cost = count_cost(config, metrics["eval_experts_per_token"], data_args.block_size)
    return {
        "bits_per_byte": metrics["eval_bits_per_byte"],
        "experts_per_token": metrics["eval_experts_per_token"],
        "experts_per_token_by_layer": [
            value for name, value in metrics.items() if name.startswith("eval_experts_per_token/layer_")
        ],
        "experts_per_token_first_step": training[0],
        "experts_per_token_last_steps": training[-1],
        "dead_experts": metrics["eval_dead_experts"],
        "total_parameters": cost.total_parameters,
        "active_parameters": cost.activity[0].parameters,
        "flops_per_token": cost.activity[0].flops,
        "steps": state["global_step"],
        "training_tokens": state["global_step"] * sequences * data_args.block_size,
        "tokens_per_second": metrics["train_samples_per_second"] * data_args.block_size,
        "log_history": history,
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """The table of a comparison."""
    console = new_console()
    tokens = next(iter(results.values()))["training_tokens"]
    console.print(
        f"\nThe same text, seed and budget for each run: {tokens:,} tokens. Experts per token in the first step, over "
        "the last steps, and on the validation text; experts that no validation token used; active parameters at that "
        "number of experts."
    )
    columns = ("bits/byte", "first", "last", "valid.", "dead", "active", "total", "tokens/s")
    table = new_table("run", *columns, numbers=True)
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['bits_per_byte']:.3f}",
            f"{result['experts_per_token_first_step']:.2f}",
            f"{result['experts_per_token_last_steps']:.2f}",
            f"{result['experts_per_token']:.2f}",
            f"{result['dead_experts']:.0f}",
            f"{result['active_parameters'] / 1e6:.2f} M",
            f"{result['total_parameters'] / 1e6:.2f} M",
            f"{result['tokens_per_second']:,.0f}",
        )
    console.print(table)
