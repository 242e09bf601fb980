"""`dynmoe validate`: check a configuration and count what its model costs, without memory for the weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_arguments import ROUTING_HELP
from .tables import new_console, new_table

if TYPE_CHECKING:
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.analysis.cost import Cost

FILES = (".yaml", ".yml", ".json")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "config",
        help="YAML file of a training run, YAML or JSON file of DynMoeConfig fields, or model folder or Hub id",
    )
    parser.add_argument("--experts-per-token", type=float, metavar="K", help="count the cost at K experts a layer")
    parser.add_argument("--sequence-length", type=int, metavar="S", help="count attention for S tokens, default: all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = f"{ROUTING_HELP} --model.FIELD VALUE changes a field of DynMoeConfig."
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.analysis.cost import count_cost
    from dynmoe_hf.errors import user_errors

    with user_errors():
        config = read_config(args.config, args.rest)
        cost = count_cost(config, args.experts_per_token, args.sequence_length)
    if args.json:
        print(json.dumps(_as_json(config, cost), indent=2))
    else:
        _print(args.config, config, cost)


def read_config(source: str, rest: list[str]) -> DynMoeConfig:
    """The model configuration that a file, a folder or a Hub id stands for, changed by flags.

    The vocabulary of a training run that makes its own tokenizer is taken as large as it may become.

    Raises:
        ValueError: for anything that is refused. huggingface_hub's StrictDataclassError for a value of a wrong type.
    """
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.evaluation.loading import load_config
    from dynmoe_hf.training.arguments import check_model_fields, fit_settings, read_settings, take_sections

    suffix = Path(source).suffix
    settings = read_settings(source) if suffix in FILES else {}
    is_run = _is_training_run(settings)
    if suffix not in FILES or (suffix == ".json" and "model_type" in settings):
        settings = {"model": source}
    elif not is_run:
        routing = settings.pop("routing", None)
        settings = {"model": settings, "routing": routing}
    if unknown := take_sections(rest, settings):
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
    if is_run:
        settings = fit_settings(settings, source)
    model, routing = settings.get("model") or {}, settings.get("routing")
    if isinstance(model, str):
        return load_config(model, routing)
    check_model_fields(model)
    if is_run and "vocab_size" not in model:
        model = model | {"vocab_size": _vocab_size(settings)}
    return DynMoeConfig(**model, routing=routing)


def _vocab_size(settings: Mapping[str, Any]) -> int:
    """Tokens of the tokenizer that a training run uses for a new model."""
    from dynmoe_hf.training.arguments import ModelArguments
    from dynmoe_hf.training.tokenizer import load_tokenizer

    if "tokenizer" in settings:
        return len(load_tokenizer(settings["tokenizer"]))
    return int(settings.get("vocab_size", ModelArguments.vocab_size))


def _is_training_run(settings: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of `dynmoe train`, not the fields of a model."""
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.training.arguments import DataArguments, DynMoeTrainingArguments, ModelArguments

    kinds = (ModelArguments, DataArguments, DynMoeTrainingArguments)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return not names.isdisjoint(set(settings) - {field.name for field in dataclasses.fields(DynMoeConfig)})


def _as_json(config: DynMoeConfig, cost: Cost) -> dict[str, Any]:
    return {
        "routing": config.routing,
        "layer_routing": {layer: config.routing_for(layer) for layer in config.layer_routing or {}},
        "total_parameters": cost.total_parameters,
        **dataclasses.asdict(cost),
    }


def _print(source: str, config: DynMoeConfig, cost: Cost) -> None:
    console = new_console()
    sparse = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    console.print(f"{source} is valid.", style="bold")
    console.print(
        f"{config.routing['method']} routing, {config.num_hidden_layers} layers ({sparse} MoE), "
        f"{config.num_experts} experts, hidden size {config.hidden_size}, vocabulary {config.vocab_size}"
    )
    total = cost.total_parameters
    table = new_table("part", "parameters", "share", numbers=True)
    for name, number in cost.parameters.items():
        if number:
            table.add_row(name.replace("_", " "), f"{number:,}", f"{number / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", "100.0%")
    console.print(table)
    console.print(f"Weights take {_with_prefix(cost.weight_bytes)}B in {cost.dtype}.")
    table = new_table("experts per token", "active parameters", "share", "FLOPs per token", numbers=True)
    for point in cost.activity:
        table.add_row(
            f"{point.experts_per_token:.4g}",
            f"{point.parameters:,}",
            f"{point.parameters / total:.1%}",
            f"{_with_prefix(point.flops)}FLOP",
        )
    console.print(table)
    console.print(f"FLOPs of a forward pass, attention over {cost.sequence_length:,} tokens.")
    for note in cost.notes:
        console.print(f"Note: {note}")


def _with_prefix(value: float) -> str:
    """A number up to its unit, with an SI prefix: `13.95 G`."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.4g} {prefix}"
        value /= 1000
    return f"{value:,.4g} T"
