import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from dynmoe_hf.training.corpus import normalize, stdlib_corpus, unit_hash


@pytest.fixture(scope="module")
def corpus():
    return stdlib_corpus()


@pytest.fixture(scope="module")
def texts(corpus):
    return {row["name"]: row["text"] for split in corpus.values() for row in split}


@pytest.fixture
def fake_stdlib(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(root: Path, name: str, content: str | bytes = "x = 1\n") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def names_of_sources(corpus) -> set[str]:
    return {name for split in corpus.values() for name in split["name"] if name.startswith("lib/")}


def test_documents_are_the_library_word_for_word(texts):
    assert texts["lib/argparse.py"] == Path(argparse.__file__).read_text(encoding="utf-8")
    assert texts["lib/json/decoder.py"].startswith('"""Implementation of JSONDecoder')
    assert texts["topics/assert"] == topics["assert"]
    assert sum(len(text.encode()) for text in texts.values()) > 8e6


def test_docstrings_of_compiled_modules_with_signatures(texts):
    assert "len(obj, /)\n    Return the number of items in a container." in texts["builtins/builtins"]
    assert "str.casefold(self, /)" in texts["builtins/builtins"]
    assert "intern" in texts["builtins/sys"]
    assert not any(re.search(r"<.* at 0x[0-9a-f]+>", texts[name]) for name in texts if name.startswith("builtins/"))


def test_splits_are_ninety_five_five_and_disjoint(corpus):
    total = sum(len(split) for split in corpus.values())
    assert set(corpus) == {"train", "validation", "test"}
    assert 0.86 < len(corpus["train"]) / total < 0.94
    assert all(0.02 < len(corpus[split]) / total < 0.08 for split in ("validation", "test"))
    assert len({name for split in corpus.values() for name in split["name"]}) == total


def test_no_document_is_duplicated_within_or_across_splits(texts):
    contents = [re.sub(r"[ \t\r]+\n", "\n", text).strip() for text in texts.values()]
    assert len(set(contents)) == len(contents)
    assert all(contents)


def test_every_split_records_the_python_version(corpus):
    assert all(platform.python_version() in split.info.description for split in corpus.values())


def test_another_process_builds_the_same_and_holds_no_environment(corpus):
    code = (
        "import json; from dynmoe_hf.training.corpus import stdlib_corpus\n"
        "import hashlib; splits = {k: v.to_dict() for k, v in stdlib_corpus().items()}\n"
        "text = json.dumps(splits, sort_keys=True)\n"
        "print(hashlib.sha256(text.encode()).hexdigest(), 'verysecretvalue' in text)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOME_TOKEN": "verysecretvalue"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = json.dumps({name: split.to_dict() for name, split in corpus.items()}, sort_keys=True)
    assert output.stdout.split() == [hashlib.sha256(expected.encode()).hexdigest(), "False"]


def test_only_the_library_itself_is_read(fake_stdlib):
    kept = ["argparse.py", "json/decoder.py", "email/mime/text.py"]
    skipped = [
        "test/a.py", "unittest/test/b.py", "idlelib/idle_test/c.py", "ensurepip/d.py", "lib2to3/e.py",
        "turtledemo/f.py", "site-packages/json.py", "dist-packages/json.py", "sitecustomize.py",
        "config-3.11-x86/json.py", "__pycache__/json.py", "pydoc_data/topics.py", "argparse.txt",
    ]  # fmt: skip
    for name in [*kept, *skipped]:
        write(fake_stdlib, name, f"name = {name!r}\n")
    assert names_of_sources(stdlib_corpus()) == {f"lib/{name}" for name in kept}


def test_the_first_name_of_a_duplicate_wins_and_blank_files_are_left_out(fake_stdlib):
    write(fake_stdlib, "string.py", "x = 1\ny = 2\n")
    write(fake_stdlib, "ast.py", "x = 1  \r\ny = 2\n\n\n")
    write(fake_stdlib, "json/__init__.py", "\n \n")
    assert names_of_sources(stdlib_corpus()) == {"lib/ast.py"}


def test_sources_are_decoded_as_they_declare(fake_stdlib):
    write(fake_stdlib, "ast.py", "# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    texts = [row["text"] for split in stdlib_corpus().values() for row in split if row["name"] == "lib/ast.py"]
    assert texts == ["# -*- coding: latin-1 -*-\nx = 'é'\n"]


def test_the_split_of_a_document_depends_on_its_name_alone(corpus, fake_stdlib):
    split_of = {name: split for split, documents in corpus.items() for name in documents["name"]}
    some = [name for split in corpus for name in corpus[split]["name"] if name.startswith("lib/")][::10]
    for name in some:
        write(fake_stdlib, name.removeprefix("lib/"), f"# {name}\n")
    rebuilt = {name: split for split, documents in stdlib_corpus().items() for name in documents["name"]}
    assert {name: rebuilt[name] for name in some} == {name: split_of[name] for name in some}


def test_a_python_without_sources_is_refused(fake_stdlib):
    with pytest.raises(FileNotFoundError, match="needs the .py files"):
        stdlib_corpus()


def test_unit_hash_is_the_start_of_sha256_and_uniform():
    digest = hashlib.sha256(b"lib/argparse.py").hexdigest()
    assert unit_hash("lib/argparse.py") == pytest.approx(int(digest[:8], 16) / 2**32, abs=2**-32)
    values = [unit_hash(str(number)) for number in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert sum(value < 0.25 for value in values) == pytest.approx(500, abs=75)


def test_normalize_ignores_line_ends_and_outer_blank_lines_only():
    assert normalize("\n a \t\r\n b\n\n") == normalize("a\n b") == "a\n b"
    assert normalize("a\n\n b") != normalize("a\n b")
