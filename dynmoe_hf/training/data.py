"""Documents from anywhere, packed into blocks of one length that keep documents apart.

Bits per byte of a model on packed blocks: the sum of the loss over all labels, in nats, divided by ln 2 and by the sum
of the column `num_bytes`. It compares models with different tokenizers (Gao et al. 2020, The Pile, section 3.1).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, NamedSplit, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .corpus import CORPUS_NAME, normalize, stdlib_corpus, unit_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
SPLITS = ("train", "validation", "test")

TOKEN_FEATURES = Features({"input_ids": List(Value("int32")), "num_bytes": List(Value("int32"))})
BLOCK_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "position_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "num_bytes": Value("int32"),
    }
)

# Documents per step: the offsets of a step's tokens are Python objects, about 150 bytes a token.
BATCH_SIZE = 32


def load_documents(
    source: str | Sequence[str],
    *,
    config_name: str | None = None,
    validation_files: str | Sequence[str] | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.05,
) -> DatasetDict:
    """Load documents for training and validation.

    Args:
        source: `python-stdlib` (the corpus of this Python, no download); the name of a Hub dataset; or local files:
            paths, glob patterns or folders, one or a list. A `.txt` file is one document, every row of a `.json`,
            `.jsonl` or `.parquet` file is one; text and JSON may be compressed (`.gz`, `.xz`, ...). A folder stands
            for all such files in it. If every one is named after a split (`train.jsonl`,
            `validation-00000-of-00002.parquet`), those are the splits.
        config_name: configuration of a Hub dataset.
        validation_files: local files for validation, instead of the source's own validation split.
        text_column: column that holds the text.
        validation_fraction: in (0, 1); share of the training documents to hold out when there is no validation split,
            chosen by a hash of their text, so that equal documents stay together and their order does not matter.

    Returns:
        Splits `train`, `validation` and, where the source has one, `test`, with the one string column `text`.
        Documents that are empty or blank are left out.

    Raises:
        FileNotFoundError: a file or a Hub dataset does not exist.
        ValueError: an argument, a file's type or content, a column or a split does not fit.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}, but must lie between 0 and 1.")
    splits = load_splits(source, config_name, validation_files)
    documents = {split: as_documents(splits[split], text_column, split) for split in SPLITS if split in splits}
    if "validation" not in documents:
        documents["train"], documents["validation"] = hold_out(documents["train"], "text", validation_fraction)
    return DatasetDict({split: documents[split] for split in SPLITS if split in documents})


def pack(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    keep_remainder: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenize documents, end each with EOS, and cut their concatenation into blocks of `block_size` tokens.

    A document that does not fit goes on in the next block. Documents do not see each other: `position_ids` restart,
    and transformers makes the attention mask block-diagonal where they do, if the model is called without an
    `attention_mask` and without a cache (`use_cache=False`, the default of `TrainingArguments`).

    The tokens after the last full block are dropped, or, with `keep_remainder`, end one more block that begins inside
    the block before it; the labels of that overlap are -100. So each token is predicted at most once, and no block
    holds padding, which a router would have to route and its statistics to count.

    Args:
        documents: a dataset with a string column `text`.
        tokenizer: a fast tokenizer with an EOS token; it adds no special token but that.
        block_size: tokens in a block, at least 2.
        keep_remainder: keep the last tokens, as an evaluation must.
        num_proc: processes that tokenize.

    Returns:
        One row a block, `B = block_size`:
        `input_ids` (B,) int32;
        `position_ids` (B,) int32, 0 at the start of a document and of a block;
        `labels` (B,) int32, the input ids (the model shifts them), -100 where the position is 0 or the token was in
        an earlier block: the first token of a document or a block has nothing to be predicted from;
        `num_bytes` int32, UTF-8 bytes of the text of the tokens whose label is not -100. EOS counts 0. Text that the
        tokenizer skips counts with the token after it (at the end of a document, before it), and a character spelled
        by several tokens with the first of them, so that the tokens of a document add up to all its bytes.

    Raises:
        ValueError: `block_size` is below 2, the tokenizer is slow or has no EOS token, there is no column `text`, or
            there are no documents or too few to fill one block.
    """
    check_packing(tokenizer, block_size)
    if "text" not in documents.column_names:
        raise ValueError(f"the documents have no column 'text', only: {', '.join(documents.column_names)}.")
    if len(documents) == 0:
        raise ValueError("there are no documents to pack.")
    # datasets hashes a module's functions by name alone; with the code in the fingerprint, no cache outlives a change.
    code = Path(__file__).read_bytes()
    tokens = documents.map(
        tokenize,
        batched=True,
        batch_size=BATCH_SIZE,
        remove_columns=documents.column_names,
        features=TOKEN_FEATURES,
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=num_proc,
        new_fingerprint=Hasher.hash((code, documents._fingerprint, tokenizer)),
        desc="Tokenizing",
    )
    num_tokens = pc.sum(pc.list_value_length(tokens.data["input_ids"])).as_py()
    if num_tokens < block_size:
        raise ValueError(
            f"the documents hold {num_tokens} tokens, which do not fill one block of {block_size}; "
            "lower the block size or give more text."
        )
    return Dataset.from_generator(
        _blocks,
        features=BLOCK_FEATURES,
        gen_kwargs={"tokens": tokens, "block_size": block_size, "keep_remainder": keep_remainder},
        split=NamedSplit("packed"),
        fingerprint=Hasher.hash((tokens._fingerprint, block_size, keep_remainder)),
    )


def check_packing(tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Refuse what cannot make blocks, with a ValueError."""
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}, but a block needs at least 2 tokens to predict one.")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot tell which text a token covers; a fast tokenizer can.")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to end documents with; set tokenizer.eos_token.")


