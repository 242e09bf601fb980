# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""What a built model can change about its routing, and the controllers that move it during training."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import DynMoeBlock, build_selector
from .configuration_dynmoe import DynMoeConfig
from .controllers import BudgetController
from .expert_selectors import Selector
from .methods import RoutingSpec, bank_spec, initial_threshold, num_choices, part_options
from .routing import Routing


class RoutingChanges:
    """Mixin of the models."""

    config: DynMoeConfig

    def moe_blocks(self) -> list[DynMoeBlock]:
        """The MoE blocks, one a router, in the order in which they run; a cartesian layer has two."""
        sparse = [layer for layer in self.base_model.layers if layer.is_sparse]
        return [block for layer in sparse for block in (layer.mlp.sub_layers if layer.is_cartesian else [layer.mlp])]

    def set_routing(self, method: str | None = None, *, layers: Sequence[int] | None = None, **parts: Any) -> None:
        """Change how tokens are routed from now on, in the model and in its config.

        Args:
            method: a method name whose scorer and experts are the model's own.
            layers: change these decoder layers only.
            parts: `selector={"p": 0.2}`, `losses={"router_z": 1e-3}`, ...; single keys, as in the config.

        Raises:
            ValueError: for a change that the config refuses, or that needs other parameters than the model has. Nothing
                is changed then.
        """
        changes = parts if method is None else {"method": method, **parts}
        config = copy.deepcopy(self.config)
        config.change_routing(changes, layers)
        changed = [(block, *_successor(block, self.config, config)) for block in self.moe_blocks()]
        controller = build_controller(config)
        if controller is not None:
            controller.to(self.device)
            if self.base_model.controller is not None:
                _keep_state(controller, self.base_model.controller)
        self.config.change_routing(changes, layers)
        self.base_model.controller = controller
        for block, spec, selector in changed:
            block.spec, block.selector = spec, selector

    @contextlib.contextmanager
    def routing_override(
        self, method: str | None = None, *, layers: Sequence[int] | None = None, **parts: Any
    ) -> Iterator[None]:
        """`set_routing` inside a `with` block; the routing before it comes back at its end."""
        config, controller = self.config, self.base_model.controller
        before = (config.routing, config.layer_routing, config.num_experts_per_tok)
        blocks = [(block, block.spec, block.selector) for block in self.moe_blocks()]
        self.set_routing(method, layers=layers, **parts)
        try:
            yield
        finally:
            config.routing, config.layer_routing, config.num_experts_per_tok = before
            self.base_model.controller = controller
            for block, spec, selector in blocks:
                block.spec, block.selector = spec, selector.train(block.training)

    def update_controllers(self) -> None:
        """Move what the controller of the model controls; call it once after every optimizer step.

        It reads the training forward passes since the last call, of all processes: under `torch.distributed` every
        process must call it. Nothing happens in a model without a controller.
        """
        controller = self.base_model.controller
        thresholds = None if controller is None else controller.close_step()
        if thresholds is not None:
            blocks = controlled_blocks(self.moe_blocks())
            for threshold, layer in zip(thresholds, blocks.values(), strict=True):
                for block in layer:
                    block.selector.threshold.fill_(threshold)

    def thresholds(self) -> dict[int, float]:
        """Decoder layer -> the threshold at which its controlled selector stops."""
        blocks = controlled_blocks(self.moe_blocks())
        return {layer: blocks[layer][0].selector.threshold.item() for layer in blocks}


def build_controller(config: DynMoeConfig) -> BudgetController | None:
    """The controller of a model, None if no layer has one."""
    sparse = [config.routing_for(layer) for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    controlled = [spec for spec in sparse if spec["controller"]["type"] != "none"]
    if not controlled:
        return None
    return BudgetController(
        part_options("controller", controlled[0]["controller"]),
        [num_choices(spec, config) for spec in controlled],
        [initial_threshold(spec, config) for spec in controlled],
    )


def controlled_blocks(blocks: Sequence[DynMoeBlock]) -> dict[int, list[DynMoeBlock]]:
    """Decoder layer -> its blocks, of the layers whose selector a controller moves."""
    layers: dict[int, list[DynMoeBlock]] = {}
    for block in blocks:
        if block.spec["controller"]["type"] != "none":
            layers.setdefault(block.layer_idx, []).append(block)
    return layers


def count_for_controller(
    controller: BudgetController, blocks: Sequence[DynMoeBlock], routings: Sequence[Routing], token_mask: Tensor | None
) -> None:
    """Report one training forward to the controller; in a cartesian layer the experts of a token are pairs."""
    used: dict[int, Tensor] = {}
    for block, routing in zip(blocks, routings, strict=True):
        if block.spec["controller"]["type"] != "none":
            used[block.layer_idx] = routing.num_selected * used.get(block.layer_idx, 1)
    num_tokens = routings[0].logits.shape[0] if token_mask is None else token_mask.sum()
    controller.count([experts.sum() for experts in used.values()], num_tokens)


def _successor(block: DynMoeBlock, old: DynMoeConfig, new: DynMoeConfig) -> tuple[RoutingSpec, Selector]:
    """What a changed config makes of a block: its specification, and its selector with the state that the old one had.

    Raises:
        ValueError: if the scorer or the experts would change, or the selector would need new parameters.
    """
    layer_spec, layer_before = new.routing_for(block.layer_idx), old.routing_for(block.layer_idx)
    for axis in ("scorer", "experts"):
        if layer_spec[axis] != layer_before[axis]:
            raise ValueError(
                f"The {axis} of layer {block.layer_idx} cannot change from {layer_before[axis]} to {layer_spec[axis]} "
                "in a built model, which was built for it. Build a new model with that routing."
            )
    selector = build_selector(new, block.layer_idx, block.bank)
    for module in selector.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(new.initializer_range)
    known = dict(block.selector.named_parameters())
    if added := [name for name, _ in selector.named_parameters() if name not in known]:
        raise ValueError(
            f"The selector of layer {block.layer_idx} would need parameters that the model does not have, "
            f"{', '.join(added)}. Build a new model with that routing, or load a checkpoint with it."
        )
    _keep_state(selector, block.selector)
    reference = next(block.parameters())
    return bank_spec(layer_spec, block.bank), selector.to(reference.device).train(block.training)


@torch.no_grad()
def _keep_state(new: nn.Module, old: nn.Module) -> None:
    """Take over the state that both have in the same shape: buffers by value, parameters themselves.

    An optimizer holds the old parameters, and goes on training them.
    """
    parameters, buffers = dict(old.named_parameters()), dict(old.named_buffers())
    for name, buffer in new.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
    for name, parameter in list(new.named_parameters()):
        if name in parameters and parameters[name].shape == parameter.shape:
            module, _, attribute = name.rpartition(".")
            setattr(new.get_submodule(module), attribute, parameters[name])
