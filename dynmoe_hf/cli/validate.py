"""`dynmoe validate`: check a configuration and count what its model and its training cost, without its weights."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_arguments import ROUTING_HELP
from .tables import new_console, new_table

if TYPE_CHECKING:
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.analysis.budget import Budget
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
    training = parser.add_argument_group("what a training run takes, for the YAML file of one")
    training.add_argument("--device", default="h100", help="a100, l40s, h100 (default), h200, mi300x")
    training.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of a device, instead of --device's")
    training.add_argument("--peak-tflops", type=float, metavar="N", help="its dense peak in bfloat16, likewise")
    training.add_argument("--utilisation", type=float, default=0.4, metavar="U", help="share of the peak, default: 0.4")
    training.add_argument(
        "--accelerate", metavar="FILE", help="configuration of `accelerate launch`: devices, sharding"
    )
    training.add_argument(
        "--devices", type=int, metavar="N", help="number of devices, instead of the file's; DDP without"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = f"{ROUTING_HELP} --model.FIELD VALUE changes a field of DynMoeConfig."
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.analysis.cost import count_cost
    from dynmoe_hf.errors import user_errors

    with user_errors():
        config, settings = read_config(args.config, args.rest)
        cost = count_cost(config, args.experts_per_token, args.sequence_length)
        if settings is None and (args.accelerate is not None or args.devices is not None):
            raise ValueError(f"--accelerate and --devices are for the YAML file of a training run, not {args.config}.")
        budget = None if settings is None else _count_budget(config, settings, args)
    if args.json:
        training = {} if budget is None else {"training": budget.to_dict()}
        print(json.dumps(_as_json(config, cost) | training, indent=2))
        return
    _print(args.config, config, cost)
    if budget is not None:
        _print_budget(budget)


def read_config(source: str, rest: list[str]) -> tuple[DynMoeConfig, dict[str, Any] | None]:
    """The model configuration that a file, a folder or a Hub id stands for, changed by flags; and all settings of a
    training run, None for anything else.

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
        return load_config(model, routing), settings if is_run else None
    check_model_fields(model)
    if is_run and "vocab_size" not in model:
        model = model | {"vocab_size": _vocab_size(settings)}
    return DynMoeConfig(**model, routing=routing), settings if is_run else None


def _count_budget(config: DynMoeConfig, settings: Mapping[str, Any], args: argparse.Namespace) -> Budget:
    import torch

    from dynmoe_hf.analysis.budget import DEVICES, Device, Run, count_budget, layout_of
    from dynmoe_hf.model.routing import unknown_name
    from dynmoe_hf.training.arguments import DataArguments, DynMoeTrainingArguments

    if args.device not in DEVICES:
        raise ValueError(unknown_name("device", args.device, set(DEVICES)))
    peak, memory = DEVICES[args.device]
    device = Device(
        peak if args.peak_tflops is None else args.peak_tflops, memory if args.memory_gib is None else args.memory_gib
    )
    distribution = {"distributed_type": "NO" if args.devices in (None, 1) else "MULTI_GPU", "num_processes": 1}
    if args.accelerate is not None:
        distribution = _read_accelerate(args.accelerate)
    if args.devices is not None:
        distribution["num_processes"] = args.devices

    if isinstance(settings.get("model"), str):
        config = copy.deepcopy(config)
        config.dtype = torch.float32  # in which training loads a checkpoint, whatever it was saved in

    def given(name: str) -> Any:
        kind = DataArguments if name == "block_size" else DynMoeTrainingArguments
        return settings.get(name, next(field.default for field in dataclasses.fields(kind) if field.name == name))

    steps = int(given("max_steps"))
    run = Run(
        sequences=int(given("per_device_train_batch_size")),
        sequence_length=int(given("block_size")),
        accumulation=int(given("gradient_accumulation_steps")),
        steps=steps if steps > 0 else None,
        bf16=bool(given("bf16")),
        checkpointing=bool(given("gradient_checkpointing")),
        **layout_of(**distribution),
    )
    return count_budget(config, run, device, args.utilisation, args.experts_per_token)


def _read_accelerate(path: str) -> dict[str, Any]:
    """What decides the layout, of a configuration of `accelerate launch`."""
    from dynmoe_hf.training.arguments import read_settings

    settings = read_settings(path)
    if "distributed_type" not in settings or "num_processes" not in settings:
        raise ValueError(
            f"{path} is no configuration of `accelerate launch`: it lacks distributed_type, num_processes."
        )
    deepspeed = settings.get("deepspeed_config") or {}
    stage = deepspeed.get("zero_stage")
    if "deepspeed_config_file" in deepspeed:
        stage = read_settings(deepspeed["deepspeed_config_file"]).get("zero_optimization", {}).get("stage")
    return {
        "distributed_type": settings["distributed_type"],
        "num_processes": int(settings["num_processes"]),
        "zero_stage": stage,
        "fsdp": settings.get("fsdp_config") or {},
    }


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


def _print_budget(budget: Budget) -> None:
    from dynmoe_hf.analysis.budget import GIB, USABLE

    console, run, memory = new_console(), budget.run, budget.memory
    console.print(
        f"Training on {run.devices} {'device' if run.devices == 1 else 'devices'} ({run.layout}), "
        f"{run.tokens_per_step:,} tokens a step: {run.sequences} x {run.sequence_length} on each, "
        f"{run.accumulation} times; {'bfloat16' if run.bf16 else 'no mixed precision'}, "
        f"{'with' if run.checkpointing else 'without'} gradient checkpointing."
    )
    table = new_table("memory per device", "GiB", numbers=True)
    for name, size in dataclasses.asdict(memory).items():
        table.add_row(name.replace("_", " "), f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("total", f"{memory.total / GIB:.2f}")
    console.print(table)
    verdict = "It fits" if budget.fits else "It does not fit"
    console.print(f"{verdict} into {USABLE:.0%} of {budget.device.memory_gib:g} GiB.", style="bold")
    table = new_table("experts per token", "FLOPs per token", "tokens per second", "days", numbers=True)
    for point in budget.throughput:
        days = "" if point.seconds is None else f"{point.seconds / 86400:.3g}"
        flops = f"{_with_prefix(point.flops_per_token)}FLOP"
        table.add_row(f"{point.experts_per_token:.4g}", flops, f"{point.tokens_per_second:,.0f}", days)
    console.print(table)
    console.print(
        f"If the model's FLOPs, three forward passes a token, run at {budget.utilisation:.0%} of "
        f"{budget.device.peak_tflops:g} TFLOP/s a device. An assumption, not a measurement."
    )
    if run.checkpointing:
        console.print(f"Recomputation is no part of that: with it, devices run at {budget.utilisation * 4 / 3:.0%}.")


def _with_prefix(value: float) -> str:
    """A number up to its unit, with an SI prefix: `13.95 G`."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.4g} {prefix}"
        value /= 1000
    return f"{value:,.4g} T"
