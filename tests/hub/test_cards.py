"""The model card says what the folder and the reports say, and nothing that they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import dynmoe_hf
from dynmoe_hf import DynMoeConfig
from dynmoe_hf.analysis.cost import count_cost
from dynmoe_hf.hub import papers
from dynmoe_hf.hub.cards import PROMPT, render_card
from dynmoe_hf.hub.records import TrainingRecord, read_evaluation, read_training
from dynmoe_hf.model.methods import METHODS
from tests.tiny import all_routings, tiny_config, tiny_model

ROOT = Path(dynmoe_hf.__file__).parents[1]
CONFIG_YAML = """# dynmoe train --config FILE; written by dynmoe_hf 0.1.0, transformers 5.23.0, Python 3.11.7
model:
  hidden_size: 32
dataset: {dataset}
block_size: 64
learning_rate: 2e-3
gradient_accumulation_steps: 2
warmup_steps: 30.0
output_dir: /somewhere/private/run
"""
METRICS = {"eval_bits_per_byte": 2.25, "eval_perplexity": 99.5, "eval_experts_per_token": 3.5, "eval_loss": 5.0}
STATE = {
    "global_step": 50,
    "max_steps": 100,
    "train_batch_size": 4,
    "epoch": 0.125,
    "num_input_tokens_seen": 0,
    # Two processes: 100 steps of 2 x 4 x 2 sequences in 40 seconds.
    "log_history": [{"loss": 5.0}, {"train_runtime": 40.0, "train_samples_per_second": 40.001}],
}
TASKS = {
    "model": "somewhere",
    "results": {
        "piqa": {"acc,none": 0.6125, "acc_stderr,none": 0.01137, "alias": "piqa"},
        "lambada": {"perplexity": 31.5, "acc": float("nan")},
    },
    "compute": {
        "piqa": {
            "experts_per_token": {"prompt": {"mean": 2.125}, "continuation": {"mean": 2.5, "std": 0.5}},
            "active_parameters": 1234567,
        }
    },
    "versions": {"lm_eval": "0.4.13"},
}


def folder(tmp_path: Path, dataset: str = "python-stdlib", **state: Any) -> Path:
    (tmp_path / "train_config.yaml").write_text(CONFIG_YAML.format(dataset=dataset))
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE | state))
    (tmp_path / "all_results.json").write_text(json.dumps(METRICS))
    return tmp_path


def results_of(card: ModelCard) -> dict[tuple[str, str], float]:
    return {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in card.data.eval_results or []}


def headings(text: str) -> list[str]:
    return re.findall(r"^## .*", text, flags=re.MULTILINE)


def test_the_training_is_told(tmp_path: Path) -> None:
    training = read_training(folder(tmp_path))
    assert (training.steps, training.global_batch, training.tokens) == (50, 16, 50 * 16 * 64)
    card = render_card(tiny_config("top_p"), "org/name", training, license="mit", languages=["en"])
    for text in (
        "51,200",
        "| optimizer steps | 50, each of 16 sequences of 64 tokens |",
        "| `warmup_steps` | 30 |",
        "text | 0.125 |",
    ):
        assert text in card.text
    assert "standard library of Python" in card.text and "dynmoe_hf 0.1.0, transformers 5.23.0" in card.text
    assert "somewhere" not in str(card) and "private" not in str(card)
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en"], None)
    assert results_of(card) == {
        ("python-stdlib", "bits_per_byte"): 2.25,
        ("python-stdlib", "perplexity"): 99.5,
        ("python-stdlib", "experts_per_token"): 3.5,
    }


def test_parameters_are_those_at_the_measured_experts(tmp_path: Path) -> None:
    config = tiny_config("top_p")
    card = render_card(config, "org/name", read_training(folder(tmp_path)))
    cost = count_cost(config, 3.5)
    assert f"{cost.total_parameters:,}" in card.text and f"{cost.activity[0].parameters:,} at 3.5" in card.text
    assert sum(parameter.numel() for parameter in tiny_model("top_p").parameters()) == cost.total_parameters


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    training = read_training(tmp_path)
    assert training == TrainingRecord()
    card = render_card(tiny_config("top_p"), "org/name", training)
    assert not {"license", "language", "datasets", "base_model", "model-index"} & card.data.to_dict().keys()
    for text in ("holds no record of its training", "was not measured", "none is given", "None were published"):
        assert text in card.text
    told = re.sub(r"^\| \| `.*\n", "", card.text, flags=re.MULTILINE)  # less the options, some of which may be None
    assert not re.search(r"None\b(?! were published)|More Information|TODO|nan\b|\{%|%\}", told)


def test_counted_tokens_go_before_computed_ones(tmp_path: Path) -> None:
    assert read_training(folder(tmp_path, num_input_tokens_seen=777)).tokens == 777


def test_a_checkpoint_has_its_last_evaluation_in_the_log(tmp_path: Path) -> None:
    logs = [{"eval_lm_loss": 3.0, "eval_bits_per_byte": 2.5}, {"eval_lm_loss": 2.0, "eval_bits_per_byte": 1.5}, {}]
    folder(tmp_path, log_history=logs)
    (tmp_path / "all_results.json").unlink()
    training = read_training(tmp_path)
    assert training.metrics["eval_bits_per_byte"] == 1.5
    assert training.global_batch is None and training.tokens is None


@pytest.mark.parametrize(
    ("dataset", "named", "words"),
    [
        ("org/corpus", "org/corpus", "https://huggingface.co/datasets/org/corpus"),
        ("/srv/someone/books/part.jsonl", None, "`part.jsonl`"),
        ("books/part.jsonl", None, "`part.jsonl`"),
        ("[a/one.txt, b/two.txt]", None, "`one.txt`, `two.txt`"),
        ("here/books", None, "`books`"),
    ],
)
def test_only_a_dataset_of_the_hub_is_named_as_one(dataset: str, named: str | None, words: str, tmp_path: Path) -> None:
    (tmp_path / "here" / "books").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    card = render_card(tiny_config("top_p"), "org/name", read_training(folder(tmp_path / "run", dataset)))
    assert card.data.datasets == (named and [named])
    assert words in card.text and "someone" not in card.text


def test_a_base_model_is_named(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "this"
    run.mkdir(parents=True)

    def card(model: str) -> ModelCard:
        (run / "train_config.yaml").write_text(f"model: {model}\ndataset: python-stdlib\n")
        return render_card(tiny_config("top_p"), "org/name", read_training(run))

    assert card("org/base").data.base_model == "org/base"
    (tmp_path / "runs" / "base").mkdir()
    local = card("runs/base")
    assert local.data.base_model is None and "| began from | a local checkpoint |" in local.text
    assert "no text but" not in local.text


def test_tasks_show_on_the_hub_and_in_a_table(tmp_path: Path) -> None:
    config = tiny_config("top_p")
    (tmp_path / "report.json").write_text(json.dumps(TASKS | {"routing": config.routing}))
    report = read_evaluation(tmp_path / "report.json", tmp_path, config.routing)
    card = render_card(config, "org/name", TrainingRecord(), [report])
    assert results_of(card) == {
        ("piqa", "acc"): 0.6125,
        ("piqa", "experts_per_token"): 2.5,
        ("lambada", "perplexity"): 31.5,
    }
    assert "| `piqa` | acc | 0.6125 ± 0.011 | 2.12 | 2.5 | 1,234,567 |" in card.text
    assert "lm_eval 0.4.13" in card.text


def test_a_report_on_text_replaces_that_of_the_training(tmp_path: Path) -> None:
    report = {"dataset": ["/data/private/pep.txt"], "split": "all", "bits_per_byte": 1.5, "experts_per_token": 2.5}
    (tmp_path / "report.json").write_text(json.dumps(report | {"tokens": 1000, "block_size": 64}))
    config = tiny_config("top_p")
    reports = [read_evaluation(tmp_path / "report.json", tmp_path, config.routing)]
    card = render_card(config, "org/name", read_training(folder(tmp_path)), reports)
    assert results_of(card) == {("text", "bits_per_byte"): 1.5, ("text", "experts_per_token"): 2.5}
    assert f"{count_cost(config, 2.5).activity[0].parameters:,} at 2.5" in card.text
    assert "`pep.txt`, 1,000 tokens in sequences of 64" in card.text and "private" not in card.text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"results": {}}, "no report"),
        ({"results": {"piqa": 0.5}}, "no report"),
        ({"bits_per_byte": "1.0"}, "no report"),
        ({"bits_per_byte": 1.0, "routing": {"method": "top_k"}}, "another routing"),
    ],
)
def test_a_report_that_is_none_is_refused(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        read_evaluation(tmp_path / "report.json", tmp_path, tiny_config("top_p").routing)


@pytest.mark.parametrize("name", all_routings())
def test_every_routing_has_a_card_whose_parts_are_its_own(name: str) -> None:
    config = tiny_config(all_routings()[name])
    card = render_card(config, "org/name", TrainingRecord())
    for axis in ("scorer", "selector", "experts"):
        part = config.routing[axis]
        assert f"| {axis} `{part['type']}` |" in card.text
        for option, value in part.items():
            assert option == "type" or f"| | `{option}` | `{value!r}` |" in card.text
    for loss, coefficient in config.routing["losses"].items():
        assert (f"| `{loss}` | {coefficient:g} |" in card.text) == bool(coefficient)
    # Every table row has the cells of its header.
    for table in re.findall(r"(?:^\|.*\n)+", card.text, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize("name", METHODS)
def test_the_code_of_the_card_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the look-up of the repository."""
    model = tiny_model(name, vocab_size=280)
    model.save_pretrained(tmp_path / "model")
    card = render_card(model.config, "org/name", TrainingRecord())
    (load, *changes) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert 'name = "org/name"' in load and PROMPT in load
    namespace = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": tmp_path / "model",
        "inputs": {"input_ids": torch.arange(5)[None]},
    }
    for block in changes:
        exec(block.replace("max_new_tokens=20", "max_new_tokens=2"), namespace)
        changed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", routing={"selector": namespace["changes"]})
        assert changed.config.routing != model.config.routing == namespace["model"].config.routing
    assert len(changes) == 1


