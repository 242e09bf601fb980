"""Controllers under the real Trainer: one update for each optimizer step, however it is cut or distributed."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from dynmoe_hf.training.callbacks import ControllerCallback
from tests.distributed import run_two_processes
from tests.tiny import tiny_model, tokens
from tests.training.test_accumulation import padded_sequences

ROUTING = {"method": "dtop_p", "controller": {"target": 3}}
NUM_STEPS = 6


class KeepThresholds(TrainerCallback):
    def __init__(self):
        self.sequence = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.sequence.append(model.thresholds()[0])


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder, callbacks, routing=ROUTING, seed=0, **changes) -> Trainer:
    """Steps of four sequences with unlike numbers of real tokens. SGD, because Adam turns rounding into whole steps."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": NUM_STEPS,
        "optim": "sgd",
        "learning_rate": 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(
        model=tiny_model(routing, seed=seed),
        args=TrainingArguments(**(settings | changes)),
        train_dataset=padded_sequences(),
        eval_dataset=padded_sequences(),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def threshold_sequence(folder, resume=None, seed=0, **changes) -> list[float]:
    """The threshold after each optimizer step."""
    keep = KeepThresholds()
    make_trainer(folder, [ControllerCallback(), keep], seed=seed, **changes).train(resume_from_checkpoint=resume)
    return keep.sequence


@pytest.fixture(scope="module")
def undivided(tmp_path_factory) -> list[float]:
    sequence = threshold_sequence(tmp_path_factory.mktemp("undivided"))
    assert len(set(sequence)) == NUM_STEPS
    return sequence


@pytest.mark.parametrize("accumulation", [2, 4])
def test_thresholds_do_not_depend_on_accumulation(tmp_path, undivided, accumulation):
    changes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    assert threshold_sequence(tmp_path, **changes) == pytest.approx(undivided, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["evaluation", "gradient checkpointing", "reentrant checkpointing"],
)
def test_passes_that_are_no_training_move_nothing(tmp_path, undivided, changes):
    assert threshold_sequence(tmp_path, **changes) == pytest.approx(undivided, abs=1e-6)


def test_resumed_run_goes_on_with_the_same_thresholds(tmp_path, undivided):
    whole = threshold_sequence(tmp_path, save_strategy="steps", save_steps=2)
    assert whole == undivided
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved["model.layers.0.mlp.selector.threshold"].item() == whole[1]
    # Another seed: everything must come from the checkpoint.
    resumed = threshold_sequence(tmp_path / "resumed", resume=str(tmp_path / "checkpoint-2"), seed=7)
    assert resumed == whole[2:]


def test_an_aborted_step_is_forgotten(tmp_path, undivided):
    keep = KeepThresholds()
    trainer = make_trainer(tmp_path, [ControllerCallback(), keep])
    trainer.model.train()(tokens(4, 16), labels=tokens(4, 16))
    trainer.train()
    assert keep.sequence == undivided


def test_training_logs_gain_the_threshold(tmp_path, undivided):
    late, reporter = Reporter(), Reporter()
    trainer = make_trainer(tmp_path, [late, ControllerCallback()], eval_strategy="steps", eval_steps=3)
    trainer.train()
    history = trainer.state.log_history
    assert [log["threshold"] for log in history if "loss" in log] == pytest.approx(undivided)
    assert not [log for log in history if "loss" not in log and "threshold" in log]
    assert "threshold" not in late.logs[0]

    trainer = make_trainer(tmp_path, [reporter])
    ControllerCallback().put_first(trainer)
    trainer.train()
    assert [log["threshold"] for log in reporter.logs if "loss" in log] == pytest.approx(undivided)


def test_the_logged_threshold_is_the_mean_over_layers(tmp_path):
    routing = {"method": "dtop_p", "controller": {"target": 3, "scope": "layer"}}
    trainer = make_trainer(tmp_path, [ControllerCallback()], routing, max_steps=2)
    trainer.train()
    thresholds = trainer.model.thresholds()
    assert thresholds[0] != thresholds[2]
    *_, log = (log for log in trainer.state.log_history if "loss" in log)
    assert log["threshold"] == pytest.approx((thresholds[0] + thresholds[2]) / 2)
    assert [name for name in log if "threshold" in name] == ["threshold"]


def test_a_model_without_a_controller_is_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, [ControllerCallback()], "top_p", max_steps=1)
    trainer.train()
    assert "threshold" not in trainer.state.log_history[0]


def test_the_scale_is_trained_without_weight_decay(tmp_path):
    trainer = make_trainer(tmp_path, [], optim="adamw_torch", weight_decay=0.1)
    trainer.create_optimizer()
    scales = {id(block.selector.logit_norm.theta) for block in trainer.model.moe_blocks()}
    decay = {id(param): group["weight_decay"] for group in trainer.optimizer.param_groups for param in group["params"]}
    assert [decay[scale] for scale in scales] == [0.0, 0.0]
    assert set(decay.values()) == {0.0, 0.1}


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_the_wrapper_that_the_trainer_hands_over_under_fsdp(one_process):
    expected = tiny_model(ROUTING).train()
    expected(tokens(2, 8)).logits.sum().backward()
    expected.update_controllers()

    model = FullyShardedDataParallel(tiny_model(ROUTING), use_orig_params=True, device_id=torch.device("cpu")).train()
    callback = ControllerCallback()
    model(tokens(2, 8))
    callback.on_train_begin(None, None, None, model=model)
    model(tokens(2, 8)).logits.sum().backward()
    callback.on_optimizer_step(None, None, None, model=model)
    assert model.thresholds() == pytest.approx(expected.thresholds())
    assert callback.metrics_for({"loss": 1.0}, model) == {"threshold": pytest.approx(expected.thresholds()[0])}


DISTRIBUTED_RUN = """
import sys, torch
from tests.training.test_controllers import threshold_sequence

sequence = threshold_sequence(sys.argv[1], per_device_train_batch_size=1, gradient_accumulation_steps=2)
torch.save(sequence, f"{sys.argv[1]}/rank{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path, undivided):
    """Two processes of two accumulated sequences each; the target is on the mean over both."""
    run_two_processes(DISTRIBUTED_RUN, tmp_path)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == pytest.approx(undivided, abs=1e-6)
