"""Options for routers: their parameter groups against AdamW by hand, freezing, and the warm-up of the losses."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, default_data_collator

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.errors import UserError
from dynmoe_hf.training.arguments import DynMoeTrainingArguments, parse_arguments
from dynmoe_hf.training.callbacks import AuxiliaryWarmupCallback, RoutingCallback, ThresholdWarmupCallback
from dynmoe_hf.training.routers import RouterTrainer
from dynmoe_hf.training.train import train
from tests.tiny import TOGETHER, tiny_model
from tests.training.test_callbacks import TRAIN, VALIDATION
from tests.training.test_presets import SETTINGS

ROUTER_NAMES = re.compile(r"mlp\.(sub_layers\.\d\.)?(gate|selector)\.|shared_scorers\.")
ROUTINGS = {"top_k": "top_k", "rmoe": "rmoe", "dtop_p": "dtop_p", "learned": TOGETHER["learned importance"]} | {
    "cartesian": "cartesian"
}
OWN = {"router_learning_rate": 3e-2, "router_weight_decay": 0.5}
NUM_STEPS = 3


def make_trainer(folder, routing="top_p", callbacks=(), **changes) -> RouterTrainer:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
    }
    model = tiny_model(routing)
    return RouterTrainer(
        model=model,
        args=DynMoeTrainingArguments(**(settings | changes)),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        data_collator=default_data_collator,
        callbacks=[RoutingCallback(model), *callbacks],
    )


class AdamWByHand(TrainerCallback):
    """Applies the published update (Loshchilov and Hutter 2019, algorithm 2) to copies, with a linear schedule."""

    def __init__(self, model, rates, decays):
        self.rates, self.decays = rates, decays
        self.weights = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
        self.first, self.second = ({name: torch.zeros_like(w) for name, w in self.weights.items()} for _ in range(2))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        step = state.global_step + 1
        left = 1 - state.global_step / args.max_steps
        for name, parameter in model.named_parameters():
            gradient, own = parameter.grad.double(), bool(ROUTER_NAMES.search(name))
            rate, decay = self.rates[own] * left, 0.0 if re.search("bias|norm", name) else self.decays[own]
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
            self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
            change = (self.first[name] / (1 - 0.9**step)) / ((self.second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            self.weights[name] -= rate * (change + decay * self.weights[name])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_routers_follow_their_own_rate_and_decay(tmp_path, routing, optim):
    trainer = make_trainer(tmp_path, routing, optim=optim, **OWN)
    by_hand = AdamWByHand(trainer.model, rates=(1e-3, 3e-2), decays=(0.1, 0.5))
    trainer.add_callback(by_hand)
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight.detach().double(), by_hand.weights[name], rtol=1e-5, atol=1e-6, msg=name)
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3  # of all that is no router


@pytest.mark.parametrize(("given", "index"), [("router_learning_rate", 0), ("router_weight_decay", 1)])
def test_one_option_leaves_the_other_as_it_is(tmp_path, given, index):
    trainer = make_trainer(tmp_path, **{given: 0.25})
    trainer.create_optimizer()
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    expected = [1e-3, 0.1]
    expected[index] = 0.25
    seen = []
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            if ROUTER_NAMES.search(name):
                assert [group["lr"], group["weight_decay"]] == expected
            else:
                assert group["lr"] == 1e-3 and group["weight_decay"] == (0.0 if "norm" in name else 0.1)
    assert sorted(seen) == sorted(names.values())


def test_without_the_options_the_groups_are_those_of_transformers(tmp_path):
    trainer = make_trainer(tmp_path)
    assert len(trainer.create_optimizer().param_groups) == 2


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_groups_under_fsdp(tmp_path, use_orig_params):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        trainer = make_trainer(tmp_path, "dtop_p", **OWN)
        wrapped = FullyShardedDataParallel(
            trainer.model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        if use_orig_params:
            groups = trainer.create_optimizer(wrapped).param_groups
            counts = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
            assert (counts[3e-2, 0.5], counts[3e-2, 0.0]) == (2, 2)  # gates, and the scales of two selectors
        else:
            with pytest.raises(ValueError, match="fsdp_use_orig_params"):
                trainer.create_optimizer(wrapped)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_frozen_routers_stay_and_all_else_moves(tmp_path, routing):
    trainer = make_trainer(tmp_path, routing, freeze_routers=True)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters()}
    assert moved == {name: not ROUTER_NAMES.search(name) for name in before}


@pytest.mark.parametrize("option", [OWN, {"freeze_routers": True}])
def test_a_model_whose_experts_rank_themselves_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match="no parameters of their own"):
        make_trainer(tmp_path, "aoe", **option)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"freeze_routers": True, "router_learning_rate": 1e-3}, "exclude each other"),
        ({"freeze_routers": True, "router_weight_decay": 0.0}, "exclude each other"),
        ({"router_learning_rate": -1.0}, "router_learning_rate must be"),
        ({"router_weight_decay": float("nan")}, "router_weight_decay must be"),
        ({"aux_warmup_steps": -1}, "aux_warmup_steps must be"),
        ({"aux_warmup_steps": 2, "torch_compile": True}, "aux_warmup_steps does not work"),
        ({"threshold_warmup_steps": -1}, "threshold_warmup_steps must be"),
        ({"threshold_warmup_start": -0.1}, "threshold_warmup_start must be"),
        ({"threshold_warmup_steps": 2, "torch_compile": True}, "threshold_warmup_steps does not work"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, words):
    flags = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(UserError, match=words):
        parse_arguments([*flags, f"--output_dir={tmp_path}"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["top_p", "cartesian_top_p"])
def test_coefficients_rise_in_training_only(tmp_path, method, accumulation):
    losses = {"load_balance": 0.5, "dynamic": 0.25}
    trainer = make_trainer(
        tmp_path,
        {"method": method, "losses": losses},
        [AuxiliaryWarmupCallback(3)],
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    training = [log for log in trainer.state.log_history if "loss" in log]
    for log, share in zip(training, (1 / 3, 2 / 3, 1, 1, 1), strict=True):
        auxiliary = 0.5 * log["load_balance"] + 0.25 * log["dynamic"]
        assert log["loss"] == pytest.approx(log["lm_loss"] + share * auxiliary, rel=1e-4)
    coefficients = trainer.model.loss_coefficients()
    assert all({name: values[name] for name in losses} == losses for values in coefficients)
    for step in (1, 5):
        saved = DynMoeConfig.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert saved.routing["losses"].items() >= losses.items()
    other = make_trainer(tmp_path / "other", {"method": method, "losses": losses})
    other.model.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"))
    evaluated = next(log for log in trainer.state.log_history if "eval_loss" in log)
    assert evaluated["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("method", ["top_p", "cartesian_top_p"])
def test_thresholds_move_to_those_of_the_config_in_training_only(tmp_path, method, start):
    routing = {"method": method, "selector": {"p": 0.6}}
    trainer = make_trainer(tmp_path, routing, max_steps=5, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(ThresholdWarmupCallback(trainer.model, start, 4))
    seen = {"train": [], "eval": []}
    selectors = [block.selector for block in trainer.model.moe_blocks()]
    for selector in selectors:
        selector.register_forward_pre_hook(
            lambda module, _: seen["train" if module.training else "eval"].append(round(module.options.p, 6))
        )
    trainer.train()
    per_step = [start + step / 4 * (0.6 - start) for step in (1, 2, 3, 4)] + [0.6]
    assert seen["train"] == pytest.approx([p for p in per_step for _ in selectors])
    assert set(seen["eval"]) == {0.6}
    assert all(selector.options.p == 0.6 for selector in selectors)


@pytest.mark.parametrize(("routing", "words"), [("top_k", "takes top_p"), ("dtop_p", "The controller of this model")])
def test_thresholds_that_cannot_be_warmed_up_are_refused(routing, words):
    with pytest.raises(ValueError, match=words):
        ThresholdWarmupCallback(tiny_model(routing), 1.0, 4)


def test_a_resumed_run_goes_on_with_groups_and_coefficients(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **OWN}
    whole = make_trainer(tmp_path / "whole", callbacks=[AuxiliaryWarmupCallback(3)], **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", callbacks=[AuxiliaryWarmupCallback(3)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_routers": True, "aux_warmup_steps": 4, "threshold_warmup_steps": 2, "threshold_warmup_start": 0.9},
        {"router_learning_rate": 0.0},
    ],
    ids=["freeze", "rate"],
)
def test_the_command_takes_them(tmp_path, options):
    lines = [json.dumps({"text": f"{line}: def f(x): return x\n" * 20}) for line in range(6)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    settings = SETTINGS | options | {"routing": "top_p", "dataset": str(tmp_path / "text.jsonl")}
    settings |= {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    settings["validation_fraction"] = 0.2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / "out")}))
    train(*parse_arguments([], str(tmp_path / "run.yaml")))
    first, last = (load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (1, 4))
    moved = {
        name: not torch.equal(first[name], last[name]) for name in first if "gate.weight" in name or "proj" in name
    }
    assert moved == {name: "gate.weight" not in name for name in moved} and len(set(moved.values())) == 2
    written = yaml.safe_load((tmp_path / "out" / "train_config.yaml").read_text())
    assert written.items() >= options.items()
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]
    factor = 0.25 if "aux_warmup_steps" in options else 1.0
    coefficients = DynMoeConfig.from_pretrained(tmp_path / "out").routing["losses"]
    auxiliary = sum(coefficients[name] * log[name] for name in ("load_balance", "dynamic"))
    assert log["loss"] - log["lm_loss"] == pytest.approx(factor * auxiliary, rel=0.02)
