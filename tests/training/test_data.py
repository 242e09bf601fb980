import gzip
import json
import lzma
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

from dynmoe_hf.training import data
from dynmoe_hf.training.corpus import stdlib_corpus
from dynmoe_hf.training.data import load_documents, pack
from dynmoe_hf.training.tokenizer import train_tokenizer

TEXTS = [f"document {number}: the router sends token {number * 7} to an expert, naïve 🙂.\n" for number in range(60)]
TOKENIZER = train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module", autouse=True)
def cache_of_this_module(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    was_on = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    patch.undo()
    if not was_on:
        datasets.enable_progress_bars()


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "id": index}) + "\n" for index, text in enumerate(texts)))
    return str(path)


def as_dataset(texts) -> Dataset:
    return Dataset.from_dict({"text": texts}, features=datasets.Features({"text": datasets.Value("string")}))


def test_import_does_not_load_torch_or_the_model():
    code = (
        "import sys, dynmoe_hf.training.corpus, dynmoe_hf.training.data, dynmoe_hf.training.tokenizer\n"
        "print([name for name in sys.modules if name == 'torch' or name.startswith('dynmoe_hf.model')])"
    )
    run = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Loading


def test_embedded_corpus():
    documents, corpus = load_documents("python-stdlib"), stdlib_corpus()
    assert {split: documents[split]["text"][:] for split in documents} == {
        split: corpus[split]["text"][:] for split in ("train", "validation", "test")
    }
    assert all(split.column_names == ["text"] for split in documents.values())


