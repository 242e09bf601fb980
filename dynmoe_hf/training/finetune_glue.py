"""Fine-tuning on a task of GLUE (Wang et al. 2019, arXiv 1804.07461), the benchmark of DA-MoE."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, load_dataset
from datasets.fingerprint import Hasher
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from dynmoe_hf.errors import user_errors
from dynmoe_hf.model.routing import unknown_name

from .arguments import DynMoeTrainingArguments, ModelArguments
from .data import load_splits
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
from .tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynmoe_hf.model import DynMoeConfig

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """The columns of text, and the names of the classes; none of a task whose label is a number."""

    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable")),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(PAIR, ("not_equivalent", "equivalent")),
    "stsb": GlueTask(PAIR),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(PAIR, ("entailment", "not_entailment")),
    "wnli": GlueTask(PAIR, ("not_entailment", "entailment")),
}


@dataclass
class GlueArguments:
    """Which task the model learns, and from which files if not from the Hub."""

    _argument_group_name = "data"

    task: str | None = field(default=None, metadata={"help": ", ".join(TASKS)})
    train_files: list[str] | None = field(
        default=None,
        metadata={"help": f"local files with the columns of the task; without them, {HUB_DATASET} of the Hub"},
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "local files to validate on"})
    max_length: int = field(default=128, metadata={"help": "tokens of an example; of a pair, the longer text is cut"})
    max_train_examples: int | None = field(
        default=None, metadata={"help": "train on so many examples, drawn by data_seed or seed; by default on all"}
    )


def finetune_glue(
    model_args: ModelArguments, data_args: GlueArguments, training_args: DynMoeTrainingArguments
) -> dict[str, float]:
    """Fine-tune a checkpoint, or train a new model, on one task of GLUE, and evaluate it.

    The classifier reads the last token, an EOS: `text EOS`, or for pairs `text EOS text EOS`. The saved tokenizer adds
    these by itself, so that the saved model is ready for `pipeline("text-classification")`.

    Returns:
        The metrics of training, and after it, on the validation split, those of the GLUE paper (`eval_accuracy`, ...),
        `eval_experts_per_token` and the like, and `eval_majority_accuracy`, ...: what the most frequent label of the
        training examples would get. `mnli` of the Hub has two such splits: `eval_matched_accuracy`,
        `eval_mismatched_accuracy`.

    Raises:
        UserError: for arguments, data or folders that do not fit.
    """
    with user_errors():
        task = _check_arguments(data_args)
        checkpoint = check_run(training_args)
        check_model(model_args, "max_length", data_args.max_length)
        with training_args.main_process_first(desc="preparing the data"):
            tokenizer = find_tokenizer(model_args, checkpoint)
            splits = _load_examples(task, data_args)
            splits["train"] = _draw(splits["train"], data_args.max_train_examples, training_args)
            if tokenizer is None:
                texts = (text for column in task.columns for text in splits["train"][column])
                tokenizer = train_tokenizer(texts, model_args.vocab_size)
            end_with_eos(tokenizer)
            config = _with_head(build_config(model_args, tokenizer), task, tokenizer)
            check_resumed_config(config, checkpoint)
            encoded = {name: _tokenize(split, task, tokenizer, data_args) for name, split in splits.items()}
        seed_everything(training_args)
        train_examples = encoded.pop("train")
        trainer = RunTrainer(
            model=build_model(config, model_args, AutoModelForSequenceClassification),
            args=training_args,
            train_dataset=train_examples,
            eval_dataset=encoded if len(encoded) > 1 else encoded["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_metrics(data_args.task, train_examples["labels"]),
        )
    return trainer.run("scripts/finetune_glue.py", model_args, data_args, checkpoint)


def end_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer end every text with EOS, the only special token that it then adds, and pad.

    Raises:
        ValueError: it is slow or has no EOS token.
    """
    eos = tokenizer.eos_token
    if not tokenizer.is_fast or eos is None:
        raise ValueError("the tokenizer must be a fast one with an EOS token, which ends every text.")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["$A", eos], pair=["$A", eos, "$B", eos], special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = eos


