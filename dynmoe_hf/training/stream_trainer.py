"""A Trainer that trains on a stream, and goes on with it where a checkpoint was saved."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer

from dynmoe_hf.errors import UserError

from .streams import BlockStream, Place

STATE_FILE = "stream_state_{rank}.json"


@dataclasses.dataclass
class StreamState:
    """What a process has taken from a stream.

    Args:
        places: where its readers stand, one for each worker of the data loader, or one.
        num_batches: batches that it took. The readers give one each in turn.
    """

    places: list[Place]
    num_batches: int = 0


def save_stream_state(folder: str | Path, rank: int, stream: BlockStream, state: StreamState) -> None:
    """Write the state of a process into a checkpoint."""
    content = {"settings": stream.settings(), **dataclasses.asdict(state)}
    Path(folder, STATE_FILE.format(rank=rank)).write_text(json.dumps(content))


def load_stream_state(checkpoint: str | Path, rank: int, stream: BlockStream) -> StreamState:
    """Read the state of a process from a checkpoint.

    Raises:
        ValueError: it has none, or one of another stream.
    """
    path = Path(checkpoint, STATE_FILE.format(rank=rank))
    if not path.is_file():
        raise ValueError(f"the checkpoint {str(checkpoint)!r} has no {path.name}: it is not of a run on this stream.")
    content = json.loads(path.read_text())
    for name, value in stream.settings().items():
        if content["settings"][name] != value:
            raise ValueError(
                f"{name} of the stream is {value}, but was {content['settings'][name]} in the run that saved "
                f"{str(checkpoint)!r}; resume with the same arguments, files and number of processes."
            )
    return StreamState([Place(**place) for place in content["places"]], content["num_batches"])


def check_stream_to_resume(checkpoint: str | None, train_blocks: object, rank: int) -> None:
    """Refuse to resume a run on a stream without it, or on another one, with a ValueError."""
    if checkpoint is None:
        return
    if isinstance(train_blocks, BlockStream):
        load_stream_state(checkpoint, rank, train_blocks)
    elif Path(checkpoint, STATE_FILE.format(rank=0)).exists():
        raise ValueError(f"the checkpoint {checkpoint!r} is of a run on a stream; resume with --streaming true.")


class _Readers(IterableDataset):
    """The reader of each worker of a process, in the order in which it is their turn."""

    def __init__(self, stream: BlockStream, rank: int, state: StreamState) -> None:
        self.stream = stream
        self.rank = rank
        self.state = state

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int, Place]]:
        worker = get_worker_info()
        num_workers = len(self.state.places)
        # A data loader begins with its first worker, whichever reader's turn it is.
        index = (self.state.num_batches + (0 if worker is None else worker.id)) % num_workers
        for block, place in self.stream.read(self.rank * num_workers + index, self.state.places[index]):
            yield block, index, place


class StreamLoader:
    """The batches of one process, without end, and its state after the last one that was taken.

    transformers and accelerate would read the stream in one process and send the batches to the others, or read all of
    it in every process; and what a worker has read ahead would count as taken.

    Args:
        stream: what is read.
        rank: number of this process.
        state: where its readers begin.
        collate: makes a batch of blocks.
        options: of torch's DataLoader, among them `batch_size` and `num_workers`.
    """

    def __init__(
        self,
        stream: BlockStream,
        rank: int,
        state: StreamState,
        collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        **options: Any,
    ) -> None:
        self.stream = stream
        self.rank = rank
        self.state = state
        self.collate = collate
        self.options = options

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # With a generator of its own, it takes no number from the one that dropout has, which a resume restores.
        loader = DataLoader(
            _Readers(self.stream, self.rank, dataclasses.replace(self.state, places=list(self.state.places))),
            collate_fn=self._collate,
            generator=torch.Generator(),
            worker_init_fn=_init_worker,
            **self.options,
        )
        try:
            for batch, index, place in loader:
                if place.lap > max(known.lap for known in self.state.places) and self.rank == 0:
                    warnings.warn(
                        f"{self.stream.documents.name} has come to its end and is read again (lap {place.lap + 1}).",
                        stacklevel=2,
                    )
                self.state.places[index] = place
                self.state.num_batches += 1
                yield batch
        except UserError as error:
            # One that a worker raised comes with a traceback before it.
            reason = str(error).strip().rpartition(f"{UserError.__name__}: ")[2]
            raise UserError(f"{reason} --resume_from_checkpoint true goes on from the last checkpoint.") from error

    def _collate(self, items: list[tuple[dict[str, Any], int, Place]]) -> tuple[dict[str, torch.Tensor], int, Place]:
        _, index, place = items[-1]
        return self.collate([block for block, *_ in items]), index, place


def _init_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers does the same, and says so in every worker


class StreamTrainer(Trainer):
    """A Trainer whose `train_dataset` may be a `BlockStream`, with a reader for each worker of each process.

    Every checkpoint then holds the state of the stream, and a run that is resumed reads on from there.

    Raises:
        ValueError: for a stream under tensor, context or sequence parallelism.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parallelism = self.accelerator.parallelism_config
        if self._has_stream and parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise ValueError("a stream gives every process other text, which only data parallelism can do with.")

    @property
    def _has_stream(self) -> bool:
        return isinstance(self.train_dataset, BlockStream)

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        """As in transformers, but for a stream."""
        if not self._has_stream:
            return super().get_train_dataloader()
        num_workers = self.args.dataloader_num_workers
        return StreamLoader(
            self.train_dataset,
            self.args.process_index,
            StreamState([Place()] * max(num_workers, 1)),
            self.data_collator,
            batch_size=self._train_batch_size,
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def _run_epoch(
        self,
        *args: Any,
        train_dataloader: DataLoader | StreamLoader,
        resume_from_checkpoint: str | None,
        steps_trained_in_current_epoch: int,
        **kwargs: Any,
    ) -> None:
        """With a stream, the one epoch begins where the checkpoint was saved, and the Trainer has nothing to skip."""
        if self._has_stream:
            steps_trained_in_current_epoch = 0
            if resume_from_checkpoint is not None:
                train_dataloader.state = load_stream_state(
                    resume_from_checkpoint, self.args.process_index, self.train_dataset
                )
        super()._run_epoch(
            *args,
            train_dataloader=train_dataloader,
            resume_from_checkpoint=resume_from_checkpoint,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
            **kwargs,
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._has_stream:
            # The Trainer counts from where the run was resumed.
            self.state.epoch = self.state.global_step / self.state.max_steps
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        if self._has_stream:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            loader = self.callback_handler.train_dataloader
            save_stream_state(output_dir, self.args.process_index, self.train_dataset, loader.state)
        super()._save_rng_state(output_dir)