def test_a_text_file_is_one_document(tmp_path):
    for name, text in {"b.txt": "two\n\nlines\n", "a.txt": "été\n", "c [1].txt": "brackets", "skip.md": "no"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep" / "d.txt.gz", "wt") as file:
        file.write("packed\n")
    (tmp_path / "held.txt").write_text("validation text\n")
    held = str(tmp_path / "held.txt")
    pattern = load_documents(str(tmp_path / "[ab].txt"), validation_files=held)
    assert pattern["train"]["text"][:] == ["été\n", "two\n\nlines\n"]
    assert pattern["validation"]["text"][:] == ["validation text\n"]
    exact = load_documents([str(tmp_path / "c [1].txt")], validation_files=[held])
    assert exact["train"]["text"][:] == ["brackets"]
    folder = load_documents(str(tmp_path), validation_files=held)
    assert sorted(folder["train"]["text"]) == sorted(
        ["brackets", "packed\n", "two\n\nlines\n", "validation text\n", "été\n"]
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.xz", "json", "parquet"])
def test_rows_of_structured_files_are_documents(tmp_path, kind):
    path = tmp_path / f"corpus.{kind}"
    lines = "".join(json.dumps({"body": text, "id": 1}) + "\n" for text in TEXTS)
    if kind == "parquet":
        Dataset.from_dict({"body": TEXTS, "id": [1] * len(TEXTS)}).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps([{"body": text} for text in TEXTS]))
    else:
        opener = {"jsonl": open, "jsonl.gz": gzip.open, "jsonl.xz": lzma.open}[kind]
        with opener(path, "wt") as file:
            file.write(lines)
    documents = load_documents(str(path), text_column="body")
    assert sorted([*documents["train"]["text"], *documents["validation"]["text"]]) == sorted(TEXTS)
    assert documents["train"].column_names == documents["validation"].column_names == ["text"]


def test_a_folder_of_files_named_after_splits_keeps_them(tmp_path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", TEXTS[:3])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", TEXTS[3:5])
    write_jsonl(tmp_path / "validation.jsonl", TEXTS[5:7])
    write_jsonl(tmp_path / "test.jsonl", TEXTS[7:8])
    documents = load_documents(str(tmp_path))
    assert {split: documents[split]["text"][:] for split in documents} == {
        "train": TEXTS[:5],
        "validation": TEXTS[5:7],
        "test": TEXTS[7:8],
    }
    write_jsonl(tmp_path / "more.jsonl", TEXTS[8:])
    documents = load_documents(str(tmp_path))
    assert set(documents) == {"train", "validation"}
    assert len(documents["train"]) + len(documents["validation"]) == len(TEXTS)


def test_held_out_documents_depend_on_content_alone_and_duplicates_stay_together(tmp_path):
    duplicated = [*TEXTS, *(text.rstrip() + " \n\n" for text in TEXTS)]
    one = load_documents(write_jsonl(tmp_path / "one.jsonl", duplicated), validation_fraction=0.2)
    two = load_documents(write_jsonl(tmp_path / "two.jsonl", duplicated[::-1]), validation_fraction=0.2)
    assert sorted(one["validation"]["text"]) == sorted(two["validation"]["text"])
    assert not {text.strip() for text in one["train"]["text"]} & {text.strip() for text in one["validation"]["text"]}
    assert len(one["train"]) + len(one["validation"]) == 120
    assert 8 <= len(one["validation"]) <= 48
    few = load_documents(str(tmp_path / "one.jsonl"), validation_fraction=0.1)
    assert set(few["validation"]["text"]) < set(one["validation"]["text"])


def test_blank_documents_are_left_out(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [*TEXTS, "", " \n\t", None]
    documents = load_documents(write_jsonl(path, rows))
    assert sorted([*documents["train"]["text"], *documents["validation"]["text"]]) == sorted(TEXTS)


def test_a_hub_dataset_goes_through_load_dataset(monkeypatch):
    calls = []
    hub = DatasetDict(
        train=Dataset.from_dict({"content": TEXTS, "id": list(range(60))}), test=Dataset.from_dict({"content": ["t"]})
    )
    monkeypatch.setattr(data, "load_dataset", lambda *arguments, **options: calls.append(arguments) or hub)
    documents = load_documents("some-org/some.data", config_name="en", text_column="content")
    assert calls == [("some-org/some.data", "en")]
    assert set(documents) == {"train", "validation", "test"}
    assert documents["test"]["text"][:] == ["t"]
    assert len(documents["train"]) + len(documents["validation"]) == 60


def test_offline_mode_is_respected_for_hub_datasets(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="Offline"):
        load_documents("some-org/not-cached")


@pytest.mark.parametrize("name", ["none.txt", "./none", "none/*.jsonl", "~/none-of-this", "sub/none.jsonl.gz"])
def test_missing_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for arguments in ({"source": name}, {"source": [name]}, {"source": "python-stdlib", "validation_files": [name]}):
        with pytest.raises(FileNotFoundError, match="no text file found at"):
            load_documents(**arguments)


def test_refused_sources(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    table, text, broken, latin = (tmp_path / name for name in ("t.csv", "t.txt", "broken.jsonl", "latin.txt"))
    table.write_text("text\nx\n")
    text.write_text("hello\n")
    broken.write_text('{"text": "x"}\n{"text": \n')
    latin.write_bytes("é".encode("latin-1"))
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", " "])
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [])
    single = write_jsonl(tmp_path / "single.jsonl", TEXTS[:1])
    only_test = tmp_path / "splits"
    only_test.mkdir()
    write_jsonl(only_test / "test.jsonl", TEXTS)
    cases = [
        (dict(source=str(table)), "extension is none of .txt"),
        (dict(source=[good, str(text)]), "mix json and text"),
        (dict(source=str(broken)), "cannot read .*broken.jsonl"),
        (dict(source=str(latin)), "cannot read .*latin.txt.*utf-8"),
        (dict(source=good, text_column="body"), "no column 'body' for the text, only: text, id"),
        (dict(source=good, text_column="id"), "'id' of the train split holds .*int64.*not text"),
        (dict(source=empty), "train split has no document"),
        (dict(source=nothing), "there is nothing in it"),
        (dict(source=good, validation_files=empty), "validation split has no document"),
        (dict(source=single), "leaves the validation split empty"),
        (dict(source=single, validation_fraction=1 - 1e-9), "leaves the train split empty"),
        (dict(source=good, validation_fraction=0.0), "must lie between 0 and 1"),
        (dict(source=good, validation_fraction=1.0), "must lie between 0 and 1"),
        (dict(source=good, config_name="en"), "is no Hub dataset"),
        (dict(source="python-stdlib", config_name="en"), "is no Hub dataset"),
        (dict(source=str(only_test)), "no split named 'train', only: test"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_documents(**arguments)
        assert "\n" not in str(caught.value)


# Packing


def whitespace_tokenizer() -> PreTrainedTokenizerFast:
    """Words without the blanks between them: offsets with gaps, and a normalizer that changes lengths."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1, "router": 2, "expert": 3}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: a blank put before the text, and four tokens for one character."""
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, **{f"<0x{byte:02X}>": byte + 4 for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def reference_bytes(text: str, ids: list[int]) -> list[int]:
    """Bytes of byte-level tokens, whose vocabulary spells a byte by one character."""
    boundaries = {len(text[:end].encode()) for end in range(len(text) + 1)}
    counts, written, counted = [], 0, 0
    for token in TOKENIZER.convert_ids_to_tokens(ids):
        written += len(token)
        end = written
        while end not in boundaries:
            end += 1
        counts.append(end - counted)
        counted = end
    assert counted == len(text.encode())
    return counts


def reference_blocks(texts: list[str], block_size: int, keep_remainder: bool) -> list[dict]:
    stream = []
    for document, text in enumerate(texts):
        ids = TOKENIZER(text, add_special_tokens=False).input_ids
        stream += [(document, token, count) for token, count in zip(ids, reference_bytes(text, ids), strict=True)]
        stream.append((document, TOKENIZER.eos_token_id, 0))
    spans = [(start, start) for start in range(0, len(stream) - block_size + 1, block_size)]
    if keep_remainder and len(stream) % block_size:
        spans.append((len(stream) - block_size, len(stream) // block_size * block_size))
    blocks = []
    for start, first_new in spans:
        block = {"input_ids": [], "position_ids": [], "labels": [], "num_bytes": 0}
        for index in range(start, start + block_size):
            document, token, count = stream[index]
            is_first = index == start or stream[index - 1][0] != document
            position = 0 if is_first else block["position_ids"][-1] + 1
            is_predicted = not is_first and index >= first_new
            block["input_ids"].append(token)
            block["position_ids"].append(position)
            block["labels"].append(token if is_predicted else -100)
            block["num_bytes"] += count if is_predicted else 0
        blocks.append(block)
    return blocks


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(max_size=30) | st.sampled_from(TEXTS), min_size=1, max_size=12),
    st.integers(2, 40),
    st.booleans(),
)
def test_blocks_equal_those_of_a_plain_packer(texts, block_size, keep_remainder):
    num_tokens = sum(len(TOKENIZER(text).input_ids) + 1 for text in texts)
    if num_tokens < block_size:
        with pytest.raises(ValueError, match=f"hold {num_tokens} tokens"):
            pack(as_dataset(texts), TOKENIZER, block_size, keep_remainder=keep_remainder)
    else:
        blocks = pack(as_dataset(texts), TOKENIZER, block_size, keep_remainder=keep_remainder)
        assert blocks.to_list() == reference_blocks(texts, block_size, keep_remainder)


def test_blocks_across_steps_equal_those_of_a_plain_packer():
    texts = TEXTS * 3
    assert len(texts) > 5 * data.BATCH_SIZE
    for block_size in (7, 500, 2000):
        assert pack(as_dataset(texts), TOKENIZER, block_size, keep_remainder=True).to_list() == reference_blocks(
            texts, block_size, True
        )


def test_every_byte_of_one_long_block_but_the_first_tokens_is_counted():
    texts = ["abc", "αβγ", "🙂🙂", "router expert"]
    ids = [TOKENIZER(text).input_ids for text in texts]
    (block,) = pack(as_dataset(texts), TOKENIZER, sum(len(row) + 1 for row in ids)).to_list()
    unpredicted = sum(reference_bytes(text, row)[0] for text, row in zip(texts, ids, strict=True))
    assert block["num_bytes"] == sum(len(text.encode()) for text in texts) - unpredicted


@pytest.mark.parametrize("make_tokenizer", [whitespace_tokenizer, byte_fallback_tokenizer])
@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1) | st.text(alphabet="a é\u0301ﷺ각🙂\n", min_size=1))
def test_token_bytes_add_up_for_tokenizers_that_skip_and_rewrite_text(make_tokenizer, text):
    text = "x" + text
    rows = data.tokenize({"text": [text, text[::-1]]}, make_tokenizer())
    assert [len(row) for row in rows["num_bytes"]] == [len(row) for row in rows["input_ids"]]
    assert all(row[-1] == 0 and min(row) >= 0 for row in rows["num_bytes"])
    assert [row.sum() for row in rows["num_bytes"]] == [len(text.encode())] * 2


def test_skipped_text_counts_with_the_next_token():
    rows = data.tokenize({"text": ["  router ß  expert\n\n"]}, whitespace_tokenizer())
    assert rows["input_ids"] == [[2, 0, 3, 1]]
    assert rows["num_bytes"][0].tolist() == [8, 3, 10, 0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tensors(block: dict) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([block[key]]) for key in ("input_ids", "position_ids", "labels")}


def segments(block: dict) -> list[slice]:
    starts = [*np.flatnonzero(np.array(block["position_ids"]) == 0).tolist(), len(block["input_ids"])]
    return [slice(start, end) for start, end in zip(starts, starts[1:], strict=False)]


def test_a_real_model_sees_each_document_alone(model):
    blocks = pack(as_dataset(TEXTS[:9]), TOKENIZER, 64, keep_remainder=True).to_list()
    assert max(len(segments(block)) for block in blocks) >= 3
    for block in blocks:
        inputs = tensors(block)
        with torch.no_grad():
            packed = model(**inputs, use_cache=False).logits[0]
            for part in segments(block):
                alone = model(inputs["input_ids"][:, part], use_cache=False).logits[0]
                torch.testing.assert_close(packed[part], alone, atol=1e-5, rtol=0)
            if len(segments(block)) > 1:
                mixed = model(inputs["input_ids"], use_cache=False).logits[0]
                assert (mixed - packed).abs().max() > 1e-2


def test_the_loss_of_blocks_is_that_of_documents_and_crosses_no_boundary(model):
    texts = TEXTS[:9]
    blocks = pack(as_dataset(texts), TOKENIZER, 64, keep_remainder=True).to_list()
    packed = torch.zeros(())
    count = 0
    with torch.no_grad():
        for block in blocks:
            inputs = tensors(block)
            num_labels = (inputs["labels"][:, 1:] != -100).sum()
            packed += model(**inputs, use_cache=False).loss * num_labels
            count += int(num_labels)
        whole = pack(as_dataset(texts), TOKENIZER, sum(len(TOKENIZER(text).input_ids) + 1 for text in texts))
        documents = [torch.tensor([[*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id]]) for text in texts]
        alone = sum(model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in documents)
        inputs = tensors(whole[0])
        together = model(**inputs, use_cache=False).loss * sum(ids.shape[1] - 1 for ids in documents)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)
    cut_starts = sum(len(segments(block)) for block in blocks) - len(texts)
    assert count <= sum(ids.shape[1] - 1 for ids in documents) <= count + cut_starts


def test_a_second_call_reads_the_cache_and_any_change_misses_it(tmp_path, monkeypatch):
    documents = load_documents(write_jsonl(tmp_path / "corpus.jsonl", TEXTS))["train"]
    first = pack(documents, TOKENIZER, 32)
    other = train_tokenizer(TEXTS, 300)
    changed = [
        pack(documents, TOKENIZER, 33),
        pack(documents, TOKENIZER, 32, keep_remainder=True),
        pack(documents, other, 32),
        pack(documents.select(range(9)), TOKENIZER, 32),
    ]
    assert all(dataset.cache_files != first.cache_files for dataset in changed)

    def refuse(*arguments, **options):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(type(TOKENIZER), "__call__", refuse)
    assert pack(documents, TOKENIZER, 32).cache_files == first.cache_files


def test_processes_do_not_change_the_blocks():
    assert pack(as_dataset(TEXTS), TOKENIZER, 50, num_proc=2).to_list() == reference_blocks(TEXTS, 50, False)


def test_refused_packing():
    documents = as_dataset(TEXTS)
    no_eos = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)

    class SlowTokenizer(PreTrainedTokenizer):
        vocab_size = 2

        def get_vocab(self):
            return {"a": 0, "</s>": 1}

    cases = [
        ((documents, TOKENIZER, 1), "block_size is 1"),
        ((documents.rename_column("text", "body"), TOKENIZER, 8), "no column 'text', only: body"),
        ((as_dataset([]), TOKENIZER, 8), "no documents"),
        ((as_dataset(["ab"]), TOKENIZER, 9), "do not fill one block of 9"),
        ((documents, no_eos, 8), "no EOS token"),
        ((documents, SlowTokenizer(eos_token="</s>"), 8), "SlowTokenizer cannot tell"),
    ]
    for arguments, message in cases:
        for keep_remainder in (False, True):
            with pytest.raises(ValueError, match=message):
                pack(*arguments, keep_remainder=keep_remainder)
