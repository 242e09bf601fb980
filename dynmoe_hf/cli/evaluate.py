"""`dynmoe evaluate`: how well a model predicts held-out text, or solves tasks, and with how many experts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate_tasks import add_task_arguments, run_on_tasks
from .model_arguments import add_model_arguments, load
from .tables import new_console, new_table

if TYPE_CHECKING:
    from datasets import Dataset

REPORTED = {
    "lm_loss": "loss, nats per token",
    "perplexity": "perplexity, per token",
    "bits_per_byte": "bits per byte",
    "tokens": "tokens predicted",
    "bytes": "bytes of text predicted",
    "experts_per_token": "experts per token",
    "dead_experts": "experts that no token used",
}

# The arguments that are about text, which --tasks does not read.
TEXT_DEFAULTS = {
    "dataset": ["python-stdlib"],
    "dataset_config": None,
    "split": "validation",
    "validation_fraction": 0.05,
    "text_column": "text",
    "block_size": None,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument(
        "--dataset",
        nargs="+",
        help="python-stdlib (default), the name of a Hub dataset, or files, patterns or folders, as in training",
    )
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of a Hub dataset")
    parser.add_argument(
        "--split",
        choices=("validation", "test", "all"),
        help="validation (default) is what training holds out of the same data; all takes every document of files",
    )
    parser.add_argument("--validation-fraction", type=float, metavar="F", help="as in training")
    parser.add_argument("--text-column", metavar="NAME", help="column that holds the text")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens in a sequence, default: the model's longest"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences in one call, default 8")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="evaluate on the first N blocks, or examples of each task, only"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="also write the JSON to this file; with --tasks, JSON, table and plots to this folder",
    )
    parser.set_defaults(task_arguments=add_task_arguments(parser), **TEXT_DEFAULTS)


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.errors import user_errors

    with user_errors():
        _check(args)
    if args.tasks is None:
        _run_on_text(args)
    else:
        run_on_tasks(args)


def _run_on_text(args: argparse.Namespace) -> None:
    from dynmoe_hf.errors import user_errors
    from dynmoe_hf.evaluation.perplexity import evaluate_text
    from dynmoe_hf.training.data import pack

    with user_errors():
        model, tokenizer = load(args)
        block_size = _block_size(args.block_size, model.config.max_position_embeddings)
        blocks = pack(_documents(args), tokenizer, block_size, keep_remainder=True)
        if args.limit is not None:
            blocks = blocks.select(range(min(args.limit, len(blocks))))
    report = {
        "model": args.model,
        "routing": model.config.routing,
        "dataset": args.dataset,
        "split": args.split,
        "block_size": block_size,
        "blocks": len(blocks),
        **evaluate_text(model, blocks, args.batch_size),
    }
    text = json.dumps(report, indent=2)
    if args.output is not None:
        args.output.write_text(f"{text}\n", encoding="utf-8")
    if args.json:
        print(text)
    else:
        blocks = model.moe_blocks()
        _print(
            report, [f"{block.layer_idx}" + ("" if block.bank is None else f", bank {block.bank}") for block in blocks]
        )


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before the model is loaded."""
    for name in ("batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    if args.tasks is None:
        idle = [name for name in args.task_arguments if getattr(args, name) not in (None, False)]
    else:
        idle = [name for name, default in TEXT_DEFAULTS.items() if getattr(args, name) != default]
    if idle:
        rule = "needs" if args.tasks is None else "has no meaning with"
        raise ValueError(f"--{idle[0].replace('_', '-')} {rule} --tasks.")
    if args.tasks is not None or args.output is None:
        return
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise ValueError(f"cannot write {str(args.output)!r}: it is a folder, or in a folder that does not exist.")


def _block_size(wanted: int | None, longest: int) -> int:
    if wanted is not None and wanted > longest:
        raise ValueError(f"--block-size {wanted} is more than the {longest} positions of the model.")
    return longest if wanted is None else wanted


def _documents(args: argparse.Namespace) -> Dataset:
    from dynmoe_hf.training.data import load_documents

    source = args.dataset[0] if len(args.dataset) == 1 else args.dataset
    documents = load_documents(
        source,
        config_name=args.dataset_config,
        validation_files=source if args.split == "all" else None,
        text_column=args.text_column,
        validation_fraction=args.validation_fraction,
    )
    split = "validation" if args.split == "all" else args.split
    if split not in documents:
        raise ValueError(f"{source!r} has no split {split!r}, only: {', '.join(documents)}.")
    return documents[split]


def _print(report: dict[str, Any], routers: list[str]) -> None:
    console = new_console()
    console.print(
        f"{report['model']} on {' '.join(report['dataset'])}, {report['split']} split: "
        f"{report['blocks']} blocks of {report['block_size']} tokens"
    )
    table = new_table("measure", "value", numbers=True)
    for name, meaning in REPORTED.items():
        if name in report:
            value = report[name]
            table.add_row(meaning, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    console.print(table)
    if routers:
        table = new_table("MoE layer", "experts per token", "least used expert", "most used expert", numbers=True)
        for row in zip(routers, report["experts_per_token_by_layer"], report["expert_load"], strict=True):
            router, mean, loads = row
            table.add_row(router, f"{mean:.3f}", f"{min(loads):.1%} of tokens", f"{max(loads):.1%} of tokens")
        console.print(table)
