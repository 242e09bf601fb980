"""Converting checkpoints between a format and ours, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from dynmoe_hf.model import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model.modeling_dynmoe import AUTO_MAP
from dynmoe_hf.model.routing import shown, unknown_name

from .check import EMBEDDING, HEAD, Comparison, compare, logits_of, random_tokens
from .configs import unknown_fields
from .formats import FORMATS, NOT_YET, Format
from .plain import PLAIN_LOGITS
from .sources import Checkpoint
from .tables import Group, groups_for, groups_of, join, match, split
from .writing import Job, copy_companions, new_folder, write_weights

OURS = DynMoeConfig.model_type
SMALL_FILE = 2**25
DTYPES = ("float32", "bfloat16", "float16")
LOSSLESS = (None, "float32")  # after others, logits differ by rounding


@dataclass
class Report:
    """What a conversion did.

    Args:
        source, target: the folders.
        source_format, target_format: names of formats, `dynmoe` for ours.
        tensors, parameters, num_bytes, files: what was written.
        comparison: of the logits of both; None if it was not asked for.
        notes: what the target does not say, one sentence each.
        exact: whether an upcycled model answers at first as the dense one; None for other conversions.
        promise: why, or why not.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    tensors: int = 0
    parameters: int = 0
    num_bytes: int = 0
    files: int = 0
    comparison: Comparison | None = None
    notes: list[str] = field(default_factory=list)
    exact: bool | None = None
    promise: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str | None = None,
    source_format: str | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    allow_pickle: bool = False,
    max_shard_size: int | str | None = None,
) -> Report:
    """Convert a checkpoint of a known format into one of this family, or back.

    The source is only read. The target appears when it is whole and its logits have been compared with those of the
    source; until then it has another name beside it, and whatever goes wrong, nothing is left of it.

    Args:
        source: folder or Hub id.
        target: folder to be made.
        to: format to be written; None for ours.
        source_format: format of the source; None reads it from config.json and the names of the tensors.
        dtype: `float32`, `bfloat16` or `float16` for all weights; None keeps that of each.
        check: compare logits in float32, one layer in memory at a time.
        overwrite: replace the folder of a model that is there.
        allow_pickle: read pytorch_model.bin where there are no safetensors, with `weights_only=True`.
        max_shard_size: bytes, or text like `5GB`; None for the size of the largest file of the source, or 32 MiB.

    Raises:
        ValueError: a format is unknown; the other side cannot say what the model computes; weights are missing, unknown
            or of the wrong shape; the target is there; the logits differ.
        dynmoe_hf.errors.UserError: the target could not be written.
    """
    checkpoint = Checkpoint(source, allow_pickle)
    name = detect_format(checkpoint, source_format)
    if (name == OURS) == (to in (None, OURS)):
        written = ", ".join(repr(name) for name, known in FORMATS.items() if known.write_config)
        raise ValueError(
            f"{str(source)!r} has the format {name!r}; --to names what it becomes, which is {OURS!r} for other formats "
            f"and one of {written} for ours."
        )
    with new_folder(target, checkpoint.folder, overwrite) as folder:
        if name == OURS:
            jobs, config, read_config, notes = _plan_export(checkpoint, to, dtype)
        else:
            jobs, config, read_config, notes = _plan_import(checkpoint, name, dtype)
        report = Report(str(source), str(target), name, to or OURS, notes=notes)
        write(folder, jobs, config, checkpoint, report, max_shard_size)
        if check:
            report.comparison = compare_with_source(checkpoint, name, read_config, folder, config)
            if dtype in LOSSLESS:
                refuse_different(report)
    return report


