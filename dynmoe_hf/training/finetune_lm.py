"""Fine-tuning of a language model on instructions and their responses, whole or with LoRA."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import DataCollatorForSeq2Seq

from dynmoe_hf.errors import user_errors

from .adapters import lora_targets
from .arguments import DynMoeTrainingArguments, ModelArguments
from .checkpoints import writing
from .data import hold_out, load_splits
from .runs import (
    RunTrainer,
    build_config,
    build_model,
    check_model,
    check_resumed_config,
    check_run,
    find_tokenizer,
    seed_everything,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from dynmoe_hf.model import DynMoePreTrainedModel


@dataclass
class InstructionArguments:
    """Which responses the model learns, and which of its weights do."""

    _argument_group_name = "data"

    dataset: list[str] | None = field(
        default=None,
        metadata={"help": "the name of a Hub dataset; or files, patterns or folders of .json, .jsonl or .parquet"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    validation_files: list[str] | None = field(default=None, metadata={"help": "files to validate on"})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "share of the prompts to hold out if there is no validation split"}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "column that holds what the model is given"})
    response_column: str = field(default="response", metadata={"help": "column that holds what it is to answer"})
    messages_column: str | None = field(
        default=None,
        metadata={
            "help": "column of chats, lists of {role, content}, instead of the two; the last message is the response, "
            "and the tokenizer must have a chat template"
        },
    )
    max_length: int = field(
        default=512, metadata={"help": "tokens of an example; longer responses are cut, longer prompts left out"}
    )
    num_proc: int | None = field(default=None, metadata={"help": "processes that tokenize"})
    lora_r: int | None = field(default=None, metadata={"help": "rank of LoRA; without it, all weights are trained"})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA is scaled by lora_alpha / lora_r"})
    lora_parts: list[str] = field(
        default_factory=lambda: ["attention", "experts", "shared_experts", "dense_ffn"],
        metadata={"help": "what LoRA goes on; `routers` are trained whole"},
    )
    merge: bool = field(default=False, metadata={"help": "also save the model with LoRA merged, in output_dir/merged"})


def finetune_lm(
    model_args: ModelArguments, data_args: InstructionArguments, training_args: DynMoeTrainingArguments
) -> dict[str, float]:
    """Train a checkpoint to give the responses to prompts. Only the response has labels; it ends with EOS.

    Prompt and response are tokenized apart, so that the model is trained on the very tokens of the prompt that it will
    be given. Examples are not packed, so none sees another one. With LoRA the output folder gets the adapter alone.

    Returns:
        The metrics of training, and of the evaluation after it; among them `eval_lm_loss`, a mean over the tokens of
        the responses, in nats, its `eval_perplexity`, and `eval_experts_per_token` of prompts and responses.

    Raises:
        UserError: for arguments, data or folders that do not fit.
    """
    with user_errors():
        _check_arguments(model_args, data_args, training_args)
        checkpoint = check_run(training_args)
        check_model(model_args, "max_length", data_args.max_length)
        with training_args.main_process_first(desc="preparing the data"):
            tokenizer = find_tokenizer(model_args, checkpoint)
            if tokenizer.eos_token is None:
                raise ValueError("the tokenizer has no EOS token to end responses with.")
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            pairs = load_pairs(data_args, tokenizer)
            encoded = {name: _tokenize(split, name, tokenizer, data_args) for name, split in pairs.items()}
            config = build_config(model_args, tokenizer)
            if data_args.lora_r is None:
                check_resumed_config(config, checkpoint)
        seed_everything(training_args)
        model = build_model(config, model_args)
        if data_args.lora_r is not None:
            model = add_lora(model, data_args, checkpoint)
        trainer = RunTrainer(
            model=model,
            args=training_args,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100, on the side of the tokenizer
        )
    metrics = trainer.run("scripts/finetune_lm.py", model_args, data_args, checkpoint)
    if data_args.merge and trainer.is_world_process_zero():
        folder = Path(training_args.output_dir) / "merged"
        with writing(folder, training_args.output_dir):
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return metrics


def load_pairs(data_args: InstructionArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """The splits `train` and `validation`, with the string columns `prompt` and `response`.

    A chat becomes the text of its template before and after the point where the last message begins.

    Raises:
        ValueError: for columns and rows that do not fit.
    """
    if not 0 < data_args.validation_fraction < 1:
        raise ValueError(f"validation_fraction is {data_args.validation_fraction}, but must lie between 0 and 1.")
    source = data_args.dataset[0] if len(data_args.dataset) == 1 else data_args.dataset
    splits = load_splits(source, data_args.dataset_config, data_args.validation_files)
    used = {name: splits[name] for name in ("train", "validation") if name in splits}
    pairs = {name: _as_pairs(split, name, data_args, tokenizer) for name, split in used.items()}
    if "validation" not in pairs:
        pairs["train"], pairs["validation"] = hold_out(pairs["train"], "prompt", data_args.validation_fraction)
    return pairs


def add_lora(model: DynMoePreTrainedModel, data_args: InstructionArguments, checkpoint: str | None = None) -> PeftModel:
    """The model with new adapters.

    Raises:
        ValueError: for options that PEFT refuses, or other ones than those of the checkpoint to resume.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model

    targets = lora_targets(model, data_args.lora_parts)
    config = LoraConfig(r=data_args.lora_r, lora_alpha=data_args.lora_alpha, task_type="CAUSAL_LM", **targets)
    adapted = get_peft_model(model, config)
    if checkpoint is not None:
        saved = PeftConfig.from_pretrained(checkpoint)
        for name in ("base_model_name_or_path", "r", "lora_alpha", *targets):
            before, now = (getattr(options, name) for options in (saved, config))
            if before != now and (isinstance(now, str | int) or set(before or ()) != set(now)):
                raise ValueError(f"{name} is not what {checkpoint!r} was trained with; resume with the same arguments.")
    return adapted


