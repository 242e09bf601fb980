"""Adapters of PEFT: the names of what LoRA goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from dynmoe_hf.model.blocks import DynMoeBlock
from dynmoe_hf.model.routing import unknown_name

from .routers import router_modules

if TYPE_CHECKING:
    from dynmoe_hf.model import DynMoePreTrainedModel

ROUTERS = "routers"


def lora_targets(
    model: DynMoePreTrainedModel, parts: Sequence[str] = ("attention", "experts", "shared_experts", "dense_ffn")
) -> dict[str, list[str]]:
    """What PEFT has to know of a model: `LoraConfig(r=8, **lora_targets(model))`.

    The names are read off the model, so they fit every layout of experts. Those of LoRA are names within a decoder
    layer, and stand for the same module or parameter of every layer.

    Args:
        model: any model of the family, without adapters yet.
        parts: any of

            * `attention`: the projections;
            * `experts`: the fused weights of the routed experts, with LoRA matrices for each expert;
            * `shared_experts`, `dense_ffn`: the FFNs that every token uses;
            * `routers`: not by default. A pretrained router sends tokens where they are treated well, and few examples
              say where else; if it moves, every expert gets other inputs. ESFT (Wang et al. 2024, arXiv 2407.01906)
              trains experts alone, too. Where it is asked for it is trained whole, being small.

            One that the model lacks adds nothing. Norms and `output_bias` always stay as they are.

    Returns:
        `target_modules` and `target_parameters`; and `modules_to_save`, if there is anything to train or to save whole:
        the routers, and what a controller moves. That is its own state and the selectors with its thresholds, with
        which their learnt scale is trained.

    Raises:
        ValueError: for an unknown part; if the model has none of them; if it has adapters.
    """
    for part in parts:
        if part not in (*ROOTS, ROUTERS):
            raise ValueError(unknown_name("part of a model:", part, (*ROOTS, ROUTERS)))
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("The model has adapters already: read the targets off it before they are added.")
    modules: set[str] = set()
    parameters: set[str] = set()
    for layer in model.base_model.layers:
        names = {module: name for name, module in layer.named_modules()}
        for root in (root for part in parts if part in ROOTS for root in ROOTS[part](layer)):
            for name, module in root.named_modules(prefix=names[root]):
                if isinstance(module, nn.Linear):
                    modules.add(name)
                else:
                    own = module.named_parameters(prefix=name, recurse=False)
                    parameters |= {parameter for parameter, weight in own if weight.ndim == 3}
    names = {module: name for name, module in model.base_model.named_modules()}
    whole = {names[module] for module in _whole(model, ROUTERS in parts)}
    if not (modules or parameters or whole):
        raise ValueError(f"The model has none of these parts: {', '.join(parts)}.")
    targets = {"target_modules": sorted(modules), "target_parameters": sorted(parameters)}
    return targets | ({"modules_to_save": sorted(whole)} if whole else {})


def _blocks(layer: nn.Module) -> list[DynMoeBlock]:
    return [module for module in layer.modules() if isinstance(module, DynMoeBlock)]


ROOTS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "attention": lambda layer: [layer.self_attn],
    "experts": lambda layer: [block.experts for block in _blocks(layer)],
    "shared_experts": lambda layer: [
        block.shared_experts for block in _blocks(layer) if block.shared_experts is not None
    ],
    "dense_ffn": lambda layer: [] if layer.is_sparse else [layer.mlp],
}


def _whole(model: DynMoePreTrainedModel, with_routers: bool) -> Iterator[nn.Module]:
    """The modules that are trained, or only saved, as they are."""
    if model.base_model.controller is not None:
        yield model.base_model.controller
    if with_routers:
        yield from router_modules(model)
    yield from (block.selector for block in model.moe_blocks() if block.selector.controlled)
