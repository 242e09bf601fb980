"""Train on the same global batches under every split of the work, and compare losses and gradients.

    python scripts/compare_splits.py --methods top_k top_p rmoe aoe dtop_p

Three optimizer steps over eight sequences each, with padding and masked prompts, are taken by the Trainer of
`dynmoe train`: in one process with 1, 2, 4 and 8 accumulated micro-batches, and in two (gloo, CPU) with DDP and FSDP2.
The table has the loss, and the norms of the gradients of routers, experts and all else, of the first step. Its last
column is the largest relative difference from one process without accumulation in anything compared: the gradients of
every parameter in the first step, the loss of every step, and the thresholds and weights at the end. With `--idle`,
half of the sequences are empty, so that the second process routes no token. Exit code 1 if a difference is larger than
`--tolerance`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, default_data_collator, set_seed

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training.arguments import DynMoeTrainingArguments
from dynmoe_hf.training.callbacks import ControllerCallback
from dynmoe_hf.training.routers import router_modules
from dynmoe_hf.training.runs import RunTrainer

SPLITS: dict[str, tuple[str, int]] = {
    "1 process": ("one", 1),
    "accumulation 2": ("one", 2),
    "accumulation 4": ("one", 4),
    "accumulation 8": ("one", 8),
    "DDP x 2": ("ddp", 1),
    "DDP x 2, accumulation 2": ("ddp", 2),
    "FSDP2 x 2": ("fsdp2", 1),
    "FSDP2 x 2, accumulation 2": ("fsdp2", 2),
}
NUM_STEPS, BATCH_SIZE, LENGTH, VOCAB_SIZE = 3, 8, 16, 97
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["DynMoeDecoderLayer"]}}


def sequences(idle: bool) -> Dataset:
    """Padded sequences of random tokens, the first of each with its prompt masked out of the labels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(NUM_STEPS * BATCH_SIZE):
        length, prompt = (int(torch.randint(low, LENGTH, (), generator=generator)) for low in (2, 0))
        length = 0 if idle and index % BATCH_SIZE >= BATCH_SIZE // 2 else length
        prompt = min(prompt, max(length - 1, 0))
        ids = torch.randint(1, VOCAB_SIZE, (LENGTH,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": ids[:length] + [0] * (LENGTH - length),
                "labels": [-100] * prompt + ids[prompt:length] + [-100] * (LENGTH - length),
                "attention_mask": [1] * length + [0] * (LENGTH - length),
            }
        )
    return Dataset.from_list(rows)


def new_model(method: str, balance_scope: str) -> DynMoeForCausalLM:
    """A small model whose auxiliary losses weigh as much as the cross-entropy."""
    set_seed(0)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 8,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    losses = DynMoeConfig(**sizes, routing=method).routing["losses"]
    routing = {"method": method, "losses": {name: 100 * value for name, value in losses.items()}}
    return AutoModelForCausalLM.from_config(DynMoeConfig(**sizes, routing=routing, balance_scope=balance_scope))


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may hold a part."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: DynMoeForCausalLM, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.gradients = {name: whole(weight.grad) for name, weight in model.named_parameters()}