def detect_format(checkpoint: Checkpoint, wanted: str | None = None) -> str:
    """The format of a checkpoint: the one that is named, or the one that `model_type` and names of tensors say.

    Raises:
        ValueError: none is known, with the reason where there is one.
    """
    if wanted in NOT_YET or checkpoint.config.get("model_type") in NOT_YET:
        raise ValueError(NOT_YET[wanted if wanted in NOT_YET else checkpoint.config["model_type"]])
    if wanted is not None:
        if wanted != OURS and wanted not in FORMATS:
            raise ValueError(unknown_name("format", wanted, [OURS, *FORMATS]))
        return wanted
    model_type = checkpoint.config.get("model_type")
    if model_type == OURS:
        return OURS
    fitting = [name for name, known in FORMATS.items() if model_type in (known.model_types or (name,))]
    if model_type is None:
        fitting = [name for name, known in FORMATS.items() if known.marker]
    for name in fitting:
        if FORMATS[name].marker and any(FORMATS[name].marker in tensor for tensor in checkpoint.tensors):
            return name
    for name in fitting:
        if not FORMATS[name].marker or len(fitting) == 1:
            return name
    raise ValueError(f"no format is known for model_type {shown(model_type)}; known are {', '.join(FORMATS)}.")


def read_source_config(checkpoint: Checkpoint, name: str) -> tuple[Any, dict[str, Any], list[str]]:
    """The configuration of a source: of its own class or as stored, as arguments of `DynMoeConfig`, and notes.

    Raises:
        ValueError: it is refused, quantised, or says what `DynMoeConfig` cannot.
    """
    known = FORMATS[name]
    if checkpoint.config.get("quantization_config"):
        raise ValueError("the weights of the source are quantised: convert the checkpoint that they were made from.")
    try:
        config = checkpoint.config if known.config_class is None else _own_config(known, checkpoint)
        arguments, notes = known.read_config(config)
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]!r}, which the format {name!r} needs.") from error
    except (StrictDataclassError, TypeError, AttributeError) as error:
        raise ValueError(f"config.json is refused: {' '.join(str(error).split())[:400]}") from error
    if known.config_class is not None:
        notes = notes + unknown_fields(config, checkpoint.config)
    return config, arguments, notes


def our_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of what a model of ours saves."""
    with torch.device("meta"):
        model = DynMoeForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not (name == HEAD and config.tie_word_embeddings)}


def import_jobs(
    checkpoint: Checkpoint, known: Format, wanted: Mapping[str, torch.Size], num_experts: int, dtype: str | None
) -> dict[str, Job]:
    """How to make those of our tensors that a source has, by name.

    Raises:
        ValueError: the source lacks one of them, holds others, or has one in another shape.
    """
    names = [name for name in checkpoint.tensors if not any(match(drop, name) for drop in known.dropped)]
    if HEAD in names and HEAD not in wanted:
        names.remove(HEAD)
        if not torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDING)):
            raise ValueError(f"tie_word_embeddings says that {HEAD} is the embedding, but the file has another one.")
    groups, unknown = groups_of(known.rules, names)
    unknown += sorted(set(groups) - set(wanted))
    if unknown:
        raise ValueError(f"the checkpoint has weights that its configuration does not explain: {_some(unknown)}.")
    jobs, missing = {}, []
    for name, shape in wanted.items():
        if name in groups:
            jobs[name] = _import_job(checkpoint, groups[name], shape, num_experts, dtype)
        elif any(match(zero, name) for zero in known.zeros):
            kept = jobs[EMBEDDING].dtype if EMBEDDING in jobs else torch.float32
            jobs[name] = Job(name, shape, kept, partial(torch.zeros, shape, dtype=kept))
        else:
            missing.append(name)
    if missing:
        raise ValueError(f"the checkpoint lacks the weights of {_some(missing)}.")
    return jobs


def write(
    folder: Path,
    jobs: list[Job],
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
    report: Report,
    max_shard_size: int | str | None,
) -> None:
    """Write weights, configuration, code, tokenizer and settings of generation; fills in the numbers of the report."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    dtypes = {job.dtype for job in jobs if job.dtype.is_floating_point}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else config.dtype
    config.architectures = [model_class.__name__]
    size = max(checkpoint.largest_file, SMALL_FILE) if max_shard_size is None else max_shard_size
    report.files = write_weights(folder, jobs, size, checkpoint)
    if isinstance(config, DynMoeConfig):
        config.auto_map = dict(AUTO_MAP)
        with torch.device("meta"):
            custom_object_save(DynMoeForCausalLM(config), folder, config=config)
    config.save_pretrained(folder)
    copy_companions(checkpoint.folder, folder)
    if not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    report.tensors = len(jobs)
    report.parameters = sum(job.shape.numel() for job in jobs)
    report.num_bytes = sum(job.num_bytes for job in jobs)