def load_splits(
    source: str | Sequence[str], config_name: str | None, validation_files: str | Sequence[str] | None
) -> dict[str, Dataset]:
    """The splits of a source of `load_documents`, with all their columns; there is one named `train`.

    Raises:
        FileNotFoundError: a file or a Hub dataset does not exist.
        ValueError: a file's type or content, or the splits do not fit.
    """
    splits = load_source(source, config_name)
    if validation_files:
        splits["validation"] = load_files(find_files(validation_files))
    if "train" not in splits:
        raise ValueError(f"{source!r} has no split named 'train', only: {', '.join(sorted(splits))}.")
    return splits


def load_source(
    source: str | Sequence[str], config_name: str | None, streaming: bool = False
) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """All splits of a source of `load_documents`, as they are; with `streaming`, nothing of them is read yet."""
    if isinstance(source, str) and source != CORPUS_NAME and not _is_local(source):
        return dict(load_dataset(source, config_name, streaming=streaming))
    if config_name is not None:
        raise ValueError(f"config_name is {config_name!r}, but {source!r} is no Hub dataset and has no configurations.")
    if source == CORPUS_NAME:
        if streaming:
            raise ValueError(f"{source!r} is made here and cannot be streamed; name a Hub dataset or files.")
        return dict(stdlib_corpus())
    files = find_files(source)
    if isinstance(source, str) and os.path.isdir(os.path.expanduser(source)):
        named = [re.match(r"(train|validation|test)[-.]", os.path.basename(file)) for file in files]
        if all(named):
            splits = sorted({match[1] for match in named})
            return {
                split: load_files(
                    [file for file, match in zip(files, named, strict=True) if match[1] == split], streaming
                )
                for split in splits
            }
    return {"train": load_files(files, streaming)}


def _is_local(source: str) -> bool:
    looks_like_path = source.startswith((".", "~", os.sep)) or glob.has_magic(source) or _builder_of(source)
    return bool(looks_like_path) or os.path.exists(source)


def _builder_of(path: str) -> str | None:
    stem, extension = os.path.splitext(path.lower())
    if extension in COMPRESSIONS:
        extension = os.path.splitext(stem)[1]
    return FILE_BUILDERS.get(extension)


def find_files(patterns: str | Sequence[str]) -> list[str]:
    """The files that paths, glob patterns and folders stand for, sorted, each once."""
    found: set[str] = set()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in map(os.path.expanduser, patterns):
        if os.path.isdir(pattern):
            inside = glob.glob(os.path.join(glob.escape(pattern), "**", "*"), recursive=True)
            files = [file for file in inside if os.path.isfile(file) and _builder_of(file)]
        else:
            matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
            files = [file for file in matches if os.path.isfile(file)]
        if not files:
            raise FileNotFoundError(f"no text file found at {pattern!r}.")
        found.update(files)
    for file in sorted(found):
        if _builder_of(file) is None:
            raise ValueError(
                f"cannot read documents from {file!r}: its extension is none of {', '.join(FILE_BUILDERS)} "
                f"(or these followed by one of {', '.join(COMPRESSIONS)})."
            )
    return sorted(found)


