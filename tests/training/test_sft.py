"""TRL's SFTTrainer trains with the loss of the model, every auxiliary loss counted once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.training.adapters import lora_targets
from dynmoe_hf.training.callbacks import RoutingCallback
from tests.tiny import tiny_model, tokens

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from dynmoe_hf.training.sft import DynMoeSFTTrainer  # noqa: E402 (it needs TRL)

LOSSES = {"load_balance": 3.0, "dynamic": 0.5, "router_z": 0.1}
PROMPTS = (0, 6, 3, 1)  # leading tokens of each row without a label


def rows() -> Dataset:
    labels = tokens(4, 10)
    for row, prompt in zip(labels, PROMPTS, strict=True):
        row[:prompt] = -100
    return Dataset.from_dict({"input_ids": tokens(4, 10).tolist(), "labels": labels.tolist()})


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, 97)}
    words_alone = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words_alone, pad_token="<pad>", eos_token="w1")


def make_trainer(
    model: DynMoeForCausalLM | str,
    folder: Path,
    trainer_class: type = DynMoeSFTTrainer,
    peft_config: peft.LoraConfig | None = None,
    **settings: Any,
) -> trl.SFTTrainer:
    """By default for one step of plain gradient descent."""
    one_step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    machine = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = trl.SFTConfig(str(folder), max_grad_norm=0.0, **(one_step | machine | settings))
    return trainer_class(model, args, train_dataset=rows(), processing_class=tokenizer(), peft_config=peft_config)


def one_step(model: DynMoeForCausalLM, folder: Path, **settings: Any) -> tuple[dict[str, Tensor], list[dict]]:
    """The gradient of every parameter in the step, and the micro-batches that the decoder saw."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, folder, **settings)
    batches: list[dict[str, Tensor]] = []
    compute_loss = trainer.compute_loss

    def spy(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
        batches.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}, batches


def expected_gradients(model: DynMoeForCausalLM, batches: list[dict]) -> dict[str, Tensor]:
    """Of the cross-entropy of all labels, and of each auxiliary loss times its coefficient, meant over the labels."""
    model.train()
    num_labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        out = model(**batch, output_routing=True)
        share = (batch["labels"][:, 1:] != -100).sum() / num_labels
        cross_entropy = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        auxiliary = sum(coefficient * out.aux_losses[name] for name, coefficient in LOSSES.items())
        (cross_entropy / num_labels + share * auxiliary).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("output_router_logits", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("routing", ["top_k", "top_p", "dtop_p"])
def test_every_loss_counts_once(routing: str, accumulation: int, output_router_logits: bool, tmp_path: Path) -> None:
    model = tiny_model({"method": routing, "losses": LOSSES}, "ragged", output_router_logits=output_router_logits)
    plain, thresholds = copy.deepcopy(model), model.thresholds()
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    found, batches = one_step(model, tmp_path, **sizes)
    assert len(batches) == accumulation
    expected = expected_gradients(plain, batches)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())
    assert model.config.output_router_logits == output_router_logits
    assert model.config.routing == plain.config.routing
    assert model.thresholds().keys() == thresholds.keys()
    assert all(model.thresholds()[layer] != threshold for layer, threshold in thresholds.items())


def test_trl_alone_counts_another_loss(tmp_path: Path) -> None:
    """If this fails, TRL calls the head now, and the class of ours has become unnecessary."""
    model = tiny_model({"method": "top_p", "losses": LOSSES}, "ragged")
    plain = copy.deepcopy(model)
    found, batches = one_step(model, tmp_path, trainer_class=trl.SFTTrainer)
    router = "model.layers.0.mlp.gate.weight"
    expected = expected_gradients(plain, batches)[router]
    assert (found[router] - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("routing", ["top_p", "aoe", "dtop_p"])
def test_fine_tuning_adapters(routing: str, tmp_path: Path) -> None:
    model = tiny_model(routing, "ragged")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **lora_targets(model))
    thresholds = model.thresholds()
    longer = {"max_steps": 8, "optim": "adamw_torch", "learning_rate": 2e-2, "logging_steps": 4}
    trainer = make_trainer(model, tmp_path, peft_config=config, **longer)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    RoutingCallback(trainer.model).put_first(trainer)
    trainer.train()
    first, last = (log for log in trainer.state.log_history if "loss" in log)
    assert last["lm_loss"] < first["lm_loss"] - 0.4
    assert last["experts_per_token"] > 0 and ("threshold" in last) == bool(thresholds)
    parameters = dict(trainer.model.named_parameters())
    assert len(frozen) > 20 and all(torch.equal(parameters[name], value) for name, value in frozen.items())

    trainer.save_model()
    loaded = peft.PeftModel.from_pretrained(tiny_model(routing, "ragged"), tmp_path).eval()
    assert loaded.thresholds() == trainer.model.thresholds() and (loaded.thresholds() != thresholds or not thresholds)
    content = tokens(2, 8)
    assert torch.equal(loaded(input_ids=content).logits, trainer.model.eval()(input_ids=content).logits)


def test_evaluation_has_the_same_loss(tmp_path: Path) -> None:
    model = tiny_model({"method": "top_p", "losses": LOSSES}, "ragged")
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(rows())
    batch = {name: torch.tensor(rows()[name]) for name in ("input_ids", "labels")}
    assert metrics["eval_loss"] == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"loss_type": "dft"}, {"router_aux_loss_coef": 0.1}, {"label_smoothing_factor": 0.1}]
)
def test_settings_of_another_loss_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_trainer(tiny_model("top_p"), tmp_path, **settings)