def test_layers_that_differ_are_named() -> None:
    config = tiny_config("top_p", layer_routing={0: {"selector": {"p": 0.7}}})
    text = render_card(config, "org/name", TrainingRecord()).text
    assert "| 0 | `{'selector': {'p': 0.7}}` |" in text
    dense = DynMoeConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, mlp_layer_types=["dense"] * 2)
    assert "all of them dense" in render_card(dense, "org/name", TrainingRecord()).text


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_cited(name: str) -> None:
    """By the paper that the registry names, with its first author and year."""
    text = render_card(tiny_config(name), "org/name", TrainingRecord()).text
    for arxiv_id in re.findall(r"arXiv (\d{4}\.\d{5})", METHODS[name].paper):
        assert f"https://arxiv.org/abs/{arxiv_id})" in text and f"eprint = {{{arxiv_id}}}" in text
    for family, year, arxiv_id in re.findall(r"(\w+) et al\. (\d{4}).*?arXiv (\d{4}\.\d{5})", METHODS[name].paper):
        paper = papers.PAPERS[arxiv_id]
        assert paper.authors.startswith(f"{family},") and paper.year == int(year)


def test_citations_agree_with_those_of_the_repository() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    entry = papers.package_bibtex()
    assert all(text in entry for text in (citation["title"], citation["version"], citation["license"]))
    assert citation["authors"] == [{"name": "The dynmoe_hf developers"}] and "The dynmoe_hf developers" in entry
    (reference,) = citation["references"]
    paper = papers.PAPERS[reference["identifiers"][0]["value"].removeprefix("arXiv:")]
    assert paper.title == reference["title"] and paper.year == reference["year"]
    authors = [f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]]
    assert paper.authors == " and ".join(authors)


def test_the_template_and_the_cards_stand_in_model_cards() -> None:
    cards = ROOT / "model_cards"
    template = ROOT / "dynmoe_hf" / "hub" / "template.md"
    assert (cards / "template.md").resolve() == template
    for name, method in {"top_k_tiny": "top_k", "top_p_tiny": "top_p"}.items():
        card = ModelCard((cards / f"{name}.md").read_text())
        assert method in card.data.tags and card.data.eval_results and card.data.license
        assert headings(card.text) == headings(template.read_text())
    assert "transformers 5.20" in template.read_text() and "transformers>=5.20" in (ROOT / "pyproject.toml").read_text()
