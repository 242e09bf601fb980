"""What a training run takes of a device: memory, and tokens per second at a stated utilisation. Nothing is built.

Shapes in the formulas as in model/routing.py: `T` tokens of a micro-batch, `S` sequence, `K` slots, `E` experts, `D`
hidden size, `W` width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .cost import Cost, build_on_meta, count_cost, num_parameters

if TYPE_CHECKING:
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.model.blocks import DynMoeBlock
    from dynmoe_hf.model.modeling_dynmoe import DynMoeDecoderLayer, DynMoeForCausalLM

GIB = 2**30
USABLE = 0.9  # of a device; the rest is for its context, the buffers of communication, workspaces and fragments


class Device(NamedTuple):
    """An accelerator.

    Args:
        peak_tflops: 10^12 dense operations per second in bfloat16, without sparsity.
        memory_gib: its memory.
    """

    peak_tflops: float
    memory_gib: float


# NVIDIA's data sheets "A100 80GB", "L40S", "H100" and "H200" (SXM; halved where they count sparsity), AMD's "MI300X".
DEVICES = {
    "a100": Device(312, 80),
    "l40s": Device(362, 48),
    "h100": Device(989, 80),
    "h200": Device(989, 141),
    "mi300x": Device(1307, 192),
}

LAYOUTS = ("single", "replicated", "sharded")


@dataclass(frozen=True)
class Run:
    """The arguments of a training run that decide what it costs; defaults are those of `dynmoe train`.

    Args:
        sequences: of a micro-batch on one device.
        sequence_length: tokens of each.
        accumulation: micro-batches of an optimizer step.
        steps: optimizer steps; None if the data decides.
        bf16: products in bfloat16 under autocast; the weights keep their dtype.
        checkpointing: a layer's activations are computed again in the backward pass.
        layout: `single` device; `replicated` (DDP), everything on each; `sharded` (FSDP2 with resharding after the
            forward pass, ZeRO-3), a part of weights, gradients and optimizer on each.
        devices: number of them.
    """

    sequences: int = 8
    sequence_length: int = 512
    accumulation: int = 1
    steps: int | None = None
    bf16: bool = False
    checkpointing: bool = False
    layout: str = "single"
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("sequences", "sequence_length", "accumulation", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}.")
        if (self.layout == "single") != (self.devices == 1):
            raise ValueError(f"the layout {self.layout!r} does not go with {self.devices} devices.")

    @property
    def tokens_per_micro_batch(self) -> int:
        """On one device."""
        return self.sequences * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Of one optimizer step, on all devices."""
        return self.tokens_per_micro_batch * self.accumulation * self.devices


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step.

    Args:
        weights: with the buffers that are saved.
        gradients: and, under DDP, its buckets, which are as large again.
        optimizer: the two moments of AdamW.
        weight_copies: in the dtype of the products: autocast's, or those that are gathered from other devices.
        activations: kept for the backward pass.
        transient: the logits with their loss, or what the backward pass of a layer needs, whichever is larger.
    """

    weights: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    transient: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def count_memory(config: DynMoeConfig, run: Run) -> Memory:
    """Estimate what a training step holds on each device.

    Counting rules:

    * weights, gradients and both moments of AdamW have the dtype of the weights, float32 in `dynmoe train`: 16 bytes
      a parameter, exactly what a step holds. Sharded, each device has its part. DDP copies gradients into buckets;
    * copies of weights: under autocast those of all matrices but the router's; with checkpointing those outside of the
      experts, and the experts of one layer. Sharded: two layers as they are gathered, the gradient of one before it is
      divided, and what is gathered outside of the layers;
    * activations: what autograd keeps of a micro-batch, see `_layer_bytes`; with checkpointing the input of every
      layer. An expert's rows are counted for every slot, used or not, as grouped products on an accelerator lay them
      out: a cap on the experts of a token (`max_experts`) bounds them;
    * transient: logits, those in float32 and their logarithm, or its gradient, are 10 bytes a token and vocabulary
      entry under autocast and 12 without; the backward pass of a layer has the gradients of its rows, 14 D bytes a
      slot, and with checkpointing all that autograd keeps of this layer.

    Gradients count as held during the forward pass, as they are from the second accumulated micro-batch on. Not
    counted: what compilation saves, and the gradient of a matrix before it is added to the others.
    """
    model = build_on_meta(config)
    weights = sum(tensor.nbytes for tensor in set(model.state_dict(keep_vars=True).values()))
    trained = sum(parameter.nbytes for parameter in model.parameters())
    per_device = run.devices if run.layout == "sharded" else 1
    gradients = trained * (2 if run.layout == "replicated" else 1)
    return Memory(
        weights=weights // per_device,
        gradients=gradients // per_device,
        optimizer=2 * trained // per_device,
        weight_copies=_weight_copies(model, run),
        activations=_activations(model, run),
        transient=_transient(model, run),
    )


def _weight_copies(model: DynMoeForCausalLM, run: Run) -> int:
    layers = [num_parameters(layer) for layer in model.model.layers]
    experts = [num_parameters(*(block.experts for block in _blocks(layer))) for layer in model.model.layers]
    outside = model.lm_head.weight.numel()
    if run.layout == "sharded":
        return _product_bytes(run) * (3 * max(layers) + 2 * outside)
    if not run.bf16:
        return 0
    copied = sum(experts) if not run.checkpointing else max(experts)
    return 2 * (sum(layers) - sum(experts) + outside + copied)


def _activations(model: DynMoeForCausalLM, run: Run) -> int:
    """Bytes of a micro-batch, the norm and the input of the head after the layers among them."""
    hidden_size, stream = model.config.hidden_size, model.dtype.itemsize
    end = hidden_size * (2 * 4 + (_product_bytes(run) if run.bf16 else stream))
    if not run.checkpointing:
        layers = sum(_layer_bytes(layer, run, stream) for layer in model.model.layers)
        return run.tokens_per_micro_batch * (layers + end)
    kept = sum(hidden_size * stream + _routing_bytes(layer) for layer in model.model.layers)
    return run.tokens_per_micro_batch * (kept + end)


def _transient(model: DynMoeForCausalLM, run: Run) -> int:
    logits = model.config.vocab_size * (10 if run.bf16 else 12)
    layers = []
    for layer in model.model.layers:
        slots = max((block.selector.num_slots for block in _blocks(layer)), default=0)
        kept = _layer_bytes(layer, run, model.dtype.itemsize) if run.checkpointing else 0
        layers.append(kept + slots * 14 * model.config.hidden_size)
    return run.tokens_per_micro_batch * max(logits, *layers)


def _layer_bytes(layer: DynMoeDecoderLayer, run: Run, stream: int) -> int:
    """Bytes a token that autograd keeps of a layer.

    Under autocast every linear layer keeps its own copy of its input in bfloat16; without it, those that share an input
    share what is kept. A norm keeps its input and the normalised one, in float32.
    """
    attention, config = layer.self_attn, layer.self_attn.config
    product, hidden_size = _product_bytes(run), config.hidden_size
    heads = config.num_attention_heads * attention.head_dim
    keys = config.num_key_value_heads * attention.head_dim
    norms = 2 * hidden_size * (4 + max(4, stream))
    inputs = 3 * hidden_size * product if run.bf16 else hidden_size * stream
    # Keys and values are repeated for the kernel where a mask tells documents apart.
    kernel = 4 * heads * product + 4 * config.num_attention_heads + run.sequence_length * product
    if attention.qk_norm != "none":
        kernel += (heads + keys) * (4 + product)
    if not layer.is_sparse:
        return norms + inputs + kernel + _mlp_bytes(layer.mlp, run, stream)
    ffn = sum(_block_bytes(block, run, stream) for block in _blocks(layer))
    inner_norm = hidden_size * (4 + max(4, stream)) if layer.is_cartesian else 0
    return norms + inputs + kernel + inner_norm + ffn


def _block_bytes(block: DynMoeBlock, run: Run, stream: int) -> int:
    product, hidden_size = _product_bytes(run), block.config.hidden_size
    width = block.experts.down_proj.shape[-1]
    # A slot has its rows, both halves of the gate, the activation, its product, and the rows that come out.
    slot = product * (2 * hidden_size + 4 * width) + 21
    if block.gate.reads_norms:
        slot += product * (hidden_size + 2 * block.experts.gate_down_proj.shape[-2])
    total = block.selector.num_slots * slot + stream * hidden_size + _router_bytes(block)
    if block.shared_experts is not None:
        total += _mlp_bytes(block.shared_experts, run, stream)
    return total


def _mlp_bytes(mlp: nn.Module, run: Run, stream: int) -> int:
    width, hidden_size = mlp.down_proj.weight.shape[1], mlp.down_proj.weight.shape[0]
    inputs = 2 * hidden_size * _product_bytes(run) if run.bf16 else hidden_size * stream
    return inputs + 4 * width * _product_bytes(run)


def _router_bytes(block: DynMoeBlock) -> int:
    """Scores, probabilities, and where a selector sorts them, the order, sums and masks; the state of a recurrence."""
    experts = block.experts.num_experts
    total = 8 * experts if block.selector.fills_every_slot else 52 * experts
    size = getattr(block.gate.options, "size", 0)
    return total + 36 * size


def _routing_bytes(layer: DynMoeDecoderLayer) -> int:
    """What a layer hands to the losses and to the next router, which outlives it."""
    blocks = _blocks(layer)
    sizes = (8 * block.experts.num_experts + 12 * block.selector.num_slots for block in blocks)
    return sum(sizes) + sum(4 * getattr(block.gate.options, "size", 0) for block in blocks)


def _blocks(layer: DynMoeDecoderLayer) -> list[DynMoeBlock]:
    if not layer.is_sparse:
        return []
    return list(layer.mlp.sub_layers) if layer.is_cartesian else [layer.mlp]


def _product_bytes(run: Run) -> int:
    return 2 if run.bf16 else 4


@dataclass(frozen=True)
class Throughput:
    """Speed at a number of experts per token.

    Args:
        experts_per_token: mean over the routers.
        flops_per_token: of forward and backward pass, without recomputation.
        tokens_per_second: of all devices.
        seconds: for the whole run; None if the data decides how long it is.
    """

    experts_per_token: float
    flops_per_token: int
    tokens_per_second: float
    seconds: float | None


def count_throughput(cost: Cost, run: Run, peak_tflops: float, utilisation: float) -> tuple[Throughput, ...]:
    """Tokens per second at a utilisation of the devices' peak; one entry for each point of `cost.activity`.

    A training step has three times the FLOPs of the forward pass. The utilisation is that of these model FLOPs (MFU,
    PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B): with checkpointing the device does four thirds of them.

    Args:
        cost: counted at the run's `sequence_length`.
        peak_tflops: of one device.
        utilisation: 0 ... 1.

    Raises:
        ValueError: for a peak or a utilisation out of range.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {utilisation}.")
    if not 0 < peak_tflops < float("inf"):
        raise ValueError(f"peak_tflops must be above 0, got {peak_tflops}.")
    points = []
    for activity in cost.activity:
        flops = 3 * activity.flops
        speed = utilisation * peak_tflops * 1e12 * run.devices / flops
        seconds = None if run.steps is None else run.steps * run.tokens_per_step / speed
        points.append(Throughput(activity.experts_per_token, flops, speed, seconds))
    return tuple(points)


