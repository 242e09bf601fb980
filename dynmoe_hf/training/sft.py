"""Supervised fine-tuning with TRL."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from .balance import GlobalBalanceTrainer
from .callbacks import ControllerCallback


class DynMoeSFTTrainer(GlobalBalanceTrainer, SFTTrainer):
    """TRL's SFTTrainer with the loss of the model, in which every auxiliary loss counts once.

    TRL calls the decoder without the head that computes our losses, and adds Mixtral's load-balance loss instead, for
    the `num_experts_per_tok` most probable experts whatever the selector keeps. Here the loss is that of transformers'
    Trainer, and a controller is moved. Datasets, packing, `peft_config` and all else are TRL's; but its logs lack
    `entropy`, `mean_token_accuracy` and `num_tokens`, which it takes from its own loss.

    Args:
        model: a causal language model of the family, with or without adapters, or the path of one.
        args: as in TRL.
        options: as in TRL.

    Raises:
        ValueError: for settings of TRL that this loss does not have.
    """

    def __init__(self, model: PreTrainedModel | str, args: TrainingArguments | None = None, **options: Any) -> None:
        if getattr(args, "loss_type", "nll") != "nll":
            raise ValueError(f"loss_type must be 'nll', the loss of the model, got {args.loss_type!r}.")
        if getattr(args, "router_aux_loss_coef", None) is not None:
            raise ValueError(
                "router_aux_loss_coef is the coefficient of TRL's own load-balance loss. Give the losses of the model "
                "theirs in its routing: model.set_routing(losses={'load_balance': 0.01})."
            )
        if getattr(args, "label_smoothing_factor", 0):
            raise ValueError("label_smoothing_factor is not supported for this model.")
        wants_logits = getattr(getattr(model, "config", None), "output_router_logits", False)
        super().__init__(model, args, **options)
        self.model.config.output_router_logits = wants_logits  # TRL sets it, for its own loss
        ControllerCallback().put_first(self)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The `loss` of the model's output."""
        return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)
