"""The main job: train a language model on text with the Hugging Face Trainer."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    default_data_collator,
    enable_full_determinism,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import dynmoe_hf
from dynmoe_hf.errors import user_errors
from dynmoe_hf.model import DynMoeConfig

from .arguments import DataArguments, DynMoeTrainingArguments, ModelArguments, to_yaml
from .balance import GlobalBalanceTrainer
from .callbacks import (
    AuxiliaryWarmupCallback,
    ControllerCallback,
    RoutingCallback,
    RoutingProgressCallback,
    ThresholdWarmupCallback,
)
from .checkpoints import STATE_FILE, ResumableTrainer, fault, last_whole_checkpoint, writing
from .data import load_documents, pack
from .routers import RouterTrainer
from .sharding import ShardedTrainer
from .stream_trainer import StreamTrainer, check_stream_to_resume
from .streams import BlockStream, DocumentStream, load_stream
from .tokenizer import load_tokenizer, train_tokenizer

CONFIG_FILE = "train_config.yaml"


class RunTrainer(RouterTrainer, GlobalBalanceTrainer, StreamTrainer, ResumableTrainer, ShardedTrainer):
    """The Trainer of `dynmoe train`."""


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: DynMoeTrainingArguments
) -> dict[str, float]:
    """Train a new model, or go on with one, and evaluate it.

    The output folder gets the model with its tokenizer, the checkpoints, `trainer_state.json`, the metrics, and
    `train_config.yaml`, which repeats the run. It is not touched before all that can be checked has been.

    Returns:
        The metrics of training and of the evaluation after it; among them `eval_lm_loss` (nats per token, without the
        auxiliary losses), its `eval_perplexity` and `eval_bits_per_byte`, and `eval_experts_per_token`.

    Raises:
        UserError: for arguments, data or folders that do not fit.
    """
    with user_errors():
        _check_arguments(model_args, data_args, training_args)
        checkpoint = _checkpoint_to_resume(training_args)
        _check_output_dir(training_args, checkpoint)
        _check_model(model_args, data_args)
        with training_args.main_process_first(desc="preparing the data"):
            tokenizer, documents = _load_text(model_args, data_args, checkpoint)
            config = _build_config(model_args, tokenizer)
            _check_resumed_config(config, checkpoint)
            train_blocks, eval_blocks = _pack(documents, tokenizer, data_args, training_args)
            check_stream_to_resume(checkpoint, train_blocks, training_args.process_index)
        (enable_full_determinism if training_args.full_determinism else set_seed)(training_args.seed)
        model = _build_model(config, model_args)
        use_cache = model.config.use_cache
        trainer = RunTrainer(
            model=model,
            args=training_args,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks.remove_columns("num_bytes"),
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=_warmups(model, training_args),
        )
    ControllerCallback().put_first(trainer)
    callback = RoutingCallback(model, _tokens_per_byte(eval_blocks), training_args.log_experts_per_layer)
    callback.put_first(trainer)
    RoutingProgressCallback().replace_in(trainer)
    output_dir = Path(training_args.output_dir)
    if trainer.is_world_process_zero():
        with writing(output_dir, output_dir):
            _prepare_output_dir(model_args, data_args, training_args)

    train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    eval_metrics = trainer.evaluate()
    model.config.use_cache = use_cache  # the Trainer turned the cache off, which is no property of the model
    with writing(output_dir, output_dir):
        trainer.save_model()
        trainer.save_metrics("train", train_metrics)
        trainer.save_metrics("eval", eval_metrics)
        trainer.save_state()
    return train_metrics | eval_metrics


def _check_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: DynMoeTrainingArguments
) -> None:
    if training_args.output_dir is None:
        raise ValueError("output_dir is missing: the folder for the model and its checkpoints.")
    if data_args.block_size < 2:
        raise ValueError(f"block_size is {data_args.block_size}, but must be at least 2.")
    batch_sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for name in (*batch_sizes, "gradient_accumulation_steps"):
        if getattr(training_args, name) < 1:
            raise ValueError(f"{name} is {getattr(training_args, name)}, but must be at least 1.")
    if "flash" in (model_args.attn_implementation or "") and any(
        getattr(training_args, name) > 1 for name in batch_sizes
    ):
        # transformers tells documents apart by position_ids there, and does so for a single row only.
        raise ValueError(
            f"attn_implementation {model_args.attn_implementation!r} keeps the documents of a sequence apart only if "
            f"{' and '.join(batch_sizes)} are 1."
        )
    if training_args.use_cache:
        raise ValueError(
            "use_cache must be false in training: with a cache, the documents of a sequence see each other."
        )
    if training_args.label_smoothing_factor:
        # The Trainer shifts labels before it smooths them only for the classes that transformers itself has.
        raise ValueError("label_smoothing_factor is not supported for this model.")
    if data_args.streaming:
        _check_stream_arguments(model_args, training_args)
    available = get_available_reporting_integrations()
    for name in training_args.report_to:
        if name not in available:
            raise ValueError(f"report_to names {name!r}, but installed is {', '.join(available) or 'none'}.")


def _check_stream_arguments(model_args: ModelArguments, training_args: DynMoeTrainingArguments) -> None:
    if training_args.max_steps < 1:
        raise ValueError("streaming needs max_steps: nobody knows how long a stream is before it was read.")
    if model_args.tokenizer is None and not isinstance(model_args.model, str):
        # One that is trained on the first documents of a stream would fit them, and nobody knows what comes after.
        raise ValueError("streaming needs a tokenizer: a folder or Hub id, as --tokenizer gpt2.")


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


def _check_model(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Build the model without memory, so that what it refuses is refused before any text is read."""
    config = _build_config(model_args, tokenizer=None)
    if data_args.block_size > config.max_position_embeddings:
        raise ValueError(
            f"block_size is {data_args.block_size}, but the model's max_position_embeddings is "
            f"{config.max_position_embeddings}."
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


def _implementations(model_args: ModelArguments) -> dict[str, str]:
    names = ("experts_implementation", "attn_implementation")
    return {name: value for name in names if (value := getattr(model_args, name)) is not None}


def _build_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None) -> DynMoeConfig:
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


