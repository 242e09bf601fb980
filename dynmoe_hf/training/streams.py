"""Text that is read while it is trained on: the blocks of `pack`, from documents that are kept nowhere.

Where a reader stands is a few numbers and less than a block of tokens (`Place`), so that a run which goes on later
reads on from there. That is why there is no shuffle buffer that rolls: documents are shuffled a window at a time, and
a window is made again from the place where it begins.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from dynmoe_hf.errors import UserError

from .corpus import normalize, unit_hash
from .data import (
    BATCH_SIZE,
    Packer,
    as_documents,
    check_packing,
    find_files,
    is_not_blank,
    load_files,
    load_source,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_READ = 1000


@dataclass(frozen=True)
class DocumentStream:
    """Documents of many files, read one after the other.

    Args:
        source: the rows, of which every file is a shard.
        name: what messages call it.
        text_column: column that holds the text.
        held_out: `unit_hash` of the normalised text of every document that is left out.
    """

    source: IterableDataset
    name: str
    text_column: str
    held_out: frozenset[float] = frozenset()

    @property
    def num_files(self) -> int:
        """How many files there are."""
        return self.source.num_shards

    def rows(self, file: int, start: int = 0) -> Iterator[str | None]:
        """The texts of a file from a row on. The rows before it are read too, but not looked at.

        Raises:
            UserError: the file cannot be read, or has no such column of text.
        """
        try:
            file_rows = self.source.shard(self.num_files, file).with_format("arrow")
            for table in file_rows.iter(batch_size=ROWS_PER_READ):
                if start < table.num_rows:
                    yield from self._column(table).slice(start).to_pylist()
                start = max(start - table.num_rows, 0)
        except UserError:
            raise
        except Exception as error:  # a network, a server, a disk, a parser: anything
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise UserError(f"the text of {self.name} cannot be read: {reason}.") from error

    def is_kept(self, text: str | None) -> bool:
        """Whether a row is a document of this stream."""
        return is_not_blank(text) and not (self.held_out and unit_hash(normalize(text)) in self.held_out)

    def _column(self, table: pa.Table) -> pa.ChunkedArray:
        if self.text_column not in table.column_names:
            raise UserError(
                f"{self.name} has no column {self.text_column!r} for the text, only: {', '.join(table.column_names)}."
            )
        column = table[self.text_column]
        if column.type not in (pa.string(), pa.large_string(), pa.null()):
            raise UserError(f"column {self.text_column!r} of {self.name} holds {column.type}, not text.")
        return column


def load_stream(
    source: str | Sequence[str],
    *,
    config_name: str | None = None,
    validation_files: str | Sequence[str] | None = None,
    text_column: str = "text",
    validation_documents: int = 1000,
) -> tuple[DocumentStream, Dataset]:
    """Open documents for training, and read those for validation.

    Args:
        source: as for `load_documents`, but for the corpus of this Python.
        config_name: configuration of a Hub dataset.
        validation_files: local files for validation; all of them are read.
        text_column: column that holds the text.
        validation_documents: at least 1; without validation files, so many documents are read for validation: the
            first of the validation split, or, if there is none, of the training split. Training then leaves out every
            document with the text of one of these, wherever it stands.

    Returns:
        The stream of documents to train on, and the documents to validate on in the column `text`. Blank documents are
        left out of both.

    Raises:
        FileNotFoundError: a file or a Hub dataset does not exist.
        ValueError: an argument, a file's type or content, a column or a split does not fit.
    """
    if validation_documents < 1:
        raise ValueError(f"validation_documents is {validation_documents}, but must be at least 1.")
    name = source if isinstance(source, str) else ", ".join(source)
    splits = load_source(source, config_name, streaming=True)
    if "train" not in splits:
        raise ValueError(f"{source!r} has no split named 'train', only: {', '.join(sorted(splits))}.")
    train = DocumentStream(splits["train"], name, text_column)
    if validation_files:
        validation = as_documents(load_files(find_files(validation_files)), text_column, "validation")
    else:
        held_out = DocumentStream(splits.get("validation", splits["train"]), name, text_column)
        texts = list(itertools.islice(_documents(held_out), validation_documents))
        if not texts:
            raise ValueError(f"{name} has no document with text in it.")
        validation = Dataset.from_dict({"text": texts})
        if "validation" not in splits:
            train = dataclasses.replace(train, held_out=frozenset(unit_hash(normalize(text)) for text in texts))
    if next(_documents(train), None) is None:
        raise ValueError(
            f"no document of {name} is left to train on with validation_documents {validation_documents}; lower it."
        )
    return train, validation


def _documents(stream: DocumentStream) -> Iterator[str]:
    for file in range(stream.num_files):
        yield from filter(stream.is_kept, stream.rows(file))


@dataclass(frozen=True)
class Place:
    """Where a reader stands: in a window, which begins with a row of a file.

    Args:
        lap: how often the reader has been through all its documents.
        share: how many files of this lap were before this one.
        row: rows of the file before the window.
        document: documents of the window, in their shuffled order, before the batch that is tokenized.
        rest: (3, n), n < block size: the tokens before that batch that are in no block yet, see `Packer`.
        num_blocks: blocks that were given since.
    """

    lap: int = 0
    share: int = 0
    row: int = 0
    document: int = 0
    rest: list[list[int]] = field(default_factory=lambda: [[], [], []])
    num_blocks: int = 0


class BlockStream:
    """Blocks for training, without end: a reader that is through its documents begins again, in another order.

    The readers divide the rows of all files: each document is read by one of them, once in a lap. A reader has whole
    files if their number is a multiple of that of the readers; otherwise readers beside each other share a file, and
    each of them reads it, and tokenizes its own rows. With the same documents in the same order, the blocks of a single
    reader are those of `pack`.

    Args:
        documents: what is read.
        tokenizer: as for `pack`.
        block_size: tokens in a block, at least 2.
        num_readers: how many readers there are, in all processes.
        shuffle_buffer: documents that are shuffled together; 0 keeps the order of files and documents.
        seed: at least 0; it determines the order of files and of documents.

    Raises:
        ValueError: the tokenizer or a number does not fit.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        num_readers: int = 1,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> None:
        check_packing(tokenizer, block_size)
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}, but must be at least 0.")
        self.documents = documents
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.num_readers = num_readers
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        # A file is divided into so many equal parts that every reader gets the same number of parts.
        self.parts = num_readers // math.gcd(num_readers, documents.num_files)

    def settings(self) -> dict[str, int]:
        """What must not change between a place and its use."""
        names = ("block_size", "num_readers", "shuffle_buffer", "seed")
        return {name: getattr(self, name) for name in names} | {"num_files": self.documents.num_files}

    def read(self, reader: int, place: Place) -> Iterator[tuple[dict[str, np.ndarray], Place]]:
        """The blocks of a reader from a place on, each with the place after it.

        A block has `input_ids`, `position_ids` and `labels`, (B,) int64, as in `pack`.

        Raises:
            UserError: the text cannot be read, or there is none for this reader.
        """
        while True:
            documents, is_empty = self._documents_of_lap(reader, place), place.share == 0 and place.row == 0
            while window := list(itertools.islice(documents, self.shuffle_buffer or BATCH_SIZE)):
                is_empty = False
                texts = [text for text, *_ in window]
                if self.shuffle_buffer:
                    order = np.random.default_rng((self.seed, reader, place.lap, place.share, place.row))
                    texts = [texts[index] for index in order.permutation(len(texts))]
                for start in range(place.document, len(texts), BATCH_SIZE):
                    packer = Packer(self.block_size, place.rest)
                    blocks = packer.add(tokenize({"text": texts[start : start + BATCH_SIZE]}, self.tokenizer))
                    for num_blocks, block in enumerate(blocks, start=1):
                        if num_blocks > place.num_blocks:
                            yield _tensors(block), dataclasses.replace(place, num_blocks=num_blocks)
                    place = dataclasses.replace(
                        place, document=start + BATCH_SIZE, rest=packer.rest.tolist(), num_blocks=0
                    )
                _, share, row = window[-1]
                place = Place(place.lap, share, row, rest=place.rest)
            if is_empty:
                raise UserError(
                    f"{self.documents.name} has too few documents for {self.num_readers} readers, one for each process "
                    "and each of its dataloader_num_workers; take fewer."
                )
            place = Place(place.lap + 1, rest=place.rest)

    def _documents_of_lap(self, reader: int, place: Place) -> Iterator[tuple[str, int, int]]:
        """The documents of a reader from a place to the end of its lap, each with the share and the row after it."""
        row = place.row
        for share, (file, low, high) in enumerate(self._shares(reader, place.lap)):
            if share < place.share:
                continue
            for number, text in enumerate(self.documents.rows(file, row), start=row):
                if low <= number % self.parts < high and self.documents.is_kept(text):
                    yield text, share, number + 1
            row = 0

    def _shares(self, reader: int, lap: int) -> list[tuple[int, int, int]]:
        """The files of a reader in their order, each with the first of its parts that are its own and the one after."""
        files = np.arange(self.documents.num_files)
        if self.shuffle_buffer:
            files = np.random.default_rng((self.seed, lap)).permutation(files)
        size = len(files) * self.parts // self.num_readers
        first, last = reader * size, (reader + 1) * size
        return [
            (int(files[index]), max(first - index * self.parts, 0), min(last - index * self.parts, self.parts))
            for index in range(first // self.parts, -(-last // self.parts))
        ]


def _tensors(block: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: block[name].astype(np.int64) for name in ("input_ids", "position_ids", "labels")}
