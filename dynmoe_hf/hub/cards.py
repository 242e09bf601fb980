"""The model card: what a stranger must know before loading a model, in the Hub's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import dynmoe_hf
from dynmoe_hf.analysis.cost import count_cost
from dynmoe_hf.analysis.description import describe_part
from dynmoe_hf.model import DynMoeConfig
from dynmoe_hf.model.expert_selectors import SELECTORS
from dynmoe_hf.model.losses import LOSSES
from dynmoe_hf.model.methods import AXES, METHODS

from .papers import PAPERS, bibtex, package_bibtex
from .records import BUILT_IN_CORPUS, TrainingRecord
from .results import ResultTable, evaluation_tables, training_table

TEMPLATE = Path(__file__).with_name("template.md")
PROMPT = "def read_file(path):"
TOKENS_PER_PARAMETER = 20
SHOWN_SETTINGS = (
    "learning_rate",
    "router_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "num_train_epochs",
    "aux_warmup_steps",
    "threshold_warmup_steps",
    "threshold_warmup_start",
    "freeze_routers",
    "bf16",
    "fp16",
    "seed",
)

BALANCE_UNITS = {"sequence": "sequence", "micro": "micro-batch", "global": "optimizer step"}

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def render_card(
    config: DynMoeConfig,
    repo_id: str,
    training: TrainingRecord,
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    license: str | None = None,
    languages: Sequence[str] = (),
    has_chat_template: bool = False,
) -> ModelCard:
    """Render the card of a language model. The same input gives the same card.

    Args:
        config: of the model.
        repo_id: `organisation/name` on the Hub.
        training: see `read_training`.
        evaluations: reports of `dynmoe evaluate`, see `read_evaluation`.
        license: identifier of the Hub, such as `apache-2.0`.
        languages: ISO codes of the text.
        has_chat_template: whether its tokenizer has one.
    """
    name = repo_id.partition("/")[2]
    tables = evaluation_tables(evaluations)
    if not any(table.is_text for table in tables) and (own := training_table(training)):
        tables.insert(0, own)
    facts = {
        **_size_facts(config, tables),
        **_routing_facts(config),
        **_training_facts(training),
        "name": name,
        "repo_id": repo_id,
        "config": config,
        "license": license,
        "prompt": PROMPT,
        "results": tables,
        "has_text_results": any(table.is_text for table in tables),
        "package_bibtex": package_bibtex(),
        "version": dynmoe_hf.__version__,
        "transformers_version": transformers.__version__,
        "torch_version": torch.__version__.partition("+")[0],
    }
    facts["limits"] = _limits(facts, training, has_chat_template)
    data = _metadata(config, name, training, tables, license, languages)
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **facts, **_FORMATS)


def _metadata(
    config: DynMoeConfig,
    name: str,
    training: TrainingRecord,
    tables: Sequence[ResultTable],
    license: str | None,
    languages: Sequence[str],
) -> ModelCardData:
    """What the Hub reads: filters, links to data and base model, and the results that it shows."""
    dataset = training.text.dataset if training.text else None
    entries = [entry for table in tables for entry in table.entries]
    return ModelCardData(
        language=list(languages) or None,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "moe", "dynamic-routing", config.model_type, config.routing["method"]],
        datasets=[dataset] if dataset and dataset != BUILT_IN_CORPUS else None,
        base_model=training.base_model,
        model_name=name if entries else None,
        eval_results=entries or None,
        ignore_metadata_errors=False,
    )


def _size_facts(config: DynMoeConfig, tables: Sequence[ResultTable]) -> dict[str, Any]:
    """Parameters, and what one token costs: at the experts per token that were measured, if they were."""
    source = next((table for table in tables if table.experts_per_token is not None), None)
    bounds = count_cost(config)
    cost = count_cost(config, source.experts_per_token) if source else bounds
    points = [f"{point.parameters:,} at {point.experts_per_token:.3g} experts per token" for point in cost.activity]
    return {
        "cost": cost,
        "varies": len(bounds.activity) > 1,
        "active": cost.activity[0] if len(cost.activity) == 1 else None,
        "measured": source and source.experts_per_token,
        "measured_on": source and source.subject,
        "activity_range": f"{', '.join(points)}; the mean of this model was not measured",
        "parameters_by_part": ", ".join(f"{part.replace('_', ' ')} {n:,}" for part, n in cost.parameters.items() if n),
        "sparse_layers": _sparse_layers(config),
        "experts_sentence": _experts_sentence(config),
    }


def _sparse_layers(config: DynMoeConfig) -> int:
    return sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))


def _experts_sentence(config: DynMoeConfig) -> str:
    sparse = _sparse_layers(config)
    if not sparse:
        return "none, every layer is dense"
    place = f"two banks in each of {sparse} layers" if _is_cartesian(config) else f"{sparse} layers"
    experts = f"{config.num_experts} in each of {place}"
    layout = config.routing["experts"].get("bank", config.routing["experts"])["type"]
    words = [f"{experts}, {config.moe_intermediate_size} wide" if layout == "swiglu" else experts]
    if config.num_shared_experts:
        words.append(f"{config.num_shared_experts} shared, which every token uses")
    if sparse < config.num_hidden_layers:
        words.append(f"layers without experts: {config.num_hidden_layers - sparse}")
    return "; ".join(words)


def _is_cartesian(config: DynMoeConfig) -> bool:
    return config.routing["experts"]["type"] == "cartesian"


def _routing_facts(config: DynMoeConfig) -> dict[str, Any]:
    routing, method = config.routing, METHODS.get(config.routing["method"])
    paper = method.paper if method else ""
    selector = routing["selector"]
    option = SELECTORS[selector["type"]].slots_option
    if selector.get("p"):
        option, changed = "p", selector["p"] / 2
    else:
        changed = config.num_experts_per_tok // 2
    return {
        "method": method,
        "paper": _paper_sentence(paper),
        "bibtex": [bibtex(arxiv_id) for arxiv_id in _ARXIV.findall(paper) if arxiv_id in PAPERS],
        "parts": {axis: describe_part(axis, routing[axis]) for axis in AXES if routing[axis]["type"] != "none"},
        "layer_changes": config.layer_routing,
        "losses": {loss: (f"{c:g}", LOSSES[loss]) for loss, c in routing["losses"].items() if c},
        "balance_unit": BALANCE_UNITS[config.balance_scope],
        "is_cartesian": _is_cartesian(config),
        "option": option,
        "stored": selector[option],
        "changed": changed,
    }


def _paper_sentence(paper: str) -> str:
    linked = _ARXIV.sub(lambda match: f"[arXiv {match[1]}](https://arxiv.org/abs/{match[1]})", paper)
    if linked.startswith("none; "):
        return f"No paper has this combination; its parts are those of {linked.removeprefix('none; ')}."
    return f"It comes from {linked}."


def _training_facts(training: TrainingRecord) -> dict[str, Any]:
    if training.base_model:
        began = f"[{training.base_model}](https://huggingface.co/{training.base_model})"
    else:
        began = "a local checkpoint" if training.from_local_checkpoint else "random weights"
    return {
        "training": training,
        "began_from": began,
        "hyperparameters": {key: _plain(training.settings[key]) for key in SHOWN_SETTINGS if key in training.settings},
    }


def _plain(value: object) -> object:
    """30 rather than 30.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _limits(facts: Mapping[str, Any], training: TrainingRecord, has_chat_template: bool) -> list[str]:
    from_random = not (training.base_model or training.from_local_checkpoint)
    limits = []
    if not has_chat_template:
        limits.append("It continues text. It has no chat template and is not made to follow instructions.")
    share = (training.tokens or 0) / facts["cost"].total_parameters
    if training.tokens and from_random and share < TOKENS_PER_PARAMETER:
        limits.append(
            f"It has seen {share:.2g} tokens for each of its parameters. A compute-optimal training takes about "
            f"{TOKENS_PER_PARAMETER} (Hoffmann et al. 2022, *Training Compute-Optimal Large Language Models*): it is "
            "undertrained, and its text will not be of use beyond experiments with the method."
        )
    if from_random and training.text and training.text.dataset == BUILT_IN_CORPUS:
        limits.append("It has seen no text but the library of one version of Python and its documentation in English.")
    if facts["varies"]:
        limits.append("The number of experts follows the text, so other text may cost more or less than was measured.")
    found = "Nothing was measured" if not facts["results"] else "Nothing but the results above was measured"
    limits.append(f"{found}: not whether what it says is true, and not what is harmful or unfair in it.")
    return limits


def _short(value: float, billion: str = "B") -> str:
    """Three digits: 2.36 M. Parameters are counted in B, bytes and operations in G."""
    for size, letter in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


_FORMATS = {
    "short": _short,
    "count": "{:,}".format,
    "number": "{:.3g}".format,
    "repr": repr,
    "lower_first": _lower_first,
}
