"""The portable floor stays portable, and a saved model runs where the package is not installed."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynmoe_hf
from dynmoe_hf.model.modeling_dynmoe import AUTO_MAP
from tests.tiny import tiny_config, tiny_model, tokens

PACKAGE = Path(dynmoe_hf.__file__).parent
FLOOR = PACKAGE / "model"
FILES = sorted(path for path in FLOOR.glob("*.py") if path.name != "__init__.py")
ALLOWED = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_are_flat_and_static(path: Path) -> None:
    for node in imports(path):
        if isinstance(node, ast.Import) or node.level == 0:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                assert name.split(".")[0] in ALLOWED, f"{path.name} imports {name}"
        else:
            assert node.level == 1 and node.module and "." not in node.module, f"{path.name}: line {node.lineno}"
            assert (FLOOR / f"{node.module}.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_hides_a_module_of_the_standard_library(path: Path) -> None:
    """The files lie in checkpoint folders, and Python may be started in one."""
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_that_transformers_takes_for_an_import_is_one(path: Path) -> None:
    """It finds the files to copy by a regular expression over the text, docstrings included."""
    text = path.read_text()
    found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
    found |= set(re.findall(r"^\s*import\s+\.(\S+)\s*$", text, flags=re.MULTILINE))
    assert found == {node.module for node in imports(path) if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert not re.search(r"^\s*from\s+\.\s+import", text, flags=re.MULTILINE)


def test_the_experts_decorator_stands_in_the_modeling_file() -> None:
    text = (FLOOR / "modeling_dynmoe.py").read_text()
    assert "@use_experts_implementation" in text
    config_text = (FLOOR / "configuration_dynmoe.py").read_text()
    tree = ast.parse(config_text)
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert not futures, "annotations from __future__ switch off the type checks of the configuration"


FLOORS = {
    "cli": {"hub", "evaluation", "benchmarks", "training", "convert", "analysis", "model"},
    "hub": {"evaluation", "training", "convert", "analysis", "model"},
    "evaluation": {"training", "convert", "analysis", "model"},
    "benchmarks": {"training", "convert", "analysis", "model"},
    "training": {"convert", "analysis", "model"},
    "convert": {"analysis", "model"},
    "analysis": {"model"},
    "model": set(),
}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    floor = path.relative_to(PACKAGE).parts[0]
    for node in imports(path):
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and node.level == 0 and module.startswith("dynmoe_hf."):
            target = module.split(".")[1]
            assert target in FLOORS[floor] | {floor, "errors"}, f"{path.name} on floor {floor} imports {module}"


MODEL_FLOORS = [
    {"routing", "compat", "buffers", "products", "quantized", "checkpoints"},
    {"controllers", "row_statistics", "scorers", "expert_layouts", "losses", "packing", "outputs"},
    {"expert_selectors", "masks", "ragged"},
    {"dispatch", "parallel_plans"},
    {"low_rank_experts"},
    {"methods"},
    {"configuration_dynmoe"},
    {"attention"},
    {"blocks"},
    {"routing_changes"},
    {"modeling_dynmoe"},
]


def test_imports_only_go_down_inside_the_floor() -> None:
    level = {name: number for number, names in enumerate(MODEL_FLOORS) for name in names}
    assert set(level) == {path.stem for path in FILES}
    for path in FILES:
        for node in imports(path):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert level[node.module] < level[path.stem], f"{path.stem} imports {node.module}"


def test_the_documented_floors_are_these() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ((?:`\w+`(?:, )?)+) \|$", text, re.MULTILINE)
    documented = {int(number): set(re.findall(r"\w+", names)) for number, names in rows}
    assert documented == dict(enumerate(MODEL_FLOORS, start=1))


LOAD_ELSEWHERE = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert not any(name.startswith("dynmoe_hf") for name in sys.modules)
folder, classes = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
content = torch.load(folder + "/content.pt")
torch.save(model(content).logits, folder + "/logits.pt")
torch.save(model.generate(content[:1], max_new_tokens=4, do_sample=False), folder + "/generated.pt")
import transformers
for name in classes:
    getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
assert "dynmoe_hf" not in sys.modules
model.save_pretrained(folder + "/again")
"""


def run_elsewhere(folder: Path, home: Path) -> None:
    """In a new interpreter that cannot import this package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    block = (
        "import importlib.abc, sys\n"
        "class _Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'dynmoe_hf':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, _Absent())\n"
    )
    command = [sys.executable, "-c", block + LOAD_ELSEWHERE, str(folder), json.dumps(list(AUTO_MAP)[1:])]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("routing", ["top_k", "top_p", "aoe", "da_moe", "dtop_p", "rmoe_cartesian"])
def test_a_saved_model_runs_without_the_package(routing: str, tmp_path) -> None:
    model = tiny_model(routing, "ragged")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in FILES}
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    content = tokens(2, 8)
    torch.save(content, folder / "content.pt")
    run_elsewhere(folder, tmp_path / "home")
    assert torch.equal(torch.load(folder / "logits.pt"), model(content).logits)
    expected = model.generate(content[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.load(folder / "generated.pt"), expected)
    again = folder / "again"
    assert {path.name for path in again.glob("*.py")} == {path.name for path in FILES}
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_every_head_is_saved_with_the_same_map(tmp_path) -> None:
    from dynmoe_hf import DynMoeForSequenceClassification

    DynMoeForSequenceClassification(tiny_config("top_p")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, dynmoe_hf, dynmoe_hf.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name for statement in block.body for alias in statement.names}
    assert seen == set(dynmoe_hf.__all__) - {"__version__"} == set(dynmoe_hf.model.__all__)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("order", ["dynmoe_hf, transformers", "transformers, dynmoe_hf"])
def test_importing_the_package_registers_the_family(order: str, tmp_path) -> None:
    tiny_model("top_p").save_pretrained(tmp_path)
    code = (
        f"import {order}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert type(model).__module__ == 'dynmoe_hf.model.modeling_dynmoe', type(model)\n"
        "assert type(model) is dynmoe_hf.DynMoeForCausalLM\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, stdin=subprocess.DEVNULL)
