import inspect
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.analysis.cost import count_cost
from dynmoe_hf.errors import UserError
from dynmoe_hf.training.arguments import help_text, parse_arguments, to_yaml
from dynmoe_hf.training.corpus import CORPUS_NAME

CONFIGS = Path(__file__).parents[2] / "configs"


def parse(tmp_path, text="", *flags):
    path = tmp_path / "config.yaml"
    path.write_text(inspect.cleandoc(text), encoding="utf-8")
    return parse_arguments(["--use_cpu", *flags], str(path))


def refusal(tmp_path, text, *flags) -> str:
    with pytest.raises(UserError) as caught:
        parse(tmp_path, text, *flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_anything_the_defaults_hold():
    model_args, data_args, training_args = parse_arguments([])
    assert (model_args.model, model_args.routing, data_args.dataset) == (None, None, [CORPUS_NAME])
    assert (training_args.learning_rate, training_args.overwrite_output_dir) == (5e-5, False)


def test_flags_win_over_the_file(tmp_path):
    text = """
        learning_rate: 1e-3
        max_steps: 10
        dataset: [a.txt, b.txt]
        bf16: false
        routing: {method: top_p, selector: {p: 0.4, max_experts: 3}}
        model: {hidden_size: 128, num_experts: 8}
    """
    flags = ["--learning_rate", "2e-3", "--dataset", "c.txt", "--routing.selector.p", "0.3", "--model.num_experts=4"]
    model_args, data_args, training_args = parse(tmp_path, text, *flags)
    assert (training_args.learning_rate, training_args.max_steps) == (2e-3, 10)
    assert data_args.dataset == ["c.txt"]
    assert model_args.routing == {"method": "top_p", "selector": {"p": 0.3, "max_experts": 3}}
    assert model_args.model == {"hidden_size": 128, "num_experts": 4}


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("3.e-4", 3e-4), (".5", 0.5), ("1", 1.0), ("-0.1", -0.1), ("1e+2", 100.0)],
)
def test_numbers_are_numbers_at_every_depth(tmp_path, written, number):
    text = f"weight_decay: {written}\nmodel: {{rms_norm_eps: {written}}}\nlr_scheduler_kwargs: {{min_lr: {written}}}"
    flag = f"--routing.losses.dynamic={written}"
    model_args, _, training_args = parse(tmp_path, text, flag)
    found = (
        training_args.weight_decay,
        model_args.model["rms_norm_eps"],
        training_args.lr_scheduler_kwargs["min_lr"],
        model_args.routing["losses"]["dynamic"],
    )
    assert found == (number,) * 4
    assert not any(isinstance(value, str) for value in found)


def test_words_are_words(tmp_path):
    text = """
        eval_strategy: no
        save_strategy: "no"
        run_name: 007
        tokenizer: on
        bf16: false
        full_determinism: no
        resume_from_checkpoint: true
        lr_scheduler_kwargs: {power: 1e0}
        report_to: [none]
        eval_steps:
        include_num_input_tokens_seen: true
    """
    model_args, _, training_args = parse(tmp_path, text)
    assert (training_args.eval_strategy, training_args.save_strategy) == ("no", "no")
    assert (training_args.bf16, training_args.full_determinism, model_args.tokenizer) == (False, False, "on")
    assert training_args.resume_from_checkpoint == "True"
    assert (training_args.report_to, training_args.eval_steps) == ([], None)
    assert training_args.include_num_input_tokens_seen == "all"


def test_nested_flags_build_sections(tmp_path):
    flags = [
        *("--routing", "top_p", "--routing.selector", "top_k", "--routing.selector.k", "1"),
        *("--model.layer_routing.1.selector.p", "0.7", "--model.mlp_layer_types", "[dense, sparse]"),
        *("--model.qk-norm", "per_head", "--model.tie_word_embeddings", "true", "--model.num_key_value_heads", "null"),
    ]
    model_args, _, _ = parse(tmp_path, "", *flags)
    assert model_args.routing == {"method": "top_p", "selector": {"type": "top_k", "k": 1}}
    assert model_args.model == {
        "layer_routing": {1: {"selector": {"p": 0.7}}},
        "mlp_layer_types": ["dense", "sparse"],
        "qk_norm": "per_head",
        "tie_word_embeddings": True,
        "num_key_value_heads": None,
    }


def test_a_flag_for_a_whole_part_replaces_it(tmp_path):
    text = "routing: {method: top_p, selector: {p: 0.4}}"
    assert parse(tmp_path, text, "--routing", "top_k")[0].routing == "top_k"
    assert parse(tmp_path, text, "--model", "runs/a")[0].model == "runs/a"
    assert parse(tmp_path, "model: {hidden_size: 8}", "--model.num_experts", "4", "--model", "b")[0].model == "b"


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("learning_rte: 1e-3", (), "'learning_rte'. Did you mean 'learning_rate'?"),
        ("", ("--learning_rte", "1e-3"), "'learning_rte'. Did you mean 'learning_rate'?"),
        ("", ("--learning_rat", "1e-3"), "'learning_rat'. Did you mean 'learning_rate'?"),  # no abbreviations
        ("model: {hidden_sise: 8}", (), "'hidden_sise'. Did you mean 'hidden_size'?"),
        ("", ("--model.num_expert", "8"), "'num_expert'. Did you mean 'num_experts'?"),
        ("model: {routing: top_p}", (), "section of its own"),
        ("model: runs/a", ("--model.hidden_size", "8"), "model is 'runs/a'"),
        ("routing: {selector: {p: 0.4}}", ("--routing.selector.p.q", "8"), "routing.selector.p is 0.4"),
        ("", ("--routing",), "--routing needs a value"),
        ("", ("--routing.selector.p", "--use_cpu"), "--routing.selector.p needs a value"),
        ("max_steps: many", (), "invalid int value: 'many'"),
        ("", ("--max_steps", "1.5"), "invalid int value: '1.5'"),
        ("learning_rate: [1, 2]", (), "learning_rate takes a single value"),
        ("learning_rate: {a: 2}", (), "learning_rate takes a single value"),
        ("eval_strategy: sometimes", (), "sometimes"),
        ("- a\n- b", (), "must hold `name: value` pairs"),
        ("a: [b", (), "is not valid YAML"),
        ("", ("--max_steps", "1", "stray"), "'stray'"),
        ("", ("--bf16", "perhaps"), "perhaps"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, text, flags, said):
    message = refusal(tmp_path, text, *flags)
    assert said in message
    assert "Accepted" not in message or "field of DynMoeConfig" in message


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        parse_arguments([], str(tmp_path / "absent.yaml"))


