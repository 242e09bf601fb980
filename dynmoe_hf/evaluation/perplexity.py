"""How well a language model predicts text, and with how many experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dynmoe_hf.analysis.statistics import RoutingStatistics, RoutingSummary

if TYPE_CHECKING:
    from datasets import Dataset

    from dynmoe_hf import DynMoeForCausalLM

MODEL_COLUMNS = ("input_ids", "position_ids", "labels")


def evaluate_text(model: DynMoeForCausalLM, blocks: Dataset, batch_size: int = 8) -> dict[str, Any]:
    """Predict every token of packed documents, and count what the model routes meanwhile.

    The figures do not depend on `batch_size`, and hold no auxiliary loss.

    Args:
        model: a language model; it is run in evaluation mode.
        blocks: rows of `dynmoe_hf.training.data.pack`; use `keep_remainder=True` to miss no token.
        batch_size: blocks in one call, at least 1.

    Returns:
        `lm_loss`: mean negative log-likelihood of a token in nats;
        `perplexity`: its exponential, a token;
        `bits_per_byte`: the same likelihood over the bytes of the text, comparable between tokenizers (Gao et al. 2020,
        The Pile, arXiv 2101.00027, section 3.1);
        `tokens`, `bytes`: how many were predicted;
        `experts_per_token`: mean over the routers, and `experts_per_token_by_layer` (L,) of each;
        `dead_experts`: experts, counted in every layer, that no token used;
        `expert_load`: (L, E) share of the tokens that used the expert.
        These four are missing from a model without MoE layers. Tokens at the end that a block repeats from the one
        before it (`keep_remainder`) are predicted once, but routed, and counted there, twice.

    Raises:
        ValueError: there is no block, or attention cannot tell the documents of a batch apart.
    """
    if len(blocks) == 0:
        raise ValueError("there is no block of text to evaluate on.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    attention = model.config._attn_implementation
    if batch_size > 1 and "flash_attention" in attention:
        raise ValueError(f"{attention} keeps packed documents apart only with batch_size=1, got {batch_size}.")
    batches = DataLoader(blocks.select_columns(list(MODEL_COLUMNS)).with_format("torch"), batch_size)
    total = torch.zeros((), dtype=torch.float64)
    num_labels = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), RoutingStatistics(model) as statistics:
            for batch in tqdm(batches, desc="Evaluating", unit="batch"):
                input_ids, position_ids, labels = (batch[name].to(model.device, torch.long) for name in MODEL_COLUMNS)
                # transformers looks for packed documents only where there is neither an attention mask nor a cache.
                logits = model(input_ids, position_ids=position_ids, use_cache=False).logits
                losses = F.cross_entropy(
                    logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
                )
                total += losses.cpu().double().sum()
                num_labels += int((labels[:, 1:] != -100).sum())
    finally:
        model.train(was_training)
    mean, num_bytes = total / num_labels, sum(blocks["num_bytes"])
    return {
        "lm_loss": mean.item(),
        "perplexity": mean.exp().item(),
        "bits_per_byte": total.item() / math.log(2) / num_bytes,
        "tokens": num_labels,
        "bytes": num_bytes,
        **_routing_figures(statistics.pop("eval")),
    }


def _routing_figures(summary: RoutingSummary | None) -> dict[str, Any]:
    if summary is None:
        return {}
    return {
        "experts_per_token": summary.experts_per_token,
        "experts_per_token_by_layer": summary.experts_per_token_by_layer,
        "dead_experts": summary.dead_experts,
        "expert_load": summary.expert_load,
    }
