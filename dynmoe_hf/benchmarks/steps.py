"""The cases `step` and `methods`: a whole training step of a language model, AdamW included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.methods import DEFAULT_METHOD, METHODS

from .contest import Contest, Entrant
from .equality import failures_of
from .peers import REFERENCE, own_engines
from .settings import Build, Settings
from .shapes import DTYPES

ENGINE = "ragged"
PLAIN = "eager"
FLOAT32_TOLERANCE = 2e-4  # gradients of a whole model, of the largest element of each
LEARNING_RATE = 1e-4


class Sizes(NamedTuple):
    """Sizes of the models of a contest; I of one expert."""

    num_hidden_layers: int = 8
    hidden_size: int = 512
    num_attention_heads: int = 8
    vocab_size: int = 8192
    width: int = 1024
    num_experts: int = 16
    experts_per_token: int = 2
    batch_size: int = 4
    sequence_length: int = 512

    def common(self) -> dict[str, Any]:
        """Arguments of every configuration."""
        return {
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.sequence_length,
            "use_cache": False,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        }

    def input_ids(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocab_size, (self.batch_size, self.sequence_length), generator=generator)


FULL = Sizes()
QUICK = Sizes(2, 32, 4, 64, 24, 4, 2, 2, 16)
CHECK = QUICK._replace(num_hidden_layers=1)  # behind one router no rounding error can change a choice


def llama(sizes: Sizes) -> PreTrainedConfig:
    """The dense model whose FFN is as wide as the experts that a token uses."""
    return LlamaConfig(intermediate_size=sizes.experts_per_token * sizes.width, **sizes.common())


def dynmoe(sizes: Sizes, method: str = DEFAULT_METHOD) -> PreTrainedConfig:
    """Ours."""
    k = sizes.experts_per_token if method == DEFAULT_METHOD else None
    return DynMoeConfig(
        moe_intermediate_size=sizes.width,
        num_experts=sizes.num_experts,
        num_experts_per_tok=k,
        routing=method,
        **sizes.common(),
    )


def mixtral(sizes: Sizes) -> PreTrainedConfig:
    """Mixtral of transformers."""
    return MixtralConfig(
        intermediate_size=sizes.width,
        num_local_experts=sizes.num_experts,
        num_experts_per_tok=sizes.experts_per_token,
        output_router_logits=True,
        **sizes.common(),
    )


def olmoe(sizes: Sizes) -> PreTrainedConfig:
    """OLMoE of transformers."""
    return OlmoeConfig(
        intermediate_size=sizes.width,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.experts_per_token,
        output_router_logits=True,
        **sizes.common(),
    )


def qwen3_moe(sizes: Sizes) -> PreTrainedConfig:
    """Qwen3-MoE of transformers."""
    return Qwen3MoeConfig(
        intermediate_size=sizes.width,
        moe_intermediate_size=sizes.width,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.experts_per_token,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        output_router_logits=True,
        **sizes.common(),
    )


Family = Callable[[Sizes], PreTrainedConfig]
DENSE = "llama"
TRANSFORMERS_FAMILIES: dict[str, Family] = {"mixtral": mixtral, "olmoe": olmoe, "qwen3_moe": qwen3_moe}


def engines() -> list[str]:
    """The engines that are tried with every family: transformers' own and ours; both have one named `eager`."""
    return list(dict.fromkeys([PLAIN, "grouped_mm", *own_engines()]))


