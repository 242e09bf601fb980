"""The command line in process: exit codes, one line for a user's mistake, JSON that parses."""

import functools
import json
import subprocess
import sys

import pytest
import yaml
from transformers import AutoTokenizer

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.analysis.description import option_docs
from dynmoe_hf.cli import COMMANDS, main
from dynmoe_hf.cli.model_arguments import split_dotted_flags
from dynmoe_hf.model.methods import AXES, METHODS, Method, expand, options_class
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import all_routings, tiny_config, tiny_model

TEXTS = ["a text to learn from, with a few words", "another one, a bit longer than the first: 1 2 3 4 5", "more"]
RUN = {
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4},
    "routing": {"method": "top_p", "selector": {"p": 0.3}},
    "vocab_size": 512,
    "dataset": "python-stdlib",
    "bf16": True,
    "output_dir": "runs/x",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    tiny_model("top_p", vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def run(capsys):
    """Run a command line; what it printed, if it succeeded."""

    def call(*argv):
        code = main([str(word) for word in argv])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def refused(capsys):
    """Run a command line that must fail with exit code 2; its one-line reason."""

    def call(*argv):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert "Traceback" not in printed.err
        reasons = [line for line in printed.err.splitlines() if line.startswith(f"dynmoe {argv[0]}: ")]
        assert len(reasons) == 1 and printed.err.endswith(f"{reasons[0]}\n")
        return reasons[0]

    return call


def test_help_does_not_import_torch():
    code = (
        "import sys; from dynmoe_hf.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize(
    ("line", "others", "dotted"),
    [
        ("evaluate --routing.selector.p 0.2 MODEL", "evaluate MODEL", "--routing.selector.p 0.2"),
        ("evaluate --routing.selector.p=0.2 MODEL", "evaluate MODEL", "--routing.selector.p=0.2"),
        ("evaluate MODEL --routing top_p --limit -1", "evaluate MODEL --limit -1", "--routing top_p"),
        ("validate X --model.hidden_size 3 --routing --json", "validate X --json", "--model.hidden_size 3 --routing"),
        ("generate MODEL --prompt --top-p 0.3", "generate MODEL --prompt --top-p 0.3", ""),
    ],
)
def test_dotted_flags_are_split_off(line, others, dotted):
    assert split_dotted_flags(line.split()) == (others.split(), dotted.split())


def test_methods_lists_every_method(run):
    printed = run("methods")
    methods = json.loads(run("methods", "--json"))
    assert [method["name"] for method in methods] == list(METHODS)
    for method in methods:
        assert method["routing"] == expand(method["name"])
        assert method["name"] in printed and method["title"].split()[0] in printed


@pytest.mark.parametrize("name", METHODS)
def test_methods_shows_one_in_full(name, run):
    method = json.loads(run("methods", name, "--json"))
    printed = run("methods", name)
    for axis in AXES:
        stored = {option["name"]: option["default"] for option in method["parts"][axis]["options"]}
        assert {"type": method["parts"][axis]["type"], **stored} == expand(name)[axis]
        assert all(option in printed for option in stored)
    assert {loss["name"]: loss["coefficient"] for loss in method["losses"]} == expand(name)["losses"]


def test_every_option_of_every_part_is_documented():
    for routing in all_routings().values():
        spec = expand(routing)
        for axis in AXES:
            docs = option_docs(options_class(axis, spec[axis]["type"]))
            assert set(docs) == set(spec[axis]) - {"type"}
            assert all(docs.values())


def test_types_and_continued_lines_of_options(run):
    options = json.loads(run("methods", "top_k", "--json"))["parts"]["selector"]["options"]
    by_name = {option["name"]: option for option in options}
    assert by_name["k"]["type"] == "int | None"
    assert by_name["score_function"]["type"] == '"softmax" | "sigmoid"'
    assert by_name["num_groups"]["doc"].endswith("section 2.1.2).")


def test_defaults_are_those_of_the_method(run, monkeypatch):
    parts = METHODS["top_p"].parts | {"selector": {"type": "top_p", "p": 0.9}}
    monkeypatch.setitem(METHODS, "wide", Method("All but the least probable experts", "nobody", parts))
    options = json.loads(run("methods", "wide", "--json"))["parts"]["selector"]["options"]
    assert {option["name"]: option["default"] for option in options}["p"] == 0.9


def test_methods_knows_the_nearest_name(refused):
    assert "Did you mean 'top_p'?" in refused("methods", "topp")


def write(path, settings):
    path.write_text(json.dumps(settings) if path.suffix == ".json" else yaml.safe_dump(settings))
    return path


def test_validate_a_training_run(run, tmp_path):
    path = write(tmp_path / "run.yaml", RUN)
    found = json.loads(run("validate", path, "--json"))
    assert found["routing"]["selector"]["p"] == 0.3
    assert found["parameters"]["embedding"] == 512 * 32  # the vocabulary of the tokenizer that is to be trained
    assert [point["experts_per_token"] for point in found["activity"]] == [1, 2, 4]
    printed = run("validate", path)
    assert f"{found['total_parameters']:,}" in printed and "is valid" in printed


def test_validate_a_training_run_from_a_checkpoint(folder, run, refused, tmp_path):
    path = write(tmp_path / "run.yaml", RUN | {"model": str(folder)})
    found = json.loads(run("validate", path, "--json"))
    assert found["total_parameters"] == json.loads(run("validate", folder, "--json"))["total_parameters"]
    assert found["routing"]["selector"]["p"] == 0.3
    assert "'rooting'" in refused("validate", write(path, RUN | {"model": str(folder), "rooting": "top_p"}))


def test_validate_a_training_run_with_a_tokenizer(folder, run, tmp_path):
    path = write(tmp_path / "run.yaml", RUN | {"tokenizer": str(folder)})
    assert json.loads(run("validate", path, "--json"))["parameters"]["embedding"] == 280 * 32
    given = write(path, RUN | {"tokenizer": "not/reachable", "model": RUN["model"] | {"vocab_size": 300}})
    assert json.loads(run("validate", given, "--json"))["parameters"]["embedding"] == 300 * 32


def test_validate_applies_flags(run, tmp_path):
    path = write(tmp_path / "run.yaml", RUN)
    flags = (
        "--routing",
        "top_k",
        "--model.num_experts_per_tok",
        "3",
        "--model.vocab_size=100",
        "--sequence-length",
        "7",
    )
    found = json.loads(run("validate", *flags, path, "--json"))
    assert found["routing"]["method"] == "top_k"
    assert found["parameters"]["embedding"] == 100 * 32
    assert [point["experts_per_token"] for point in found["activity"]] == [3]
    assert found["sequence_length"] == 7


@pytest.mark.parametrize("form", ["fields.yaml", "fields.json", "config.json", "folder"])
def test_validate_every_form_of_a_model(form, run, tmp_path):
    config = tiny_config("top_p")
    config.save_pretrained(tmp_path)
    path = tmp_path if form == "folder" else tmp_path / form
    if form.startswith("fields"):
        names = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
        names += ("num_attention_heads", "num_key_value_heads", "num_shared_experts", "mlp_layer_types")
        write(path, {name: getattr(config, name) for name in names} | {"routing": "top_p"})
    found = json.loads(run("validate", path, "--json", "--experts-per-token", "1.5", "--routing.selector.p", "0.9"))
    assert found["total_parameters"] == sum(parameter.numel() for parameter in tiny_model("top_p").parameters())
    assert found["routing"]["selector"]["p"] == 0.9
    assert [point["experts_per_token"] for point in found["activity"]] == [1.5]


def test_validate_allocates_no_weights(run, tmp_path):
    path = write(tmp_path / "huge.yaml", {"hidden_size": 65536, "moe_intermediate_size": 65536, "num_experts": 512})
    assert json.loads(run("validate", path, "--json"))["total_parameters"] > 5 * 10**13


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"num_expert": 4}, [], "'num_experts'"),
        ({"num_experts": 0}, [], "num_experts must be at least 1"),
        ({"num_experts": "four"}, [], "num_experts"),
        ({"routing": "topp"}, [], "'top_p'"),
        (RUN | {"model": {"num_expert": 4}}, [], "'num_experts'"),
        (RUN | {"rooting": "top_p"}, [], "'routing'"),
        (RUN, ["--routing.selector.p", "-1"], "routing.selector: p must be"),
        (RUN, ["--routing.selector.p"], "needs a value"),
        (RUN, ["--routing", "{"], "not valid YAML"),
        (RUN, ["--sequence-length", "0"], "sequence_length"),
        (RUN, ["--experts-per-token", "5"], "experts_per_token"),
        (RUN, ["--learning_rate", "1"], "--learning_rate"),
        ({"model_type": "llama"}, [], "type"),
        ([1, 2], [], "name: value"),
    ],
)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_validate_refuses(settings, flags, message, suffix, refused, tmp_path):
    path = write(tmp_path / f"bad.{suffix}", settings)
    assert message in refused("validate", path, *flags)


