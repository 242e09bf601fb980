"""What the runs of training and of fine-tuning share: the Trainer, the output folder, the model."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    enable_full_determinism,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import dynmoe_hf
from dynmoe_hf.model import DynMoeConfig

from .arguments import DynMoeTrainingArguments, ModelArguments, to_yaml
from .balance import GlobalBalanceTrainer
from .callbacks import (
    AuxiliaryWarmupCallback,
    ControllerCallback,
    RoutingCallback,
    RoutingProgressCallback,
    ThresholdWarmupCallback,
)
from .checkpoints import STATE_FILE, ResumableTrainer, fault, last_whole_checkpoint, writing
from .routers import RouterTrainer
from .sharding import ShardedTrainer
from .stream_trainer import StreamTrainer
from .tokenizer import load_tokenizer

CONFIG_FILE = "train_config.yaml"
BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")


class RunTrainer(RouterTrainer, GlobalBalanceTrainer, StreamTrainer, ResumableTrainer, ShardedTrainer):
    """The Trainer of `dynmoe train` and of fine-tuning."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.use_cache = model.config.use_cache  # the Trainer turns the cache off, which is no property of the model
        super().__init__(model, *args, **kwargs)
        for callback in _warmups(model, self.args):
            self.add_callback(callback)

    def run(
        self,
        command: str,
        model_args: ModelArguments,
        data_args: Any,
        checkpoint: str | None,
        tokens_per_byte: float | None = None,
    ) -> dict[str, float]:
        """Train, evaluate and save, with our callbacks.

        The output folder gets the model with its tokenizer, the checkpoints, `trainer_state.json`, the metrics, and
        `train_config.yaml`, which repeats the run.

        Args:
            command: what reads that file again: `dynmoe train`.
            model_args: of the run.
            data_args: of the run.
            checkpoint: to resume from.
            tokens_per_byte: as for `RoutingCallback`.

        Returns:
            The metrics of training and of the evaluation after it.
        """
        ControllerCallback().put_first(self)
        RoutingCallback(self.model, tokens_per_byte, self.args.log_experts_per_layer).put_first(self)
        RoutingProgressCallback().replace_in(self)
        output_dir = Path(self.args.output_dir)
        if self.is_world_process_zero():
            with writing(output_dir, output_dir):
                _prepare_output_dir(command, model_args, data_args, self.args)
        train_metrics = self.train(resume_from_checkpoint=checkpoint).metrics
        eval_metrics = self.evaluate()
        self.model.config.use_cache = self.use_cache
        with writing(output_dir, output_dir):
            self.save_model()
            self.save_metrics("train", train_metrics)
            self.save_metrics("eval", eval_metrics)
            self.save_state()
        return train_metrics | eval_metrics


def _warmups(model: PreTrainedModel, training_args: DynMoeTrainingArguments) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = []
    if steps := training_args.aux_warmup_steps:
        callbacks.append(AuxiliaryWarmupCallback(steps))
    if steps := training_args.threshold_warmup_steps:
        callbacks.append(ThresholdWarmupCallback(model, training_args.threshold_warmup_start, steps))
    return callbacks


def _prepare_output_dir(
    command: str, model_args: ModelArguments, data_args: Any, training_args: DynMoeTrainingArguments
) -> None:
    folder = Path(training_args.output_dir)
    if training_args.overwrite_output_dir:
        # The Trainer would count them among its own, and resume from whichever has the highest number.
        for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}"):
            shutil.rmtree(state.parent)
        # transformers would load an adapter that is left here, and not the model beside it.
        for path in folder.glob("adapter_*"):
            path.unlink()
    comment = (
        f"{command} --config {CONFIG_FILE}; written by dynmoe_hf {dynmoe_hf.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    (folder / CONFIG_FILE).write_text(to_yaml(model_args, data_args, training_args, comment), encoding="utf-8")


def check_run(training_args: DynMoeTrainingArguments) -> str | None:
    """Refuse arguments of training and output folders that do not fit, before anything is touched.

    Returns:
        The checkpoint to resume from, if any.

    Raises:
        ValueError: with the reason.
    """
    if training_args.output_dir is None:
        raise ValueError("output_dir is missing: the folder for the model and its checkpoints.")
    for name in (*BATCH_SIZES, "gradient_accumulation_steps"):
        if getattr(training_args, name) < 1:
            raise ValueError(f"{name} is {getattr(training_args, name)}, but must be at least 1.")
    if training_args.use_cache:
        raise ValueError(
            "use_cache must be false in training: with a cache, the documents of a sequence see each other."
        )
    if training_args.label_smoothing_factor:
        # The Trainer shifts labels before it smooths them only for the classes that transformers itself has.
        raise ValueError("label_smoothing_factor is not supported for this model.")
    available = get_available_reporting_integrations()
    for name in training_args.report_to:
        if name not in available:
            raise ValueError(f"report_to names {name!r}, but installed is {', '.join(available) or 'none'}.")
    checkpoint = _checkpoint_to_resume(training_args)
    _check_output_dir(training_args, checkpoint)
    return checkpoint


def _checkpoint_to_resume(training_args: DynMoeTrainingArguments) -> str | None:
    resume, folder = str(training_args.resume_from_checkpoint), training_args.output_dir
    if resume.lower() in ("none", "false"):
        return None
    if training_args.overwrite_output_dir:
        raise ValueError("resume_from_checkpoint and overwrite_output_dir exclude each other.")
    if resume.lower() != "true":
        if (reason := fault(resume)) is not None:
            raise ValueError(f"{resume!r} is no checkpoint to resume from: {reason}.")
        return resume
    checkpoint, faults = last_whole_checkpoint(folder)
    skipped = "; ".join(f"{path!r} is not whole: {reason}" for path, reason in faults.items())
    if checkpoint is None:
        raise ValueError(
            f"there is no checkpoint in {folder!r} to resume from{f' ({skipped})' if skipped else ''}; "
            "--overwrite_output_dir starts again."
        )
    if skipped and training_args.should_log:
        warnings.warn(f"Resuming from {checkpoint!r}; {skipped}.", stacklevel=2)
    return checkpoint


def _check_output_dir(training_args: DynMoeTrainingArguments, checkpoint: str | None) -> None:
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is a file.")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {str(folder)!r} cannot be written: {str(existing)!r} is read-only for you.")
    if checkpoint is not None or training_args.overwrite_output_dir or not folder.exists():
        return
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"output_dir {str(folder)!r} holds an earlier run: --resume_from_checkpoint true goes on with it, "
            "--overwrite_output_dir starts again."
        )
    if any(folder.iterdir()):
        raise ValueError(
            f"output_dir {str(folder)!r} is not empty: choose another folder, or write into it with "
            "--overwrite_output_dir."
        )


