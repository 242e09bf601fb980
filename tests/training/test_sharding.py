"""Two processes started by `accelerate launch` with the files of configs/accelerate train what one process trains."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.training.arguments import parse_arguments
from dynmoe_hf.training.train import train

ROOT = Path(__file__).parents[2]
RUN = {
    "model": {
        "hidden_size": 32,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
        "max_position_embeddings": 64,
    },
    "vocab_size": 300,
    "block_size": 32,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.1,
    "optim": "sgd",  # Adam turns rounding into whole steps
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 1,
    "use_cpu": True,
}
# accelerate has FSDP and DeepSpeed for accelerators only: here it takes the CPU for one.
SCRIPT = """
import os, sys, torch
from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
torch.distributed.init_process_group("gloo")
from dynmoe_hf.training import train
from dynmoe_hf.training.arguments import parse_arguments

take_step = train.RunTrainer.training_step
def training_step(self, *args):
    print("KIND", self.accelerator.distributed_type.value, type(next(self.model.parameters())).__name__, flush=True)
    return take_step(self, *args)

train.RunTrainer.training_step = training_step
train.train(*parse_arguments(sys.argv[2:], sys.argv[1]))
"""
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture
def config(tmp_path):
    """A configuration file that trains on a few lines of text."""
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{split} {line}: def f(x): return x + {line}\n" * 8}) for line in range(20)]
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(lines))

    def write(**changes):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(RUN | {"dataset": str(tmp_path / "text")} | changes))
        return file

    return write


def launch(name, script, *arguments, **environment):
    """Run a script in two processes, as the configuration of accelerate says; what they print."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [*command, "--num_processes", "2", "--main_process_port", "0", script, *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launch_as_accelerator(name, folder, *arguments):
    (folder / "script.py").write_text(SCRIPT)
    return launch(name, folder / "script.py", *arguments, ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")


def weights_of_one_process(config, folder):
    train(*parse_arguments(["--per_device_train_batch_size", "4", "--output_dir", str(folder)], str(config)))
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, expected, atol=1e-6):
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)


@pytest.mark.distributed
def test_two_processes_of_a_cpu(config, tmp_path):
    file = config(routing="top_p")
    launch("cpu_2", "scripts/train.py", "--config", file, "--output_dir", tmp_path / "two")
    assert (tmp_path / "two" / "checkpoint-1" / "rng_state_1.pth").exists(), "not two processes of one run"
    assert_same_weights(tmp_path / "two", weights_of_one_process(file, tmp_path / "one"))


@pytest.mark.distributed
def test_fsdp2_is_one_process_and_its_checkpoints_are_whole(config, tmp_path):
    file = config(routing="rmoe")
    printed = launch_as_accelerator("fsdp2_8", tmp_path, file, "--output_dir", tmp_path / "two")
    assert "KIND FSDP DTensor" in printed, "not sharded"
    expected = weights_of_one_process(file, tmp_path / "one")
    assert_same_weights(tmp_path / "two", expected)
    middle = tmp_path / "two" / "checkpoint-1"
    loaded = DynMoeForCausalLM.from_pretrained(middle)
    assert_same_weights(middle, loaded.state_dict(), atol=0)
    assert_same_weights(middle, load_file(tmp_path / "one" / "checkpoint-1" / "model.safetensors"))
    for name in ("*.py", "config.json"):
        assert [path.read_text() for path in sorted(middle.glob(name))] == [
            path.read_text() for path in sorted((tmp_path / "one" / "checkpoint-1").glob(name))
        ]


@pytest.mark.distributed
def test_a_resumed_fsdp2_run_ends_the_same(config, tmp_path):
    """With AdamW, whose sharded moments are resumed too."""
    file = config(routing="top_p", optim="adamw_torch", learning_rate=1e-3)
    whole, again = tmp_path / "whole", tmp_path / "again"
    launch_as_accelerator("fsdp2_8", tmp_path, file, "--output_dir", whole)
    shutil.copytree(whole / "checkpoint-1", again / "checkpoint-1")
    launch_as_accelerator("fsdp2_8", tmp_path, file, "--output_dir", again, "--resume_from_checkpoint", "true")
    assert_same_weights(again, load_file(whole / "model.safetensors"), atol=0)


@pytest.mark.distributed
def test_fsdp2_in_bfloat16_with_checkpointing(config, tmp_path):
    """The state of recurrent routers and the scores that losses read go from layer to layer in float32."""
    file = config(routing="rmoe", bf16=True, gradient_checkpointing=True)
    printed = launch_as_accelerator("fsdp2_8", tmp_path, file, "--output_dir", tmp_path / "two")
    assert "KIND FSDP DTensor" in printed
    assert_same_weights(tmp_path / "two", weights_of_one_process(file, tmp_path / "one"), atol=5e-3)


@pytest.mark.distributed
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize("method", ["top_p", "aoe"])
def test_zero_3_trains_and_saves_whole_weights(method, config, tmp_path):
    """Not compared with one process: under ZeRO-3 a new model starts from other random numbers."""
    file = config(routing=method)
    printed = launch_as_accelerator("deepspeed_zero3", tmp_path, file, "--output_dir", tmp_path / "two")
    assert "KIND DEEPSPEED" in printed
    shapes = {name: weight.shape for name, weight in load_file(tmp_path / "two" / "model.safetensors").items()}
    loaded = DynMoeForCausalLM.from_pretrained(tmp_path / "two")
    assert shapes == {name: weight.shape for name, weight in loaded.state_dict().items()}
    log = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    assert log[1]["loss"] < log[0]["loss"]
