"""Scores of lm-evaluation-harness by both doors, and the experts of every task against plain loops."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'dynmoe-hf[eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from dynmoe_hf.cli import main
from dynmoe_hf.evaluation.harness import CountingLM, load_tasks, run_tasks
from dynmoe_hf.evaluation.task_compute import task_compute
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
TASKS = ["choice", "letters", "text", "write"]
ALL_TASKS = ",".join(TASKS)
CHOICES = [
    {"goal": "to open a door", "options": ["turn the handle", "sing"], "label": 0},
    {"goal": "to boil an egg in a pot of water", "options": ["paint it", "heat the water"], "label": 1},
    {"goal": "to sleep", "options": ["lie down", "run up a very long hill with a heavy bag", "eat"], "label": 0},
    {"goal": "to read", "options": ["open a book", "close both eyes"], "label": 0},
    {"goal": "to write a letter to a friend", "options": ["drink", "take a pen"], "label": 1},
]
TEXTS = ["A text to learn from, with a few words in it. " * 3, "short", "äöü and numbers: 1234567890, once more " * 2]
QUESTIONS = [{"question": question} for question in ("one", "two and three", "four, five and six", "x", "seven")]
YAML = {
    "choice": """
output_type: multiple_choice
doc_to_text: "How {{goal}}?"
doc_to_target: label
doc_to_choice: "{{options}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    # One letter is one token, so all answers to a question are read off one row.
    "letters": """
output_type: multiple_choice
doc_to_text: "How {{goal}}?"
doc_to_target: label
doc_to_choice: [a, b, c]
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "write": """
output_type: generate_until
doc_to_text: "Q: {{question}} A:"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["9", "|", "."], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    # The standard error of a perplexity needs resamples.
    "guess": """
output_type: loglikelihood
doc_to_text: "How {{goal}}?"
doc_to_target: "{{' ' + options[0]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
}
ROWS = dict.fromkeys(("choice", "letters", "guess"), CHOICES)
ROWS |= {"text": [{"page": text} for text in TEXTS], "write": QUESTIONS}


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1.0}}\n"
        head += f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(head + YAML[name])
    members = "task: [choice, letters]\naggregate_metric_list: [{metric: acc}]\n"
    (folder / "both.yaml").write_text(f"group: both\n{members}metadata: {{version: 1.0}}\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a text to learn from"], vocab_size=258)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("harness") / "model"
    tiny(tokenizer, "top_p").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(tasks_folder):
    return load_tasks(TASKS, str(tasks_folder))


@pytest.fixture
def indexes(monkeypatch):
    """Whether each index was asked to hold the 14,000 tasks of the harness, which take half a minute to read.

    It is built without them.
    """
    build, asked = TaskManager.__init__, []

    def small(self, include_defaults=True, **options):
        asked.append(include_defaults)
        build(self, include_defaults=False, **options)

    monkeypatch.setattr(TaskManager, "__init__", small)
    return asked


@pytest.fixture
def evaluate(folder, tasks_folder, capsys):
    """Run `dynmoe evaluate --tasks`; its exit code, and what it printed on each stream."""

    def call(*flags, tasks=ALL_TASKS):
        words = ("evaluate", folder, "--tasks", tasks, "--include-path", tasks_folder, "--device", "cpu", *flags)
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def tiny(tokenizer, routing, **changes):
    return tiny_model(routing, vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=0, **changes)


def reason(err):
    """The one line with which a command ends that refuses."""
    *_, last = err.splitlines()
    assert last.startswith("dynmoe evaluate: ") and "Traceback" not in err
    return last


def metrics(results):
    return {task: {k: v for k, v in found.items() if "," in k} for task, found in results["results"].items()}


def same(found, expected):
    """Metrics by task and name are equal to the last bit; standard errors that need resamples are left out."""
    for task in expected:
        for key, value in expected[task].items():
            if value == "N/A":
                assert found[task][key] in (None, "N/A")
            else:
                assert found[task][key] == value, (task, key)
    assert found.keys() == expected.keys()


def experts(model, ids):
    """(S, L) experts used by each of some tokens, alone and without a cache."""
    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=False, output_routing=True)
    return torch.stack([routing.num_selected for routing in out.routing if routing is not None], -1)


def scored_rows(tokenizer, task):
    """Tokens of context and continuation of each request of a multiple-choice task, written out by hand."""
    for row in CHOICES:
        context = tokenizer(f"How {row['goal']}?")["input_ids"]
        answers = ["a", "b", "c"] if task == "letters" else [f" {option}" for option in row["options"]]
        for answer in answers:
            yield context, tokenizer(answer)["input_ids"]


def plain_counts(model, tokenizer):
    """(N, L) experts of prompt and of continuation for each task, one request after the other, without padding."""
    length, eos = model.config.max_position_embeddings, tokenizer.eos_token_id
    counts = {task: ([], []) for task in TASKS}
    for task in ("choice", "letters"):
        for context, answer in scored_rows(tokenizer, task):
            used = experts(model, (context + answer)[:-1][-length:])
            counts[task][0].append(used[: len(used) - len(answer) + 1])
            counts[task][1].append(used[len(used) - len(answer) + 1 :])
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        # Windows of `length` predictions; the last one reaches back to be as long as the others.
        for end in range(length, len(ids) + length, length):
            first = max(0, min(end, len(ids)) - length)
            counts["text"][1].append(experts(model, [eos, *ids][first : min(end, len(ids))]))
    for row in QUESTIONS:
        prompt = tokenizer(f"Q: {row['question']} A:")["input_ids"]
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            written = tokenizer.decode(ids[len(prompt) :])
            if ids[-1] == eos or any(stop in written for stop in "9|."):
                break
        used = experts(model, ids[:-1])
        counts["write"][0].append(used[: len(prompt)])
        counts["write"][1].append(used[len(prompt) :])
    return {task: [torch.cat(part).double() if part else None for part in parts] for task, parts in counts.items()}


def check_summary(summary, used):
    if used is None or not len(used):
        assert summary is None
        return
    per_token = used.mean(1)
    assert summary["tokens"] == len(used)
    assert summary["mean"] == pytest.approx(per_token.mean().item())
    assert summary["std"] == pytest.approx(per_token.std(correction=0).item())
    assert [layer["mean"] for layer in summary["by_layer"]] == pytest.approx(used.mean(0).tolist())
    assert [layer["std"] for layer in summary["by_layer"]] == pytest.approx(used.std(0, correction=0).tolist())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("routing", ["top_p", "da_moe", "rmoe", "cartesian"])
def test_experts_per_token_are_a_direct_count(routing, batch_size, tokenizer, loaded):
    model = tiny(tokenizer, routing)
    _, counts = run_tasks(model, tokenizer, loaded, batch_size)
    expected = plain_counts(model, tokenizer)
    for task in TASKS:
        prompt, continuation = expected[task]
        check_summary(counts[task].prompt.summary(), prompt)
        check_summary(counts[task].continuation.summary(), continuation)
    assert expected["letters"][1].shape[0] == 0, "an answer of one token is never read"
    assert counts["choice"].num_requests == sum(len(row["options"]) for row in CHOICES)
    if routing in ("top_p", "da_moe"):
        assert counts["choice"].prompt.summary()["std"] > 0, "a constant number would hide what is counted"


def test_rows_of_a_batch_stop_at_different_tokens(tokenizer, loaded):
    """Otherwise nothing above would show where a row is cut that runs on in a batch."""
    model = tiny(tokenizer, "top_p")
    lm = CountingLM(model, tokenizer, batch_size=5)
    numbers = []
    count = lm._num_generated
    lm._num_generated = lambda *args: numbers.append(count(*args)) or numbers[-1]
    loaded["tasks"]["write"].build_all_requests(rank=0, world_size=1)
    lm.generate_until(loaded["tasks"]["write"].instances)
    assert len(set(numbers)) > 1 and min(numbers) < 12


def test_the_same_prompt_with_other_options(tokenizer):
    """All requests with the options of the first one run before those with others."""
    lm = CountingLM(tiny(tokenizer, "top_p"), tokenizer, batch_size=4)
    asked = [("Q: one", "short", 2), ("Q: two", "long", 7), ("Q: two", "short", 2)]
    requests = [
        Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": number}), 0, (task, 0, 1))
        for prompt, task, number in asked
    ]
    lm.generate_until(requests)
    assert {task: counts.continuation.num_tokens for task, counts in lm.counts.items()} == {"short": 2, "long": 6}


def test_requests_that_are_cut_on_the_left(tokenizer, loaded):
    model = tiny(tokenizer, "top_p", max_position_embeddings=48)
    tasks = {**loaded, "tasks": {name: loaded["tasks"][name] for name in ("choice", "letters")}}
    _, counts = run_tasks(model, tokenizer, tasks, 4)
    expected = plain_counts(model, tokenizer)
    whole = sum(len(context) + len(answer) - 1 for context, answer in scored_rows(tokenizer, "choice"))
    assert counts["choice"].prompt.num_tokens + counts["choice"].continuation.num_tokens < whole
    for task in ("choice", "letters"):
        check_summary(counts[task].prompt.summary(), expected[task][0])
        check_summary(counts[task].continuation.summary(), expected[task][1])


def test_scores_are_those_of_the_harness_on_the_loaded_model(tokenizer, loaded, tasks_folder):
    model = tiny(tokenizer, "top_p")
    found, _ = run_tasks(model, tokenizer, loaded, 4)
    manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    same(metrics(found), metrics(lm_eval.simple_evaluate(lm, tasks=TASKS, task_manager=manager)))
    assert not any(module._forward_hooks for module in model.modules()), "a hook is left behind"


STOCK = """
import json, sys
import lm_eval.evaluator
from lm_eval.tasks import TaskManager
lm_eval.evaluator.add_env_info = lambda results: None  # it asks pip and the GPU's driver, for seconds
model, include, tasks, *cases = sys.argv[1:]
for limit, shots in map(json.loads, cases):
    found = lm_eval.simple_evaluate(
        "hf", f"pretrained={model},trust_remote_code=True", tasks=tasks.split(","), batch_size=4, device="cpu",
        task_manager=TaskManager(include_path=include, include_defaults=False), limit=limit, num_fewshot=shots,
    )
    print("FOUND", json.dumps({t: {k: v for k, v in m.items() if "," in k} for t, m in found["results"].items()}))
