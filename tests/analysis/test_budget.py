"""Counted memory and speed of training against a real step on a CPU, and against formulas worked by hand."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.analysis.budget import DEVICES, GIB, Device, Run, count_budget, count_memory, layout_of
from dynmoe_hf.analysis.cost import count_cost
from dynmoe_hf.model import dispatch
from dynmoe_hf.model.compat import ExpertsInterface
from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_config

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "max_position_embeddings": 256,
}
RUN = {"sequences": 4, "sequence_length": 256, "bf16": True}


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still there."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        key = storage._cdata
        if key not in self.sizes and storage.nbytes():
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


@pytest.fixture
def grouped(monkeypatch):
    """The experts take the way of an accelerator, which the estimate is of."""

    def engine(experts, hidden_states, expert_ids, weights, **_):
        return dispatch.grouped_experts(experts, hidden_states, expert_ids, weights)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "ragged", engine)
    monkeypatch.setitem(dispatch.ENGINES, "ragged", engine)
    monkeypatch.setattr(dispatch, "_gains_products", lambda *_: False)


class Step:
    """A model with gradients and the state of its optimizer, and the forward and backward pass of a micro-batch."""

    def __init__(self, config, run):
        torch.manual_seed(0)
        self.model = DynMoeForCausalLM(config).train()
        self.run = run
        if run.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.ids = torch.randint(config.vocab_size, (run.sequences, run.sequence_length))
        # Documents end within a sequence, as in packed text.
        self.position_ids = (torch.arange(run.sequence_length) % 50).expand_as(self.ids)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.forward().backward()
        self.optimizer.step()

    def forward(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.run.bf16):
            ids = self.ids
            return self.model(ids, labels=ids, position_ids=self.position_ids, use_cache=False).loss

    def saved_bytes(self):
        """Of the tensors that autograd keeps; parameters and buffers apart."""
        own = {tensor.untyped_storage()._cdata for tensor in (*self.model.parameters(), *self.model.buffers())}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        assert loss.requires_grad
        return sum(storage.nbytes() for storage in kept.values())

    def peak_bytes(self):
        gc.collect()
        with LiveBytes() as live:
            self.forward().backward()
        return live.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_gradients_and_optimizer_are_exact(method, dtype):
    config = tiny_config(method, dtype=dtype)
    model = DynMoeForCausalLM(config).to(getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(config.vocab_size, (2, 8))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    memory = count_memory(config, Run())
    assert memory.weights == sum(tensor.nbytes for tensor in set(model.state_dict(keep_vars=True).values()))
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    states = [
        state for states in optimizer.state.values() for state in states.values() if state.ndim or state.numel() > 1
    ]
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    assert memory.optimizer == sum(state.nbytes for state in states) + 2 * sum(scalar.nbytes for scalar in scalars)


@pytest.mark.parametrize("method", ["top_k", "top_p", "rmoe", "aoe", "cartesian", "da_moe", "dtop_p"])
def test_activations_are_what_autograd_keeps(method, grouped):
    config = DynMoeConfig(**SIZES, routing=method)
    run = Run(**RUN)
    memory = count_memory(config, run)
    log_probabilities = 4 * run.tokens_per_micro_batch * config.vocab_size
    counted = memory.activations + memory.weight_copies + log_probabilities
    assert counted == pytest.approx(Step(config, run).saved_bytes(), rel=0.05)


@pytest.mark.parametrize(
    "changes", [{"qk_norm": "full"}, {"num_key_value_heads": 2}, {"mlp_layer_types": ["dense"] * 3}]
)
def test_activations_of_other_bodies(changes, grouped):
    config = DynMoeConfig(**SIZES, **changes, routing="top_k")
    run = Run(**RUN)
    memory = count_memory(config, run)
    log_probabilities = 4 * run.tokens_per_micro_batch * config.vocab_size
    counted = memory.activations + memory.weight_copies + log_probabilities
    assert counted == pytest.approx(Step(config, run).saved_bytes(), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["top_k", "top_p", "rmoe", "aoe", "cartesian"])
def test_the_fullest_moment_of_a_step(method, checkpointing, grouped):
    """Beside weights, gradients and optimizer. So many tokens that no gradient of a matrix, not counted, matters."""
    config = DynMoeConfig(**SIZES, routing=method)
    run = Run(**(RUN | {"sequences": 16}), checkpointing=checkpointing)
    memory = count_memory(config, run)
    counted = memory.activations + memory.weight_copies + memory.transient
    assert counted == pytest.approx(Step(config, run).peak_bytes(), rel=0.12)


def test_without_bfloat16_autograd_keeps_what_is_counted(grouped):
    config = DynMoeConfig(**SIZES, routing="top_k")
    run = Run(**(RUN | {"bf16": False}))
    memory = count_memory(config, run)
    counted = memory.activations + 4 * run.tokens_per_micro_batch * config.vocab_size
    assert memory.weight_copies == 0
    assert counted == pytest.approx(Step(config, run).saved_bytes(), rel=0.05)


def test_the_engine_of_a_cpu_keeps_less():
    config = DynMoeConfig(**SIZES, routing="top_p")
    run = Run(**RUN)
    memory = count_memory(config, run)
    assert Step(config, run).saved_bytes() < 0.6 * (memory.activations + memory.weight_copies)


def test_a_cap_on_the_experts_bounds_the_slots():
    free, capped = (
        count_memory(DynMoeConfig(**SIZES, routing={"method": "top_p", "selector": options}), Run(**RUN))
        for options in ({}, {"max_experts": 2})
    )
    # bfloat16 rows in and out, and four times the width; what sorts the slots.
    slot = 2 * (2 * 64 + 4 * 128) + 21
    assert free.activations - capped.activations == 3 * 4 * 256 * 6 * slot


def test_layouts():
    config = DynMoeConfig(**SIZES, routing="top_k")
    single = count_memory(config, Run(**RUN))
    replicated = count_memory(config, Run(**RUN, layout="replicated", devices=8))
    sharded = count_memory(config, Run(**RUN, layout="sharded", devices=8))
    parameters = count_cost(config).total_parameters
    assert single.weights + single.gradients + single.optimizer == 16 * parameters
    assert replicated.total - single.total == 4 * parameters
    assert sharded.weights + sharded.gradients + sharded.optimizer == 2 * parameters
    assert sharded.activations == single.activations and sharded.transient == single.transient
    layer = (parameters - 2 * 512 * 64 - 64) // 3
    assert sharded.weight_copies == 2 * (3 * layer + 2 * 512 * 64)


def test_speed_is_flops():
    """PaLM's formula: 6 N + 12 L H Q S for each token, with N the active parameters but the embedding."""
    config = DynMoeConfig(**SIZES, routing="top_k")
    run = Run(**RUN, accumulation=3, steps=1000, checkpointing=True, layout="replicated", devices=4)
    budget = count_budget(config, run, Device(peak_tflops=100, memory_gib=40), utilisation=0.5)
    (point,) = budget.throughput
    norms = 64 * (2 * 3 + 1)
    active = count_cost(config).activity[0].parameters - 512 * 64 - norms
    assert point.flops_per_token == 6 * active + 12 * 3 * 64 * 256
    assert point.tokens_per_second == pytest.approx(0.5 * 100e12 * 4 / point.flops_per_token)
    assert run.tokens_per_step == 4 * 256 * 3 * 4
    assert point.seconds == pytest.approx(1000 * run.tokens_per_step / point.tokens_per_second)
    free = count_budget(config, Run(**RUN), DEVICES["h100"], experts_per_token=4)
    assert free.throughput[0].seconds is None and free.throughput[0].experts_per_token == 4


