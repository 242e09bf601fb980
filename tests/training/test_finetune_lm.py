"""Fine-tuning on instructions: what has labels, what LoRA changes, resuming, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dynmoe_hf.cli.finetune import main
from dynmoe_hf.training import finetune_lm
from dynmoe_hf.training.arguments import parse_arguments
from dynmoe_hf.training.data import hold_out, load_splits
from dynmoe_hf.training.finetune_lm import InstructionArguments, encode_pairs
from tests.training.finetuning import WORDS, call, quiet_datasets, results, save_checkpoint, save_rows

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
LORA = ("--lora_r", 4, "--learning_rate", 3e-2)
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def rows(number: int = 40) -> list[dict[str, str]]:
    source = random.Random(0)
    return [
        {
            "prompt": " ".join(source.choices(WORDS, k=source.randint(1, 8))) + "\n",
            "response": " ".join(source.choices(WORDS, k=source.randint(1, 5))),
        }
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("lm")
    with quiet_datasets(folder / "cache"):
        # A controller, whose thresholds an adapter must hold, too.
        save_checkpoint(folder / "base", routing="dtop_p")
        save_rows(folder / "pairs.jsonl", rows())
        yield folder


@pytest.fixture
def tokenizer(workplace: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(workplace / "base")


def run(workplace: Path, output_dir: Path, *flags: Any) -> int:
    data = ("--dataset", workplace / "pairs.jsonl", "--max_length", 40, "--validation_fraction", 0.2)
    given = (f"--model={workplace / 'base'}", *data, "--output_dir", output_dir, *flags)
    return call(finetune_lm.finetune_lm, InstructionArguments, *given)


STEPS = ("--max_steps", 12, "--save_steps", 6, "--eval_on_start", "true")


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    assert run(workplace, workplace / "whole", *STEPS) == 0
    return workplace / "whole"


@pytest.fixture(scope="module")
def adapter(workplace: Path) -> Path:
    assert run(workplace, workplace / "adapter", *STEPS, *LORA, "--merge") == 0
    return workplace / "adapter"


def eval_losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log["eval_lm_loss"] for log in history if "eval_lm_loss" in log]


@torch.no_grad()
def loss_by_hand(model: Any, tokenizer: Any, workplace: Path) -> float:
    """Nats per token of the responses of the validation split, one example at a time and without padding."""
    model.eval()
    documents = load_splits(str(workplace / "pairs.jsonl"), None, None)["train"]
    nll = count = 0
    for row in hold_out(documents, "prompt", 0.2)[1]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        nll += cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        count += len(response)
    return nll / count


def test_only_the_response_has_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    content = rows(10)
    batch = {name: [row[name] for row in content] for name in content[0]}
    encoded = encode_pairs(batch, tokenizer, max_length=100)
    for row, ids, mask, labels in zip(content, *encoded.values(), strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row["response"])["input_ids"]
        assert ids == [*prompt, *response, tokenizer.eos_token_id]
        assert labels == [-100] * len(prompt) + [*response, tokenizer.eos_token_id]
        assert mask == [1] * len(ids)
        assert tokenizer.decode(ids[:-1]) == row["prompt"] + row["response"]


def test_long_responses_are_cut_and_long_prompts_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = "the router\n", "sends every token to experts"
    length = len(tokenizer(prompt)["input_ids"])
    batch = {"prompt": [prompt, prompt * 2], "response": [response] * 2}
    encoded = encode_pairs(batch, tokenizer, max_length=length + 1)
    first = tokenizer(response)["input_ids"][0]
    assert encoded["labels"] == [[-100] * length + [first]] and len(encoded["input_ids"][0]) == length + 1
    assert encode_pairs(batch, tokenizer, max_length=length)["labels"] == []


def test_examples_without_room_for_a_response_are_told(workplace: Path, tmp_path: Path, capsys: Any) -> None:
    content = [*rows(20), *({"prompt": f"{WORDS} {number}", "response": "no"} for number in range(3))]
    files = ("--dataset", save_rows(tmp_path / "rows.jsonl", content), "--validation_files", workplace / "pairs.jsonl")
    with pytest.warns(UserWarning, match="3 of 23 examples of the train split have prompts of max_length or more"):
        assert run(workplace, tmp_path / "out", *files, "--max_steps", 1) == 0
    files = (
        "--dataset",
        save_rows(tmp_path / "long.jsonl", content[20:]),
        "--validation_files",
        tmp_path / "rows.jsonl",
    )
    assert run(workplace, tmp_path / "out2", *files) == 2
    assert "so that no response is left; raise max_length (40)" in capsys.readouterr().err


def test_the_reported_loss_is_that_of_the_responses(workplace: Path, whole: Path) -> None:
    """Before and after: the examples that are padded in a batch count as they do alone."""
    tokenizer = AutoTokenizer.from_pretrained(whole)
    before, *_, after = eval_losses(whole)
    for folder, reported in ((workplace / "base", before), (whole, after)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert reported == pytest.approx(loss_by_hand(model, tokenizer, workplace), rel=1e-5)
    assert after < before - 0.5
    metrics = results(whole)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(after).exp().item(), rel=1e-5)
    assert 1 <= metrics["eval_experts_per_token"] <= 4


def test_the_side_of_the_padding_changes_nothing(workplace: Path, whole: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workplace / "base")
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "left")
    assert run(workplace, tmp_path / "out", *STEPS, "--tokenizer", tmp_path / "left") == 0
    assert eval_losses(tmp_path / "out") == pytest.approx(eval_losses(whole), rel=1e-4)


def test_lora_changes_adapters_alone(workplace: Path, tmp_path: Path, monkeypatch: Any) -> None:
    trainers = []

    class Kept(finetune_lm.RunTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(finetune_lm, "RunTrainer", Kept)
    assert run(workplace, tmp_path / "out", *STEPS, *LORA, "--lora_parts", "attention", "experts", "routers") == 0
    model = trainers[0].model.eval()
    base = dict(AutoModelForCausalLM.from_pretrained(workplace / "base").named_parameters())
    changed = set()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            changed.add(name)
            continue
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "").replace("original_module.", "")
        assert torch.equal(parameter, base[plain]) and not parameter.requires_grad
    assert any("gate_up_proj" in name or "experts" in name for name in changed)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all("lora_" in name or ".gate." in name or "controller" in name or "selector" in name for name in saved)
    assert any("lora_B" in name and weight.any() for name, weight in saved.items())

    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    content = torch.randint(2, 200, (2, 9))
    assert torch.equal(loaded(input_ids=content).logits, model(input_ids=content).logits)
    assert loaded.thresholds() == model.thresholds()


def test_adapter_and_merged_model_have_the_reported_loss(workplace: Path, adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter / "merged")
    before, *_, after = eval_losses(adapter)
    assert after < before - 0.1
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    merged = AutoModelForCausalLM.from_pretrained(adapter / "merged")
    for model in (loaded, merged):
        assert loss_by_hand(model, tokenizer, workplace) == pytest.approx(after, rel=1e-5)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    kind: str, workplace: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uninterrupted = request.getfixturevalue(kind)
    flags = [*STEPS, *(LORA if kind == "adapter" else ()), "--resume_from_checkpoint", "true"]
    shutil.copytree(uninterrupted / "checkpoint-6", tmp_path / "checkpoint-6")
    assert run(workplace, tmp_path, *flags) == 0
    name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    expected, found = (load_file(folder / name) for folder in (uninterrupted, tmp_path))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("flags", "name"), [(("--lora_r", 3), "r"), (("--lora_r", 4, "--lora_parts", "attention"), "target_modules")]
)
def test_other_adapters_are_not_resumed(
    flags: tuple, name: str, workplace: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run(workplace, tmp_path / "out", *flags, "--resume_from_checkpoint", adapter / "checkpoint-6") == 2
    assert f"finetune_lm.py: {name} is not what" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def chats() -> list[dict[str, Any]]:
    return [
        {"chat": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}
        for row in rows()
    ]


def test_of_a_chat_the_last_answer_is_learned(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = [
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "router"},
        {"role": "assistant", "content": "experts"},
    ]
    source = save_rows(tmp_path / "chats.jsonl", [*chats(), {"chat": chat}])
    args = InstructionArguments(dataset=[str(source)], messages_column="chat", validation_fraction=0.3)
    pairs = finetune_lm.load_pairs(args, tokenizer)
    assert pairs["train"].num_rows + pairs["validation"].num_rows == 41 and pairs["validation"].num_rows > 3
    found = {row["prompt"]: row["response"] for split in pairs.values() for row in split}
    prompt = "[user]yes\n[assistant]no\n[user]router\n[assistant]"
    assert found[prompt] == "experts\n"
    encoded = encode_pairs({"prompt": [prompt], "response": [found[prompt]]}, tokenizer, 100, is_chat=True)
    learned = [label for label in encoded["labels"][0] if label != -100]
    assert tokenizer.decode(learned) == "experts\n"
    assert tokenizer.decode(encoded["input_ids"][0]) == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    ("chat", "template", "message"),
    [
        (chats()[0]["chat"], None, "no chat template"),
        (chats()[0]["chat"][:1], TEMPLATE, "row 0 must end with the answer"),
        (chats()[0]["chat"][::-1], TEMPLATE, "row 0 must end with the answer"),
        (chats()[0]["chat"], "{{ messages | length }}", "writes the prompt of row 0 differently"),
    ],
)
def test_chats_that_do_not_fit(
    chat: list, template: str | None, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = template
    source = save_rows(tmp_path / "chats.jsonl", [{"chat": chat}])
    args = InstructionArguments(dataset=[str(source)], messages_column="chat")
    with pytest.raises(ValueError, match=message):
        finetune_lm.load_pairs(args, tokenizer)


REFUSED = {
    "missing column": (["--response_column", "answer"], None, "no column 'answer', only: prompt, response"),
    "missing chats": (["--messages_column", "messages"], None, "no column 'messages', only: prompt, response"),
    "no text": (
        [],
        [*rows(2), {"prompt": "a", "response": None}],
        "row 2 of the train split has no text in 'prompt' or",
    ),
    "fraction": (["--validation_fraction", "1"], None, "validation_fraction is 1.0, but"),
    "too long": (["--max_length", "65"], None, "max_length is 65, but the model's max_position_embeddings is 64"),
    "too short": (["--max_length", "1"], None, "max_length is 1, but"),
    "rank": (["--lora_r", "0"], None, "lora_r is 0, but"),
    "part": ([*LORA, "--lora_parts", "attentoin"], None, "Did you mean 'attention'?"),
    "merge": (["--merge"], None, "merge is for LoRA"),
    "routers": ([*LORA, "--freeze_routers"], None, "freeze_routers does not go with LoRA"),
    "router rate": ([*LORA, "--router_learning_rate", "0"], None, "router_learning_rate does not go with LoRA"),
    "new model": (["--model={hidden_size: 32}"], None, "model must be the folder or Hub id of the checkpoint"),
    "no such model": (["--model=absent"], None, "couldn't connect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_costs_one_line(name: str, workplace: Path, tmp_path: Path, capsys: Any) -> None:
    flags, content, message = REFUSED[name]
    if content is not None:
        flags = [*flags, "--dataset", save_rows(tmp_path / "rows.jsonl", content)]
    assert run(workplace, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("finetune_lm.py: ") and message in error
    assert not (tmp_path / "out").exists()


def test_without_data_nothing_is_done(workplace: Path, capsys: Any) -> None:
    assert call(finetune_lm.finetune_lm, InstructionArguments, f"--model={workplace / 'base'}") == 2
    assert "dataset is missing" in capsys.readouterr().err


def test_a_folder_in_use(workplace: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    """It is refused; and if it is to be overwritten, no adapter stays beside the new model."""
    shutil.copytree(adapter, tmp_path / "out")
    assert run(workplace, tmp_path / "out", "--max_steps", 1) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert run(workplace, tmp_path / "out", "--max_steps", 1, "--overwrite_output_dir") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"])
    assert not list((tmp_path / "out").glob("adapter_*"))


def test_help_and_written_configuration(workplace: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(finetune_lm.finetune_lm, InstructionArguments, "--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("--lora_r", "--prompt_column", "--model", "learning_rate"))
    assert "--block_size" not in printed
    again = ["--config", str(adapter / "train_config.yaml"), "--output_dir", str(tmp_path / "again"), "--json"]
    assert main(finetune_lm.finetune_lm, InstructionArguments, again) == 0
    assert json.loads(capsys.readouterr().out)["eval_lm_loss"] == results(adapter)["eval_lm_loss"]


def test_configurations_of_the_repository_differ_in_lora_alone() -> None:
    found = {}
    for kind in ("full", "lora"):
        path = str(ROOT / f"configs/finetune/lm_{kind}.yaml")
        found[kind] = parse_arguments(["--use_cpu"], path, InstructionArguments)
    (full_model, full, full_training), (lora_model, lora, lora_training) = found.values()
    assert full_model == lora_model and (full.lora_r, lora.lora_r) == (None, 8)
    assert {name for name in vars(full) if getattr(full, name) != getattr(lora, name)} == {"lora_r"}
    differ = {name for name, value in full_training.to_dict().items() if value != lora_training.to_dict()[name]}
    assert differ == {"output_dir", "learning_rate"}
