"""`dynmoe push`: publish a model on the Hub, with its code, its tokenizer and a model card."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .tables import new_console, new_table

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from transformers import PreTrainedTokenizerBase

    from dynmoe_hf import DynMoeForCausalLM


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of `dynmoe train`, or of any saved model")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub; it is made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="all but the upload; needs no token and no network")
    parser.add_argument("--public", action="store_true", help="make the repository public; by default it is private")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, such as apache-2.0")
    parser.add_argument("--language", nargs="+", default=[], metavar="CODE", help="languages of the text, such as en")
    parser.add_argument(
        "--evaluation", nargs="+", type=Path, default=[], metavar="FILE", help="what `dynmoe evaluate --output` wrote"
    )
    parser.add_argument("--card", type=Path, metavar="FILE", help="use this model card instead of a rendered one")
    parser.add_argument("--card-output", type=Path, metavar="FILE", help="also write the model card here")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it is not there; default: main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises UserError for what the user can mend; returns 1 if anything else goes wrong."""
    from dynmoe_hf.errors import user_errors
    from dynmoe_hf.hub.push import check_repo_id, find_target, upload
    from dynmoe_hf.hub.staging import PublishingError, check_in_clean_process, stage

    try:
        with user_errors():
            check_repo_id(args.repo_id)
            _check_files(args)
            target = None if args.dry_run else find_target(args.repo_id, args.revision, args.public)
            model, tokenizer, card = _load(args)
        with tempfile.TemporaryDirectory() as staging:
            files = stage(model, tokenizer, card, Path(staging))
            check_in_clean_process(Path(staging), model, tokenizer)
            if args.card_output is not None:
                args.card_output.write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
            url = None
            if target is not None:
                method = model.config.routing["method"]
                url = upload(Path(staging), target, args.message or f"Upload {method} model", args.create_pr)
    except PublishingError as error:
        print(f"dynmoe push: {error}", file=sys.stderr)
        return 1
    report = {"repo_id": args.repo_id, "revision": args.revision or "main", "dry_run": args.dry_run}
    report |= {"private": not args.public if target is None else target.is_private, "url": url, "files": files}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, args.card_output)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise ValueError(f"there is no folder {str(args.folder)!r}.")
    out = args.card_output
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ValueError(f"cannot write {str(out)!r}: it is a folder, or in a folder that does not exist.")


def _load(args: argparse.Namespace) -> tuple[DynMoeForCausalLM, PreTrainedTokenizerBase, ModelCard]:
    """The model, checked as every checkpoint is that is loaded, its tokenizer, and the card."""
    from huggingface_hub import ModelCard

    from dynmoe_hf.evaluation.loading import load_model_and_tokenizer
    from dynmoe_hf.hub.cards import render_card
    from dynmoe_hf.hub.records import read_evaluation, read_training

    model, tokenizer = load_model_and_tokenizer(args.folder, device="cpu")
    if getattr(model.config, "quantization_config", None) is not None:
        # transformers raises NotImplementedError where it should save such a model again.
        raise ValueError(
            f"{str(args.folder)!r} is quantised, and transformers cannot write it anew: publish the original, "
            "which its users can quantise as they load it."
        )
    if args.card is not None:
        return model, tokenizer, ModelCard(args.card.read_text(encoding="utf-8"))
    card = render_card(
        model.config,
        args.repo_id,
        read_training(args.folder),
        [read_evaluation(file, args.folder, model.config.routing) for file in args.evaluation],
        license=args.license,
        languages=args.language,
        has_chat_template=tokenizer.chat_template is not None,
    )
    return model, tokenizer, card


def _print(report: dict, card_output: Path | None) -> None:
    console = new_console()
    table = new_table("file", "bytes", numbers=True)
    for name, size in report["files"].items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    console.print("The copy was loaded without dynmoe_hf and gave the same logits to the bit.")
    if card_output is not None:
        console.print(f"The model card is in {card_output}.")
    visibility = "private" if report["private"] else "public"
    if report["dry_run"]:
        console.print(f"Nothing was uploaded: this was a dry run for {report['repo_id']} ({visibility}).")
    elif report["url"] is None:
        console.print(f"Nothing has changed in {report['repo_id']} ({visibility}).")
    else:
        console.print(f"{report['repo_id']} ({visibility}): {report['url']}")
