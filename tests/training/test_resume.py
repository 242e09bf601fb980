import json
import os
import random
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import accelerate
import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerState

from dynmoe_hf import cli
from dynmoe_hf.model import products
from dynmoe_hf.training.checkpoints import ResumableTrainer, fault, last_whole_checkpoint

SETTINGS = """
model: {hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 4, num_experts: 4,
        max_position_embeddings: 64, initializer_range: 0.1, attention_dropout: 0.1}
vocab_size: 300
block_size: 28
validation_fraction: 0.2
max_steps: 6
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
per_device_eval_batch_size: 2
learning_rate: 1e-2
save_steps: 2
save_total_limit: 1
logging_steps: 2
report_to: none
use_cpu: true
disable_tqdm: true
"""


class Killed(BaseException):
    """Stops a run where it stands, as SIGKILL does: no handler of the package or of transformers catches it."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    words = random.Random(0)
    rows = [{"text": " ".join(words.choices("the router sends tokens to experts".split(), k=40))} for _ in range(11)]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.yaml").write_text(f"{SETTINGS}\ndataset: {folder / 'documents.jsonl'}\n")
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder
    if were_on:
        datasets.enable_progress_bars()


def run_train(workplace, output_dir, *flags) -> int:
    command = ["train", "--json", "--config", str(workplace / "config.yaml"), "--output_dir", str(output_dir)]
    return cli.main([*command, *map(str, flags)])


@pytest.fixture(scope="module")
def runs(workplace):
    """Uninterrupted runs by routing method, with all their checkpoints."""
    folders = {}
    for routing in ("top_k", "dtop_p"):
        folders[routing] = workplace / routing
        assert run_train(workplace, folders[routing], "--routing", routing, "--save_total_limit", 3) == 0
    return folders


@pytest.fixture
def copy(runs, tmp_path):
    """The run by top_k as if it had been stopped after its second checkpoint."""
    for step in (2, 4):
        shutil.copytree(runs["top_k"] / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def bits(value):
    """Nested states with tensors as bytes, to be compared by ==."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return str(value.dtype), tuple(value.shape), np.asarray(value).tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [bits(inner) for inner in value]
    return repr(value)


