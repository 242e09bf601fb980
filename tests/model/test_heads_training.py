"""The heads in use: trained by transformers' Trainer on texts of many lengths, then asked through pipelines."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
)

from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import tiny_config

AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
}
LABELS = {0: "x", 1: "y", 2: "z"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A token a letter."""
    return train_tokenizer(["abc"], vocab_size=258)


def texts(number: int, seed: int) -> list[str]:
    """2 ... 9 letters, of which any may be an x, y or z."""
    source = random.Random(seed)
    return ["".join(source.choices("abcxyz", k=source.randint(2, 9))) for _ in range(number)]


def targets(task: str, text: str) -> dict[str, Any]:
    """What a head should learn: the kind of the last letter, of every letter, or where the one question ends."""
    if task == "sequence":
        return {"labels": "xyzabc".index(text[-1]) % 3}
    if task == "token":
        return {"labels": [-100 if letter == "a" else "xyzabc".index(letter) % 3 for letter in text]}
    return {"start_positions": text.index("<"), "end_positions": text.index(">")}


def question(text: str, source: random.Random) -> str:
    """The same text with one `<` and, somewhere after it, one `>`."""
    first, second = sorted(source.sample(range(len(text) + 1), 2))
    return text[:first] + "<" + text[first:second] + ">" + text[second:]


def dataset(task: str, tokenizer: PreTrainedTokenizerBase, number: int, seed: int) -> Dataset:
    source = random.Random(seed)
    content = [question(text, source) if task == "question" else text for text in texts(number, seed)]
    rows = [{**tokenizer(text), **targets(task, text)} for text in content]
    return Dataset.from_list(rows)


def build(task: str, method: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    torch.manual_seed(0)
    if task != "question":
        changes = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}} | changes
    config = tiny_config(
        method,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_hidden_layers=2,
        mlp_layer_types=None,
        num_experts=4,
        **changes,
    )
    return AUTO[task].from_config(config, experts_implementation="ragged")


def make_trainer(task: str, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, steps: int = 60) -> Trainer:
    collators = {"token": DataCollatorForTokenClassification}
    return Trainer(
        model,
        TrainingArguments(
            str(folder),
            use_cpu=True,
            max_steps=steps,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
        ),
        data_collator=collators.get(task, DataCollatorWithPadding)(tokenizer),
        train_dataset=dataset(task, tokenizer, 200, seed=1),
        processing_class=tokenizer,
    )


def accuracy(task: str, predicted: Any, test: Dataset) -> float:
    if task == "question":
        starts, ends = (np.asarray(part).argmax(-1) for part in predicted)
        return float(((starts == test["start_positions"]) & (ends == test["end_positions"])).mean())
    if task == "sequence":
        return float((predicted.argmax(-1) == test["labels"]).mean())
    hits = [
        guess == label
        for row, labels in zip(predicted.argmax(-1), test["labels"], strict=True)
        for guess, label in zip(row, labels, strict=False)
        if label != -100
    ]
    return float(np.mean(hits))


# Every preset with every head takes a minute: normally each preset learns one of the three.
CASES = [
    pytest.param(task, method, marks=() if (number + place) % 3 == 0 else pytest.mark.slow)
    for number, method in enumerate(METHODS)
    for place, task in enumerate(AUTO)
]