def _load_text(
    model_args: ModelArguments, data_args: DataArguments, checkpoint: str | None
) -> tuple[PreTrainedTokenizerBase, dict[str, Dataset | DocumentStream]]:
    """The documents, and the tokenizer of the checkpoint to resume, the one that was named, or a new one."""
    tokenizer, source = None, checkpoint or model_args.tokenizer
    if source is None and isinstance(model_args.model, str):
        source = model_args.model
    if source is not None:
        tokenizer = load_tokenizer(source)
    dataset = data_args.dataset[0] if len(data_args.dataset) == 1 else data_args.dataset
    options = {
        "config_name": data_args.dataset_config,
        "validation_files": data_args.validation_files,
        "text_column": data_args.text_column,
    }
    if data_args.streaming:
        train, validation = load_stream(dataset, validation_documents=data_args.validation_documents, **options)
        documents = {"train": train, "validation": validation}
    else:
        documents = load_documents(dataset, validation_fraction=data_args.validation_fraction, **options)
    if tokenizer is None:
        tokenizer = train_tokenizer(documents["train"]["text"], model_args.vocab_size)
    return tokenizer, documents


def _pack(
    documents: Mapping[str, Dataset | DocumentStream],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    training_args: DynMoeTrainingArguments,
) -> tuple[Dataset | BlockStream, Dataset]:
    """The blocks to train on, and those to validate on, which still have their `num_bytes`."""
    block_size, num_proc = data_args.block_size, data_args.num_proc
    if data_args.streaming:
        data_seed = training_args.data_seed
        train = BlockStream(
            documents["train"],
            tokenizer,
            block_size,
            num_readers=training_args.world_size * max(training_args.dataloader_num_workers, 1),
            shuffle_buffer=data_args.shuffle_buffer,
            seed=training_args.seed if data_seed is None else data_seed,
        )
    else:
        train = pack(documents["train"], tokenizer, block_size, num_proc=num_proc).remove_columns("num_bytes")
    return train, pack(documents["validation"], tokenizer, block_size, keep_remainder=True, num_proc=num_proc)


def _check_resumed_config(config: DynMoeConfig, checkpoint: str | None) -> None:
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


def _build_model(config: DynMoeConfig, model_args: ModelArguments) -> PreTrainedModel:
    if isinstance(model_args.model, str):
        # Weights are kept in float32 whatever they were saved in; bf16=True computes in bfloat16.
        return AutoModelForCausalLM.from_pretrained(
            model_args.model, config=config, dtype=torch.float32, **_implementations(model_args)
        )
    return AutoModelForCausalLM.from_config(config, **_implementations(model_args))


def _warmups(model: PreTrainedModel, training_args: DynMoeTrainingArguments) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = []
    if steps := training_args.aux_warmup_steps:
        callbacks.append(AuxiliaryWarmupCallback(steps))
    if steps := training_args.threshold_warmup_steps:
        callbacks.append(ThresholdWarmupCallback(model, training_args.threshold_warmup_start, steps))
    return callbacks


def _tokens_per_byte(packed: Dataset) -> float | None:
    num_labels = pc.sum(pc.not_equal(pc.list_flatten(packed.data["labels"]), -100)).as_py()
    num_bytes = pc.sum(packed.data["num_bytes"]).as_py()
    return num_labels / num_bytes if num_bytes else None


def _prepare_output_dir(
    model_args: ModelArguments, data_args: DataArguments, training_args: DynMoeTrainingArguments
) -> None:
    folder = Path(training_args.output_dir)
    if training_args.overwrite_output_dir:
        # The Trainer would count them among its own, and resume from whichever has the highest number.
        for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}"):
            shutil.rmtree(state.parent)
    comment = (
        f"dynmoe train --config {CONFIG_FILE}; written by dynmoe_hf {dynmoe_hf.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    (folder / CONFIG_FILE).write_text(to_yaml(model_args, data_args, training_args, comment), encoding="utf-8")
