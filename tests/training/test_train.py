import json
import math
import re
import shutil
import sys

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed

from dynmoe_hf import cli
from dynmoe_hf.training.data import load_documents, pack

WORDS = "the router sends every token to as many experts as its probability mass asks for and no more".split()
SETTINGS = """
model: {hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 4, num_experts: 4,
        max_position_embeddings: 64, initializer_range: 0.1}
routing: {method: top_p, losses: {load_balance: 1e-1, dynamic: 1e-2}}
vocab_size: 300
block_size: 28
validation_fraction: 0.2
max_steps: 4
per_device_train_batch_size: 4
per_device_eval_batch_size: 2
learning_rate: 1e-2
save_steps: 2
logging_steps: 2
use_cpu: true
disable_tqdm: true
"""


def document(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(3, 20 + 3 * number)) + f" {number} naïve 🙂"


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if were_on:
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with 20 documents and a configuration, and the cache of datasets."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        rows = [json.dumps({"text": document(number)}) for number in range(20)]
        (folder / "documents.jsonl").write_text("\n".join(rows), encoding="utf-8")
        settings = f"{SETTINGS}\ndataset: {folder / 'documents.jsonl'}\n"
        (folder / "config.yaml").write_text(settings)
        (folder / "no_model.yaml").write_text(re.sub("model:.*?}|routing:.*?}}", "", settings, flags=re.DOTALL))
        yield folder


def run_train(workplace, output_dir, *flags, config="config.yaml") -> int:
    command = ["train", "--json", "--config", str(workplace / config), "--output_dir", str(output_dir)]
    return cli.main([*command, *map(str, flags)])


@pytest.fixture(scope="module")
def first_run(workplace):
    output_dir = workplace / "first"
    assert run_train(workplace, output_dir) == 0
    return output_dir


def results(output_dir) -> dict[str, float]:
    return json.loads((output_dir / "all_results.json").read_text())


