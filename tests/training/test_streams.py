import gzip
import itertools
import json
import random
import shutil
import warnings
from types import SimpleNamespace

import accelerate
import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, default_data_collator

from dynmoe_hf import cli
from dynmoe_hf.errors import UserError
from dynmoe_hf.training import data, streams
from dynmoe_hf.training.checkpoints import fault
from dynmoe_hf.training.data import pack
from dynmoe_hf.training.stream_trainer import StreamLoader, StreamState, StreamTrainer
from dynmoe_hf.training.streams import BlockStream, DocumentStream, Place, load_stream
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.distributed import run_two_processes

WORDS = "the router sends every token to as many experts as its probability mass asks for".split()
SETTINGS = """
model: {hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 4, num_experts: 4,
        max_position_embeddings: 64, initializer_range: 0.1, attention_dropout: 0.1}
routing: top_p
streaming: true
shuffle_buffer: 7
validation_documents: 3
block_size: 28
max_steps: 6
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
per_device_eval_batch_size: 2
learning_rate: 1e-2
save_steps: 2
logging_steps: 2
report_to: none
use_cpu: true
disable_tqdm: true
"""


def document(number: int) -> str:
    words = random.Random(number)
    return f"{number} naïve 🙂 " + " ".join(words.choices(WORDS, k=words.randint(2, 30)))


TEXTS = [document(number) for number in range(61)]
TOKENIZER = train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module", autouse=True)
def cache_of_this_module(tmp_path_factory):
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
    if were_on:
        datasets.enable_progress_bars()