def _check_arguments(data_args: GlueArguments) -> GlueTask:
    if importlib.util.find_spec("evaluate") is None:
        raise ValueError("the metrics of GLUE need evaluate: pip install 'dynmoe-hf[finetune]'")
    if data_args.task is None:
        raise ValueError(f"task is missing; there are {', '.join(TASKS)}.")
    if data_args.task not in TASKS:
        raise ValueError(unknown_name("task of GLUE:", data_args.task, TASKS))
    if (data_args.train_files is None) != (data_args.validation_files is None):
        raise ValueError("train_files and validation_files belong together.")
    if data_args.max_length < 4:
        raise ValueError(f"max_length is {data_args.max_length}, but a pair and its two EOS need at least 4.")
    if data_args.max_train_examples is not None and data_args.max_train_examples < 1:
        raise ValueError(f"max_train_examples is {data_args.max_train_examples}, but must be at least 1.")
    return TASKS[data_args.task]


def _load_examples(task: GlueTask, data_args: GlueArguments) -> dict[str, Dataset]:
    """`train` and `validation`, or for mnli of the Hub `train`, `matched` and `mismatched`."""
    if data_args.train_files is None:
        splits = dict(load_dataset(HUB_DATASET, data_args.task))
    else:
        splits = load_splits(data_args.train_files, None, data_args.validation_files)
    used = {name.removeprefix("validation_"): split for name, split in splits.items() if not name.startswith("test")}
    for name, split in used.items():
        _check_examples(split, name, task)
    return used


def _check_examples(split: Dataset, name: str, task: GlueTask) -> None:
    for column in (*task.columns, "label"):
        if column not in split.column_names:
            raise ValueError(f"the {name} split has no column {column!r}, only: {', '.join(split.column_names)}.")
    for column in task.columns:
        if not all(isinstance(text, str) for text in split[column]):
            raise ValueError(f"column {column!r} of the {name} split must hold text in every row.")
    accepted = f"one of 0 ... {len(task.labels) - 1}" if task.labels else "a finite number"
    for label in split["label"]:
        is_number = isinstance(label, int | float) and not isinstance(label, bool) and np.isfinite(label)
        if not is_number or (task.labels and label not in range(len(task.labels))):
            raise ValueError(f"the {name} split has the label {label!r}, which must be {accepted} in every row.")


def _draw(examples: Dataset, number: int | None, training_args: DynMoeTrainingArguments) -> Dataset:
    if number is None or number >= len(examples):
        return examples
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    return examples.shuffle(seed=seed).select(range(number))


def _with_head(config: DynMoeConfig, task: GlueTask, tokenizer: PreTrainedTokenizerBase) -> DynMoeConfig:
    config.pad_token_id = tokenizer.pad_token_id
    config.problem_type = "single_label_classification" if task.labels else "regression"
    config.id2label = dict(enumerate(task.labels or ("score",)))
    config.label2id = {label: number for number, label in config.id2label.items()}
    return config


def _tokenize(
    examples: Dataset, task: GlueTask, tokenizer: PreTrainedTokenizerBase, data_args: GlueArguments
) -> Dataset:
    return examples.map(
        _encode,
        batched=True,
        remove_columns=examples.column_names,
        fn_kwargs={"task": task, "tokenizer": tokenizer, "max_length": data_args.max_length},
        # As in `pack`: no cache outlives a change of the code.
        new_fingerprint=Hasher.hash(
            (Path(__file__).read_bytes(), examples._fingerprint, task, tokenizer, data_args.max_length)
        ),
        desc="Tokenizing",
    )


def _encode(
    batch: Mapping[str, list[Any]], task: GlueTask, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    texts = (batch[column] for column in task.columns)
    encoded = tokenizer(*texts, truncation="longest_first", max_length=max_length, return_token_type_ids=False)
    return {**encoded, "labels": [int(label) if task.labels else float(label) for label in batch["label"]]}


def _metrics(task: str, labels: list[float]) -> Callable[[EvalPrediction], dict[str, float]]:
    """What the Trainer calls with logits (N, classes), or (N, 1) numbers, and labels."""
    from .glue_metric import GlueMetric  # imports evaluate

    metric = GlueMetric(config_name=task, keep_in_memory=True)
    values, counts = np.unique(labels, return_counts=True)
    majority = values[counts.argmax()]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, references = prediction.predictions, prediction.label_ids
        answers = logits.argmax(-1) if TASKS[task].labels else logits[:, 0]
        metrics = metric.compute(predictions=answers, references=references)
        constant = metric.compute(predictions=np.full_like(references, majority), references=references)
        return metrics | {f"majority_{name}": value for name, value in constant.items()}

    return compute
