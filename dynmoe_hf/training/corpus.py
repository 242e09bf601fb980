"""The corpus that needs no download: the text of the running Python's own standard library."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import platform
import sys
import sysconfig
import textwrap
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, DatasetInfo

CORPUS_NAME = "python-stdlib"

# Tests, vendored wheels and a second copy of the grammar: bulk that teaches a language model nothing new.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "lib2to3", "turtledemo", "ensurepip"})

TOPICS_SOURCE = Path("pydoc_data", "topics.py")

BUILTIN_METHOD_TYPES = (
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


def stdlib_corpus() -> DatasetDict:
    """The standard library of the running Python as documents, split by document name.

    Documents are the entries of `pydoc_data.topics` (`topics/...`), the docstrings of the modules compiled into the
    interpreter (`builtins/...`) and the Python sources (`lib/...`). The text belongs to the installed Python and
    differs between versions, so every split records the version in `info.description`. A document
    whose normalised text equals an earlier one, in the order of names, is left out.

    Returns:
        Splits `train`, `validation` and `test` (about 90, 5 and 5 percent of the documents) with the string columns
        `name` and `text`. The split of a document depends on its name alone.

    Raises:
        FileNotFoundError: this Python is installed without the sources of its library.
    """
    sources = dict(_source_documents())
    if not sources:
        raise FileNotFoundError(
            f"the built-in corpus {CORPUS_NAME!r} needs the .py files of Python's standard library, "
            f"and {sysconfig.get_path('stdlib')} holds none; name a dataset or text files instead."
        )
    documents = {**sources, **dict(_builtin_documents()), **dict(_topic_documents())}
    splits: dict[str, dict[str, list[str]]] = {
        split: {"name": [], "text": []} for split in ("train", "validation", "test")
    }
    seen = {""}
    for name, text in sorted(documents.items()):
        content = normalize(text)
        if content not in seen:
            seen.add(content)
            columns = splits[_split_of(name)]
            columns["name"].append(name)
            columns["text"].append(text)
    info = DatasetInfo(
        description=f"The standard library of Python {platform.python_version()}: sources, docstrings and topics.",
        homepage="https://docs.python.org",
        license="PSF-2.0",
    )
    return DatasetDict({split: Dataset.from_dict(columns, info=info) for split, columns in splits.items()})


def normalize(text: str) -> str:
    """The text without trailing blanks and outer empty lines; documents with equal results count as duplicates."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone, uniform over keys: the same on every machine and run."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


def _split_of(name: str) -> str:
    position = unit_hash(name)
    if position < 0.90:
        return "train"
    return "validation" if position < 0.95 else "test"


def _topic_documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield f"topics/{topic}", text


def _source_documents() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    # Only names of the library itself: next to them lie site-packages, sitecustomize.py and the build's own settings.
    for module in sys.stdlib_module_names:
        for path in (root / f"{module}.py", *(root / module).rglob("*.py")):
            name = path.relative_to(root)
            if path.is_file() and SKIPPED_FOLDERS.isdisjoint(name.parts) and name != TOPICS_SOURCE:
                with tokenize.open(path) as file:
                    yield f"lib/{name.as_posix()}", file.read()


def _builtin_documents() -> Iterator[tuple[str, str]]:
    for module in sys.builtin_module_names:
        yield f"builtins/{module}", _docstrings(importlib.import_module(module))


def _docstrings(module: types.ModuleType) -> str:
    """Docstrings of a compiled module, its functions, classes and their methods.

    Values are left out, unlike in `pydoc`, because `posix.environ` and `sys.path` describe the user, not the language.
    """
    members = {
        member.__qualname__: member
        for member in vars(module).values()
        if (inspect.isbuiltin(member) or inspect.isclass(member)) and _is_at_home(member, module)
    }
    entries = [inspect.getdoc(module) or ""]
    for _, member in sorted(members.items()):
        entries.append(_entry(member))
        if inspect.isclass(member):
            methods = [value for _, value in sorted(vars(member).items()) if isinstance(value, BUILTIN_METHOD_TYPES)]
            entries.extend(_entry(method) for method in methods)
    body = "\n\n".join(entry for entry in entries if entry)
    return f"{module.__name__}\n\n{body}" if body else ""


def _is_at_home(member: object, module: types.ModuleType) -> bool:
    # Compiled modules name the Python module in front of them as the home: `_collections.deque` is in `collections`.
    return (member.__module__ or "").lstrip("_") == module.__name__.lstrip("_")


def _entry(member: object) -> str:
    if not isinstance(member.__doc__, str):  # a class may define a slot or property of that name
        return ""
    try:
        signature = str(inspect.signature(member))
    except (TypeError, ValueError):
        signature = ""
    return f"{member.__qualname__}{signature}\n{textwrap.indent(inspect.cleandoc(member.__doc__), '    ')}"