def check_model(model_args: ModelArguments, length_name: str, length: int) -> None:
    """Build the model without memory, so that what it refuses is refused before any text is read."""
    config = build_config(model_args, tokenizer=None)
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{length_name} is {length}, but the model's max_position_embeddings is {config.max_position_embeddings}."
        )
    if isinstance(model_args.model, dict) and model_args.tokenizer is None:
        if model_args.model.get("vocab_size", model_args.vocab_size) < model_args.vocab_size:
            raise ValueError(
                f"the tokenizer is to be trained to {model_args.vocab_size} tokens, but model.vocab_size is "
                f"{model_args.model['vocab_size']}; lower vocab_size."
            )
    if is_deepspeed_zero3_enabled():
        return  # it would gather and fill the weights of every model that is built
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, **_implementations(model_args))
    except ImportError as error:
        raise ValueError(str(error)) from error


def build_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None) -> DynMoeConfig:
    """The configuration of the model; without a tokenizer, right but for the vocabulary of a new model."""
    if isinstance(model_args.model, str):
        config = AutoConfig.from_pretrained(model_args.model)
        if config.model_type != DynMoeConfig.model_type:
            raise ValueError(
                f"{model_args.model!r} is a model of type {config.model_type}, not {DynMoeConfig.model_type}."
            )
        if model_args.routing is not None:
            config.change_routing(model_args.routing)
    else:
        fields = {}
        if tokenizer is not None:
            fields = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            fields["vocab_size"] = len(tokenizer)
        config = DynMoeConfig(**(fields | (model_args.model or {})), routing=model_args.routing)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is {config.vocab_size}."
        )
    return config


def _implementations(model_args: ModelArguments) -> dict[str, str]:
    names = ("experts_implementation", "attn_implementation")
    return {name: value for name in names if (value := getattr(model_args, name)) is not None}


def find_tokenizer(model_args: ModelArguments, checkpoint: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint to resume, the one that was named, or that of the model; None for a new one."""
    source = checkpoint or model_args.tokenizer
    if source is None and isinstance(model_args.model, str):
        source = model_args.model
    return None if source is None else load_tokenizer(source)


def check_resumed_config(config: DynMoeConfig, checkpoint: str | None) -> None:
    """A resumed run trains the model that it began with; the Trainer would load what fits and say no more."""
    if checkpoint is None:
        return
    saved = DynMoeConfig.from_pretrained(checkpoint)
    for name in DynMoeConfig.__annotations__:
        if name != "use_cache" and getattr(config, name) != getattr(saved, name):
            raise ValueError(
                f"{name} is not what the checkpoint {checkpoint!r} was trained with; resume with the same arguments, "
                f"or start a new run from its weights with --model {checkpoint}."
            )


def seed_everything(training_args: DynMoeTrainingArguments) -> None:
    """For the weights that are drawn before there is a Trainer."""
    (enable_full_determinism if training_args.full_determinism else set_seed)(training_args.seed)


def build_model(
    config: DynMoeConfig, model_args: ModelArguments, auto_class: type = AutoModelForCausalLM
) -> PreTrainedModel:
    """The model of a configuration, with the weights of the checkpoint if one was named."""
    if isinstance(model_args.model, str):
        return auto_class.from_pretrained(
            model_args.model,
            config=config,
            dtype=torch.float32,  # whatever they were saved in; bf16=True computes in bfloat16
            # A classifier for other labels is drawn anew.
            ignore_mismatched_sizes=auto_class is not AutoModelForCausalLM,
            **_implementations(model_args),
        )
    return auto_class.from_config(config, **_implementations(model_args))
