"""`dynmoe bench`: what it writes, and what it refuses."""

import json
import math
import shlex
import sys

import pytest

from dynmoe_hf.benchmarks import cases
from dynmoe_hf.cli import main
from dynmoe_hf.model.compat import ExpertsInterface
from dynmoe_hf.model.dispatch import ENGINES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "layer.json"
    assert main(["bench", "--quick", "--case", "layer", "--rounds", "3", "--dtype", "both", "--output", str(path)]) == 0
    return path


def refusal(capsys, *argv):
    code = main(["bench", *(str(word) for word in argv)])
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert printed.err.startswith("dynmoe bench: ") and printed.err.count("\n") == 1
    return printed.err


def test_the_file_has_all_that_is_needed_to_read_it(results):
    def no_constant(name):
        raise ValueError(f"{name} is no JSON")

    content = json.loads(results.read_text(), parse_constant=no_constant)
    assert set(content) == {"command", "date", "machine", "versions", "settings", "results"}
    assert content["command"] == shlex.join(["dynmoe", *sys.argv[1:]])
    assert {"cpu", "cpu_capability", "cores", "threads", "memory_gib", "gpus"} <= set(content["machine"])
    assert set(content["versions"]) == {"python", "torch", "transformers", "dynmoe_hf"}
    assert content["settings"]["rounds"] == 3 and content["settings"]["quick"] is True
    assert [(one["title"], one["dtype"]) for one in content["results"]] == [
        (shape, dtype) for dtype in ("float32", "bfloat16") for shape in ("a", "b")
    ]
    for result in content["results"]:
        assert result["case"] == "layer" and result["quantity"] == "seconds" and result["yardstick"] == "gemm"
        assert {"num_tokens", "hidden_size", "width", "num_experts", "num_slots", "num_pairs"} <= set(result["shape"])
        shape = result["shape"]
        assert result["notes"]["gemm_flops"] == 18 * shape["num_pairs"] * shape["hidden_size"] * shape["width"]
        assert ("gemm_float32" in result["scores"]) == (result["dtype"] == "bfloat16")
        for score in result["scores"].values():
            assert len(score["ratios"]) == 3 and all(0 < ratio < math.inf for ratio in score["ratios"])
            low, high = score["quartiles"]
            assert min(score["ratios"]) <= low <= score["median"] <= high <= max(score["ratios"])
            assert score["yardstick"] == "gemm" and score["yardstick_median"] > 0


def test_nothing_is_overwritten_unless_asked(results, capsys, monkeypatch):
    before = results.read_bytes()
    assert "--overwrite" in refusal(capsys, "--quick", "--case", "layer", "--output", results)
    assert results.read_bytes() == before
    monkeypatch.setattr(cases, "run_case", lambda name, settings: iter(()))
    assert main(["bench", "--quick", "--case", "layer", "--output", str(results), "--overwrite"]) == 0
    assert json.loads(results.read_text())["results"] == []


def test_a_picture_beside_the_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["bench", "--quick", "--case", "mean_k", "--rounds", "1", "--output", str(tmp_path / "a.json")]
    assert main(arguments) == 0
    assert (tmp_path / "a.float32.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    (tmp_path / "a.json").unlink()
    assert "a.float32.png" in refusal(capsys, *arguments[1:])


def test_bad_input(tmp_path, capsys):
    assert "Did you mean 'layer'?" in refusal(capsys, "--case", "leyer")
    assert "--rounds" in refusal(capsys, "--rounds", "0")
    assert "--threads" in refusal(capsys, "--threads", "0")
    assert "JSON" in refusal(capsys, "--output", tmp_path / "results.txt")
    (tmp_path / "folder.json").mkdir()
    assert "folder" in refusal(capsys, "--output", tmp_path / "folder.json", "--overwrite")


def test_a_wrong_engine_ends_the_run_without_a_number(tmp_path, capsys, monkeypatch):
    def wrong(experts, hidden, ids, weights):
        return 2 * ENGINES["eager"](experts, hidden, ids, weights)

    monkeypatch.setitem(ENGINES, "planted", wrong)
    monkeypatch.setitem(ExpertsInterface._global_mapping, "planted", wrong)
    output = tmp_path / "a.json"
    assert main(["bench", "--quick", "--case", "variable_k", "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert "planted is wrong in variable_k" in printed.err and printed.out == ""
    assert not output.exists()


def test_the_list_names_every_case(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cases.CASES)


def test_without_names_the_default_cases_run(monkeypatch):
    ran = []
    monkeypatch.setattr(cases, "run_case", lambda name, settings: iter(ran.append(name) or ()))
    assert main(["bench", "--quick"]) == 0
    assert ran == cases.default_cases() and "layer" in ran and "step" not in ran
