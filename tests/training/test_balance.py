"""`balance_scope="global"`: the load balance over all tokens of an optimizer step, and what it takes."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments, default_data_collator

from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.training.balance import GlobalBalanceTrainer
from dynmoe_hf.training.callbacks import ControllerCallback, RoutingCallback
from tests.tiny import tiny_config, tiny_model, tokens


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}


def one_step(model, rows, accumulation, folder, extra=(), **options):
    keep = KeepGradients()
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"num_train_epochs": 1, **options},
    )
    data = Dataset.from_list(rows)
    trainer = GlobalBalanceTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_data_collator,
        callbacks=[keep, *extra],
    )
    trainer.train()
    return keep.gradients, trainer.state.log_history[0]


def labelled_rows(num_classes: int | None = None) -> list[dict]:
    rows = []
    for number, length in enumerate((9, 4, 7, 12)):
        ids = tokens(length, seed=number).tolist()
        padding = 12 - length
        labels = ids + [-100] * padding if num_classes is None else number % num_classes
        mask = [1] * length + [0] * padding
        rows.append({"input_ids": ids + [0] * padding, "attention_mask": mask, "labels": labels})
    return rows


def test_usage_of_several_calls_balances_them_as_one() -> None:
    model = tiny_model({"method": "top_p", "losses": {"load_balance": 1.0}}, balance_scope="global").train()
    batch = {name: torch.tensor([row[name] for row in labelled_rows()]) for name in labelled_rows()[0]}
    num_labels = (batch["labels"][:, 1:] != -100).sum()
    whole = model(**batch, num_items_in_batch=num_labels, output_routing=True)
    calls = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(4)]
    usage = sum(model(**call, num_items_in_batch=num_labels).expert_usage for call in calls)
    torch.testing.assert_close(usage, whole.expert_usage)
    parts = [model(**call, num_items_in_batch=num_labels, expert_usage=usage) for call in calls]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)

    # By hand: sequences count by their labels, and the product is taken over the whole batch.
    shares = (batch["labels"][:, 1:] != -100).sum(-1) / num_labels
    expected = []
    for routing in filter(None, whole.routing):
        f, q = torch.zeros(routing.num_experts), torch.zeros(routing.num_experts)
        for row, share in enumerate(shares):
            for position in range(12):
                if batch["attention_mask"][row, position]:
                    token, length = 12 * row + position, batch["attention_mask"][row].sum()
                    q += share / length * routing.probs[token].detach()
                    for expert in routing.expert_ids[token][routing.used[token]]:
                        f[expert] += share / length
        expected.append(routing.num_experts * (f * q).sum())
    torch.testing.assert_close(whole.aux_losses["load_balance"], torch.stack(expected).mean())


def test_one_call_of_full_sequences_is_the_papers_scope() -> None:
    routing = tiny_model("top_p")(tokens(3, 8), output_routing=True).routing[0]
    weights = TokenWeights.build(None, None, (3, 8), torch.device("cpu"))
    values = {scope: load_balance([routing], weights, scope) for scope in ("global", "micro", "sequence")}
    torch.testing.assert_close(values["global"], values["micro"])
    assert not torch.allclose(values["global"], values["sequence"])


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_classifier_is_balanced_over_the_step(tmp_path, accumulation: int) -> None:
    def model():
        torch.manual_seed(0)
        losses = {"load_balance": 1.0}
        config = tiny_config(
            {"method": "top_k", "losses": losses}, balance_scope="global", num_labels=3, pad_token_id=0
        )
        return AutoModelForSequenceClassification.from_config(config)

    expected, log = one_step(model(), labelled_rows(3), 1, tmp_path)
    actual, cut_log = one_step(model(), labelled_rows(3), accumulation, tmp_path)
    assert log["loss"] == pytest.approx(cut_log["loss"], rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


def test_passes_that_only_route_are_neither_logged_nor_counted(tmp_path) -> None:
    model = tiny_model({"method": "dtop_p", "losses": {"load_balance": 1.0}}, balance_scope="global")
    callback, calls = RoutingCallback(model), []
    count = model.model.controller.count
    model.model.controller.count = lambda used, num_tokens: (calls.append(int(num_tokens)), count(used, num_tokens))
    popped, pop = {"train": [], "eval": []}, callback.statistics.pop
    callback.statistics.pop = lambda mode: popped[mode].append(pop(mode)) or popped[mode][-1]
    # An evaluation between two steps leaves the model in evaluation mode.
    options = {"num_train_epochs": 2, "eval_strategy": "epoch"}
    one_step(model, labelled_rows(), 4, tmp_path, [ControllerCallback(), callback], **options)
    assert sorted(calls) == [4, 4, 7, 7, 9, 9, 12, 12]
    for mode in ("train", "eval"):
        assert [summary.num_tokens for summary in popped[mode][:2]] == [32, 32]


def test_usage_is_refused_for_another_scope() -> None:
    model = tiny_model("top_k")
    with pytest.raises(ValueError, match="expert_usage is for balance_scope 'global', but it is 'sequence'"):
        model(tokens(1, 4), labels=tokens(1, 4), expert_usage=torch.zeros(2, 8))


def test_without_a_load_balance_there_is_nothing_to_route_beforehand(tmp_path) -> None:
    model = tiny_model({"method": "top_k", "losses": {"load_balance": 0.0}}, balance_scope="global")
    _, log = one_step(model, labelled_rows(), 2, tmp_path)
    assert log["loss"] > 0
