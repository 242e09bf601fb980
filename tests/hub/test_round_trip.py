"""Publishing and loading over HTTP, against a Hub on the loopback address; each side in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import dynmoe_hf
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.hub.server import TOKEN, Hub, running_hub
from tests.tiny import tiny_model, tokens

ROOT = Path(dynmoe_hf.__file__).parents[1]
FLOOR = {path.name for path in (ROOT / "dynmoe_hf" / "model").glob("*.py")} - {"__init__.py"}
SHARD = "30KB"

PUBLISH = """
import contextlib, io, json, sys
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
import dynmoe_hf.hub.staging
from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.cli import main

work, shard = sys.argv[1:]
outcomes = {}

def push(name, *words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["push", *words, "--json"])
    outcomes[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}

first, second = f"{work}/first", f"{work}/second"
push("new", first, "tester/model", "--license", "apache-2.0", "--language", "en")
dynmoe_hf.hub.staging.check_in_clean_process = lambda *args: None  # each takes a process
push("unchanged", first, "tester/model", "--license", "apache-2.0", "--language", "en")
push("branch", second, "tester/model", "--revision", "v2", "--message", "Another model")
push("pull request", second, "tester/model", "--create-pr")
push("bad card", first, "tester/bad", "--license", "no-license")
model = DynMoeForCausalLM.from_pretrained(second)
model.push_to_hub("tester/direct", max_shard_size=shard)
AutoTokenizer.from_pretrained(second).push_to_hub("tester/direct")
push("public by accident", first, "tester/direct")
model.push_to_hub("tester/sharded", max_shard_size=shard)
push("over shards", first, "tester/sharded", "--public")
ids = torch.arange(2, 18).reshape(2, 8)
arguments = TrainingArguments(f"{work}/trained", push_to_hub=True, hub_model_id="tester/trained", max_steps=1,
                              hub_private_repo=True, report_to=[], use_cpu=True, save_strategy="no")
trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
trainer.train()
trainer.push_to_hub()
model.save_pretrained(f"{work}/after training")
json.dump(outcomes, open(f"{work}/outcomes.json", "w"))
"""

LOAD = """
import importlib.abc, json, re, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dynmoe_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

work, places, name = sys.argv[1:]
ids = load_file(f"{work}/ids.safetensors")["ids"]
logits = {}
for repo, revision in json.loads(places):
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()
    with torch.no_grad():
        logits[f"{repo} {revision}"] = model(ids).logits
save_file(logits, f"{work}/{name}.safetensors")
card = open(hf_hub_download("tester/model", "README.md"), encoding="utf-8").read()
namespace = {}
for block in re.findall(r"```python\\n(.*?)```", card, re.DOTALL):
    exec(block, namespace)
assert namespace["output"].shape[1] > namespace["inputs"]["input_ids"].shape[1]
"""


def run(code: str, arguments: list[str], home: Path, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment | variables,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with a tokenizer; the second has other weights, in several files."""
    work = tmp_path_factory.mktemp("hub")
    tokenizer = train_tokenizer(["a text to learn from, with a few words"], vocab_size=280)
    for seed, name in enumerate(("first", "second")):
        model = tiny_model("top_p", seed=seed, vocab_size=280, pad_token_id=1, eos_token_id=0)
        model.save_pretrained(work / name, max_shard_size=SHARD if seed else "1GB")
        tokenizer.save_pretrained(work / name)
    assert len(list((work / "second").glob("model-*.safetensors"))) > 1
    return work


@pytest.fixture(scope="module")
def hub(work: Path) -> Hub:
    """The Hub after everything was published."""
    (work / "publisher").mkdir()
    with running_hub() as hub:
        run(PUBLISH, [str(work), SHARD], work / "publisher", HF_ENDPOINT=hub.url)
        yield hub


@pytest.fixture(scope="module")
def outcomes(hub: Hub, work: Path) -> dict[str, dict[str, Any]]:
    return json.loads((work / "outcomes.json").read_text())


@pytest.fixture(scope="module")
def reader(hub: Hub, work: Path) -> Path:
    """The home of a reader who has loaded everything over HTTP and has no dynmoe_hf."""
    from safetensors.torch import save_file

    (work / "reader").mkdir()
    save_file({"ids": tokens(2, 8)}, work / "ids.safetensors")
    places = [
        ("tester/model", "main"),
        ("tester/model", "v2"),
        ("tester/model", "refs/pr/1"),
        ("tester/trained", "main"),
    ]
    places += [("tester/direct", "main"), ("tester/sharded", "main")]
    run(LOAD, [str(work), json.dumps(places), "online"], work / "reader", HF_ENDPOINT=hub.url)
    return work / "reader"


