"""What a task cost, by hand."""

import torch

from dynmoe_hf.analysis.cost import count_cost
from dynmoe_hf.evaluation.task_compute import TaskCounts, task_compute
from tests.tiny import tiny_model


def test_compute_is_the_cost_at_the_experts_of_each_router():
    experts = {"type": "low_rank", "rank": 5}
    model = tiny_model("top_p", layer_routing={0: {"experts": experts}})
    counts = TaskCounts()
    counts.add(torch.tensor([[1, 4], [3, 8], [2, 8]]), num_prompt=2)
    counts.add(torch.tensor([[2, 8], [2, 7]]), num_prompt=2)
    found = task_compute(model.config, counts)
    assert found["sequence_length"] == 3 and found["requests"] == 2
    assert found["experts_per_token"]["continuation"]["by_layer"] == [{"mean": 2, "std": 0}, {"mean": 8, "std": 0}]
    sizes = [sum(p.numel() for p in block.experts.parameters()) / 8 for block in model.moe_blocks()]
    assert sizes[0] != sizes[1]
    none = count_cost(model.config, 0, 3).activity[0]
    used = 2 * sizes[0] + 7 * sizes[1]
    assert found["active_parameters"] == none.parameters + round(used)
    assert found["flops_per_token"] == none.flops + 2 * round(used)
