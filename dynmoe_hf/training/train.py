"""The main job: train a language model on text with the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, default_data_collator

from dynmoe_hf.errors import user_errors

from .arguments import DataArguments, DynMoeTrainingArguments, ModelArguments
from .data import load_documents, pack
from .runs import (
    BATCH_SIZES,
    RunTrainer,
    build_config,
    build_model,
    check_model,
    check_resumed_config,
    check_run,
    find_tokenizer,
    seed_everything,
)
from .stream_trainer import check_stream_to_resume
from .streams import BlockStream, DocumentStream, load_stream
from .tokenizer import train_tokenizer


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: DynMoeTrainingArguments
) -> dict[str, float]:
    """Train a new model, or go on with one, and evaluate it.

    The output folder (see `RunTrainer.run`) is not touched before all that can be checked has been.

    Returns:
        The metrics of training and of the evaluation after it; among them `eval_lm_loss` (nats per token, without the
        auxiliary losses), its `eval_perplexity` and `eval_bits_per_byte`, and `eval_experts_per_token`.

    Raises:
        UserError: for arguments, data or folders that do not fit.
    """
    with user_errors():
        _check_arguments(model_args, data_args, training_args)
        checkpoint = check_run(training_args)
        check_model(model_args, "block_size", data_args.block_size)
        with training_args.main_process_first(desc="preparing the data"):
            tokenizer, documents = _load_text(model_args, data_args, checkpoint)
            config = build_config(model_args, tokenizer)
            check_resumed_config(config, checkpoint)
            train_blocks, eval_blocks = _pack(documents, tokenizer, data_args, training_args)
            check_stream_to_resume(checkpoint, train_blocks, training_args.process_index)
        seed_everything(training_args)
        trainer = RunTrainer(
            model=build_model(config, model_args),
            args=training_args,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks.remove_columns("num_bytes"),
            processing_class=tokenizer,
            data_collator=default_data_collator,
        )
    return trainer.run("dynmoe train", model_args, data_args, checkpoint, _tokens_per_byte(eval_blocks))


def _check_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: DynMoeTrainingArguments
) -> None:
    if data_args.block_size < 2:
        raise ValueError(f"block_size is {data_args.block_size}, but must be at least 2.")
    if "flash" in (model_args.attn_implementation or "") and any(
        getattr(training_args, name) > 1 for name in BATCH_SIZES
    ):
        # transformers tells documents apart by position_ids there, and does so for a single row only.
        raise ValueError(
            f"attn_implementation {model_args.attn_implementation!r} keeps the documents of a sequence apart only if "
            f"{' and '.join(BATCH_SIZES)} are 1."
        )
    if data_args.streaming:
        _check_stream_arguments(model_args, training_args)


def _check_stream_arguments(model_args: ModelArguments, training_args: DynMoeTrainingArguments) -> None:
    if training_args.max_steps < 1:
        raise ValueError("streaming needs max_steps: nobody knows how long a stream is before it was read.")
    if model_args.tokenizer is None and not isinstance(model_args.model, str):
        # One that is trained on the first documents of a stream would fit them, and nobody knows what comes after.
        raise ValueError("streaming needs a tokenizer: a folder or Hub id, as --tokenizer gpt2.")


def _load_text(
    model_args: ModelArguments, data_args: DataArguments, checkpoint: str | None
) -> tuple[PreTrainedTokenizerBase, dict[str, Dataset | DocumentStream]]:
    """The documents and the tokenizer, a new one if there is none to load."""
    tokenizer = find_tokenizer(model_args, checkpoint)
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


def _tokens_per_byte(packed: Dataset) -> float | None:
    num_labels = pc.sum(pc.not_equal(pc.list_flatten(packed.data["labels"]), -100)).as_py()
    num_bytes = pc.sum(packed.data["num_bytes"]).as_py()
    return num_labels / num_bytes if num_bytes else None
