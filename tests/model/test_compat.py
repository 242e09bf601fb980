"""Tells when one of the less stable names of transformers changes what we rely on."""

import ast
import inspect
from pathlib import Path

import torch
from torch import nn

from dynmoe_hf.model import compat, dispatch

FLOOR = Path(compat.__file__).parent


def test_all_less_stable_names_are_imported_in_one_place() -> None:
    stable = {"transformers", "transformers.activations"}
    for path in FLOOR.glob("*.py"):
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("transformers"):
                assert node.module in stable, f"{path.name} imports {node.module}"


PRIVATE = ["_grouped_linear"]  # there is no public grouped product that can be compiled in every dtype


def test_no_private_name_is_used() -> None:
    tree = ast.parse((FLOOR / "compat.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert [name for name in names if name.startswith("_")] == PRIVATE
    for path in FLOOR.glob("*.py"):
        assert "_is_expert_parallel" not in path.read_text()


def test_an_engine_is_called_with_the_module_and_three_tensors() -> None:
    seen = []

    def engine(module: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(type(module).__name__)
        return hidden

    class Config:
        _experts_implementation = "dynmoe_probe"

    class Experts(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()

        def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the class's own forward was called")

    interface = compat.ExpertsInterface()
    interface["dynmoe_probe"] = engine
    experts = compat.use_experts_implementation(Experts, experts_interface=interface)(Config())
    experts(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 1))
    assert seen == ["Experts"]


def test_the_engines_of_this_layout_are_still_there() -> None:
    registered = set(compat.ExpertsInterface().valid_keys())
    assert {"grouped_mm", "batched_mm", *dispatch.ENGINES} - {"eager"} <= registered


def test_masks_are_made_from_these_arguments() -> None:
    expected = {"config", "inputs_embeds", "attention_mask", "past_key_values", "position_ids"}
    for function in (compat.create_causal_mask, compat.create_sliding_window_causal_mask):
        parameters = inspect.signature(function).parameters
        assert expected <= set(parameters)
        required = {name for name, value in parameters.items() if value.default is value.empty}
        assert required <= expected


def test_a_checkpointed_layer_still_receives_its_arguments_by_position() -> None:
    class Layer(compat.GradientCheckpointingLayer):
        def forward(self, hidden: torch.Tensor, state: torch.Tensor | None = None, scale: float = 1.0) -> tuple:
            return hidden * scale, state

    layer = Layer()
    layer.gradient_checkpointing = True
    calls = []
    layer._gradient_checkpointing_func = lambda function, *args: calls.append(args) or function(*args)
    hidden, state = layer.train()(torch.ones(2), torch.zeros(1), scale=3.0)
    assert len(calls) == 1 and len(calls[0]) == 2 and torch.equal(hidden, torch.full((2,), 3.0))