def compare_with_source(
    checkpoint: Checkpoint, name: str, read_config: Any, folder: Path, config: PreTrainedConfig
) -> Comparison:
    """Logits of the source, by transformers' class or the formulas of the released code, and of what was written."""
    input_ids = random_tokens(config.vocab_size, config.max_position_embeddings)
    if name in PLAIN_LOGITS:
        expected = PLAIN_LOGITS[name](checkpoint.read, read_config, input_ids)
    else:
        expected = logits_of(checkpoint, read_config, input_ids)
    checkpoint.close()
    return compare(expected, logits_of(Checkpoint(folder), type(config).from_pretrained(folder), input_ids))


def refuse_different(report: Report) -> None:
    """Raises ValueError if logits differ that should not."""
    if report.comparison is not None and not report.comparison.is_equal:
        raise ValueError(
            f"the logits of source and target differ by {report.comparison.max_difference:.3g}, so the target was not "
            "kept; --no-check keeps it."
        )


def _plan_import(
    checkpoint: Checkpoint, name: str, dtype: str | None
) -> tuple[list[Job], DynMoeConfig, Any, list[str]]:
    read_config, arguments, notes = read_source_config(checkpoint, name)
    config = DynMoeConfig(**arguments)
    jobs = import_jobs(checkpoint, FORMATS[name], our_shapes(config), config.num_experts, dtype)
    return list(jobs.values()), config, read_config, notes


def _plan_export(
    checkpoint: Checkpoint, to: str, dtype: str | None
) -> tuple[list[Job], PreTrainedConfig, DynMoeConfig, list[str]]:
    """Raises ValueError where the format cannot say what the model computes."""
    if to in NOT_YET:
        raise ValueError(NOT_YET[to])
    if to not in FORMATS:
        raise ValueError(unknown_name("format", to, FORMATS))
    if FORMATS[to].write_config is None:
        raise ValueError(f"the format {to!r} is read and not written.")
    if checkpoint.config.get("quantization_config"):
        raise ValueError("the weights of the source are quantised: convert the checkpoint that they were made from.")
    ours = DynMoeConfig.from_pretrained(checkpoint.folder)
    config, notes = FORMATS[to].write_config(ours)
    shapes = our_shapes(ours)
    stored = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if stored != shapes:
        wrong = sorted(name for name in {**stored, **shapes} if stored.get(name) != shapes.get(name))
        raise ValueError(f"the weights are not those of the configuration: {_some(wrong)}.")
    groups, unknown = groups_for(FORMATS[to].rules, shapes)
    if unknown:
        raise ValueError(f"the format {to!r} has no weights for {_some(unknown)}.")
    jobs = []
    for group in groups.values():
        whole = checkpoint.tensors[group.ours]
        kept = _dtype(dtype, whole.dtype)
        for row, part, name in group.names():
            shape = split(group, row, part, lambda name, index: _at(checkpoint.tensors[name].meta, index)).shape
            jobs.append(Job(name, shape, kept, partial(split, group, row, part, checkpoint.read)))
    return jobs, config, ours, notes


def _import_job(checkpoint: Checkpoint, group: Group, wanted: torch.Size, num_experts: int, dtype: str | None) -> Job:
    meta = join(group, lambda name: checkpoint.tensors[name].meta, num_experts)
    if meta.shape != wanted:
        raise ValueError(f"{group.ours} would be {tuple(meta.shape)}, but config.json says {tuple(wanted)}.")
    make = partial(join, group, checkpoint.read, num_experts)
    return Job(group.ours, wanted, _dtype(dtype, meta.dtype), make)


def _own_config(known: Format, checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration in its own class, without a stored choice of kernels, whose code transformers would fetch."""
    kept = {name: value for name, value in checkpoint.config.items() if "_implementation" not in name}
    return known.config_class.from_dict(kept)


def _dtype(wanted: str | None, stored: torch.dtype) -> torch.dtype:
    if wanted is None or not stored.is_floating_point:
        return stored
    if wanted not in DTYPES:
        raise ValueError(unknown_name("dtype", wanted, DTYPES))
    return getattr(torch, wanted)


def _at(tensor: Tensor, index: int | None) -> Tensor:
    return tensor if index is None else tensor[index]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