@pytest.mark.parametrize("name", ["nothing.yaml", "nowhere", "."])
def test_validate_refuses_what_is_not_there(name, refused, tmp_path):
    refused("validate", tmp_path / name)


def evaluate(folder, documents, *flags):
    return ("evaluate", folder, "--dataset", documents, "--split", "all", "--block-size", "16", *flags)


def test_evaluate(folder, documents, run, tmp_path):
    output = tmp_path / "result.json"
    found = json.loads(run(*evaluate(folder, documents, "--json", "--output", output)))
    assert json.loads(output.read_text()) == found
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
    assert num_tokens % 16 and found["blocks"] == num_tokens // 16 + 1
    assert num_tokens - found["blocks"] - len(TEXTS) <= found["tokens"] < num_tokens
    assert 1 <= found["experts_per_token"] <= 8 and len(found["expert_load"]) == 2
    assert found["routing"]["selector"]["p"] == 0.4
    printed = run(*evaluate(folder, documents, "--batch-size", "1"))
    assert f"{found['bits_per_byte']:.4g}" in printed and f"{found['tokens']}" in printed


def test_evaluate_changes_the_routing(folder, documents, run):
    def experts(*flags):
        return json.loads(run(*evaluate(folder, documents, "--json", *flags)))["experts_per_token"]

    assert experts("--routing.selector.p", "0") == 1
    assert experts("--routing", '{"selector": {"p": 1.5}}') == 8
    assert experts("--routing=top_k") == 2


