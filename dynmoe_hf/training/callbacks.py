"""What the Trainer does and logs beside its own: controllers move, routing is counted."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dynmoe_hf.analysis.statistics import RoutingStatistics, RoutingSummary
from dynmoe_hf.model.controllers import BudgetController
from dynmoe_hf.model.methods import bank_spec, part_options

from .alarms import RoutingAlarms

if TYPE_CHECKING:
    from dynmoe_hf.model import DynMoePreTrainedModel


class LogCallback(TrainerCallback):
    """Base of the callbacks that add to logs.

    As one of `Trainer(callbacks=[...])` it reaches the log history (`trainer_state.json`), the metrics and the progress
    bar. For reporters (`report_to`) see `put_first`.
    """

    def put_first(self, trainer: Trainer) -> None:
        """Give this callback to a trainer that does not have it, in front of all others.

        The Trainer calls reporters before the callbacks that it was given, and each of them reports a log as it finds
        it: what a later callback adds would not reach TensorBoard.
        """
        trainer.callback_handler.callbacks.insert(0, self)

    def metrics_for(self, logs: dict[str, float], model: DynMoePreTrainedModel) -> dict[str, float]:
        """What a log gains."""
        raise NotImplementedError

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        model: DynMoePreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Extend a log, and its copy in the log history."""
        added = self.metrics_for(logs, model)
        logs.update(added)
        state.log_history[-1].update(added)