@torch.no_grad()
def expected(work: Path, name: str) -> torch.Tensor:
    model = dynmoe_hf.DynMoeForCausalLM.from_pretrained(work / name).eval()
    return model(load_file(work / "ids.safetensors")["ids"]).logits


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("tester/model main", "first"),
        ("tester/model v2", "second"),
        ("tester/model refs/pr/1", "second"),
        ("tester/direct main", "second"),
        ("tester/sharded main", "first"),
        ("tester/trained main", "after training"),
    ],
)
def test_what_comes_back_is_what_was_published(place: str, name: str, reader: Path, work: Path) -> None:
    assert torch.equal(load_file(work / "online.safetensors")[place], expected(work, name))


def test_the_cache_serves_without_a_hub(reader: Path, work: Path) -> None:
    places = json.dumps([("tester/model", "main")])
    run(LOAD, [str(work), places, "offline"], reader, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert torch.equal(load_file(work / "offline.safetensors")["tester/model main"], expected(work, "first"))


def test_a_new_repository_is_private_and_holds_what_it_needs(hub: Hub, outcomes: dict[str, Any]) -> None:
    assert outcomes["new"]["code"] == 0, outcomes["new"]["err"]
    report = json.loads(outcomes["new"]["out"])
    assert report["private"] and hub.repositories["tester/model"].private
    assert report["url"].startswith(f"{hub.url}/tester/model/commit/")
    files = hub.files("tester/model")
    assert set(files) == FLOOR | {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert report["files"] == {name: len(content) for name, content in files.items()}


def test_the_card_was_validated_by_the_hub(hub: Hub) -> None:
    content = hub.files("tester/model")["README.md"].decode()
    assert content in hub.cards
    data = ModelCard(content).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "transformers")
    assert "top_p" in data.tags and data.pipeline_tag == "text-generation"


def test_a_second_push_of_the_same_makes_no_commit(hub: Hub, outcomes: dict[str, Any]) -> None:
    assert outcomes["unchanged"]["code"] == 0, outcomes["unchanged"]["err"]
    assert json.loads(outcomes["unchanged"]["out"])["url"] is None
    messages = hub.repositories["tester/model"].messages
    assert messages[:2] == ["Upload top_p model", "Another model"] and len(messages) == 3


def test_a_branch_and_a_pull_request_leave_main_alone(hub: Hub, outcomes: dict[str, Any]) -> None:
    assert outcomes["branch"]["code"] == outcomes["pull request"]["code"] == 0
    assert json.loads(outcomes["pull request"]["out"])["url"] == f"{hub.url}/tester/model/discussions/1"
    weights = [hub.files("tester/model", name)["model.safetensors"] for name in ("main", "v2", "refs/pr/1")]
    assert weights[0] != weights[1] == weights[2]


def test_a_card_that_the_hub_refuses_stops_the_upload(hub: Hub, outcomes: dict[str, Any]) -> None:
    assert outcomes["bad card"]["code"] == 1
    (said,) = [line for line in outcomes["bad card"]["err"].splitlines() if line.startswith("dynmoe push: ")]
    assert "no such license" in said
    assert not hub.files("tester/bad")


def test_a_public_repository_is_not_filled_by_accident(hub: Hub, outcomes: dict[str, Any]) -> None:
    assert outcomes["public by accident"]["code"] == 2 and "--public" in outcomes["public by accident"]["err"]
    assert len([name for name in hub.files("tester/direct") if name.endswith(".safetensors")]) > 1


def test_shards_of_an_earlier_push_do_not_stay(hub: Hub, outcomes: dict[str, Any]) -> None:
    assert outcomes["over shards"]["code"] == 0 and not json.loads(outcomes["over shards"]["out"])["private"]
    assert [name for name in hub.files("tester/sharded") if "safetensors" in name] == ["model.safetensors"]


def test_the_trainer_publishes_code_too(hub: Hub) -> None:
    assert hub.repositories["tester/trained"].private
    assert set(hub.files("tester/trained")) >= FLOOR | {"model.safetensors", "config.json", "README.md"}