def load_files(files: Sequence[str], streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of files of one kind; a text file is one row."""
    builders = sorted({str(_builder_of(file)) for file in files})
    if len(builders) > 1:
        raise ValueError(f"the files mix {' and '.join(builders)}; give files of one kind, for example with a pattern.")
    options: dict[str, Any] = {"sample_by": "document"} if builders == ["text"] else {}
    try:
        patterns = [glob.escape(file) for file in files]
        return load_dataset(builders[0], data_files=patterns, split="train", streaming=streaming, **options)
    except (DatasetGenerationError, StopIteration) as error:
        # StopIteration is what datasets raises for an empty JSON file.
        reason = error.__cause__ or str(error) or "there is nothing in it"
        raise ValueError(f"cannot read {', '.join(files)}: {reason}") from error


def as_documents(dataset: Dataset, text_column: str, split: str) -> Dataset:
    """The documents of a split that are not blank, with the one column `text`."""
    if text_column not in dataset.column_names:
        raise ValueError(
            f"the {split} split has no column {text_column!r} for the text, only: {', '.join(dataset.column_names)}."
        )
    if getattr(dataset.features[text_column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"column {text_column!r} of the {split} split holds {dataset.features[text_column]}, not text."
        )
    documents = dataset.select_columns([text_column]).rename_columns({text_column: "text"})
    documents = documents.filter(is_not_blank, input_columns="text", desc="Dropping blank documents")
    if len(documents) == 0:
        raise ValueError(f"the {split} split has no document with text in it.")
    return documents


def is_not_blank(text: str | None) -> bool:
    """Whether there is text in it."""
    return bool(text and not text.isspace())


def hold_out(documents: Dataset, column: str, fraction: float) -> tuple[Dataset, Dataset]:
    """The rows to train on and those to validate on, told apart by a hash of a column of text.

    Raises:
        ValueError: one of the two is empty.
    """
    is_held_out = np.array([unit_hash(normalize(text)) < fraction for text in documents[column]])
    if is_held_out.all() or not is_held_out.any():
        raise ValueError(
            f"holding out a fraction of {fraction} of {len(documents)} documents leaves the "
            f"{'train' if is_held_out.all() else 'validation'} split empty; give validation files or another fraction."
        )
    return documents.select(np.flatnonzero(~is_held_out)), documents.select(np.flatnonzero(is_held_out))


def tokenize(batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """The ids of the documents in the column `text`, each ended with EOS, and the bytes of text of every token."""
    encoded = tokenizer(
        batch["text"],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return {
        "input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]],
        "num_bytes": [
            np.append(_bytes_per_token(text, offsets), 0)
            for text, offsets in zip(batch["text"], encoded["offset_mapping"], strict=True)
        ],
    }


def _bytes_per_token(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes of the text up to the end of each token that no token before it covers, (T,) int64."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    ends[-1:] = len(text)
    return np.diff(bytes_before[ends], prepend=0)


class Packer:
    """Cuts the concatenation of documents into blocks.

    Args:
        block_size: tokens in a block.
        rest: (3, n) int, n < `block_size`: the tokens to begin with, as the property `rest` of an earlier packer.
    """

    def __init__(self, block_size: int, rest: Sequence[Sequence[int]] = ((), (), ())) -> None:
        self.block_size = block_size
        # Rows: token id, its bytes, whether it starts a document.
        self.columns = np.array(rest, dtype=np.int32)
        self.num_emitted = 0  # columns at the front that the last block holds already

    def add(self, documents: Mapping[str, Iterable[Sequence[int]]]) -> Iterator[dict[str, Any]]:
        """The blocks that more documents, as `tokenize` returns them, fill."""
        columns = [
            np.array([ids, num_bytes, np.arange(len(ids)) == 0], dtype=np.int32)
            for ids, num_bytes in zip(documents["input_ids"], documents["num_bytes"], strict=True)
        ]
        self.columns = np.concatenate([self.columns, *columns], axis=1)
        while self.columns.shape[1] - self.num_emitted >= self.block_size:
            self.columns = self.columns[:, self.num_emitted :]
            self.num_emitted = self.block_size
            yield _block(self.columns[:, : self.block_size], num_seen=0)

    @property
    def rest(self) -> np.ndarray:
        """The tokens that are in no block yet, once all blocks of `add` were taken."""
        return self.columns[:, self.num_emitted :]

    def last_block(self) -> dict[str, Any]:
        """The rest, at the end of a block that begins with tokens of the block before it."""
        return _block(self.columns[:, -self.block_size :], num_seen=self.block_size - self.rest.shape[1])


def _blocks(tokens: Dataset, block_size: int, keep_remainder: bool) -> Iterator[dict[str, Any]]:
    packer = Packer(block_size)
    for batch in tokens.with_format("numpy").iter(batch_size=BATCH_SIZE):
        yield from packer.add(batch)
    if keep_remainder and packer.rest.size:
        yield packer.last_block()


def _block(columns: np.ndarray, num_seen: int) -> dict[str, Any]:
    ids, num_bytes, starts = columns
    index = np.arange(len(ids))
    position_ids = index - np.maximum.accumulate(np.where(starts, index, 0))
    labels = np.where((position_ids == 0) | (index < num_seen), -100, ids)
    return {
        "input_ids": ids,
        "position_ids": position_ids,
        "labels": labels,
        "num_bytes": int(num_bytes[labels != -100].sum()),
    }
