"""The arguments of `dynmoe train`, from a YAML file and from flags; flags win.

    # dynmoe train --config FILE --learning_rate 3e-4 --model.num_hidden_layers 6 --routing.selector.p 0.3
    model:                      # fields of DynMoeConfig for a new model; or `model: PATH` to go on from a checkpoint
      hidden_size: 128
      num_experts: 8
    routing:                    # a method (`routing: top_p`) or any part of a specification, see `dynmoe methods`
      method: top_p
      selector: {p: 0.4}
    dataset: python-stdlib      # all other keys are the fields of ModelArguments, DataArguments
    block_size: 256             # and transformers.TrainingArguments, side by side
    output_dir: runs/top_p
    learning_rate: 1e-3

Both sections nest to any depth, in the file and in flags (`--model.layer_routing.0.selector.p 0.6`). The value of such
a flag is read as in the file. A name for a part stands for `{method: NAME}` in `routing` and `{type: NAME}` below it; a
flag that gives a whole part (`--routing top_k`) replaces it. Scalars are those of YAML 1.2: `1e-3` is a number, and
`no`, as in `eval_strategy: no`, is a word. A key without a value counts as not given.
"""

import argparse
import dataclasses
import re
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from dynmoe_hf.errors import UserError, user_errors
from dynmoe_hf.model import DynMoeConfig
from dynmoe_hf.model.routing import unknown_name

SECTIONS = ("model", "routing")


@dataclass
class ModelArguments:
    """Which model is trained, and with which tokenizer."""

    _argument_group_name = "model"

    model: dict | str | None = field(
        default=None,
        metadata={
            "metavar": "PATH",
            "help": "checkpoint folder or Hub id to go on from; without it, --model.FIELD VALUE sets any field of "
            "DynMoeConfig for a new model",
        },
    )
    routing: dict | str | None = field(
        default=None,
        metadata={
            "metavar": "METHOD",
            "help": "routing method (`dynmoe methods` lists them); --routing.selector.p 0.3 sets single options",
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a tokenizer; without it, the tokenizer of the checkpoint, or for a new model "
            "a byte-level BPE trained on the training documents"
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "tokens of the tokenizer that is trained"})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "engine of the experts: ragged, grouped_mm, batched_mm, eager, ..."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention of transformers: sdpa, eager, flash_attention_2, ..."}
    )


