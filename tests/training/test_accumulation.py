"""Under the real Trainer, one optimizer step is the same however its sequences are cut into micro-batches."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from dynmoe_hf.model import modeling_dynmoe
from dynmoe_hf.training.callbacks import RoutingCallback
from tests.distributed import run_two_processes
from tests.tiny import tiny_model, tokens

LENGTHS = (16, 3, 9, 12, 5, 16, 7, 2)
PROMPTS = (0, 1, 4, 9, 0, 13, 2, 0)  # leading tokens without a label
SPREAD = ("experts_per_token", "experts_per_token_p95", "dead_experts", "load_cv", "router_entropy")
LOSSES = {"top_k": {"load_balance": 1.0}, "top_p": {"load_balance": 1.0, "dynamic": 1.0}}


def padded_sequences() -> Dataset:
    rows = []
    for number, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        ids = tokens(length, seed=number).tolist()
        labels = [-100] * prompt + ids[prompt:]
        padding = 16 - length
        rows.append(
            {
                "input_ids": ids + [0] * padding,
                "labels": labels + [-100] * padding,
                "attention_mask": [1] * length + [0] * padding,
            }
        )
    return Dataset.from_list(rows)


class KeepRouterGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        routers = [weight.grad for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")]
        assert len(routers) == 2
        self.gradients = torch.cat([gradient.flatten() for gradient in routers]).clone()


def one_step(folder, method, accumulation, losses, batch_size=8) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradients of all routers in one optimizer step over the eight sequences, and what is logged about it."""
    model = tiny_model({"method": method, "losses": losses})
    keep = KeepRouterGradients()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            per_device_train_batch_size=batch_size // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=padded_sequences(),
        data_collator=default_data_collator,
        callbacks=[keep, RoutingCallback(model)],
    )
    trainer.train()
    return keep.gradients, trainer.state.log_history[0]


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undivided")
    without_aux = {name: 0.0 for name in LOSSES["top_p"]}
    return {
        method: (one_step(folder, method, 1, losses), one_step(folder, method, 1, without_aux))
        for method, losses in LOSSES.items()
    }


@pytest.mark.parametrize("accumulation", [2, 4, 8])
@pytest.mark.parametrize("method", LOSSES)
def test_router_gradients_and_logs_do_not_depend_on_accumulation(tmp_path, undivided, method, accumulation):
    (gradients, log), (lm_gradients, _) = undivided[method]
    cut_gradients, cut_log = one_step(tmp_path, method, accumulation, LOSSES[method])

    assert relative_difference(cut_gradients, gradients) < 1e-5
    torch.testing.assert_close(cut_gradients, gradients, rtol=0, atol=1e-5)
    # The share of the auxiliary losses alone, which the cross-entropy could otherwise hide.
    cut_lm_gradients, _ = one_step(tmp_path, method, accumulation, {name: 0.0 for name in LOSSES["top_p"]})
    aux, cut_aux = gradients - lm_gradients, cut_gradients - cut_lm_gradients
    assert aux.norm() > 0.1 * gradients.norm()
    assert relative_difference(cut_aux, aux) < 1e-5

    for name in ("loss", "lm_loss", *SPREAD, *LOSSES[method]):
        assert cut_log[name] == pytest.approx(log[name], rel=1e-5), name
    assert log["loss"] == pytest.approx(log["lm_loss"] + sum(log[name] for name in LOSSES[method]), rel=1e-5)


@pytest.mark.parametrize("method", LOSSES)
def test_a_mean_over_each_micro_batch_would_be_noticed(tmp_path, undivided, method, monkeypatch):
    monkeypatch.setattr(modeling_dynmoe, "share_of_step", lambda *args, **kwargs: 1.0)
    (gradients, log), (lm_gradients, _) = undivided[method]
    cut_gradients, cut_log = one_step(tmp_path, method, 4, LOSSES[method])
    cut_aux, aux = (cut_gradients - lm_gradients).norm(), (gradients - lm_gradients).norm()
    assert cut_aux > 3 * aux
    assert cut_log["loss"] > log["loss"] + 2 * log["load_balance"]


DISTRIBUTED_STEP = """
import sys, torch
from tests.training.test_accumulation import LOSSES, one_step

gradients, log = one_step(sys.argv[1], "top_p", accumulation=2, losses=LOSSES["top_p"], batch_size=4)
torch.save((gradients, log), f"{sys.argv[1]}/rank{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path, undivided):
    """Two processes of two accumulated micro-batches of two sequences each; the logs are sums over both."""
    run_two_processes(DISTRIBUTED_STEP, tmp_path)
    gradients, log = undivided["top_p"][0]
    for rank in range(2):
        cut_gradients, cut_log = torch.load(tmp_path / f"rank{rank}.pt")
        assert relative_difference(cut_gradients, gradients) < 1e-5
        for name in ("loss", "lm_loss", *SPREAD, *LOSSES["top_p"]):
            assert cut_log[name] == pytest.approx(log[name], rel=1e-5), name