@dataclass(frozen=True)
class Budget:
    """Memory and speed of a run on a device."""

    run: Run
    device: Device
    utilisation: float
    memory: Memory
    throughput: tuple[Throughput, ...]

    @property
    def fits(self) -> bool:
        """Whether the device has room for it, and a tenth to spare."""
        return self.memory.total <= USABLE * self.device.memory_gib * GIB

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": asdict(self.run) | {"tokens_per_step": self.run.tokens_per_step},
            "device": self.device._asdict(),
            "utilisation": self.utilisation,
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "fits": self.fits,
            "throughput": [asdict(point) for point in self.throughput],
        }


def count_budget(
    config: DynMoeConfig, run: Run, device: Device, utilisation: float = 0.4, experts_per_token: float | None = None
) -> Budget:
    """`count_memory` and `count_throughput` together.

    Raises:
        ValueError: for a utilisation, a peak, a memory or experts per token out of range.
    """
    if not 0 < device.memory_gib < float("inf"):
        raise ValueError(f"memory_gib must be above 0, got {device.memory_gib}.")
    cost = count_cost(config, experts_per_token, run.sequence_length)
    throughput = count_throughput(cost, run, device.peak_tflops, utilisation)
    return Budget(run, device, utilisation, count_memory(config, run), throughput)


def layout_of(
    distributed_type: str,
    num_processes: int,
    zero_stage: int | None = None,
    fsdp: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """`layout` and `devices` of a Run for the fields of a configuration of accelerate.

    Raises:
        ValueError: for one that is not counted: offloading, ZeRO below stage 3, FSDP that is not version 2 or does not
            reshard after the forward pass.
    """
    if num_processes == 1:
        return {"layout": "single", "devices": 1}
    if distributed_type in ("MULTI_GPU", "MULTI_CPU"):
        return {"layout": "replicated", "devices": num_processes}
    is_fsdp2 = fsdp.get("fsdp_version") == 2 and fsdp.get("fsdp_reshard_after_forward") is True
    offloads = fsdp.get("fsdp_offload_params", False)
    if (distributed_type == "FSDP" and is_fsdp2 and not offloads) or (
        distributed_type == "DEEPSPEED" and zero_stage == 3
    ):
        return {"layout": "sharded", "devices": num_processes}
    raise ValueError(
        f"memory is not counted for this distributed_type ({distributed_type}): only for one device, DDP, FSDP version "
        "2 that reshards after the forward pass and does not offload, and ZeRO stage 3."
    )
