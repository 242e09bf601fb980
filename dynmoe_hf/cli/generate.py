"""`dynmoe generate`: continue a prompt, word by word."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .model_arguments import add_model_arguments, load

DEFAULT_NEW_TOKENS = 100
SAMPLING = ("temperature", "top_p", "top_k")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file that holds the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: 100, or as many as the model has positions for"
    )
    parser.add_argument("--do-sample", action="store_true", help="sample; without it, the likeliest token is taken")
    parser.add_argument("--temperature", type=float, metavar="T", help="above 0; sample with this temperature")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="0 ... 1; sample from the likeliest tokens of this mass"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--seed", type=int, help="of the sampling, for text that can be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON, when all is done")


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    import torch
    from transformers import TextStreamer, set_seed

    from dynmoe_hf.errors import user_errors

    with user_errors():
        options = _generation_options(args)
        prompt = args.prompt if args.prompt_file is None else args.prompt_file.read_text(encoding="utf-8")
        if not prompt:
            raise ValueError("the prompt is empty.")
        model, tokenizer = load(args)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        options["max_new_tokens"] = _num_new_tokens(
            args.max_new_tokens, num_prompt_tokens, model.config.max_position_embeddings
        )
    if args.seed is not None:
        set_seed(args.seed)
    streamer = None if args.json else TextStreamer(tokenizer, skip_special_tokens=True)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            streamer=streamer,
            pad_token_id=pad_token_id,
            **options,
        )[0]
    if args.json:
        new_tokens = output[num_prompt_tokens:]
        report = {
            "model": args.model,
            "routing": model.config.routing,
            "prompt": prompt,
            "continuation": tokenizer.decode(new_tokens, skip_special_tokens=True),
            "prompt_tokens": num_prompt_tokens,
            "new_tokens": len(new_tokens),
            "options": options,
            "seed": args.seed,
        }
        print(json.dumps(report, indent=2))


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """What of GenerationConfig the sampling flags set; one that only sampling reads asks for sampling."""
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature must be above 0, got {args.temperature}.")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {args.top_p}.")
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"--top-k must be at least 1, got {args.top_k}.")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return {"do_sample": args.do_sample or bool(given), **given}


def _num_new_tokens(wanted: int | None, num_prompt_tokens: int, num_positions: int) -> int:
    room = num_positions - num_prompt_tokens
    if room < (wanted or 1):
        raise ValueError(
            f"the model has {num_positions} positions, too few for a prompt of {num_prompt_tokens} tokens and "
            f"{wanted or 1} new ones."
        )
    return min(room, DEFAULT_NEW_TOKENS) if wanted is None else wanted
