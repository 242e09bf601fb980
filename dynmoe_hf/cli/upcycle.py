"""`dynmoe upcycle`: a dense Llama, Mistral, Qwen2 or Qwen3 becomes a mixture of experts."""

from __future__ import annotations

import argparse

from .convert import add_arguments, print_report, shared_options
from .model_arguments import ROUTING_HELP, parse_routing


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_arguments(parser)
    parser.add_argument("--num-experts", type=int, default=8, metavar="E", help="routed experts of a layer, default 8")
    parser.add_argument("--num-experts-per-tok", type=int, metavar="K", help="as in the configuration")
    parser.add_argument(
        "--split", type=int, default=1, metavar="G", help="cut each copy of the FFN into G experts, default 1"
    )
    parser.add_argument(
        "--shared-experts", type=int, default=0, metavar="N", help="1 adds the dense FFN as a shared expert, default 0"
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="X", help="added to the experts, in units of their own spread"
    )
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="layers that get experts, default: all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random, default 0")
    parser.epilog = ROUTING_HELP
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.convert import upcycle
    from dynmoe_hf.errors import user_errors

    with user_errors():
        report = upcycle(
            args.source,
            args.target,
            num_experts=args.num_experts,
            num_experts_per_tok=args.num_experts_per_tok,
            routing=parse_routing(args.rest),
            split=args.split,
            num_shared_experts=args.shared_experts,
            noise=args.noise,
            layers=args.layers,
            seed=args.seed,
            **shared_options(args),
        )
    print_report(report, args.json)