def train(method: str, kind: str, accumulation: int, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What is compared of the steps of one split."""
    num_processes = 1 if kind == "one" else 2
    model, keep = new_model(method, options.balance_scope), KeepGradients()
    routers = {id(parameter) for module in router_modules(model) for parameter in module.parameters()}
    parts = {name: part_of(name, id(parameter) in routers) for name, parameter in model.named_parameters()}
    args = DynMoeTrainingArguments(
        folder,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH_SIZE // accumulation // num_processes,
        gradient_accumulation_steps=accumulation,
        # Plain descent: where a gradient is nearly 0, the steps of Adam would make much of its last digits.
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **(FSDP2 if kind == "fsdp2" else {}),
    )
    if kind == "fsdp2":
        allow_fsdp_on_cpu()
    data = sequences(options.idle)
    trainer = RunTrainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=[keep])
    ControllerCallback().put_first(trainer)
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    sharded = {isinstance(parameter, DTensor) for parameter in model.parameters()}
    if sharded != {kind == "fsdp2"}:
        raise RuntimeError(f"{kind} has sharded parameters: {sharded}.")
    logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {
        "parts": parts,
        "gradients": keep.gradients,
        "losses": torch.tensor(logs, dtype=torch.float64),
        "thresholds": torch.tensor(list(model.thresholds().values()), dtype=torch.float64),
        "weights": {name: whole(parameter) for name, parameter in model.named_parameters()},
    }


def part_of(name: str, is_router: bool) -> str:
    """The column of the table that a parameter belongs to."""
    return "router" if is_router else "experts" if ".experts." in name else "rest"


def norms(results: dict[str, Any]) -> dict[str, float]:
    """Norm of the gradients of each part."""
    squares = dict.fromkeys(("router", "experts", "rest"), 0.0)
    for name, gradient in results["gradients"].items():
        squares[results["parts"][name]] += gradient.double().square().sum().item()
    return {part: square**0.5 for part, square in squares.items()}


def difference(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected, or of 1e-3 if that is larger."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-3)).item()


def largest_difference(actual: dict[str, Any], expected: dict[str, Any]) -> float:
    """Over the gradients and weights of every parameter, the losses and the thresholds."""
    pairs = [(actual[key], expected[key]) for key in ("losses", "thresholds")]
    for key in ("gradients", "weights"):
        assert actual[key].keys() == expected[key].keys()
        pairs += [(actual[key][name], value) for name, value in expected[key].items()]
    return max(difference(*pair) for pair in pairs)


def allow_fsdp_on_cpu() -> None:
    """Accelerate shards on accelerators only; on a CPU it takes DDP instead, and does not say so."""
    PartialState().distributed_type = DistributedType.MULTI_GPU


def run_kind(kind: str, options: argparse.Namespace, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(method, split) -> results, for the splits of one kind, by torchrun where that is more than one process."""
    if kind == "one":
        return dict(_run_here(kind, options, str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [__file__, *sys.argv[1:], "--worker", kind, str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{kind} failed:\n{done.stdout}")
    return torch.load(folder / f"{kind}.pt")


def _run_here(kind: str, options: argparse.Namespace, folder: str) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for method in options.methods:
        for split in options.splits:
            if SPLITS[split][0] == kind:
                yield (method, split), train(method, *SPLITS[split], options, folder)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--balance_scope", choices=("sequence", "micro", "global"), default="sequence")
    parser.add_argument("--idle", action="store_true", help="the second process routes no token")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        kind, folder = options.worker
        results = dict(_run_here(kind, options, folder))
        if distributed.get_rank() == 0:
            torch.save(results, Path(folder) / f"{kind}.pt")
        distributed.destroy_process_group()
        return 0
    options.splits = list(dict.fromkeys(["1 process", *options.splits]))
    with tempfile.TemporaryDirectory() as folder:
        kinds = dict.fromkeys(SPLITS[split][0] for split in options.splits)
        results = {key: value for kind in kinds for key, value in run_kind(kind, options, Path(folder)).items()}
    rows = []
    for (method, split), result in sorted(results.items(), key=lambda item: options.methods.index(item[0][0])):
        rows.append(
            {
                "method": method,
                "split": split,
                "loss": result["losses"][0].item(),
                **norms(result),
                "largest difference": largest_difference(result, results[method, "1 process"]),
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)
    return int(any(not row["largest difference"] <= options.tolerance for row in rows))


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table."""
    print("| method | split | loss | router | experts | rest | largest difference |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        values = " | ".join(f"{row[name]:.5f}" for name in ("loss", "router", "experts", "rest"))
        print(f"| `{row['method']}` | {row['split']} | {values} | {row['largest difference']:.1e} |")


if __name__ == "__main__":
    sys.exit(main())