@pytest.mark.parametrize(("task", "method"), CASES)
def test_a_head_learns(task: str, method: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """It predicts logits and nothing else, the same ones in batches of any size and padded on any side."""
    model = build(task, method, tokenizer)
    trainer = make_trainer(task, model, tokenizer, tmp_path / "run")
    trainer.train()
    test = dataset(task, tokenizer, 24, seed=2)
    found = trainer.predict(test)
    names = ("start_logits", "end_logits") if task == "question" else ("logits",)
    parts = found.predictions if task == "question" else (found.predictions,)
    assert len(parts) == len(names) and all(isinstance(part, np.ndarray) for part in parts)
    assert accuracy(task, found.predictions, test) > 0.95
    assert found.metrics["test_loss"] < 0.5

    trainer.save_model(tmp_path / "model")
    loaded = AUTO[task].from_pretrained(tmp_path / "model").eval()
    assert loaded.config.id2label == model.config.id2label
    for row in range(6):
        ids = torch.tensor([test[row]["input_ids"]])
        length = ids.shape[1]
        with torch.no_grad():
            alone = loaded(ids)
            padded = {side: with_padding(loaded, ids, side, tokenizer) for side in ("left", "right")}
        for name, part in zip(names, parts, strict=True):
            expected = getattr(alone, name)[0]
            together = torch.tensor(part[row] if task == "sequence" else part[row][:length])
            torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-4)
            for side, output in padded.items():
                real = slice(None) if task == "sequence" else slice(4, None) if side == "left" else slice(0, length)
                torch.testing.assert_close(getattr(output, name)[0][real], expected, rtol=1e-3, atol=1e-4)


def with_padding(model: Any, ids: torch.Tensor, side: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Four tokens of padding beside one row."""
    where = (4, 0) if side == "left" else (0, 4)
    padded = torch.nn.functional.pad(ids, where, value=tokenizer.pad_token_id)
    return model(padded, attention_mask=torch.nn.functional.pad(torch.ones_like(ids), where))


@pytest.mark.parametrize("task", AUTO)
def test_a_data_set_that_is_padded_already(task: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Its attention mask reaches the model: the Trainer drops columns that the forward does not name."""
    model = build(task, "top_p", tokenizer)
    tokenizer.padding_side = "left"
    rows = [dict(tokenizer(text, padding="max_length", max_length=12)) for text in texts(8, seed=3)]
    tokenizer.padding_side = "right"
    trainer = make_trainer(task, model, tokenizer, tmp_path)
    trainer.data_collator = lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}
    found = trainer.predict(Dataset.from_list(rows)).predictions
    found = found[0] if task == "question" else found
    with torch.no_grad():
        output = model.eval()(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]})
    expected = output.start_logits if task == "question" else output.logits
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_text_classification_pipeline(method: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build("sequence", method, tokenizer).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    content = texts(5, seed=4)
    for found in (classify(content), classify(content, batch_size=5)):
        for text, scores in zip(content, found, strict=True):
            with torch.no_grad():
                probs = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            assert {entry["label"] for entry in scores} == set(LABELS.values())
            for entry in scores:
                assert entry["score"] == pytest.approx(probs[model.config.label2id[entry["label"]]].item(), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_token_classification_pipeline(method: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = build("token", method, tokenizer).eval()
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu", ignore_labels=[])
    content = texts(5, seed=4)
    for found in (tag(content), tag(content, batch_size=5)):
        for text, entries in zip(content, found, strict=True):
            with torch.no_grad():
                probs = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            assert [entry["entity"] for entry in entries] == [LABELS[label] for label in probs.argmax(-1).tolist()]
            scores = [entry["score"] for entry in entries]
            assert scores == pytest.approx(probs.amax(-1).tolist(), abs=1e-5)


def test_zero_shot_classification_pipeline(tokenizer: PreTrainedTokenizerBase) -> None:
    """A head with the labels of an entailment task."""
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    model = build("sequence", "top_p", tokenizer, id2label=names, label2id={v: k for k, v in names.items()}).eval()
    classify = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer, device="cpu")
    found = classify("abc", candidate_labels=["x", "yz"], hypothesis_template="{}!", multi_label=True)
    for label, score in zip(found["labels"], found["scores"], strict=True):
        with torch.no_grad():
            logits = model(**tokenizer("abc", f"{label}!", return_tensors="pt")).logits[0]
        assert score == pytest.approx(logits[[0, 2]].softmax(-1)[1].item(), abs=1e-5)