@torch.no_grad()
def evaluated_by_hand(workplace, output_dir) -> tuple[float, float]:
    """(nats per token, bits per byte) of the saved model, one piece of one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    documents = load_documents(str(workplace / "documents.jsonl"), validation_fraction=0.2)
    blocks = pack(documents["validation"], tokenizer, 28, keep_remainder=True)
    assert len(blocks) > len(pack(documents["validation"], tokenizer, 28)), "there is to be a remainder"
    nll, count = 0.0, 0
    for block in blocks:
        starts = [index for index, position in enumerate(block["position_ids"]) if position == 0] + [28]
        for start, end in zip(starts, starts[1:], strict=False):
            ids, labels = (
                torch.tensor([block["input_ids"][start:end]]),
                torch.tensor(block["labels"][start + 1 : end], dtype=torch.long),
            )
            nll += F.cross_entropy(model(ids).logits[0, :-1], labels, reduction="sum").item()
            count += (labels != -100).sum().item()
    return nll / count, nll / math.log(2) / sum(blocks["num_bytes"])


def test_run_reports_the_loss_of_the_saved_model(workplace, first_run, capsys):
    nats, bits = evaluated_by_hand(workplace, first_run)
    metrics = results(first_run)
    assert metrics["eval_lm_loss"] == pytest.approx(nats, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert 1 <= metrics["eval_experts_per_token"] <= 4


def test_run_leaves_all_that_is_needed_to_use_and_to_repeat_it(first_run):
    config = json.loads((first_run / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(first_run)
    assert (config["vocab_size"], config["use_cache"]) == (len(tokenizer), True)
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert {path.name for path in first_run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    history = json.loads((first_run / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "experts_per_token" in log] == [2, 4]
    assert "eval_lm_loss" in history[-1]
    settings = yaml.safe_load((first_run / "train_config.yaml").read_text())
    assert settings["routing"]["losses"] == {"load_balance": 0.1, "dynamic": 0.01}


def test_written_configuration_repeats_the_run(workplace, first_run):
    again = workplace / "again"
    assert run_train(workplace, again, config=first_run / "train_config.yaml") == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (first_run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert results(again)["eval_lm_loss"] == results(first_run)["eval_lm_loss"]


@pytest.mark.parametrize("by_name", [False, True])
def test_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(workplace, first_run, tmp_path, by_name):
    resumed = tmp_path / "resumed"
    if by_name:
        source = first_run / "checkpoint-2"
    else:
        shutil.copytree(first_run / "checkpoint-2", resumed / "checkpoint-2")
        source = True
    assert run_train(workplace, resumed, "--resume_from_checkpoint", source) == 0
    whole, parts = (load_file(folder / "model.safetensors") for folder in (first_run, resumed))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = load_file(first_run / "checkpoint-2" / "model.safetensors")
    assert not any(torch.equal(whole[name], start[name]) for name in whole if "proj" in name)


def test_run_moves_and_logs_a_controlled_threshold(workplace, tmp_path):
    flags = ("--routing", "dtop_p", "--logging_steps", 1, "--save_strategy", "no")
    assert run_train(workplace, tmp_path / "out", *flags) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logged = [log["threshold"] for log in history if "loss" in log]
    assert len(set(logged)) == 4
    thresholds = AutoModelForCausalLM.from_pretrained(tmp_path / "out").thresholds()
    assert thresholds == {layer: pytest.approx(logged[-1]) for layer in (0, 1)}


def test_resumed_run_keeps_its_tokenizer(workplace, first_run, tmp_path):
    """Text may have changed since: a tokenizer trained again would be another one."""
    flags = ("--resume_from_checkpoint", first_run / "checkpoint-2", "--vocab_size", 280)
    assert run_train(workplace, tmp_path / "resumed", *flags) == 0
    files = [(folder / "tokenizer.json").read_text() for folder in (first_run, tmp_path / "resumed")]
    assert files[0] == files[1]


def test_seed_determines_the_weights_a_model_starts_with(workplace, tmp_path):
    flags = ("--seed", 7, "--learning_rate", 0, "--max_steps", 1, "--save_strategy", "no")
    assert run_train(workplace, tmp_path / "out", *flags) == 0
    set_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_json_is_all_that_is_printed(workplace, tmp_path, capfd):
    assert run_train(workplace, tmp_path / "out", "--max_steps", 1) == 0
    printed = capfd.readouterr()
    metrics = json.loads(printed.out)
    assert metrics["eval_lm_loss"] == results(tmp_path / "out")["eval_lm_loss"]
    assert "'experts_per_token'" in printed.err or "train_runtime" in printed.err


def test_help_shows_our_arguments_and_those_of_the_trainer(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    for name in (
        "--config FILE",
        "--json",
        "--validation_files",
        "--routing.selector.p",
        "gradient_accumulation_steps",
    ):
        assert name in printed


def test_missing_packages_are_named(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run_train(workplace, tmp_path / "out") == 2
    assert capsys.readouterr().err == "dynmoe train: training needs datasets: pip install 'dynmoe-hf[train]'\n"


def test_going_on_with_a_model_keeps_its_weights_and_changes_its_routing(workplace, first_run, tmp_path):
    flags = ("--model", first_run, "--routing.selector.p", 0.9, "--learning_rate", 0, "--max_steps", 1)
    assert run_train(workplace, tmp_path / "more", *flags, config="no_model.yaml") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (first_run, tmp_path / "more"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert results(tmp_path / "more")["eval_experts_per_token"] > results(first_run)["eval_experts_per_token"]
    routing = json.loads((tmp_path / "more" / "config.json").read_text())["routing"]
    assert (routing["selector"]["p"], routing["losses"]["load_balance"]) == (0.9, 0.1)


def test_overwriting_replaces_the_checkpoints_and_nothing_else(workplace, first_run, tmp_path):
    used = tmp_path / "used"
    shutil.copytree(first_run, used)
    (used / "notes.txt").write_text("mine")
    (used / "checkpoint-mine").mkdir()
    assert run_train(workplace, used, "--overwrite_output_dir", "--max_steps", 1, "--save_strategy", "no") == 0
    assert {path.name for path in used.glob("checkpoint-*")} == {"checkpoint-mine"}
    assert (used / "notes.txt").read_text() == "mine"


def listing(folder) -> dict[str, tuple[int, int]]:
    paths = [path for path in folder.rglob("*") if "cache" not in path.parts]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


BAD_INPUT = {
    "no such file": (["--dataset", "{work}/absent.jsonl"], "absent.jsonl"),
    "empty file": (["--dataset", "{work}/empty.txt"], "no document with text"),
    "blank documents": (["--dataset", "{work}/blank.jsonl"], "no document with text"),
    "no such column": (["--text_column", "body"], "'body'"),
    "no validation file": (["--validation_files", "{work}/absent.txt"], "absent.txt"),
    "too little text": (["--block_size", "60", "--dataset", "{work}/short.jsonl"], "block"),
    "long blocks": (["--block_size", "128"], "max_position_embeddings"),
    "block of one": (["--block_size", "1"], "block_size"),
    "no batch": (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
    "tiny vocabulary": (["--vocab_size", "100"], "vocab_size is 100"),
    "tokenizer too large": (["--model.vocab_size", "299"], "model.vocab_size is 299"),
    "loaded tokenizer too large": (["--model.vocab_size", "280", "--tokenizer", "{first}"], "vocab_size is 280"),
    "no such tokenizer": (["--tokenizer", "{work}/absent"], "cannot load a tokenizer"),
    "no such model": (["--model", "{work}/absent"], "absent"),
    "another family": (["--model", "{work}/llama"], "llama"),
    "no such method": (["--routing", "top_q"], "Did you mean"),
    "no such option": (["--routing.selector.pp", "0.1"], "'pp'"),
    "impossible option": (["--routing.selector.p", "-1"], "p must be"),
    "impossible model": (["--model.num_attention_heads", "5"], "num_attention_heads"),
    "wrong type": (["--model.hidden_size", "wide"], "hidden_size"),
    "no such engine": (["--experts_implementation", "rugged"], "experts_implementation"),
    "flash attention and packing": (["--attn_implementation", "flash_attention_2"], "documents"),
    "cache and packing": (["--use_cache"], "use_cache must be false"),
    "label smoothing": (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
    "no such reporter": (["--report_to", "tensorbord"], "tensorbord"),
    "unknown argument": (["--learning_rat", "1"], "Did you mean 'learning_rate'?"),
    "missing value": (["--learning_rate"], "expected one argument"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "no checkpoint"),
    "no checkpoint": (["--resume_from_checkpoint", "{work}"], "no checkpoint"),
    "another model to resume": (
        ["--resume_from_checkpoint", "{first}/checkpoint-2", "--routing.selector.p", "0.2"],
        "routing is not what",
    ),
    "resume and overwrite": (
        ["--resume_from_checkpoint", "{first}/checkpoint-2", "--overwrite_output_dir"],
        "exclude each other",
    ),
    "output is a file": (["--output_dir", "{work}/config.yaml"], "is a file"),
    "output is in use": (["--output_dir", "{work}"], "is not empty"),
    "output is an earlier run": (["--output_dir", "{first}"], "holds an earlier run"),
}


@pytest.fixture(scope="module")
def pitfalls(workplace, first_run):
    (workplace / "empty.txt").write_text("")
    (workplace / "blank.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    (workplace / "short.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in WORDS))
    LlamaConfig().save_pretrained(workplace / "llama")
    return {"work": workplace, "first": first_run}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_writes_nothing(workplace, pitfalls, capsys, case):
    flags, said = BAD_INPUT[case]
    before = listing(workplace)
    assert run_train(workplace, workplace / "new", *(flag.format(**pitfalls) for flag in flags)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    complaints = [line for line in lines if line.startswith("dynmoe train: ")]
    assert len(complaints) == 1 and lines[-1] == complaints[0]
    assert said in complaints[0]
    assert listing(workplace) == before