def test_yaml_of_a_run_repeats_it(tmp_path):
    text = """
        model: {hidden_size: 64, layer_routing: {1: {selector: {p: 1e-1}}}}
        routing: {method: top_p, losses: {dynamic: 1e-4}}
        dataset: [a.jsonl, b.jsonl]
        validation_files: v.jsonl
        learning_rate: 1e-5
        max_grad_norm: 0
        eval_strategy: no
        save_strategy: epoch
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr: 3e-5}
        accelerator_config: {even_batches: false}
        report_to: tensorboard
        gradient_checkpointing: true
        gradient_checkpointing_kwargs: {use_reentrant: false}
        hub_token: secret
        output_dir: runs/a
        resume_from_checkpoint: true
    """
    arguments = parse(tmp_path, text)
    written = to_yaml(*arguments, "a comment")
    assert written.startswith("# a comment\n")
    assert "secret" not in written and "TOKEN" not in written
    assert not {"resume_from_checkpoint", "overwrite_output_dir", "adam_beta1"} & set(yaml.safe_load(written))
    again = parse(tmp_path, written)
    assert again[:2] == arguments[:2]
    ours, theirs = again[2].to_dict(), arguments[2].to_dict()
    assert {name for name in ours if ours[name] != theirs[name]} == {"resume_from_checkpoint"}


def test_help_names_every_argument():
    text = help_text()
    for name in ("--model", "--routing.selector.p", "--dataset", "learning_rate", "overwrite_output_dir", "1e-3"):
        assert name in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train/*.yaml")), ids=lambda path: path.stem)
def test_configs_of_the_repository_build_a_model(path):
    model_args, data_args, training_args = parse_arguments(["--use_cpu"], str(path))
    config = DynMoeConfig(**model_args.model, routing=model_args.routing)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sparse = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    assert sorted({block.layer_idx for block in model.moe_blocks()}) == sparse
    assert data_args.block_size <= config.max_position_embeddings
    assert training_args.output_dir == f"runs/{path.stem}"


def test_tiny_configs_differ_in_routing_alone():
    top_k, top_p = (yaml.safe_load((CONFIGS / f"train/{name}_tiny.yaml").read_text()) for name in ("top_k", "top_p"))
    for settings in (top_k, top_p):
        del settings["routing"], settings["output_dir"]
    assert top_k == top_p


def test_cartesian_tiny_differs_from_top_k_tiny_in_its_experts_alone():
    """And has as many FFN parameters, all of them and those of one token."""
    settings, sizes = [], []
    for name in ("top_k", "cartesian"):
        path = CONFIGS / f"train/{name}_tiny.yaml"
        settings.append(yaml.safe_load(path.read_text()))
        del settings[-1]["model"], settings[-1]["routing"], settings[-1]["output_dir"]
        model_args, _, _ = parse_arguments(["--use_cpu"], str(path))
        config = DynMoeConfig(**model_args.model, routing=model_args.routing)
        cost = count_cost(config)
        ffn = cost.parameters["experts"] + cost.parameters["shared_experts"]
        rest = cost.total_parameters - ffn - cost.parameters["router"] - cost.parameters["norms"]
        sizes.append((rest, ffn, ffn - cost.total_parameters + cost.activity[0].parameters))
    assert settings[0] == settings[1]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "model").glob("*.json")))
def test_model_and_train_config_of_a_paper_are_the_same(name: str):
    model_args, _, _ = parse_arguments(["--use_cpu"], str(CONFIGS / f"train/{name}.yaml"))
    trained = DynMoeConfig(**model_args.model, routing=model_args.routing)
    config = DynMoeConfig.from_pretrained(CONFIGS / f"model/{name}.json")
    for field in DynMoeConfig.__annotations__:
        assert getattr(config, field) == getattr(trained, field), field


def test_paper_config_has_the_size_of_the_paper():
    """Huang et al. 2024: 3.5B parameters, 374M active with one expert and 582M with two."""
    config = DynMoeConfig.from_pretrained(CONFIGS / "model/top_p_paper.json")
    _, _, training_args = parse_arguments(["--use_cpu"], str(CONFIGS / "train/top_p_paper.yaml"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    active = {used: total - 24 * (16 - used) * expert for used in (1, 2)}
    assert round(total / 1e9, 2) == 3.49
    assert {used: round(count / 1e6) for used, count in active.items()} == {1: 374, 2: 582}
    assert training_args.lr_scheduler_kwargs == {"min_lr": 3e-5}
    assert (training_args.learning_rate, training_args.warmup_steps, training_args.weight_decay) == (3e-4, 2000, 0.1)
    losses = {name: value for name, value in config.routing_for(0)["losses"].items() if value}
    assert losses == {"load_balance": 1e-2, "dynamic": 1e-4}
