"""A load balance over the whole optimizer step, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import Trainer

from dynmoe_hf.model.routing import is_distributed


class GlobalBalanceTrainer(Trainer):
    """The Trainer, with the usage of experts that `balance_scope="global"` balances by under gradient accumulation.

    Usage is known only when all tokens of an optimizer step have been routed. Processes that work at the same time add
    theirs up inside of a forward call. What comes one after the other is routed beforehand, without gradients: one
    forward pass more for each micro-batch. For other scopes, and without accumulation, nothing is different.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """As in transformers; the micro-batches of a step also have its `expert_usage`."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        is_balanced = any(losses.get("load_balance") for losses in self.model.loss_coefficients())
        is_global = self.model.config.balance_scope == "global"
        if is_global and is_balanced and self.args.gradient_accumulation_steps > 1:
            usage = self._expert_usage(batches, num_items)
            batches = [{**batch, "expert_usage": usage} for batch in batches]
        return batches, num_items

    @torch.no_grad()
    def _expert_usage(self, batches: list[dict[str, Any]], num_items: Tensor | int | None) -> Tensor:
        """(routers, E) share of the tokens of all batches, in all processes, that use each expert."""
        config = self.model.config
        usage = torch.zeros(len(self.model.moe_blocks()), config.num_experts, device=self.args.device)
        self.model_wrapped.train()
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                usage += self.model_wrapped(**inputs, num_items_in_batch=num_items).expert_usage.to(usage.device)
        if is_distributed():
            distributed.all_reduce(usage)
            if not self.args.average_tokens_across_devices:  # then every process counts shares of its own labels
                usage /= distributed.get_world_size()
        return usage
