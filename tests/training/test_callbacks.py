import json
import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from dynmoe_hf.training.callbacks import RoutingCallback, RoutingProgressCallback
from tests.tiny import tiny_model, tokens

ROUTING = {"method": "top_p", "losses": {"load_balance": 0.5, "dynamic": 0.1}}
SPREAD = {"experts_per_token", "experts_per_token_p95", "dead_experts", "load_cv", "router_entropy"}
ROUTING_METRICS = SPREAD | {"load_balance", "dynamic", "lm_loss"}
ALARMS = {"alarm/collapse", "alarm/runaway"}
TRAINER_OWN = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def sequences(count, seed, unlabelled=()) -> Dataset:
    ids = tokens(count, 12, seed=seed)
    labels = ids.clone()
    for row in unlabelled:
        labels[row, :9] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


TRAIN = sequences(16, seed=1, unlabelled=(2, 3, 5))
VALIDATION = sequences(5, seed=2, unlabelled=(1, 4))


class Reporter(TrainerCallback):
    """As TensorBoard's callback: keeps each log as it is when this callback is called."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder, callbacks=(), routing=ROUTING, **changes) -> Trainer:
    model = tiny_model(routing)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(settings | changes)),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        data_collator=default_data_collator,
        callbacks=[make(model) for make in callbacks],
    )


@torch.no_grad()
def mean_cross_entropy(model, dataset) -> float:
    """Over all labels of a dataset, one sequence at a time."""
    total, count = 0.0, 0
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        total += F.cross_entropy(model(ids).logits[0, :-1], labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def test_plain_trainer_logs_routing_in_training_and_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, [RoutingCallback], eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    training = [log for log in history if "loss" in log]
    evaluation = [log for log in history if "eval_loss" in log]
    assert (len(training), len(evaluation)) == (2, 1)
    for log in training:
        assert set(log) == ROUTING_METRICS | ALARMS | TRAINER_OWN
        assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["load_balance"] + 0.1 * log["dynamic"], rel=1e-5)
    names = ROUTING_METRICS | {"perplexity"}
    assert set(evaluation[0]) >= {f"eval_{name}" for name in names}
    assert "eval_bits_per_byte" not in evaluation[0] and not {f"eval_{name}" for name in ALARMS} & set(evaluation[0])
    final = history[-1]
    assert "train_loss" in final and not set(final) & ROUTING_METRICS


def test_losses_are_means_over_labels(tmp_path):
    """A mean over batches would weigh labels of half-labelled sequences more."""
    trainer = make_trainer(
        tmp_path,
        [lambda model: RoutingCallback(model, tokens_per_byte=0.25)],
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    trainer.train()
    metrics = trainer.evaluate()
    train_loss, eval_loss = (mean_cross_entropy(trainer.model, dataset) for dataset in (TRAIN, VALIDATION))
    assert trainer.state.log_history[0]["lm_loss"] == pytest.approx(train_loss, rel=1e-5)
    assert metrics["eval_lm_loss"] == pytest.approx(eval_loss, rel=1e-5)
    assert metrics["eval_loss"] > metrics["eval_lm_loss"] + 0.5  # the Trainer's holds the auxiliary losses
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(eval_loss), rel=1e-5)
    assert metrics["eval_bits_per_byte"] == pytest.approx(eval_loss / math.log(2) * 0.25, rel=1e-5)


def test_logging_window_spans_steps(tmp_path):
    every = make_trainer(tmp_path, [RoutingCallback], max_steps=4)
    every.train()
    once = make_trainer(tmp_path, [RoutingCallback], max_steps=4, logging_steps=4)
    once.train()
    per_step = [log["experts_per_token"] for log in every.state.log_history if "loss" in log]
    assert once.state.log_history[0]["experts_per_token"] == pytest.approx(sum(per_step) / 4)
    assert len(set(per_step)) > 1


def test_evaluation_prefixes_and_predict(tmp_path):
    trainer = make_trainer(tmp_path, [lambda model: RoutingCallback(model, tokens_per_byte=0.25)])
    validation = trainer.evaluate()
    by_name = trainer.evaluate({"a": VALIDATION, "b": TRAIN})
    assert by_name["eval_a_lm_loss"] == validation["eval_lm_loss"]
    assert by_name["eval_b_lm_loss"] == pytest.approx(mean_cross_entropy(trainer.model, TRAIN), rel=1e-5)
    predicted = trainer.predict(TRAIN).metrics
    assert predicted["test_experts_per_token"] == by_name["eval_b_experts_per_token"]
    assert "test_bits_per_byte" not in predicted  # the bytes were those of the validation text
    assert trainer.evaluate()["eval_experts_per_token"] == validation["eval_experts_per_token"]


def test_per_layer_values_have_the_number_of_the_decoder_layer(tmp_path):
    trainer = make_trainer(tmp_path, [lambda model: RoutingCallback(model, per_layer=True)])
    metrics = trainer.evaluate()
    per_layer = {name: value for name, value in metrics.items() if "/layer_" in name}
    assert set(per_layer) == {"eval_experts_per_token/layer_0", "eval_experts_per_token/layer_2"}
    assert sum(per_layer.values()) / 2 == pytest.approx(metrics["eval_experts_per_token"])


def test_banks_of_a_cartesian_layer_are_logged_apart(tmp_path):
    routing = {"method": "cartesian", "selector": {"k": 3}, "experts": {"second_selector": {"k": 1}}}
    trainer = make_trainer(tmp_path, [lambda model: RoutingCallback(model, per_layer=True)], routing)
    trainer.train()
    for log, prefix in ((trainer.state.log_history[0], ""), (trainer.evaluate(), "eval_")):
        per_layer = {name: value for name, value in log.items() if "/layer_" in name}
        banks = {f"layer_{layer}_bank_{bank}": k for layer in (0, 2) for bank, k in enumerate((3, 1))}
        assert per_layer == pytest.approx({f"{prefix}experts_per_token/{name}": k for name, k in banks.items()})
        assert log[f"{prefix}experts_per_token"] == pytest.approx(2)


def test_reporters_see_the_metrics_of_a_callback_put_first(tmp_path):
    reporter = Reporter()
    trainer = make_trainer(tmp_path, [lambda model: reporter])
    RoutingCallback(trainer.model).put_first(trainer)
    trainer.train()
    assert set(reporter.logs[0]) >= ROUTING_METRICS | ALARMS

    late = Reporter()
    trainer = make_trainer(tmp_path, [lambda model: late, RoutingCallback])
    trainer.train()
    assert not set(late.logs[0]) & ROUTING_METRICS
    assert set(trainer.state.log_history[0]) >= ROUTING_METRICS


@pytest.mark.parametrize("num_layers", [3, 9])
def test_the_number_of_keys_does_not_grow_with_the_model(tmp_path, num_layers):
    model = tiny_model("top_p", num_hidden_layers=num_layers, num_experts=5 * num_layers, mlp_layer_types=None)
    added = RoutingCallback(model).metrics_for
    model.train()(tokens(2, 9), labels=tokens(2, 9))
    assert set(added({"loss": 1.0}, model)) == ROUTING_METRICS | ALARMS


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    RoutingCallback(trainer.model).put_first(trainer)
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    for log in trainer.state.log_history[:2]:
        for name in ROUTING_METRICS | ALARMS:
            values = {event.step: event.value for event in events.Scalars(f"train/{name}")}
            assert values[log["step"]] == pytest.approx(log[name])
    assert {f"eval/{name}" for name in ROUTING_METRICS} < set(events.Tags()["scalars"])


def test_progress_bar_shows_loss_and_experts_per_token(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=False)
    RoutingCallback(trainer.model).put_first(trainer)
    bar = RoutingProgressCallback()
    bar.replace_in(trainer)
    assert [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)] == [bar]
    trainer.train()
    shown = capsys.readouterr()
    for log in trainer.state.log_history[:2]:
        figures = f"experts/token={log['experts_per_token']:.3g}, loss={log['loss']:.3g}"
        assert figures in shown.err or ", ".join(reversed(figures.split(", "))) in shown.err
        assert f"'lm_loss': '{log['lm_loss']:.4g}'" in shown.out + shown.err
    trainer.evaluate()


def test_no_progress_bar_where_none_is_wanted(tmp_path):
    trainer = make_trainer(tmp_path)
    RoutingProgressCallback().replace_in(trainer)
    assert not [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)]


def test_other_logs_stay_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path, [RoutingCallback])
    trainer.model(tokens(1, 4))
    trainer.log({"my_number": 1.0})
    assert set(trainer.state.log_history[-1]) == {"my_number", "epoch", "step"}


def test_best_model_can_be_chosen_by_a_metric_of_ours(tmp_path):
    trainer = make_trainer(
        tmp_path,
        [RoutingCallback],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-3,
        load_best_model_at_end=True,
        metric_for_best_model="lm_loss",
    )
    trainer.train()
    best = min(log["eval_lm_loss"] for log in trainer.state.log_history if "eval_lm_loss" in log)
    assert trainer.state.best_metric == best