def test_a_tenth_of_a_device_stays_free():
    config = DynMoeConfig(**SIZES, routing="top_k")
    needed = count_memory(config, Run(**RUN)).total / GIB
    assert count_budget(config, Run(**RUN), Device(100, needed / 0.89)).fits
    assert not count_budget(config, Run(**RUN), Device(100, needed / 0.91)).fits


FSDP2 = {"fsdp_version": 2, "fsdp_reshard_after_forward": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (("FSDP", 1), ("single", 1)),
        (("NO", 1), ("single", 1)),
        (("MULTI_GPU", 8), ("replicated", 8)),
        (("FSDP", 8, None, FSDP2), ("sharded", 8)),
        (("DEEPSPEED", 4, 3), ("sharded", 4)),
    ],
)
def test_layout_of(fields, expected):
    found = layout_of(*fields)
    assert (found["layout"], found["devices"]) == expected


@pytest.mark.parametrize(
    "fields",
    [
        ("FSDP", 8),
        ("FSDP", 8, None, FSDP2 | {"fsdp_version": 1}),
        ("FSDP", 8, None, FSDP2 | {"fsdp_reshard_after_forward": False}),
        ("FSDP", 8, None, FSDP2 | {"fsdp_offload_params": True}),
        ("DEEPSPEED", 8, 2),
        ("MEGATRON_LM", 8),
    ],
)
def test_layouts_that_are_not_counted(fields):
    with pytest.raises(ValueError, match=fields[0]):
        layout_of(*fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": 0}, "sequences"),
        ({"layout": "sharded"}, "1 devices"),
        ({"devices": 8}, "'single'"),
        ({"layout": "split"}, "layout must"),
    ],
)
def test_impossible_runs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Run(**changes)


@pytest.mark.parametrize(
    ("device", "utilisation", "message"),
    [(Device(1, 80), 0, "utilisation"), (Device(0, 80), 0.4, "peak_tflops"), (Device(1, 0), 0.4, "memory_gib")],
)
def test_impossible_devices_are_refused(device, utilisation, message):
    with pytest.raises(ValueError, match=message):
        count_budget(tiny_config(), Run(), device, utilisation)