@dataclass
class DataArguments:
    """Which text the model is trained and evaluated on."""

    _argument_group_name = "data"

    dataset: list[str] = field(
        default_factory=lambda: ["python-stdlib"],
        metadata={
            "help": "python-stdlib, the library of this Python; the name of a Hub dataset; or files, patterns or "
            "folders of .txt, .json, .jsonl or .parquet"
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    validation_files: list[str] | None = field(default=None, metadata={"help": "files to validate on"})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "share of the documents to hold out if there is no validation split"}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the training text while training, and keep none of it; needs max_steps and a tokenizer, and "
            "dataloader_num_workers tokenize beside the training"
        },
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "documents of a stream that are shuffled together; 0 keeps their order"}
    )
    validation_documents: int = field(
        default=1000,
        metadata={
            "help": "documents of a stream to validate on: the first of the validation split, or else of the training "
            "split, which are then not trained on"
        },
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    block_size: int = field(default=512, metadata={"help": "tokens in a training sequence"})
    num_proc: int | None = field(default=None, metadata={"help": "processes that tokenize"})


@dataclass
class DynMoeTrainingArguments(TrainingArguments):
    """All of transformers' TrainingArguments, the flag to write into a folder that is in use, what to log more, and
    what is different for routers.

    Raises:
        ValueError: for values out of range, and for options that exclude each other.
    """

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "train into a folder that is not empty; the checkpoints of an earlier run in it are deleted"},
    )
    log_experts_per_layer: bool = field(
        default=False, metadata={"help": "log the experts per token of every layer beside their mean"}
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate of the routers; by default learning_rate"}
    )
    router_weight_decay: float | None = field(
        default=None, metadata={"help": "weight decay of the routers; by default weight_decay"}
    )
    freeze_routers: bool = field(default=False, metadata={"help": "keep the routers as they are"})
    aux_warmup_steps: int = field(
        default=0, metadata={"help": "optimizer steps in which the coefficients of the auxiliary losses rise from 0"}
    )
    threshold_warmup_steps: int = field(
        default=0,
        metadata={"help": "optimizer steps in which p of top_p moves from threshold_warmup_start to its value"},
    )
    threshold_warmup_start: float = field(
        default=1.0, metadata={"help": "p of top_p before the first of these steps; 1 uses every expert"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        warmups = ("aux_warmup_steps", "threshold_warmup_steps")
        for name in ("router_learning_rate", "router_weight_decay", *warmups, "threshold_warmup_start"):
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
            if self.freeze_routers and name.startswith("router_"):
                raise ValueError(f"{name} and freeze_routers exclude each other: frozen routers are not trained.")
        for name in warmups:
            if getattr(self, name) and self.torch_compile:
                raise ValueError(f"{name} does not work with torch_compile: every new value compiles again.")


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `1e-3` is a string and `no` is false."""

    yaml_implicit_resolvers: dict[str, list] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_arguments(
    argv: Sequence[str], config_file: str | None = None, data_class: type = DataArguments
) -> tuple[ModelArguments, Any, DynMoeTrainingArguments]:
    """Read the YAML file, if any, and the flags.

    Args:
        argv: the flags.
        config_file: the YAML file.
        data_class: the dataclass of what a command reads and learns; the model and the training are those of every one.

    Raises:
        UserError: for anything that does not fit, before anything else happens.
    """
    with user_errors():
        settings = {} if config_file is None else read_settings(config_file)
        flags = take_sections(argv, settings)
        model = settings.get("model")
        if isinstance(model, Mapping):
            check_model_fields(model)
        parser = _parser(data_class)
        parser.set_defaults(**fit_settings(settings, config_file, data_class))
        *arguments, rest = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            name = rest[0].lstrip("-").partition("=")[0]
            raise ValueError(
                _unknown("argument", name, data_class) if rest[0].startswith("--") else f"What is {rest[0]!r} for?"
            )
    return tuple(arguments)


def to_yaml(model_args: ModelArguments, data_args: Any, training_args: DynMoeTrainingArguments, comment: str) -> str:
    """A file that repeats a run: the arguments of model and data, and what differs from the defaults of training."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    settings = {
        name: value
        for args in (model_args, data_args)
        for name, value in dataclasses.asdict(args).items()
        if value is not None
    }
    values = training_args.to_dict()
    default_accelerator = AcceleratorConfig().to_dict()
    for entry in dataclasses.fields(training_args):
        value = values.get(entry.name)
        not_given = value in (None, [], "") or value == entry.default or (value is False and entry.default is None)
        if entry.name == "accelerator_config":
            not_given = value.items() <= default_accelerator.items()
        about_this_call = entry.name in ("resume_from_checkpoint", "overwrite_output_dir")
        # Newer versions mirror the argument under a second name.
        alias = entry.name.startswith("gradient_") and entry.name.replace("gradient_", "activation_", 1) in values
        if not (not_given or about_this_call or alias or entry.name.endswith("_token")):
            settings[entry.name] = value
    return f"# {comment}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)


def help_text(data_class: type = DataArguments) -> str:
    """Everything that can be given, for the end of `dynmoe train --help`."""
    ours = HfArgumentParser((ModelArguments, data_class), usage=argparse.SUPPRESS, add_help=False)
    training = textwrap.fill(
        ", ".join(name for name in _field_types(DynMoeTrainingArguments)), width=100, initial_indent="  "
    ).replace("\n", "\n  ")
    return (
        f"{ours.format_help()}\ntraining, as in https://huggingface.co/docs/transformers/main_classes/trainer :\n"
        f"{training}\n\nThe YAML file:\n\n{textwrap.indent(_example(), '  ')}"
    )


def _example() -> str:
    return textwrap.dedent((__doc__ or "").split("\n\n")[1]) + "\n"


def _parser(data_class: type) -> _Parser:
    return _Parser((ModelArguments, data_class, DynMoeTrainingArguments), allow_abbrev=False, add_help=False)


def read_settings(path: str) -> dict[str, Any]:
    """The content of a YAML file; empty if it holds nothing.

    Raises:
        ValueError: there is no such file, or it does not hold names and values.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no configuration file {path!r}.")
    try:
        settings = _load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict | None):
        raise ValueError(f"{path} must hold `name: value` pairs, not {settings!r:.40}.")
    return settings or {}


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Yaml12Loader)  # a SafeLoader


def take_sections(argv: Sequence[str], settings: dict[str, Any]) -> list[str]:
    """Put the flags of nested sections into the settings; return all other flags.

    Raises:
        ValueError: a flag has no value, or one that is not YAML, or changes what has no options.
    """
    others, flags = [], list(argv)
    while flags:
        flag = flags.pop(0)
        name, equals, value = flag.partition("=")
        path = name.removeprefix("--").replace("-", "_").split(".")
        if not name.startswith("--") or path[0] not in SECTIONS:
            others.append(flag)
            continue
        if not equals:
            if not flags or flags[0].startswith("--"):
                raise ValueError(f"{name} needs a value.")
            value = flags.pop(0)
        try:
            _put(settings, path, _load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"{name} has a value that is not valid YAML: {value!r}.") from error
    return others


def _put(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    section = settings
    for depth, key in enumerate(path[:-1]):
        inner = section.get(_key(key))
        if isinstance(inner, str) and path[0] == "routing":
            inner = {"method" if depth == 0 else "type": inner}
        if not isinstance(inner, dict | None):
            name = ".".join(path[: depth + 1])
            raise ValueError(f"--{'.'.join(path)} does not fit: {name} is {inner!r}, which has no options.")
        section[_key(key)] = section = dict(inner or {})
    section[_key(path[-1])] = value


def _key(text: str) -> str | int:
    """Layers are numbers, as in the file."""
    return int(text) if text.isdigit() else text


def check_model_fields(model: Mapping[str, Any]) -> None:
    """Refuse names that are not fields of DynMoeConfig, which would keep them as attributes without a word.

    Raises:
        ValueError: with the nearest name.
    """
    known = {entry.name for entry in dataclasses.fields(DynMoeConfig)} | set(DynMoeConfig.attribute_map)
    known.remove("routing")
    for name in model:
        if name == "routing":
            raise ValueError("`routing` is a section of its own beside `model`, not inside it.")
        if name not in known:
            raise ValueError(unknown_name("field of DynMoeConfig in model:", name, known))


def fit_settings(settings: Mapping[str, Any], source: str | None, data_class: type = DataArguments) -> dict[str, Any]:
    """The settings of a file as argparse takes them for defaults: it parses those that are strings, and no others.

    Raises:
        ValueError: a name is not an argument of training, or a value is not of its kind.
    """
    hints = {name: hint for args in _parser(data_class).dataclass_types for name, hint in _field_types(args).items()}
    fitted = {}
    for name, value in settings.items():
        if name not in hints:
            raise ValueError(_unknown(f"key in {source}:", name, data_class))
        if value is not None:
            fitted[name] = _fit_value(name, value, hints[name])
    return fitted


def _fit_value(name: str, value: Any, hint: Any) -> Any:
    accepted = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = {get_origin(kind) or kind for kind in accepted}
    if isinstance(value, list) and list in kinds:
        return [str(item) for item in value]
    if type(value) in kinds:
        return value
    if isinstance(value, dict | list):
        raise ValueError(f"{name} takes a single value, not {value!r}.")
    return [str(value)] if list in kinds and str not in kinds else str(value)


def _field_types(args: Any) -> dict[str, Any]:
    hints = get_type_hints(args)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(args) if entry.init}


def _unknown(kind: str, name: object, data_class: type) -> str:
    known = {name for args in _parser(data_class).dataclass_types for name in _field_types(args)}
    # All accepted names would be more than a screen.
    return f"{unknown_name(kind, name, known).partition(' Accepted:')[0]} --help lists what there is."