class ControllerCallback(LogCallback):
    """Moves the controller of the model after every optimizer step: `Trainer(..., callbacks=[ControllerCallback()])`.

    A training log gains `threshold`, where the controlled selectors stop from now on, a mean over their layers. For a
    model without a controller nothing happens.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DynMoePreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Forget the passes of a step that was never completed, as when `auto_find_batch_size` ran out of memory."""
        for module in model.modules():
            if isinstance(module, BudgetController):
                module.forget()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DynMoePreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Close the step, before a checkpoint of it is saved."""
        model.update_controllers()

    def metrics_for(self, logs: dict[str, float], model: DynMoePreTrainedModel) -> dict[str, float]:
        thresholds = model.thresholds().values() if "loss" in logs else []
        return {"threshold": sum(thresholds) / len(thresholds)} if thresholds else {}


class RoutingCallback(LogCallback):
    """Adds to every log what the model routed since the last one.

    A training log gains `experts_per_token` and `experts_per_token_p95`, `dead_experts` (experts, counted in every
    layer, that no token used), `load_cv` and `router_entropy` (see `RoutingSummary`), every auxiliary loss under its
    name (`load_balance`, `dynamic`, ...; without its coefficient), `lm_loss`, the mean over labels of the cross-entropy
    alone, and the `alarm/...` of `RoutingAlarms`, which also warn in words; the Trainer's own `loss` also holds the
    weighted auxiliary losses. The log and the metrics of an evaluation gain the same without alarms, with the prefix of
    the evaluation (`eval_lm_loss`, ...), and that of a language model the `eval_perplexity` and, if the bytes are
    known, the `eval_bits_per_byte` of that lm_loss. Sequences that a distributed evaluation repeats to fill its last
    batch count twice.

    It works as `Trainer(model, callbacks=[RoutingCallback(model)], ...)`.

    Args:
        model: the model that is trained.
        tokens_per_byte: labels for each byte of text in the evaluation data, for `eval_bits_per_byte`.
        per_layer: also log `experts_per_token/layer_0`, ..., with the number of the decoder layer; the banks of a
            cartesian layer apart, as `experts_per_token/layer_0_bank_0` and `experts_per_token/layer_0_bank_1`.
    """

    def __init__(
        self, model: DynMoePreTrainedModel, tokens_per_byte: float | None = None, per_layer: bool = False
    ) -> None:
        self.statistics = RoutingStatistics(model)
        self.alarms = RoutingAlarms(model)
        self.tokens_per_byte = tokens_per_byte
        self.per_layer = per_layer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what an earlier training, or an aborted attempt of `auto_find_batch_size`, has counted."""
        self.statistics.reset("train")
        self.alarms = RoutingAlarms(self.statistics.model)

    def metrics_for(self, logs: dict[str, float], model: DynMoePreTrainedModel) -> dict[str, float]:
        return self._training_metrics() if "loss" in logs else self._evaluation_metrics(logs)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Extend the metrics of `Trainer.predict`, which logs nothing."""
        metrics.update(self._evaluation_metrics(metrics))

    def _training_metrics(self) -> dict[str, float]:
        summary = self.statistics.pop("train")
        return {} if summary is None else self._metrics(summary) | self.alarms.check(summary)

    def _evaluation_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Evaluations are told by their `PREFIX_runtime`; other logs change nothing."""
        prefix = next((name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")), None)
        summary = None if prefix is None else self.statistics.pop("eval")
        if summary is None:
            return {}
        added = self._metrics(summary)
        predicts_tokens = self.statistics.model.get_output_embeddings() is not None
        if summary.lm_loss is not None and predicts_tokens:
            added["perplexity"] = torch.tensor(summary.lm_loss, dtype=torch.float64).exp().item()
            if self.tokens_per_byte is not None and prefix == "eval":
                added["bits_per_byte"] = summary.lm_loss / math.log(2) * self.tokens_per_byte
        return {f"{prefix}_{name}": value for name, value in added.items()}

    def _metrics(self, summary: RoutingSummary) -> dict[str, float]:
        names = ("experts_per_token", "experts_per_token_p95", "dead_experts", "load_cv", "router_entropy")
        metrics = {name: getattr(summary, name) for name in names} | summary.aux_losses
        if summary.lm_loss is not None:
            metrics["lm_loss"] = summary.lm_loss
        if self.per_layer:
            blocks = self.statistics.model.moe_blocks()
            for block, value in zip(blocks, summary.experts_per_token_by_layer, strict=True):
                bank = "" if block.bank is None else f"_bank_{block.bank}"
                metrics[f"experts_per_token/layer_{block.layer_idx}{bank}"] = value
        return metrics


class _WarmupCallback(TrainerCallback):
    """Base of what differs from the config in the first optimizer steps.

    It differs while a step is trained and at no other time: evaluations and checkpoints have what the config says.

    Args:
        steps: when the config's values are reached, at least 1.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def apply(self, model: DynMoePreTrainedModel, progress: float) -> None:
        """Set what holds at a progress of 0 ... 1; the config's values at 1."""
        raise NotImplementedError

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DynMoePreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Set what holds for all forward passes of the step."""
        if state.global_step < self.steps:
            self.apply(model, (state.global_step + 1) / self.steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: DynMoePreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Give back what the config says."""
        if state.global_step < self.steps:
            self.apply(model, 1.0)


class AuxiliaryWarmupCallback(_WarmupCallback):
    """Lets the coefficients of the auxiliary losses rise: in optimizer step t they are t / steps of the config's.

    Evaluations and checkpoints have those of the config.

    Args:
        steps: when they reach the config's, at least 1.
    """

    def apply(self, model: DynMoePreTrainedModel, progress: float) -> None:
        for block in model.moe_blocks():
            losses = bank_spec(model.config.routing_for(block.layer_idx), block.bank)["losses"]
            block.spec = {**block.spec, "losses": {name: progress * value for name, value in losses.items()}}


class ThresholdWarmupCallback(_WarmupCallback):
    """Moves the threshold p of `top_p` from a start to the config's, in equal steps.

    Evaluations and checkpoints have that of the config.

    Args:
        model: the model that is trained.
        start: p before the first step, >= 0; above the config's for many experts at first, below it for few.
        steps: when p is the config's, at least 1.

    Raises:
        ValueError: no layer has such a threshold, or a controller moves it.
    """

    def __init__(self, model: DynMoePreTrainedModel, start: float, steps: int) -> None:
        super().__init__(steps)
        self.start = start
        selectors = [block.selector for block in model.moe_blocks()]
        if any(selector.controlled for selector in selectors):
            raise ValueError("The controller of this model moves its thresholds; a warm-up cannot move them too.")
        if not any(selector.has_threshold for selector in selectors):
            raise ValueError("No layer of this model has a threshold that a warm-up could move: that takes top_p.")

    def apply(self, model: DynMoePreTrainedModel, progress: float) -> None:
        for block in model.moe_blocks():
            if block.selector.has_threshold:
                spec = bank_spec(model.config.routing_for(block.layer_idx), block.bank)
                options = part_options("selector", spec["selector"])
                p = self.start + progress * (options.p - self.start) if progress < 1 else options.p
                block.selector.options = dataclasses.replace(options, p=p)


class RoutingProgressCallback(ProgressCallback):
    """The Trainer's progress bar, with the loss and the experts per token of the last training log beside it."""

    def replace_in(self, trainer: Trainer) -> None:
        """Take the place of a trainer's plain progress bar, if it shows one."""
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Write the log above the bar, as ever, and its two figures beside it."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in logs:
            shown = {"loss": "loss", "experts_per_token": "experts/token"}
            self.training_bar.set_postfix({shown[name]: logs[name] for name in shown if name in logs})
