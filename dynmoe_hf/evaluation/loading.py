"""Load a checkpoint to use it, and refuse one that is broken."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import cached_file, logging

from dynmoe_hf.model import DynMoeConfig
from dynmoe_hf.model.checkpoints import INDEX, read_object, shard_names
from dynmoe_hf.model.quantized import dequantized
from dynmoe_hf.model.routing import shown
from dynmoe_hf.training.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TorchAoConfig

    from dynmoe_hf import DynMoeForCausalLM


def load_config(name_or_path: str | os.PathLike, routing: str | dict[str, Any] | None = None) -> DynMoeConfig:
    """Load the configuration of a model of this family from a local folder, a config.json or a Hub id.

    Args:
        routing: changes to the stored routing.

    Raises:
        ValueError: there is none, it is not of this family, or it is refused.
    """
    source = os.path.expanduser(os.fspath(name_or_path))
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise ValueError(f"the folder {source!r} has no config.json, so it holds no model.")
        read_object(os.path.join(source, "config.json"))
    elif os.path.isfile(source):
        read_object(source)
    elif os.path.isabs(source) or source.startswith("."):
        raise ValueError(f"there is no model at {source!r}.")
    changes = {} if routing is None else {"routing": routing}
    try:
        # Not AutoConfig: it would offer to run the code of a model of another family.
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if model_type != DynMoeConfig.model_type:
            raise ValueError(f"{source!r} is a model of type {shown(model_type)}, not {DynMoeConfig.model_type!r}.")
        return DynMoeConfig.from_pretrained(source, **changes)
    except OSError as error:
        raise ValueError(f"cannot load a configuration from {source!r}: {_first_line(error)}") from error
    except StrictDataclassError as error:
        reason = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise ValueError(f"the configuration of {source!r} is refused: {reason}") from error


def load_model(
    name_or_path: str | os.PathLike,
    routing: str | dict[str, Any] | None = None,
    experts_implementation: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantization_config: TorchAoConfig | None = None,
) -> DynMoeForCausalLM:
    """Load the language model of a local folder or a Hub id, in evaluation mode.

    `from_pretrained` fills what a checkpoint lacks in heads and routers with fresh random numbers and goes on; here
    everything must be there. Weights are read from safetensors files only, which cannot hold code, and no memory is
    taken before it is clear that the files can hold the model that the configuration describes.

    Args:
        name_or_path: folder with config.json and safetensors, or `organisation/name`.
        routing: changes to the stored routing, as in `DynMoeConfig.from_pretrained`.
        experts_implementation: engine of the experts; None leaves the choice to transformers.
        dtype: of the weights; None keeps that of the checkpoint.
        device: None takes the accelerator, if there is one.
        quantization_config: how to quantise the weights, see quantization.py; None for a checkpoint that already is.

    Raises:
        ValueError: there is no such model or device; the configuration is refused or of another family; a file is
            truncated or corrupt; weights are missing, unexpected, of the wrong shape, or not finite.
    """
    source = os.path.expanduser(os.fspath(name_or_path))
    config = load_config(source, routing)
    is_stored_quantized = _is_stored_quantized(source, config)
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} is not available: {_first_line(error)}") from error
    try:
        shapes = _refuse_too_small(source, config, _weight_files(source))
        with _without_load_report():
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype="auto" if dtype is None else dtype,
                experts_implementation=experts_implementation,
                quantization_config=quantization_config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source!r} has a truncated or corrupt file of weights: {_first_line(error)}") from error
    except ImportError as error:
        raise ValueError(_first_line(error)) from error
    except OSError as error:
        raise ValueError(f"{source!r} has no complete set of safetensors weights: {_first_line(error)}") from error
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if not is_stored_quantized:
            raise
        raise ValueError(f"torchao cannot read the quantised weights of {source!r}: {_first_line(error)}") from error
    _refuse_incomplete(source, report)
    _refuse_misshapen(source, model, shapes)
    _refuse_not_finite(source, model)
    return model.to(device)


def load_model_and_tokenizer(
    name_or_path: str | os.PathLike, **options: Any
) -> tuple[DynMoeForCausalLM, PreTrainedTokenizerBase]:
    """`load_model` with its options, and the tokenizer of the same place.

    Raises:
        ValueError: as `load_model`; or there is no tokenizer, or it has more tokens than the model has embeddings.
    """
    model = load_model(name_or_path, **options)
    tokenizer = load_tokenizer(model.name_or_path)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {model.name_or_path!r} has {len(tokenizer)} tokens, but the model's vocabulary has only "
            f"{model.config.vocab_size}."
        )
    return model, tokenizer


def _is_stored_quantized(source: str, config: DynMoeConfig) -> bool:
    """Whether the checkpoint is quantised. Raises ValueError for a quantisation that could not be read strictly."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None and stored.get("quant_method") != "torchao":
        method = shown(stored.get("quant_method"))
        raise ValueError(f"{source!r} is quantised with {method}, and only what torchao has quantised is read here.")
    return stored is not None


def _weight_files(source: str) -> list[str]:
    """The safetensors files of a model. Raises ValueError for a broken index, OSError for a missing file."""
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if settings := cached_file(source, "generation_config.json", **optional):
        read_object(settings)
    if whole := cached_file(source, "model.safetensors", **optional):
        return [whole]
    if index := cached_file(source, INDEX, **optional):
        return [cached_file(source, name) for name in shard_names(index)]
    raise OSError(f"neither model.safetensors nor {INDEX} is there")


def _refuse_too_small(source: str, config: DynMoeConfig, files: list[str]) -> dict[str, torch.Size]:
    """The shapes of a model's parameters. Raise for files that cannot hold them, even at four bits each."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = sum(os.path.getsize(file) for file in files)
    for file in files:
        with safe_open(file, framework="pt"):
            pass  # that opens only if the header is sound and the file as long as it says
    if parameters > 2 * num_bytes:
        raise ValueError(
            f"the weights of {source!r} have {num_bytes:,} bytes, too few for the {parameters:,} parameters of its "
            "configuration."
        )
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _refuse_incomplete(source: str, report: dict[str, Any]) -> None:
    """Raise for weights that are not exactly those of the model."""
    for problem, keys in (
        ("lacks weights", sorted(report["missing_keys"])),
        ("has weights that the model does not know", sorted(report["unexpected_keys"])),
        (
            "has weights of the wrong shape",
            sorted(
                f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
            ),
        ),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"the checkpoint {source!r} {problem}: {', '.join(keys[:3])}{more}.")


def _refuse_misshapen(source: str, model: torch.nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Raise for quantised weights that are missing or do not fit the model: transformers reports neither."""
    for name, shape in shapes.items():
        weight = model.get_parameter(name)
        if weight.is_meta:
            raise ValueError(f"the checkpoint {source!r} lacks weights: {name}.")
        try:
            found = dequantized(weight).shape
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"the parts of {name} in {source!r} do not fit together: {_first_line(error)}") from error
        if found != shape:
            raise ValueError(f"the checkpoint {source!r} has {name} as {tuple(found)} instead of {tuple(shape)}.")


def _refuse_not_finite(source: str, model: torch.nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(dequantized(tensor)).all():
            raise ValueError(f"the checkpoint {source!r} has NaN or infinite values in {name} as {tensor.dtype}.")


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' table of missing and unexpected weights, which we turn into an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(": ")