def test_evaluate_in_batches(folder, documents, run, monkeypatch):
    shapes = []
    forward = DynMoeForCausalLM.forward

    def spy(self, input_ids, **arguments):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(DynMoeForCausalLM, "forward", functools.wraps(forward)(spy))
    run(*evaluate(folder, documents, "--batch-size", "3"))
    assert shapes == [(3, 16), (1, 16)]


def test_evaluate_the_first_blocks(folder, documents, run):
    found = json.loads(run(*evaluate(folder, documents, "--json", "--limit", "1")))
    assert found["blocks"] == 1 and found["tokens"] <= 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--block-size", "65"], "64 positions"),
        (["--block-size", "1"], "block_size"),
        (["--text-column", "words"], "'words'"),
        (["--split", "test", "--validation-fraction", "0.5"], "no split 'test'"),
        (["--routing.selector.q", "1"], "'q'"),
        (["--model.hidden_size", "1"], "--model.hidden_size"),
        (["--nonsense"], "--nonsense"),
        (["--output", "nowhere/at/all.json"], "nowhere/at/all.json"),
        (["--device", "toaster"], "toaster"),
        (["--dataset", "nothing.txt"], "nothing.txt"),
    ],
)
def test_evaluate_refuses(flags, message, folder, documents, refused):
    assert message in refused(*evaluate(folder, documents, *flags))


def test_a_broken_checkpoint_is_refused(documents, refused, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert "truncated or corrupt" in refused(*evaluate(tmp_path, documents))
    assert "truncated or corrupt" in refused("generate", tmp_path, "--prompt", "x")


def test_generate_prints_what_generate_returns(folder, run):
    found = json.loads(run("generate", folder, "--prompt", "a text", "--max-new-tokens", "12", "--json"))
    streamed = run("generate", folder, "--prompt", "a text", "--max-new-tokens", "12")
    assert streamed.strip("\n") == "a text" + found["continuation"].rstrip("\n")
    assert 1 <= found["new_tokens"] <= 12
    assert found["options"] == {"max_new_tokens": 12, "do_sample": False}


def test_generate_samples_by_seed(folder, run, tmp_path):
    (tmp_path / "prompt.txt").write_text("a text")

    def sample(seed, *flags):
        line = ("generate", "--seed", seed, folder, "--prompt-file", tmp_path / "prompt.txt", "--json", *flags)
        return json.loads(run(*line, "--max-new-tokens", "20"))

    first, again, other = (sample(seed, "--temperature", "5") for seed in (1, 1, 2))
    assert first["continuation"] == again["continuation"] != other["continuation"]
    assert first["options"] == {"max_new_tokens": 20, "do_sample": True, "temperature": 5.0}
    greedy = sample(1, "--top-k", "1")
    assert greedy["continuation"] == sample(2, "--top-p", "1e-9")["continuation"]


def test_generate_changes_the_routing(folder, run):
    found = json.loads(run("generate", "--routing.selector.p", "0", folder, "--prompt", "a", "--json"))
    assert found["routing"]["selector"]["p"] == 0
    assert found["new_tokens"] <= 63  # all that the model has room for, where nothing is asked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt-file", "nothing.txt"], "nothing.txt"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--max-new-tokens", "64"], "64 positions"),
        (["--prompt", "x y " * 64], "64 positions"),
        (["--prompt", "x", "--temperature", "0"], "--temperature"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p"),
        (["--prompt", "x", "--top-k", "0"], "--top-k"),
        (["--prompt", "x", "--routing", "topp"], "'top_p'"),
        (["--prompt", "x", "--prompt-file", "y"], "not allowed with"),
        ([], "--prompt"),
    ],
)
def test_generate_refuses(flags, message, folder, refused):
    assert message in refused("generate", folder, *flags)