def write_files(folder, texts, num_files=1, kind="jsonl") -> str:
    """The texts in order, in files of about the same number of them; returns a pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, rows in enumerate(np.array_split(np.array(texts, dtype=object), num_files)):
        path = folder / f"part-{index:02}.{kind}"
        if kind == "parquet":
            Dataset.from_dict({"id": list(range(len(rows))), "text": list(rows)}).to_parquet(path, batch_size=5)
        else:
            opener = gzip.open if kind.endswith("gz") else open
            with opener(path, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": 1, "text": text}) + "\n" for text in rows)
    return str(folder / f"*.{kind}")


def open_stream(source, num_files=None) -> DocumentStream:
    """All documents of files, without those for validation."""
    stream = DocumentStream(data.load_source(source, None, streaming=True)["train"], "them", "text")
    assert num_files in (None, stream.num_files)
    return stream


def take(blocks, count: int) -> list[dict[str, list[int]]]:
    return [{name: row.tolist() for name, row in block.items()} for block, *_ in itertools.islice(blocks, count)]


def packed(texts, block_size) -> list[dict[str, list[int]]]:
    return pack(Dataset.from_dict({"text": texts}), TOKENIZER, block_size).remove_columns("num_bytes").to_list()


def documents_of_one_lap(stream: BlockStream, reader: int) -> list[str]:
    """What the blocks of a reader spell, and of the first block of its second lap the tokens left of the first."""
    ids = []
    for block, place in stream.read(reader, Place()):
        ids += block["input_ids"].tolist()[: len(place.rest[0]) if place.lap else None]
        if place.lap:
            break
    ends = [index for index, token in enumerate(ids) if token == TOKENIZER.eos_token_id]
    assert ends[-1] == len(ids) - 1
    return [TOKENIZER.decode(ids[start:end]) for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]


# Blocks


@pytest.mark.parametrize(("kind", "num_files"), [("jsonl", 1), ("jsonl.gz", 3), ("parquet", 4), ("jsonl", 61)])
def test_blocks_are_those_of_pack_lap_after_lap(tmp_path, kind, num_files):
    rows = [*TEXTS[:40], "", " \n", *TEXTS[40:]]
    documents = open_stream(write_files(tmp_path, rows, num_files, kind), num_files)
    for block_size in (7, 64, 3000):
        expected = packed(TEXTS * 3, block_size)
        assert take(BlockStream(documents, TOKENIZER, block_size).read(0, Place()), len(expected)) == expected


def test_a_text_file_is_one_document(tmp_path):
    for index, text in enumerate(TEXTS[:5]):
        (tmp_path / f"{index}.txt").write_text(f"{text}\n\nmore\n", encoding="utf-8")
    expected = packed([f"{text}\n\nmore\n" for text in TEXTS[:5]], 9)
    stream = BlockStream(open_stream(str(tmp_path)), TOKENIZER, 9)
    assert take(stream.read(0, Place()), len(expected)) == expected


@pytest.mark.parametrize("num_files", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("num_readers", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shuffle_buffer", [0, 5])
def test_readers_divide_the_documents_of_a_lap(tmp_path, num_files, num_readers, shuffle_buffer):
    documents = open_stream(write_files(tmp_path, TEXTS, num_files))
    stream = BlockStream(documents, TOKENIZER, 4, num_readers=num_readers, shuffle_buffer=shuffle_buffer)
    parts = [documents_of_one_lap(stream, reader) for reader in range(num_readers)]
    assert sorted(itertools.chain(*parts)) == sorted(TEXTS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * max(num_files, num_readers)
    opened = {reader: len(stream._shares(reader, 0)) for reader in range(num_readers)}
    assert sum(opened.values()) < num_files + num_readers, "no more files are shared than must be"


def test_shuffling_depends_on_the_seed_and_the_lap_and_moves_documents_and_files(tmp_path):
    documents = open_stream(write_files(tmp_path, TEXTS, 6))
    orders = {}
    for seed in (0, 0, 1):
        stream = BlockStream(documents, TOKENIZER, 16, shuffle_buffer=20, seed=seed)
        laps = [[text for text, *_ in stream._documents_of_lap(0, Place(lap))] for lap in range(2)]
        assert sorted(laps[0]) == sorted(laps[1]) == sorted(TEXTS), "files in another order"
        assert laps[0] != laps[1] and TEXTS not in laps
        read = documents_of_one_lap(stream, 0)
        assert sorted(read[:20]) == sorted(laps[0][:20]) and read[:20] != laps[0][:20], "windows shuffled inside"
        ranks = [laps[0].index(text) for text in read]
        assert orders.setdefault(seed, (laps[0], ranks[:20])) == (laps[0], ranks[:20])
        assert ranks[:20] != [rank - 20 for rank in ranks[20:40]], "every window in its own way"
    assert all(orders[0][part] != orders[1][part] for part in range(2)), "files, and documents in a window"


@pytest.mark.parametrize("shuffle_buffer", [0, 7])
@pytest.mark.parametrize(("kind", "num_files", "num_readers"), [("jsonl", 3, 1), ("parquet", 2, 4), ("jsonl", 1, 2)])
def test_every_place_leads_to_the_same_blocks(tmp_path, monkeypatch, kind, num_files, num_readers, shuffle_buffer):
    """Far enough for a second lap, and with tables of a few rows, so that places are inside of some."""
    monkeypatch.setattr(streams, "ROWS_PER_READ", 4)
    monkeypatch.setattr(streams, "BATCH_SIZE", 3)
    documents = open_stream(write_files(tmp_path, TEXTS, num_files, kind))
    options = {"num_readers": num_readers, "shuffle_buffer": shuffle_buffer, "seed": 3}
    for reader in range(num_readers):
        read = list(itertools.islice(BlockStream(documents, TOKENIZER, 30, **options).read(reader, Place()), 86))
        assert read[-1][1].lap > 0
        blocks = take(read, 86)
        for index in range(0, 80, 4):
            place = Place(**json.loads(json.dumps(vars(read[index][1]))))
            again = BlockStream(open_stream(str(tmp_path / f"*.{kind}")), TOKENIZER, 30, **options)
            assert take(again.read(reader, place), 6) == blocks[index + 1 : index + 7]


def test_no_more_is_read_than_a_window(tmp_path):
    """A source without end, of which nothing may be kept."""
    pulled = []

    def rows():
        for number in itertools.count():
            pulled.append(number)
            yield {"text": document(number)}

    stream = BlockStream(DocumentStream(IterableDataset.from_generator(rows), "it", "text"), TOKENIZER, 64)
    blocks = stream.read(0, Place())
    assert take(blocks, 3) == packed([document(number) for number in range(40)], 64)[:3]
    assert len(pulled) <= streams.ROWS_PER_READ + 1
    take(blocks, 500)
    assert len(pulled) <= 3 * streams.ROWS_PER_READ


# Which documents


def test_the_first_documents_are_held_out_wherever_their_text_stands(tmp_path):
    rows = ["", *TEXTS[:30], TEXTS[2].rstrip() + " \n", *TEXTS[30:]]
    train, validation = load_stream(write_files(tmp_path, rows, 4), validation_documents=6)
    assert validation["text"][:] == TEXTS[:6] and validation.column_names == ["text"]
    stream = BlockStream(train, TOKENIZER, 8, num_readers=3, shuffle_buffer=9)
    read = [text for reader in range(3) for text in documents_of_one_lap(stream, reader)]
    assert sorted(read) == sorted(TEXTS[6:])


def test_a_validation_split_and_validation_files_are_used_and_nothing_is_held_out(tmp_path):
    write_files(tmp_path / "data", TEXTS[:20])
    (tmp_path / "data" / "part-00.jsonl").rename(tmp_path / "data" / "train.jsonl")
    write_files(tmp_path / "more", ["", *TEXTS[20:25]])
    held = tmp_path / "more" / "part-00.jsonl"
    train, validation = load_stream(str(tmp_path / "data"), validation_files=str(held), validation_documents=2)
    assert validation["text"][:] == TEXTS[20:25]
    shutil.move(held, tmp_path / "data" / "validation-0.jsonl")
    split_train, split_validation = load_stream(str(tmp_path / "data"), validation_documents=2)
    assert split_validation["text"][:] == TEXTS[20:22]
    for stream in (train, split_train):
        assert documents_of_one_lap(BlockStream(stream, TOKENIZER, 8), 0) == TEXTS[:20]


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch):
    calls = []
    hub = {"train": data.load_source(write_files(tmp_path, TEXTS), None, streaming=True)["train"]}
    monkeypatch.setattr(data, "load_dataset", lambda *arguments, **options: calls.append((arguments, options)) or hub)
    train, _ = load_stream("HuggingFaceFW/fineweb-edu", config_name="sample-10BT", validation_documents=1)
    assert calls == [(("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"streaming": True})]
    assert documents_of_one_lap(BlockStream(train, TOKENIZER, 8), 0) == TEXTS[1:]


def test_refused_streams(tmp_path):
    good = write_files(tmp_path / "good", TEXTS)
    blank = write_files(tmp_path / "blank", ["", " "])
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "test.jsonl").write_text('{"text": "x"}\n')
    cases = [
        (dict(source="python-stdlib"), "cannot be streamed"),
        (dict(source=good, text_column="body"), "no column 'body' for the text, only: id, text"),
        (dict(source=good, text_column="id"), "column 'id' of .* holds int64, not text"),
        (dict(source=good, config_name="en"), "is no Hub dataset"),
        (dict(source=good, validation_documents=0), "validation_documents is 0"),
        (dict(source=good, validation_documents=61), "no document of .* is left"),
        (dict(source=good, validation_files=blank), "validation split has no document"),
        (dict(source=blank), "has no document with text"),
        (dict(source=str(tmp_path / "broken.jsonl")), "broken.jsonl cannot be read: "),
        (dict(source=str(tmp_path / "latin.txt")), "latin.txt cannot be read: .*utf-8"),
        (dict(source=str(tmp_path / "nothing.jsonl")), "nothing.jsonl"),
        (dict(source=str(tmp_path / "splits")), "no split named 'train', only: test"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_stream(**arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="shuffle_buffer is -1"):
        BlockStream(open_stream(good), TOKENIZER, 8, shuffle_buffer=-1)
    with pytest.raises(ValueError, match="block_size is 1"):
        BlockStream(open_stream(good), TOKENIZER, 1)
    with pytest.raises(UserError, match="too few documents for 90 readers"):
        list(BlockStream(open_stream(good), TOKENIZER, 8, num_readers=90).read(89, Place()))


# Batches


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_batches_are_taken_in_turn_from_the_readers_of_the_workers(tmp_path, num_workers):
    """In the middle of the second of two processes, and again after a resume from any batch."""
    num_readers = 2 * max(num_workers, 1)
    documents = open_stream(write_files(tmp_path, TEXTS, 3))
    stream = BlockStream(documents, TOKENIZER, 12, num_readers=num_readers, shuffle_buffer=4)
    own = [stream.read(reader, Place()) for reader in range(num_readers // 2, num_readers)]
    expected = [take(own[batch % len(own)], 2) for batch in range(9)]

    def load(state, count):
        loader = StreamLoader(stream, 1, state, default_data_collator, batch_size=2, num_workers=num_workers)
        batches = list(itertools.islice(loader, count))
        assert all(batch[name].dtype == torch.int64 for batch in batches for name in batch)
        return [[{name: batch[name][row].tolist() for name in batch} for row in range(2)] for batch in batches]

    for stop in (0, 1, 2, 5):
        state = StreamState([Place()] * len(own))
        before = torch.get_rng_state()
        assert load(state, stop) == expected[:stop]
        assert torch.equal(torch.get_rng_state(), before), "dropout after a resume would be another"
        assert state.num_batches == stop
        assert load(state, 4) == expected[stop : stop + 4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_that_fails_ends_with_a_sentence(tmp_path, monkeypatch, num_workers):
    stream = BlockStream(open_stream(write_files(tmp_path, TEXTS)), TOKENIZER, 16, num_readers=max(num_workers, 1))
    state, options = StreamState([Place()] * max(num_workers, 1)), {"batch_size": 1, "num_workers": num_workers}
    loader = iter(StreamLoader(stream, 0, state, default_data_collator, **options))

    def disconnected(*args, **kwargs):
        raise ConnectionError("Server\nDisconnected")

    monkeypatch.setattr(IterableDataset, "iter", disconnected)
    with pytest.raises(UserError) as caught:
        next(loader)
    assert str(caught.value) == (
        "the text of them cannot be read: Server Disconnected. "
        "--resume_from_checkpoint true goes on from the last checkpoint."
    )


# Runs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    pattern = write_files(folder / "data", TEXTS, 3)
    TOKENIZER.save_pretrained(folder / "tokenizer")
    (folder / "no_tokenizer.yaml").write_text(f"{SETTINGS}\ndataset: {pattern!r}\n")
    (folder / "config.yaml").write_text(f"{SETTINGS}\ndataset: {pattern!r}\ntokenizer: {folder / 'tokenizer'}\n")
    return folder


def run_train(workplace, output_dir, *flags) -> int:
    command = ["train", "--json", "--config", str(workplace / "config.yaml"), "--output_dir", str(output_dir)]
    return cli.main([*command, *map(str, flags)])


@pytest.fixture(scope="module")
def first_run(workplace):
    assert run_train(workplace, workplace / "first") == 0
    return workplace / "first"


def history(output_dir) -> list[dict[str, float]]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if "runtime" not in name} for entry in log]


def assert_same_end(first, second) -> None:
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        whole, parts = (load_file(folder / name) for folder in (first, second))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    states = [json.loads((folder / "checkpoint-6" / "stream_state_0.json").read_text()) for folder in (first, second)]
    assert states[0] == states[1]


def test_a_run_trains_on_the_blocks_of_the_stream(workplace, first_run, monkeypatch, tmp_path):
    """And on nothing that it is validated on; what it is validated on is counted in bytes as ever."""
    seen = []
    monkeypatch.setattr(
        "transformers.Trainer.training_step",
        lambda self, model, inputs, *rest: seen.append(inputs["input_ids"].tolist()) or torch.tensor(0.0),
    )
    assert run_train(workplace, tmp_path / "out", "--save_strategy", "no") == 0
    train, validation = load_stream(str(workplace / "data" / "*.jsonl"), validation_documents=3)
    assert validation["text"][:] == TEXTS[:3]
    stream = BlockStream(train, TOKENIZER, 28, shuffle_buffer=7, seed=42)
    assert list(itertools.chain(*seen)) == [block["input_ids"] for block in take(stream.read(0, Place()), 24)]
    metrics = json.loads((first_run / "all_results.json").read_text())
    blocks = pack(validation, TOKENIZER, 28, keep_remainder=True)
    labels = sum(label != -100 for block in blocks for label in block["labels"])
    nats = metrics["eval_bits_per_byte"] * np.log(2) * sum(blocks["num_bytes"])
    assert metrics["eval_lm_loss"] == pytest.approx(nats / labels, rel=1e-6)


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(workplace, first_run, tmp_path, step):
    shutil.copytree(first_run / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    assert run_train(workplace, tmp_path / "run", "--resume_from_checkpoint", "true") == 0
    assert_same_end(first_run, tmp_path / "run")
    logged = [[log for log in history(folder) if "loss" in log] for folder in (first_run, tmp_path / "run")]
    for log, other in zip(*logged, strict=True):
        assert (log["step"], log["epoch"], log["learning_rate"]) == tuple(
            other[name] for name in ("step", "epoch", "learning_rate")
        )
    assert logged[0][-1]["loss"] == pytest.approx(logged[1][-1]["loss"])


def test_resumed_run_with_workers_ends_bit_for_bit_where_an_uninterrupted_one_does(workplace, tmp_path):
    """Three batches a step and two workers, so that the next batch is the second one's after an odd step."""
    flags = ("--dataloader_num_workers", 2, "--gradient_accumulation_steps", 3, "--save_steps", 3)
    assert run_train(workplace, tmp_path / "first", *flags) == 0
    shutil.copytree(tmp_path / "first" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    assert run_train(workplace, tmp_path / "run", *flags, "--resume_from_checkpoint", "true") == 0
    assert_same_end(tmp_path / "first", tmp_path / "run")


def test_a_stream_that_is_too_short_is_read_again_with_a_warning(workplace, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_train(workplace, tmp_path / "out", "--max_steps", 30, "--save_strategy", "no") == 0
    laps = [str(warning.message) for warning in caught if "come to its end" in str(warning.message)]
    assert laps and len(laps) == len(set(laps)) and laps[0].endswith("and is read again (lap 2).")


def test_every_process_has_written_its_state_before_a_checkpoint_counts_as_whole(workplace, tmp_path, monkeypatch):
    """The wait for the others is the last thing before the file that makes it whole."""
    seen, original = [], accelerate.Accelerator.wait_for_everyone

    def wait(self):
        seen.append({path.name for path in (tmp_path / "run" / "checkpoint-2").glob("*")})
        original(self)

    monkeypatch.setattr(accelerate.Accelerator, "wait_for_everyone", wait)
    assert run_train(workplace, tmp_path / "run", "--max_steps", 2) == 0
    everything = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "stream_state_0.json" in everything and everything - {"trainer_state.json"} in seen


def test_a_cut_off_state_is_noticed(first_run, tmp_path):
    shutil.copytree(first_run / "checkpoint-2", tmp_path / "copy")
    path = tmp_path / "copy" / "stream_state_0.json"
    assert fault(tmp_path / "copy") is None
    path.write_text(path.read_text()[:-9])
    assert fault(tmp_path / "copy") == "stream_state_0.json is damaged"


REFUSED = {
    "no steps": (["--max_steps", "-1"], "streaming needs max_steps"),
    "no tokenizer": (["--config", "{work}/no_tokenizer.yaml"], "streaming needs a tokenizer"),
    "corpus": (["--dataset", "python-stdlib"], "'python-stdlib' is made here and cannot be streamed"),
    "column": (["--text_column", "body"], "no column 'body'"),
    "order": (["--shuffle_buffer", "-1"], "shuffle_buffer is -1"),
    "nothing left": (["--validation_documents", "100"], "no document of"),
    "other order": (["--resume_from_checkpoint", "{first}/checkpoint-2", "--shuffle_buffer", "8"], "shuffle_buffer of"),
    "other seed": (["--resume_from_checkpoint", "{first}/checkpoint-2", "--data_seed", "8"], "seed of the stream is 8"),
    "other workers": (["--resume_from_checkpoint", "{first}/checkpoint-2", "--dataloader_num_workers", "2"], "num_rea"),
    "no stream": (["--resume_from_checkpoint", "{first}/checkpoint-2", "--streaming", "false"], "--streaming true"),
    "not of a stream": (["--resume_from_checkpoint", "{kept}"], "has no stream_state_0.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_work(workplace, first_run, tmp_path, capsys, case):
    flags, said = REFUSED[case]
    shutil.copytree(first_run / "checkpoint-2", tmp_path / "kept")
    (tmp_path / "kept" / "stream_state_0.json").unlink()
    flags = [flag.format(work=workplace, first=first_run, kept=tmp_path / "kept") for flag in flags]
    assert run_train(workplace, tmp_path / "out", *flags) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("dynmoe train: ") and said in complaint
    assert not (tmp_path / "out").exists()


def test_parallelism_that_needs_the_same_text_in_several_processes_is_refused(tmp_path, monkeypatch):
    def init(self, train_dataset, parallelism):
        self.train_dataset, self.accelerator = train_dataset, SimpleNamespace(parallelism_config=parallelism)

    monkeypatch.setattr(Trainer, "__init__", init)
    stream = BlockStream(open_stream(write_files(tmp_path, TEXTS)), TOKENIZER, 8)
    with pytest.raises(ValueError, match="only data parallelism"):
        StreamTrainer(stream, accelerate.ParallelismConfig(tp_size=2))
    StreamTrainer(stream, accelerate.ParallelismConfig(dp_replicate_size=2))
    StreamTrainer(stream, None)
    StreamTrainer([], accelerate.ParallelismConfig(tp_size=2))


TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from dynmoe_hf import cli
from dynmoe_hf.training.stream_trainer import StreamTrainer

folder, seen, original = Path(sys.argv[1]), [], StreamTrainer.training_step

def step(self, model, inputs, *rest):
    seen.append([self.state.global_step, inputs["input_ids"].tolist()])
    return original(self, model, inputs, *rest)

StreamTrainer.training_step = step
command = ["train", "--config", str(folder / "config.yaml"), "--output_dir"]
assert cli.main([*command, str(folder / "whole")]) == 0
whole = list(seen)
seen.clear()
source = folder / "whole" / "checkpoint-4"
assert cli.main([*command, str(folder / "parts"), "--resume_from_checkpoint", str(source)]) == 0
rank = torch.distributed.get_rank()
(folder / f"seen{rank}.json").write_text(json.dumps({"whole": whole, "parts": seen}))
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_see_every_block_once_and_resume_identically(workplace, tmp_path):
    """Of three files, so that both processes read the second."""
    shutil.copy(workplace / "config.yaml", tmp_path)
    run_two_processes(TWO_PROCESSES, tmp_path)
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(2)]
    train, _ = load_stream(str(workplace / "data" / "*.jsonl"), validation_documents=3)
    stream = BlockStream(train, TOKENIZER, 28, num_readers=2, shuffle_buffer=7, seed=42)
    for rank in range(2):
        blocks = [block["input_ids"] for block in take(stream.read(rank, Place()), 24)]
        assert [row for _, batch in seen[rank]["whole"] for row in batch] == blocks
        assert seen[rank]["parts"] == [entry for entry in seen[rank]["whole"] if entry[0] >= 4]
    both = [json.dumps(row) for rank in range(2) for _, batch in seen[rank]["whole"] for row in batch]
    assert len(both) == len(set(both)) == 48
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert AutoTokenizer.from_pretrained(tmp_path / "parts").get_vocab() == TOKENIZER.get_vocab()
