"""What commands that have a model share: its flags, and dotted flags that change its configuration.

argparse knows no dotted flags such as `--routing.selector.p 0.2`, and would take their values for positional arguments.
`main` puts them into `args.rest` instead, where `dynmoe_hf.training.arguments` reads them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynmoe_hf import DynMoeForCausalLM

ROUTING_HELP = (
    "--routing METHOD, --routing.selector.p 0.2 or --routing '{selector: {p: 0.2}}' change the stored routing; "
    "`dynmoe methods` lists what there is."
)

_DOTTED_FLAG = re.compile(r"--(model|routing)(\.[\w.-]+)?")


def split_dotted_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """All other words of a command line, and the dotted flags with their values."""
    others: list[str] = []
    dotted: list[str] = []
    is_value = False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_flag = _DOTTED_FLAG.fullmatch(name) is not None
        belongs = is_flag or (is_value and not word.startswith("--"))
        (dotted if belongs else others).append(word)
        is_value = is_flag and not equals
    return others, dotted


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `load` needs."""
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights, default: as saved")
    parser.add_argument("--quantize", choices=("int8",), help="hold the weights of experts and layers in int8")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the accelerator, if there is one")
    parser.add_argument(
        "--experts-implementation", metavar="ENGINE", help="engine of the experts: ragged, grouped_mm, eager, ..."
    )
    parser.epilog = ROUTING_HELP
    parser.set_defaults(rest=[])


def load(args: argparse.Namespace) -> tuple[DynMoeForCausalLM, PreTrainedTokenizerBase]:
    """The model that the arguments name, with its routing changed, and its tokenizer.

    Raises:
        ValueError: for a flag or a model that is refused.
    """
    from dynmoe_hf.evaluation.loading import load_model_and_tokenizer
    from dynmoe_hf.evaluation.quantization import int8_weight_only

    return load_model_and_tokenizer(
        args.model,
        routing=parse_routing(args.rest),
        experts_implementation=args.experts_implementation,
        dtype=args.dtype,
        device=args.device,
        quantization_config=int8_weight_only() if args.quantize else None,
    )


def parse_routing(rest: Sequence[str]) -> str | dict[str, Any] | None:
    """The change of routing that flags ask for, None without any.

    Raises:
        ValueError: for any other flag, and for one that cannot be read.
    """
    from dynmoe_hf.training.arguments import take_sections

    settings: dict[str, Any] = {}
    unknown = take_sections(rest, settings)
    if unknown or "model" in settings:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown or rest)}")
    return settings.get("routing")
