"""Memory of one AoE block in training, ours against plain autograd.

    python benchmarks/aoe_memory.py

Every expert of a block runs its first projection on every token: C (T, E, r). Ours computes again what the backward
pass needs of it; plain autograd, written here, keeps it. Everything else is the same in both, side by side in one run.

* kept: bytes of the storages that the forward pass saves for the backward pass, each once, parameters left out.
* peak: the most bytes allocated at one time during a forward and a backward pass, on top of parameters and input; the
  gradients of the parameters are among them.
* time: processor time of both passes on one thread, the shortest of some runs.

`paper` is a block of the paper's small model. `64 experts / 4` is one of a later paper's, every width divided by
4 (D=1536, r=512 and W=768 there, with 8 experts a token).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import dynmoe_hf
from dynmoe_hf import DynMoeConfig
from dynmoe_hf.cli.tables import new_console, new_table
from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.model.low_rank_experts import LowRankExperts
from dynmoe_hf.model.methods import RoutingSpec, part_options
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock
from dynmoe_hf.model.routing import RoutingContext

ENGINE = "ragged"
RUNS = 2
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One block: T tokens, E experts of which a token uses K, hidden size D, rank r, expert width W."""

    name: str
    num_tokens: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    rank: int
    width: int


CASES = (
    Case("aoe_tiny.yaml", 2048, 8, 2, 128, 40, 152),
    Case("paper, r=256", 512, 8, 2, 768, 256, 3840),
    Case("paper, r=512", 512, 8, 2, 768, 512, 3264),
    Case("64 experts / 4", 1024, 64, 8, 384, 128, 192),
    Case("64 experts / 4", 1024, 64, 2, 384, 128, 192),
)


class PlainLowRankExperts(LowRankExperts):
    """The same experts with the projection of all experts left to autograd."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.gate_down_proj
        activations = F.linear(hidden_states, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        return torch.linalg.vector_norm(activations, dim=-1), activations

    def select(self, hidden_states: Tensor, activations: Tensor, token: Tensor, expert: Tensor) -> Tensor:
        return activations[token, expert]


def build_block(case: Case, experts_class: type[LowRankExperts]) -> DynMoeBlock:
    """The block of a case, with the same weights for every class."""
    config = DynMoeConfig(
        hidden_size=case.hidden_size,
        num_attention_heads=1,
        num_experts=case.num_experts,
        num_experts_per_tok=case.experts_per_token,
        routing={"method": "aoe", "experts": {"rank": case.rank, "intermediate_size": case.width}},
        experts_implementation=ENGINE,
    )

    def build_experts(spec: RoutingSpec, config: DynMoeConfig) -> LowRankExperts:
        return experts_class(part_options("experts", spec["experts"]), config)

    block = DynMoeBlock(config, 0, build_experts)
    torch.manual_seed(0)
    block.experts.init_weights(config.initializer_range)
    return block


def training_step(block: DynMoeBlock, case: Case) -> tuple[Callable[[], Tensor], Step]:
    """The forward pass with its balance loss, which gives every norm a gradient, and forward and backward together."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = F.rms_norm(
        torch.randn(1, case.num_tokens, case.hidden_size, generator=generator), (case.hidden_size,)
    )
    hidden_states.requires_grad_()
    weights = TokenWeights.build(None, None, (1, case.num_tokens), hidden_states.device)

    def forward() -> Tensor:
        output, routing = block(hidden_states, RoutingContext(0))
        return output.square().mean() + 0.01 * load_balance([routing], weights).sum()

    def step() -> None:
        block.zero_grad(set_to_none=True)
        hidden_states.grad = None
        forward().backward()

    return forward, step


def kept_bytes(block: DynMoeBlock, forward: Callable[[], Tensor]) -> int:
    """Bytes that the forward pass saves, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        del loss
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def peak_bytes(step: Step) -> int:
    """The highest sum of what the allocator has handed out and not got back since the step began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(case: Case) -> dict[str, dict[str, float]]:
    """kept and peak in bytes and time in seconds, `ours`, `plain`, and the `ratio` of ours to plain."""
    results: dict[str, dict[str, float]] = {}
    steps: dict[str, Step] = {}
    for name, experts_class in (("ours", LowRankExperts), ("plain", PlainLowRankExperts)):
        block = build_block(case, experts_class)
        forward, steps[name] = training_step(block, case)
        steps[name]()
        block.zero_grad(set_to_none=True)  # freed inside a step, the gradients of the one before would lower its sum
        results[name] = {"kept": kept_bytes(block, forward), "peak": peak_bytes(steps[name])}
    for _ in range(RUNS):
        for name, step in steps.items():
            results[name]["time"] = min(seconds(step), results[name].get("time", float("inf")))
    results["ratio"] = {key: results["ours"][key] / results["plain"][key] for key in results["ours"]}
    return results


def table(results: list[tuple[Case, dict[str, dict[str, float]]]]) -> Table:
    """The ratios of ours to plain, and the kept MiB of both."""
    view = new_table("case", "T, E, K, D, r, W", "kept MiB", "kept", "peak", "time", numbers=True)
    for case, result in results:
        name, *sizes = asdict(case).values()
        kept = " / ".join(f"{result[side]['kept'] / 2**20:.0f}" for side in ("ours", "plain"))
        view.add_row(name, ", ".join(map(str, sizes)), kept, *(f"{ratio:.2f}" for ratio in result["ratio"].values()))
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "aoe_memory.json")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    results = [(case, measure(case)) for case in CASES]
    new_console().print(table(results))
    report = {
        "command": "python benchmarks/aoe_memory.py",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dynmoe_hf": dynmoe_hf.__version__,
        },
        "device": "cpu",
        "num_threads": torch.get_num_threads(),
        "dtype": "float32",
        "engine": ENGINE,
        "cases": [{**asdict(case), **result} for case, result in results],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
