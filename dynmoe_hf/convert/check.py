"""Comparing two checkpoints by their logits, with one decoder layer in memory at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig
from transformers.utils import logging

from dynmoe_hf.model import DynMoeConfig

from .sources import Checkpoint

BATCH = (2, 16)
TOLERANCE = 1e-4
EMBEDDING, HEAD = NOT_IN_LAYERS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two models are apart on the same random tokens, both computed in float32.

    Args:
        max_difference: largest absolute difference of two logits.
        scale: largest absolute logit of the source.
        argmax_agreement: share of the positions at which both find the same token most probable, 0 ... 1.
        positions: how many were compared.
    """

    max_difference: float
    scale: float
    argmax_agreement: float
    positions: int

    @property
    def is_equal(self) -> bool:
        """Whether the difference is no more than rounding makes: 1e-4 of the largest logit, or of 1."""
        return self.max_difference <= TOLERANCE * max(self.scale, 1.0)


def random_tokens(vocab_size: int, longest: int) -> Tensor:
    """The batch that is compared, (2, 16) or shorter: always the same one."""
    shape = (BATCH[0], min(BATCH[1], longest))
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def compare(expected: Tensor, found: Tensor) -> Comparison:
    """Compare logits (B, S, V)."""
    return Comparison(
        max_difference=(expected - found).abs().max().item(),
        scale=expected.abs().max().item(),
        argmax_agreement=(expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
        positions=expected.shape[:-1].numel(),
    )


@torch.inference_mode()
def logits_of(checkpoint: Checkpoint, config: PreTrainedConfig, input_ids: Tensor) -> Tensor:
    """Logits (B, S, V) in float32, by transformers' own class of the configuration.

    The class is built and loaded with one decoder layer after the other, except where layers share a router or a
    controller: then all are loaded together.

    Raises:
        ValueError: the checkpoint lacks weights of the model, or has others.
    """
    hidden_states = checkpoint.read(EMBEDDING)[input_ids].float()
    for layers in _spans(config):
        model = _load_layers(checkpoint, config, layers)
        if layers.stop < config.num_hidden_layers:
            model.norm = nn.Identity()
        hidden_states = model(inputs_embeds=hidden_states, use_cache=False).last_hidden_state
        del model
        checkpoint.close()
    return hidden_states @ checkpoint.read(EMBEDDING if config.tie_word_embeddings else HEAD).float().T


def _spans(config: PreTrainedConfig) -> Iterator[range]:
    layers = range(config.num_hidden_layers)
    if isinstance(config, DynMoeConfig):
        specs = [config.routing_for(layer) for layer in layers if config.is_sparse(layer)]
        if any(spec["scorer"]["type"] == "recurrent" or spec["controller"]["type"] != "none" for spec in specs):
            yield layers
            return
    yield from (range(layer, layer + 1) for layer in layers)


def _load_layers(checkpoint: Checkpoint, config: PreTrainedConfig, layers: range) -> nn.Module:
    """A model of these layers alone, with the weights that the checkpoint has for them, in float32."""
    part = _part(config, layers)
    tensors = {}
    for name in checkpoint.tensors:
        if name in NOT_IN_LAYERS or name.endswith(".rotary_emb.inv_freq"):
            continue
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers."):
            tensors[name.removeprefix("model.")] = checkpoint.read(name)
        elif int(number) in layers:
            tensors[f"layers.{int(number) - layers.start}.{rest}"] = checkpoint.read(name)
    with _quiet():
        model, report = MODEL_MAPPING[type(config)].from_pretrained(
            None,
            config=part,
            state_dict=tensors,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(key) for key in report[problem] if key != "embed_tokens.weight"):
            raise ValueError(
                f"{type(model).__name__} has {problem.replace('_', ' ')} in layer {layers.start}: {names[:3]}."
            )
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing weights, which we turn into an error, and its progress bars."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _part(config: PreTrainedConfig, layers: range) -> PreTrainedConfig:
    """The configuration of these layers alone, with an embedding of one row, which nothing reads."""
    part = copy.deepcopy(config)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) is not None:
            setattr(part, name, getattr(config, name)[layers.start : layers.stop])
    if isinstance(config, DynMoeConfig):
        own = {layer: spec for layer, spec in config.layer_routing.items() if layer in layers}
        part.layer_routing = {layer - layers.start: spec for layer, spec in own.items()}
    elif hasattr(config, "mlp_only_layers"):
        step, only = config.decoder_sparse_step, config.mlp_only_layers
        part.mlp_only_layers = [layer - layers.start for layer in layers if layer in only or (layer + 1) % step]
        part.decoder_sparse_step = 1
    part.num_hidden_layers = len(layers)
    part.vocab_size, part.pad_token_id, part.tie_word_embeddings = 1, None, False
    return part