def build_model(family: Family, sizes: Sizes, dtype: torch.dtype, engine: str, seed: int) -> nn.Module:
    """A model in training mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(family(sizes), dtype=dtype, experts_implementation=engine).train()


class Training:
    """A model, its optimizer and one batch, whose step may run under any engine."""

    def __init__(self, model: nn.Module, sizes: Sizes, seed: int) -> None:
        self.model = model
        self.input_ids = sizes.input_ids(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        """It drops the gradients, so that only one of several models has any."""
        self.model(input_ids=self.input_ids, labels=self.input_ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def entrant(self, name: str, engine: str) -> Entrant:
        return Entrant(name, self.step, partial(self.model.set_experts_implementation, engine))


def check(family: Family, name: str, names: list[str], dtype: torch.dtype, seed: int) -> dict[str, str]:
    """Logits and gradients of a small model under each engine, against float64.

    Ours are compared with the engine `reference`, a family of transformers with the loop of its own class.
    """
    input_ids = CHECK.input_ids(seed)
    exact_engine = REFERENCE if family(CHECK).model_type == DynMoeConfig.model_type else PLAIN
    state = build_model(family, CHECK, dtype, PLAIN, seed).state_dict()

    def results(engine: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model = build_model(family, CHECK, dtype, engine, seed)
        model.load_state_dict(state)
        output = model(input_ids=input_ids, labels=input_ids)
        output.loss.backward()
        gradients = {f"gradient of {key}": parameter.grad for key, parameter in model.named_parameters()}
        gradients = {key: gradient for key, gradient in gradients.items() if gradient is not None}
        return {"logits": output.logits.detach(), **gradients}

    contestants = {engine: partial(results, engine, dtype) for engine in (PLAIN, *names)}
    return failures_of(
        contestants, results(exact_engine, torch.float64), PLAIN, f"{name} in {dtype}", FLOAT32_TOLERANCE
    )


def step_contest(dtype: str, quick: bool, seed: int) -> Contest:
    """Every family under every engine, over a dense Llama of the same active size."""
    sizes = QUICK if quick else FULL
    entrants = [Training(build_model(llama, sizes, DTYPES[dtype], PLAIN, seed), sizes, seed).entrant(DENSE, PLAIN)]
    left_out: dict[str, str] = {}
    for family, config in {"dynmoe": dynmoe, **TRANSFORMERS_FAMILIES}.items():
        failures = check(config, f"step of {family}", engines(), DTYPES[dtype], seed)
        training = Training(build_model(config, sizes, DTYPES[dtype], PLAIN, seed), sizes, seed)
        for engine in engines():
            if engine in failures:
                left_out[f"{family} {engine}"] = f"not supported: {failures[engine]}"
            else:
                entrants.append(training.entrant(f"{family} {engine}", engine))
    notes = {"tokens": sizes.batch_size * sizes.sequence_length}
    quantities = ("seconds", "peak_bytes")
    return Contest(
        f"{sizes.num_hidden_layers} layers", sizes._asdict(), dtype, entrants, DENSE, left_out, notes, quantities
    )


def method_contest(method: str, dtype: str, quick: bool, seed: int) -> Contest:
    """One method over top_k, both new models of the same sizes. Two at a time, because all do not fit into memory."""
    sizes = QUICK if quick else FULL
    families: Mapping[str, Family] = {name: partial(dynmoe, method=name) for name in (DEFAULT_METHOD, method)}
    entrants = []
    notes: dict[str, Any] = {"engine": ENGINE}
    failures = check(families[method], f"methods, {method}", [ENGINE], DTYPES[dtype], seed)
    for name, family in families.items():
        model = build_model(family, sizes, DTYPES[dtype], ENGINE, seed)
        notes[f"experts per token, {name}"] = _experts_per_token(model, sizes.input_ids(seed))
        if ENGINE not in failures or name == DEFAULT_METHOD:
            entrants.append(Training(model, sizes, seed).entrant(name, ENGINE))
    left_out = {method: failures[ENGINE]} if ENGINE in failures else {}
    return Contest(method, sizes._asdict(), dtype, entrants, DEFAULT_METHOD, left_out, notes)


@torch.no_grad()
def _experts_per_token(model: nn.Module, input_ids: Tensor) -> float:
    return model(input_ids=input_ids, output_routing=True).experts_per_token.mean().item()


def plan_step(settings: Settings) -> list[Build]:
    """The contests of `step`, one a dtype."""
    return [partial(step_contest, dtype, settings.quick, settings.seed) for dtype in settings.dtypes]


def plan_methods(settings: Settings) -> list[Build]:
    """The contests of `methods`: each method but the default one, and dtype."""
    return [
        partial(method_contest, method, dtype, settings.quick, settings.seed)
        for dtype in settings.dtypes
        for method in METHODS
        if method != DEFAULT_METHOD
    ]