def assert_same_end(first: Path, second: Path) -> None:
    for name in ("model.safetensors", "checkpoint-6/model.safetensors"):
        assert bits(load_file(first / name)) == bits(load_file(second / name))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(folder / "checkpoint-6" / name, weights_only=False) for folder in (first, second)]
        assert bits(states[0]) == bits(states[1]), name
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (first, second)]
    assert results[0]["eval_lm_loss"] == results[1]["eval_lm_loss"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def kill_in_write(patch: pytest.MonkeyPatch, checkpoint: str, name: str) -> None:
    """Let the next run die when half of this file of this checkpoint is written."""
    writers = {
        "model.safetensors": (PreTrainedModel, "save_pretrained", 1),
        "trainer_state.json": (TrainerState, "save_to_json", 1),
    }
    owner, method, position = writers.get(name, (torch, "save", 1))
    original = getattr(owner, method)

    def write(*args, **kwargs):
        original(*args, **kwargs)
        path = Path(args[position])
        path = path / name if name == "model.safetensors" else path
        if path.parent.name == checkpoint and path.name == name:
            cut(path)
            raise Killed

    patch.setattr(owner, method, write)


FILES = (
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


@pytest.mark.parametrize(("routing", "name"), [("top_k", "optimizer.pt"), *(("dtop_p", name) for name in FILES)])
def test_run_killed_in_a_write_ends_bit_for_bit_where_one_left_alone_does(workplace, runs, tmp_path, routing, name):
    """Only the last checkpoint is kept, so that the one before is there if the Trainer deletes in the right order."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in_write(patch, "checkpoint-4", name)
        run_train(workplace, folder, "--routing", routing)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    with pytest.warns(UserWarning, match="checkpoint-4' is not whole") as caught:
        assert run_train(workplace, folder, "--routing", routing, "--resume_from_checkpoint", "true") == 0
    assert len([warning for warning in caught if "not whole" in str(warning.message)]) == 1
    assert_same_end(runs[routing], folder)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6"}


@pytest.mark.parametrize(("routing", "micro_batch"), [("dtop_p", 0), ("dtop_p", 5), ("top_k", 9)])
def test_run_killed_in_a_step_ends_bit_for_bit_where_one_left_alone_does(
    workplace, runs, tmp_path, monkeypatch, routing, micro_batch
):
    """In the first step there is no checkpoint yet; 5 and 9 are in the midst of an accumulation."""
    folder, original, count = tmp_path / "run", ResumableTrainer.training_step, iter(range(100))

    def step(self, *args, **kwargs):
        if next(count) == micro_batch:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableTrainer, "training_step", step)
        run_train(workplace, folder, "--routing", routing)
    flags = ("--resume_from_checkpoint", "true") if micro_batch else ("--overwrite_output_dir",)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run_train(workplace, folder, "--routing", routing, *flags) == 0
    assert_same_end(runs[routing], folder)


def test_run_killed_after_its_last_checkpoint_is_finished(workplace, runs, tmp_path):
    """Its last step lies amid an epoch: transformers 5.23 would take another one."""
    state = json.loads((runs["dtop_p"] / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["epoch"] % 1
    shutil.copytree(runs["dtop_p"], tmp_path / "run")
    cut(tmp_path / "run" / "model.safetensors")
    assert run_train(workplace, tmp_path / "run", "--routing", "dtop_p", "--resume_from_checkpoint", "true") == 0
    assert_same_end(runs["dtop_p"], tmp_path / "run")


@pytest.mark.parametrize(
    "damage", [Path.unlink, cut, lambda path: path.write_bytes(b"")], ids=["missing", "cut", "empty"]
)
@pytest.mark.parametrize("name", [*FILES, "config.json", "tokenizer.json"])
def test_damaged_file_is_noticed(copy, name, damage):
    assert fault(copy / "checkpoint-4") is None
    damage(copy / "checkpoint-4" / name)
    if damage is Path.unlink and name in ("training_args.bin", "tokenizer.json"):
        return  # the tokenizer is in more than one file, and no run needs its old arguments
    assert fault(copy / "checkpoint-4") is not None
    whole, faults = last_whole_checkpoint(copy)
    assert (whole, list(faults)) == (str(copy / "checkpoint-2"), [str(copy / "checkpoint-4")])


def test_missing_shard_is_noticed(copy):
    weights = copy / "checkpoint-4" / "model.safetensors"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(weights, copy / "checkpoint-4" / "model-00001-of-00002.safetensors")
    assert fault(copy / "checkpoint-4") == "it has no model-00002-of-00002.safetensors"
    shutil.copy(weights, copy / "checkpoint-4" / "model-00002-of-00002.safetensors")
    assert fault(copy / "checkpoint-4") is None


def test_steps_are_compared_as_numbers_and_other_folders_are_left_alone(copy):
    for step in ("100", "mine", "8-old"):
        shutil.copytree(copy / "checkpoint-2", copy / f"checkpoint-{step}")
    (copy / "checkpoint-9").write_text("a file")
    assert last_whole_checkpoint(copy) == (str(copy / "checkpoint-100"), {})


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_named_checkpoint_that_is_not_whole_is_refused(workplace, copy, capsys, name):
    cut(copy / "checkpoint-4" / name)
    flags = ("--routing", "top_k", "--resume_from_checkpoint", copy / "checkpoint-4")
    assert run_train(workplace, copy, *flags) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint == (f"dynmoe train: '{copy}/checkpoint-4' is no checkpoint to resume from: {name} is damaged.")


def test_nothing_whole_to_resume_says_why_and_how_to_start_again(workplace, copy, capsys):
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / "optimizer.pt").unlink()
    assert run_train(workplace, copy, "--routing", "top_k", "--resume_from_checkpoint", "true") == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.count("it has no state of the optimizer") == 2 and "--overwrite_output_dir" in complaint


def test_whole_checkpoint_that_is_written_again_counts_as_half_written_meanwhile(workplace, copy):
    flags = ("--routing", "top_k", "--resume_from_checkpoint", copy / "checkpoint-2")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_in_write(patch, "checkpoint-4", "training_args.bin")
        run_train(workplace, copy, *flags)
    shutil.copy(copy / "checkpoint-2" / "training_args.bin", copy / "checkpoint-4")
    assert fault(copy / "checkpoint-4") == "it has no trainer_state.json"


def test_older_checkpoint_is_deleted_only_when_the_newer_one_is_whole(workplace, tmp_path, monkeypatch):
    deleted, original = [], shutil.rmtree

    def rmtree(path, *args, **kwargs):
        deleted.append(Path(path).name)
        newer = Path(path).with_name(f"checkpoint-{int(deleted[-1][-1]) + 2}")
        json.loads((newer / "trainer_state.json").read_text())
        torch.load(newer / "rng_state.pth", weights_only=False)
        torch.load(newer / "optimizer.pt")
        load_file(newer / "model.safetensors")
        original(path, *args, **kwargs)

    monkeypatch.setattr("transformers.trainer_utils.shutil.rmtree", rmtree)
    assert run_train(workplace, tmp_path / "run") == 0
    assert deleted == ["checkpoint-2", "checkpoint-4"]


def test_every_process_has_written_its_part_before_the_file_that_makes_a_checkpoint_whole(
    workplace, tmp_path, monkeypatch
):
    """The wait for the others is the last thing before that file, and comes after this process's own last part."""
    seen, original = [], accelerate.Accelerator.wait_for_everyone

    def wait(self):
        seen.append({path.name for path in (tmp_path / "run" / "checkpoint-2").glob("*")})
        original(self)

    monkeypatch.setattr(accelerate.Accelerator, "wait_for_everyone", wait)
    assert run_train(workplace, tmp_path / "run", "--max_steps", 2) == 0
    everything = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert everything - {"trainer_state.json"} in seen


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_one_sentence(capsys, folder: Path, target: str, said: str) -> None:
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("dynmoe train: ")] == lines[-1:]
    assert lines[-1].startswith(f"dynmoe train: '{folder}{target}' could not be written: ") and said in lines[-1]
    assert lines[-1].endswith(f"the last whole checkpoint is '{folder}/checkpoint-2'.")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("limit", [2**9, 2**12, 2**15, 2**16])
def test_checkpoint_that_does_not_fit_ends_with_a_sentence(workplace, tmp_path, monkeypatch, capsys, limit):
    """A real limit on the size of files, which every writer meets in its own way."""
    folder, original, before = tmp_path / "run", ResumableTrainer._save_checkpoint, {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, *args):
        if self.state.global_step == 4:
            before.update(contents(folder / "checkpoint-2"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            original(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(ResumableTrainer, "_save_checkpoint", save)
    assert run_train(workplace, folder, "--routing", "top_k") == 2
    assert_one_sentence(capsys, folder, "/checkpoint-4", "")
    assert contents(folder / "checkpoint-2") == before and fault(folder / "checkpoint-4") is not None


WRITERS = {
    "model": ("PreTrainedModel.save_pretrained", SafetensorError("I/O error: No space left on device (os error 28)")),
    "tokenizer": ("PreTrainedTokenizerBase.save_pretrained", Exception("No space left on device (os error 28)")),
    "optimizer": ("torch.save", RuntimeError("basic_ios::clear: iostream error")),
    "state": ("TrainerState.save_to_json", OSError(28, "No space left on device")),
    "permission": ("torch.save", PermissionError(13, "Permission denied")),
}


@pytest.mark.parametrize("case", WRITERS)
def test_full_disk_and_missing_permission_end_with_a_sentence(workplace, tmp_path, monkeypatch, capsys, case):
    """The errors are those that the writers raised on a full file system."""
    folder, before = tmp_path / "run", {}
    name, error = WRITERS[case]
    owner = torch if name == "torch.save" else getattr(transformers, name.partition(".")[0])
    method = name.partition(".")[2]
    original = getattr(owner, method)

    def write(*args, **kwargs):
        if "checkpoint-4" in str(args[1]):
            before.update(contents(folder / "checkpoint-2"))
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, write)
    assert run_train(workplace, folder, "--routing", "top_k") == 2
    assert_one_sentence(capsys, folder, "/checkpoint-4", str(error))
    assert contents(folder / "checkpoint-2") == before


def test_end_of_a_run_that_does_not_fit_ends_with_a_sentence(workplace, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResumableTrainer, "save_metrics", full)
    assert run_train(workplace, tmp_path / "run", "--max_steps", 2) == 2
    assert_one_sentence(capsys, tmp_path / "run", "", "No space left on device")


def test_mistakes_of_the_code_are_no_full_disk(workplace, tmp_path, monkeypatch):
    def broken(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(TrainerState, "save_to_json", broken)
    with pytest.raises(TypeError, match="a mistake"):
        run_train(workplace, tmp_path / "run")


@pytest.mark.parametrize("exists", [True, False])
def test_unwritable_folder_is_refused_before_any_work(workplace, tmp_path, monkeypatch, capsys, exists):
    """Root may write everywhere, so that the answer of the system is a stand-in."""
    folder = tmp_path / "closed" if exists else tmp_path / "closed" / "a" / "b"
    (tmp_path / "closed").mkdir()
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and original(path, mode))
    monkeypatch.setattr("dynmoe_hf.training.train.load_documents", None)
    assert run_train(workplace, folder) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint == (
        f"dynmoe train: output_dir '{folder}' cannot be written: '{tmp_path}/closed' is read-only for you."
    )
    assert list((tmp_path / "closed").iterdir()) == []


@pytest.fixture
def determinism(monkeypatch):
    """What full_determinism sets for the whole process is as before."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", os.environ.get("FLASH_ATTENTION_DETERMINISTIC", ""))
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("full_determinism", [False, True])
def test_full_determinism_keeps_large_experts_from_products_chosen_by_time(
    workplace, tmp_path, monkeypatch, determinism, full_determinism
):
    """Two processes may choose differently, and then round differently."""
    measured = []

    def measure(*args):
        measured.append(args)
        return products.portable_products(args[0])

    monkeypatch.setattr(products, "_measured_products", measure)
    wide = ("--model.hidden_size", 256, "--model.moe_intermediate_size", 512, "--max_steps", 1)
    flags = (*wide, "--save_strategy", "no", *["--full_determinism"] * full_determinism)
    assert run_train(workplace, tmp_path / "run", *flags) == 0
    assert bool(measured) == (not full_determinism)


@pytest.mark.slow
def test_script_finds_no_difference():
    script = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, script, "--trials", "2"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "0 with a difference, 0 that lost a finished checkpoint" in done.stdout
