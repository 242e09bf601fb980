"""The promises of the packaging files: honest ranges, pinned environments, one version, nothing of one machine."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dynmoe_hf

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """Direct requirements of the package with `extras`, by canonical name; its extras may name each other."""
    found: dict[str, Requirement] = {}
    for text in PROJECT["dependencies"] + [text for extra in extras for text in EXTRAS[extra]]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            found |= requirements(*requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def pins(file_name: str) -> dict[str, Version]:
    """Canonical name to version for every line of a constraints file, each of which must be an exact pin."""
    versions = {}
    for line in (ROOT / file_name).read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            versions[canonicalize_name(name)] = Version(version)
    return versions


def test_constraints_pin_every_direct_requirement_within_its_range() -> None:
    versions = pins("constraints.txt")
    required = requirements("dev", "demo")
    assert required.keys() <= versions.keys()
    outside = {name: versions[name] for name, req in required.items() if not req.specifier.contains(versions[name])}
    assert not outside


def test_floor_pins_the_lower_bound_of_every_range() -> None:
    bounds = {
        name: Version(specifier.version)
        for name, requirement in requirements("demo", "finetune", "quantization", "eval").items()
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    versions = pins("constraints-floor.txt")
    assert versions.pop("torch") >= bounds.pop("torch")
    assert versions == bounds


def test_every_third_party_import_is_a_declared_requirement() -> None:
    imported = set()
    for path in (ROOT / "dynmoe_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    distributions = importlib.metadata.packages_distributions()
    declared = requirements(*EXTRAS).keys()
    third_party = imported - sys.stdlib_module_names - {"dynmoe_hf"}
    undeclared = {
        name
        for name in third_party
        if not declared & {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
    }
    assert "torch" in third_party
    assert not undeclared


def test_citation_and_changelog_name_the_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dynmoe_hf.__version__
    assert f"## [{dynmoe_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    pattern = re.compile(rb"(?<![\w.~$})])/(?:home|Users|root|work|tmp)/\w")
    tracked = [name for name in listing.split("\0") if name]
    assert not [name for name in tracked if (ROOT / name).is_file() and pattern.search((ROOT / name).read_bytes())]