assert "dynmoe_hf" not in sys.modules
"""


def test_both_doors_give_the_same_scores(evaluate, folder, tasks_folder, tmp_path):
    """A child process that never imports the package runs the code that the checkpoint carries."""
    cases = [[None, 0], [3, 2]]
    words = [folder, tasks_folder, ALL_TASKS, *map(json.dumps, cases)]
    child = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, words)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    expected = [json.loads(line[6:]) for line in child.stdout.splitlines() if line.startswith("FOUND ")]
    assert expected[0] != expected[1] and expected[0]["choice"]["acc,none"] not in (0, 1)
    for (limit, shots), scores in zip(cases, expected, strict=True):
        limits = ["--limit", limit] if limit else []
        code, out, err = evaluate("--json", "--batch-size", 4, "--num-fewshot", shots, *limits)
        assert code == 0, err
        report = json.loads(out)
        same(report["results"], scores)
        assert report["examples"]["choice"] == (limit or len(CHOICES))


def test_the_report(evaluate, indexes, tmp_path):
    code, out, err = evaluate("--json", "--output", tmp_path / "out", tasks="both,text,write")
    assert code == 0, err
    report = json.loads(out)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert list(report["results"]) == list(report["compute"]) and set(report["results"]) == {*TASKS, "both"}
    assert report["routing"]["selector"]["p"] == 0.4 and {"lm_eval", "dynmoe_hf"} <= report["versions"].keys()
    choice, letters, both = (report["compute"][name]["experts_per_token"] for name in ("choice", "letters", "both"))
    tokens = [part["prompt"]["tokens"] for part in (choice, letters, both)]
    assert tokens[0] + tokens[1] == tokens[2]
    pooled = (choice["prompt"]["mean"] * tokens[0] + letters["prompt"]["mean"] * tokens[1]) / tokens[2]
    assert both["prompt"]["mean"] == pytest.approx(pooled)
    table = (tmp_path / "out" / "table.txt").read_text()
    assert f"{choice['continuation']['mean']:.3f} ± {choice['continuation']['std']:.3f}" in table
    assert f"{report['results']['choice']['acc,none']:.4f}" in table
    assert set(os.listdir(tmp_path / "out")) == {"evaluation.json", "table.txt"}


def test_a_model_without_experts(tokenizer, loaded):
    model = tiny(tokenizer, None, mlp_layer_types=["dense"] * 3)
    _, counts = run_tasks(model, tokenizer, loaded, 4)
    found = task_compute(model.config, counts["choice"])
    assert found["experts_per_token"] == {"prompt": None, "continuation": None, "all": None}
    assert found["active_parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_sweep_is_the_curve_of_one_checkpoint(evaluate, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ("--sweep", "selector.p=0.1,0.4,0.95", "--output", tmp_path / "out", "--limit", 3)
    code, out, err = evaluate(*flags, "--json", tasks="guess,text")
    assert code == 0, err
    sweep = json.loads(out)["sweep"]
    points = sweep["points"]
    assert sweep["option"] == "selector.p" and [point["value"] for point in points] == [0.1, 0.4, 0.95]
    assert [point["routing"]["selector"]["p"] for point in points] == [0.1, 0.4, 0.95]
    for task in ("guess", "text"):
        means = [point["compute"][task]["experts_per_token"]["all"]["mean"] for point in points]
        assert means == sorted(means) and means[0] < means[1] < means[2]
        flops = [point["compute"][task]["flops_per_token"] for point in points]
        assert flops[0] < flops[1] < flops[2]
    assert all(point["results"]["guess"]["perplexity_stderr,none"] > 0 for point in points)
    # The same as a run with that routing alone, also after other values.
    alone = json.loads(evaluate("--routing.selector.p", "0.95", "--limit", 3, "--json", tasks="guess,text")[1])
    assert {key: alone[key] for key in ("results", "compute")} == {
        key: points[2][key] for key in ("results", "compute")
    }
    names = {"evaluation.json", "table.txt", "perplexity_over_experts.png", "word_perplexity_over_experts.png"}
    assert set(os.listdir(tmp_path / "out")) == names
    code, out, _ = evaluate(*flags, tasks="choice")
    assert code == 2
    code, out, err = evaluate(*flags, "--overwrite", tasks="choice")
    assert code == 0 and "0.95" in out, err
    assert set(os.listdir(tmp_path / "out")) == {"evaluation.json", "table.txt", "acc_over_experts.png"}


def test_an_override_is_undone(tokenizer, loaded):
    model = tiny(tokenizer, "top_p")
    before = run_tasks(model, tokenizer, loaded, 4)[1]["choice"].prompt.summary()
    with model.routing_override(selector={"max_experts": 1}):
        assert run_tasks(model, tokenizer, loaded, 4)[1]["choice"].prompt.summary()["mean"] == 1
    assert before["mean"] > 1
    assert run_tasks(model, tokenizer, loaded, 4)[1]["choice"].prompt.summary() == before


@pytest.mark.parametrize(
    ("tasks", "flags", "message"),
    [
        ("choice", ["--limit", "0"], "--limit must be at least 1"),
        ("choice", ["--dataset", "python-topics"], "--dataset has no meaning with --tasks"),
        ("choice", ["--num-fewshot", "-1"], "--num-fewshot must be at least 0"),
        ("choice", ["--include-path", "nowhere"], "'nowhere' is not a folder"),
        ("choice", ["--sweep", "selector.p"], "selector.p=0.1,0.2"),
        ("choice", ["--sweep", "selector.p=0.1,2x"], "selector.p=0.1,0.2"),
        ("choice", ["--sweep", "selector.q=1"], "'q'"),
        ("choice", ["--sweep", "selector.p=0.1,-1"], "p must be"),
        ("choice", ["--sweep", 'experts.type="low_rank"'], "experts"),
        ("choice", ["--routing.selector.q", "1"], "'q'"),
        ("write", ["--gen-kwargs", "max_gen_toks=64"], "64 tokens"),
        ("write", ["--gen-kwargs", "num_beams=2"], "beams"),
    ],
)
def test_refusals_before_any_work(tasks, flags, message, evaluate, tmp_path):
    code, out, err = evaluate(*flags, "--output", tmp_path / "out", tasks=tasks)
    assert code == 2 and not out and not (tmp_path / "out").exists()
    assert message in reason(err)


def test_task_flags_need_tasks(folder, capsys):
    assert main(["evaluate", str(folder), "--sweep", "selector.p=0.1"]) == 2
    assert "--sweep needs --tasks" in capsys.readouterr().err


def test_without_the_harness(evaluate, monkeypatch):
    monkeypatch.delitem(sys.modules, "dynmoe_hf.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = evaluate()
    assert code == 2 and "pip install 'dynmoe-hf[eval]'" in reason(err)


@pytest.mark.parametrize(("tasks", "asked"), [("choice,l*s", [False]), ("both", [False, True]), ("tex", [False, True])])
def test_all_tasks_are_indexed_only_if_needed(tasks, asked, indexes, tasks_folder):
    try:
        found = set(load_tasks(tasks.split(","), str(tasks_folder))["tasks"])
    except ValueError:
        found = set()
    assert indexes == asked and found == ({"choice", "letters"} if tasks != "tex" else set())


def test_a_folder_of_something_else_is_left_alone(evaluate, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = evaluate("--output", tmp_path, "--overwrite", tasks="choice")
    assert code == 2 and "thesis.txt" in err and os.listdir(tmp_path) == ["thesis.txt"]


def test_an_unknown_task_names_the_nearest(evaluate, indexes):
    code, _, err = evaluate(tasks="chioce")
    assert code == 2 and "unknown task 'chioce'. Did you mean 'choice'?" in err


def test_data_out_of_reach(evaluate, indexes, tmp_path):
    (tmp_path / "far.yaml").write_text(f"task: far\ndataset_path: nobody/nothing\ntest_split: test\n{YAML['choice']}")
    code, _, err = evaluate("--include-path", tmp_path, tasks="far")
    assert code == 2 and "data of task 'far'" in reason(err) and "--include-path" in reason(err)


STOCK_FILES = {name: f"{name}/{name}" for name in ("piqa", "hellaswag", "openbookqa", "wikitext")} | {
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "boolq": "super_glue/boolq/default",
    "winogrande": "winogrande/default",
    "lambada_openai": "lambada/lambada_openai",
}


def test_the_shipped_tasks_ask_as_those_of_the_harness():
    shipped = {path.stem: load_yaml(path) for path in (ROOT / "configs" / "eval").glob("*.yaml")}
    assert shipped.keys() == STOCK_FILES.keys()
    other = {"task", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split"}
    for name, file in STOCK_FILES.items():
        stock = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{file}.yaml")
        found = shipped[name]
        assert found["task"] == f"{name}_local"
        asked = [{k: v for k, v in task.items() if k not in other and v is not None} for task in (found, stock)]
        # A function is loaded once more for each file that names it.
        first, second = ({k: getattr(v, "__code__", v) for k, v in task.items()} for task in asked)
        assert first == second
        (split,) = found["dataset_kwargs"]["data_files"]
        assert split == (stock.get("test_split") or stock["validation_split"]) in found.values()


@pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation sets are not beside this checkout")
def test_the_shipped_tasks_run_on_their_data(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(DATA)
    tasks = load_tasks(["*_local"], str(ROOT / "configs" / "eval"))
    model = tiny(tokenizer, "top_p", max_position_embeddings=512)  # an answer must fit in
    results, counts = run_tasks(model, tokenizer, tasks, limit=2, bootstrap_iters=0)
    assert set(counts) == {f"{name}_local" for name in STOCK_FILES}
    assert all(math.isfinite(v) for found in metrics(results).values() for k, v in found.items() if "stderr" not in k)
