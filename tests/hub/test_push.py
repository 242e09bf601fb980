"""What `dynmoe push` refuses, what it stages, and that its trial without the package finds faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from dynmoe_hf.cli import main
from dynmoe_hf.evaluation.loading import load_model_and_tokenizer
from dynmoe_hf.evaluation.quantization import int8_weight_only
from dynmoe_hf.hub import staging
from dynmoe_hf.hub.staging import PublishingError, check_in_clean_process, stage
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.hub.server import Hub, running_hub
from tests.tiny import tiny_model

REPO = "tester/model"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that training leaves in it."""
    folder = tmp_path_factory.mktemp("push") / "model"
    tiny_model("top_p", vocab_size=280, pad_token_id=1, eos_token_id=0).save_pretrained(folder, max_shard_size="30KB")
    train_tokenizer(["a text to learn from, with a few words"], vocab_size=280).save_pretrained(folder)
    (folder / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/optimizer.pt", "training_args.bin", "notes.txt", "pytorch_model.bin", "extra.py"):
        (folder / name).write_bytes(b"private")
    (folder / "train_config.yaml").write_text(f"dataset: {folder}/secret/text.txt\n")
    return folder


@pytest.fixture
def staged(original: Path, tmp_path: Path):
    model, tokenizer = load_model_and_tokenizer(original, device="cpu")
    folder = tmp_path / "staged"
    files = stage(model, tokenizer, ModelCard("---\nlicense: mit\n---\n# A card\n"), folder)
    return folder, files, model, tokenizer


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trial in a process of its own, which takes seconds."""
    monkeypatch.setattr(staging, "check_in_clean_process", lambda *args: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A Hub for this process, which has asked for none when huggingface_hub was imported."""
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


def push(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["push", *map(str, words)])
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("dynmoe push: ")]
    return code, out, "\n".join(said)


def test_exactly_what_belongs_to_the_model_is_staged(staged, original: Path) -> None:
    folder, files, model, _ = staged
    code = {name for name in files if name.endswith(".py")}
    assert "modeling_dynmoe.py" in code and "extra.py" not in code
    assert set(files) - code == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert files == {path.name: path.stat().st_size for path in folder.iterdir()}
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for path in folder.iterdir():
        assert str(original).encode() not in path.read_bytes(), path.name


def test_a_copy_without_its_code_fails_the_trial(staged) -> None:
    folder, _, model, tokenizer = staged
    (folder / "routing.py").unlink()
    with pytest.raises(PublishingError, match=r"does not work without dynmoe_hf: .*routing\.py"):
        check_in_clean_process(folder, model, tokenizer)


def test_a_copy_that_computes_something_else_fails_the_trial(staged) -> None:
    folder, _, model, tokenizer = staged
    check_in_clean_process(folder, model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(PublishingError, match="it computes other logits than the original"):
        check_in_clean_process(folder, model, tokenizer)


def test_code_that_needs_the_package_fails_the_trial(staged) -> None:
    folder, _, model, tokenizer = staged
    with (folder / "routing.py").open("a") as file:
        file.write("\nimport dynmoe_hf.training\n")
    with pytest.raises(PublishingError, match="dynmoe_hf"):
        check_in_clean_process(folder, model, tokenizer)


def test_a_failed_trial_uploads_nothing(original: Path, hub: Hub, monkeypatch, capsys) -> None:
    def fail(*args: object) -> None:
        raise PublishingError("the reason.")

    monkeypatch.setattr(staging, "check_in_clean_process", fail)
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    assert push(capsys, original, REPO) == (1, "", "dynmoe push: the reason.")
    assert hub.requests and not hub.uploads()


def test_a_dry_run_asks_nobody(original: Path, no_trial, hub: Hub, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = {path: path.stat().st_mtime_ns for path in original.rglob("*")}
    code, out, err = push(capsys, original, REPO, "--dry-run", "--json", "--card-output", tmp_path / "card.md")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["dry_run"] and report["private"] and report["url"] is None
    card = (tmp_path / "card.md").read_text()
    assert report["files"]["README.md"] == len(card.encode()) and "`text.txt`" in card
    assert before == {path: path.stat().st_mtime_ns for path in original.rglob("*")}
    assert not hub.requests
    code, out, _ = push(capsys, original, REPO, "--dry-run", "--card", tmp_path / "card.md")
    assert code == 0 and "model.safetensors" in out and "Nothing was uploaded" in out


def test_without_a_token_one_sentence(original: Path, hub: Hub, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = push(capsys, original, REPO)
    assert code == 2 and "--dry-run needs none" in err and "\n" not in err and not hub.requests


def test_with_a_wrong_token_one_sentence(original: Path, hub: Hub, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = push(capsys, original, REPO)
    assert code == 1 and "refuses: " in err and "token" in err and "\n" not in err
    assert not hub.uploads() and not hub.repositories


def test_without_a_network_one_sentence(original: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = push(capsys, original, REPO)
    assert code == 1 and "http://127.0.0.1:9 cannot be reached" in err and "\n" not in err


def test_in_offline_mode_one_sentence(original: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = push(capsys, original, REPO)
    assert code == 1 and "HF_HUB_OFFLINE" in err and "\n" not in err


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "org/", "/name", "org/-x", "org/na me", "org/a..b", "org/x.git"])
def test_a_bad_name_is_refused(repo_id: str, original: Path, capsys) -> None:
    code, _, err = push(capsys, original, "--dry-run", "--", repo_id)
    assert code == 2 and repr(repo_id) in err and "\n" not in err


def test_a_quantised_folder_is_refused(original: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("torchao")
    model, tokenizer = load_model_and_tokenizer(original, device="cpu", quantization_config=int8_weight_only())
    model.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    code, _, err = push(capsys, tmp_path / "int8", REPO, "--dry-run")
    assert code == 2 and "is quantised" in err and "\n" not in err


def test_broken_folders_are_refused(original: Path, tmp_path: Path, capsys) -> None:
    code, _, err = push(capsys, tmp_path / "none", REPO, "--dry-run")
    assert code == 2 and "no folder" in err
    broken = shutil.copytree(original, tmp_path / "broken")
    (shard := next(broken.glob("model-00002*"))).write_bytes(shard.read_bytes()[:-10])
    code, _, err = push(capsys, broken, REPO, "--dry-run")
    assert code == 2 and "truncated or corrupt" in err
    without = shutil.copytree(original, tmp_path / "without")
    for path in without.glob("tokenizer*"):
        path.unlink()
    code, _, err = push(capsys, without, REPO, "--dry-run")
    assert code == 2 and "tokenizer" in err
    code, _, err = push(capsys, original, REPO, "--dry-run", "--card-output", tmp_path)
    assert code == 2 and "cannot write" in err