def _check_arguments(
    model_args: ModelArguments, data_args: InstructionArguments, training_args: DynMoeTrainingArguments
) -> None:
    if not isinstance(model_args.model, str):
        raise ValueError("model must be the folder or Hub id of the checkpoint to fine-tune.")
    if not data_args.dataset:
        raise ValueError("dataset is missing: the prompts and responses, or the chats.")
    if data_args.max_length < 2:
        raise ValueError(f"max_length is {data_args.max_length}, but must be at least 2.")
    if data_args.lora_r is None:
        if data_args.merge:
            raise ValueError("merge is for LoRA: give lora_r, or leave it out.")
        return
    for name in ("lora_r", "lora_alpha"):
        if getattr(data_args, name) < 1:
            raise ValueError(f"{name} is {getattr(data_args, name)}, but must be at least 1.")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("LoRA needs peft: pip install 'dynmoe-hf[finetune]'")
    rates = ("router_learning_rate", "router_weight_decay")
    given = [name for name in rates if getattr(training_args, name) is not None]
    if training_args.freeze_routers:
        given.append("freeze_routers")
    if given:
        raise ValueError(f"{given[0]} does not go with LoRA, which trains routers only if lora_parts names them.")


def _as_pairs(
    split: Dataset, name: str, data_args: InstructionArguments, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    is_chat = data_args.messages_column is not None
    columns = [data_args.messages_column] if is_chat else [data_args.prompt_column, data_args.response_column]
    for column in columns:
        if column not in split.column_names:
            raise ValueError(f"the {name} split has no column {column!r}, only: {', '.join(split.column_names)}.")
    if is_chat:
        rows = [_split_chat(messages, row, tokenizer) for row, messages in enumerate(split[columns[0]])]
    else:
        rows = list(zip(*(split[column] for column in columns), strict=True))
    for row, texts in enumerate(rows):
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"row {row} of the {name} split has no text in {' or '.join(map(repr, columns))}.")
    return Dataset.from_dict(dict(zip(("prompt", "response"), map(list, zip(*rows, strict=True)), strict=True)))


def _split_chat(messages: Sequence[Mapping[str, Any]], row: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template to write messages with; set tokenizer.chat_template.")
    if not messages or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(f"the chat of row {row} must end with the answer of the assistant to a message.")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if not whole.startswith(prompt):
        raise ValueError(f"the chat template writes the prompt of row {row} differently once the answer is there.")
    return prompt, whole.removeprefix(prompt)


def _tokenize(
    pairs: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, data_args: InstructionArguments
) -> Dataset:
    options = {"max_length": data_args.max_length, "is_chat": data_args.messages_column is not None}
    encoded = pairs.map(
        encode_pairs,
        batched=True,
        remove_columns=pairs.column_names,
        fn_kwargs={"tokenizer": tokenizer, **options},
        num_proc=data_args.num_proc,
        # As in `pack`: no cache outlives a change of the code.
        new_fingerprint=Hasher.hash((Path(__file__).read_bytes(), pairs._fingerprint, tokenizer, options)),
        desc="Tokenizing",
    )
    num_left_out = len(pairs) - len(encoded)
    message = f"{num_left_out} of {len(pairs)} examples of the {name} split have prompts of max_length or more tokens"
    if not len(encoded):
        raise ValueError(f"{message}, so that no response is left; raise max_length ({data_args.max_length}).")
    if num_left_out:
        warnings.warn(f"{message} ({data_args.max_length}), and are left out.", stacklevel=2)
    return encoded


def encode_pairs(
    batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int, is_chat: bool = False
) -> dict[str, list[list[int]]]:
    """Token ids, attention mask and labels of pairs; the labels of the prompt are -100, and EOS ends the response.

    Special tokens of a chat are those of its template, which are in the text; those of a prompt are the tokenizer's.
    """
    prompts = tokenizer(batch["prompt"], add_special_tokens=not is_chat)["input_ids"]
    responses = tokenizer(batch["response"], add_special_tokens=False)["input_ids"]
    end = [] if is_chat else [tokenizer.eos_token_id]
    rows = [
        ([*prompt, *response, *end][:max_length], len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
        if len(prompt) < max_length
    ]
    return {
        "input_ids": [ids for ids, _ in rows],
        "attention_mask": [[1] * len(ids) for ids, _ in rows],
        "labels": [[-100] * length + ids[length:] for ids, length in rows],
    }
