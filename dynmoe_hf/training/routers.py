"""The routers of a model, and a Trainer that treats them apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

if TYPE_CHECKING:
    from dynmoe_hf.model import DynMoePreTrainedModel


def router_modules(model: DynMoePreTrainedModel) -> Iterator[nn.Module]:
    """The modules whose parameters decide who goes where: scorers, what they share, and selectors that learn."""
    yield from model.base_model.shared_scorers.values()
    for block in model.moe_blocks():
        yield from (module for module in (block.gate, block.selector) if list(module.parameters()))


def router_parameters(model: DynMoePreTrainedModel) -> list[nn.Parameter]:
    """Every parameter of the routers, once.

    Raises:
        ValueError: there are none, as where experts rank themselves by their activations.
    """
    parameters = list(dict.fromkeys(weight for module in router_modules(model) for weight in module.parameters()))
    if not parameters:
        raise ValueError("The routers of this model have no parameters of their own, so nothing can be set for them.")
    return parameters


class RouterTrainer(Trainer):
    """The Trainer, with the options for routers of `DynMoeTrainingArguments`.

    Raises:
        ValueError: one of them is given, and the model has no parameters of routers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.freeze_routers:
            for parameter in router_parameters(self.model):
                parameter.requires_grad_(False)
        if self._has_groups:
            router_parameters(self.model)

    @property
    def _has_groups(self) -> bool:
        return self.args.router_learning_rate is not None or self.args.router_weight_decay is not None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; then the routers leave their parameter groups for groups of their own.

        Raises:
            ValueError: the optimizer does not hold the parameters of the routers as they are.
        """
        is_new = self.optimizer is None
        super().create_optimizer(*([] if model is None else [model]))
        if is_new and self._has_groups:
            self._split_groups(self.model if model is None else model)
        return self.optimizer

    def _split_groups(self, model: nn.Module) -> None:
        routers = {id(parameter) for module in router_modules(self.model) for parameter in module.parameters()}
        decaying = set(self.get_decay_parameter_names(model))
        decaying = {id(parameter) for name, parameter in model.named_parameters() if name in decaying}
        wanted = {"lr": self.args.router_learning_rate, "weight_decay": self.args.router_weight_decay}
        is_split = False
        for group in list(self.optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in routers]
            if not own:
                continue
            changes = {name: value for name, value in wanted.items() if value is not None}
            if id(own[0]) not in decaying:
                changes.pop("weight_decay", None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in routers]
            self.optimizer.add_param_group({**group, **changes, "params": own})
            is_split = True
        if not is_split:
            raise ValueError(
                f"{type(self.optimizer).__name__} does not hold the parameters of the routers one by one, which "
                "router_learning_rate and router_weight_decay need; with FSDP set fsdp_use_orig_params."
            )
