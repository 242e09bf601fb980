"""The documentation stays true: links and named tests exist, code runs, every option is described."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dynmoe_hf.model import expert_selectors, methods
from dynmoe_hf.model.methods import AXES, METHODS, options_class
from tests.model.contract import RULES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", flags=re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, info: str) -> list[tuple[int, str]]:
    """Code blocks with this info string, each with the number of the line before its first."""
    text = path.read_text()
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in FENCE.finditer(text) if match[1] == info]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(code: str, namespace: dict[str, Any], path: Path, line: int) -> None:
    """Execute a block so that a traceback shows its place in the page."""
    exec(compile("\n" * line + code, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_resolve(path: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "code", prose(path))):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(page), f"{target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_named_tests_exist(path: Path) -> None:
    for file, name in NAMED_TEST.findall(path.read_text()):
        assert re.search(rf"^def {name}\b", (ROOT / file).read_text(), flags=re.MULTILINE), f"no {name} in {file}"


@pytest.mark.parametrize(
    "path", [page for page in PAGES if blocks(page, "python") and page.name != "CONTRIBUTING.md"], ids=page_id
)
def test_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All `python` blocks of a page, in order and in one namespace; `python no-run` marks the others."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for line, code in blocks(path, "python"):
        run(code, namespace, path, line)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_that_describes_its_options(name: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{METHODS[name].page or name}.md").read_text()
    spec = methods.expand(name)
    for axis in AXES:
        assert f"`{spec[axis]['type']}`" in text or f'"type": "{spec[axis]["type"]}"' in text
        for option in fields(options_class(axis, spec[axis]["type"])):
            row = f"| `{option.name}` | `{spec[axis][option.name]!r}` |"
            assert row in text, f"no row {row}"
    for loss, coefficient in spec["losses"].items():
        assert f"| `{loss}` | `{coefficient!r}` |" in text, f"no coefficient of {loss}"


def test_every_paper_that_the_models_cite_is_in_the_index() -> None:
    folders = (ROOT / "dynmoe_hf" / name for name in ("model", "convert"))
    sources = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    cited = set(re.findall(r"arXiv (\d{4}\.\d{5})", sources))
    assert "2403.07652" in cited
    assert cited == set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "docs" / "paper_index.md").read_text()))


@pytest.fixture
def worked_example(monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """The method that CONTRIBUTING.md adds, registered for one test: its name, and the namespace of its own test."""
    page = ROOT / "CONTRIBUTING.md"
    (class_line, classes), (table_line, table), (preset_line, preset), (test_line, test) = blocks(page, "python")
    selectors = dict(vars(expert_selectors))
    run(classes, selectors, page, class_line)
    run(table, selectors, page, table_line)
    for name, value in selectors.items():
        if name not in vars(expert_selectors):
            monkeypatch.setattr(expert_selectors, name, value, raising=False)
    for name, part in selectors["SELECTORS"].items():
        monkeypatch.setitem(expert_selectors.SELECTORS, name, part)
    entry = eval(compile("\n" * preset_line + "{" + preset + "}", str(page), "eval"), vars(methods))
    ((method, parts),) = entry.items()
    monkeypatch.setitem(METHODS, method, parts)
    namespace: dict[str, Any] = {"__name__": "docs"}
    run(test, namespace, page, test_line)
    return method, namespace


def test_the_worked_example_passes_its_own_test(worked_example: tuple[str, dict[str, Any]]) -> None:
    tests = [value for name, value in worked_example[1].items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_worked_example_keeps_the_contract(rule: Any, worked_example: tuple[str, dict[str, Any]]) -> None:
    rule({"method": worked_example[0]})
