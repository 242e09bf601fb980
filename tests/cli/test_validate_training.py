"""What `dynmoe validate` says of a training run: devices and sharding from a launch file, memory, speed."""

import json

import pytest
import yaml

from dynmoe_hf.cli import main
from tests.tiny import tiny_model

RUN = {
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4},
    "routing": "top_k",
    "vocab_size": 512,
    "block_size": 64,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 100,
    "bf16": True,
    "gradient_checkpointing": True,
    "output_dir": "runs/x",
}
FSDP2 = {
    "distributed_type": "FSDP",
    "num_processes": 8,
    "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
}


@pytest.fixture
def validate(tmp_path, capsys):
    """Validate a run; the exit code, and what was printed or is the matter."""

    def call(settings, *flags, launch=None):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        if launch is not None:
            (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launch))
            flags += ("--accelerate", str(tmp_path / "launch.yaml"))
        code = main(["validate", str(path), *flags])
        printed = capsys.readouterr()
        return code, printed.out or printed.err

    return call


def counted(validate, settings, *flags, launch=None):
    code, printed = validate(settings, "--json", *flags, launch=launch)
    assert code == 0
    return json.loads(printed)["training"]


def test_the_arguments_of_the_run_are_counted(validate):
    found = counted(validate, RUN)
    assert found["run"] == {
        "sequences": 4,
        "sequence_length": 64,
        "accumulation": 2,
        "steps": 100,
        "bf16": True,
        "checkpointing": True,
        "layout": "single",
        "devices": 1,
        "tokens_per_step": 512,
    }
    assert found["device"] == {"peak_tflops": 989, "memory_gib": 80} and found["utilisation"] == 0.4
    few = counted(validate, {"model": RUN["model"], "output_dir": "runs/x"})
    assert (few["run"]["sequences"], few["run"]["sequence_length"], few["run"]["steps"]) == (8, 512, None)
    assert not few["run"]["bf16"] and not few["run"]["checkpointing"] and few["throughput"][0]["seconds"] is None


def test_the_launch_file_decides_devices_and_sharding(validate):
    alone, sharded = counted(validate, RUN), counted(validate, RUN, launch=FSDP2)
    assert (sharded["run"]["layout"], sharded["run"]["devices"]) == ("sharded", 8)
    assert sharded["memory"]["optimizer"] == alone["memory"]["optimizer"] // 8
    assert sharded["throughput"][0]["tokens_per_second"] == 8 * alone["throughput"][0]["tokens_per_second"]
    fewer = counted(validate, RUN, "--devices", "2", launch=FSDP2)
    assert (fewer["run"]["layout"], fewer["run"]["devices"]) == ("sharded", 2)
    copies = counted(validate, RUN, "--devices", "2")
    assert (copies["run"]["layout"], copies["run"]["devices"]) == ("replicated", 2)


def test_zero_3_is_read_from_its_own_file(validate, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    launch = {"distributed_type": "DEEPSPEED", "num_processes": 4}
    by_file = launch | {"deepspeed_config": {"deepspeed_config_file": str(tmp_path / "zero.json")}}
    assert counted(validate, RUN, launch=by_file)["run"]["layout"] == "sharded"
    assert counted(validate, RUN, launch=launch | {"deepspeed_config": {"zero_stage": 3}})["run"]["devices"] == 4
    code, reason = validate(RUN, launch=launch | {"deepspeed_config": {"zero_stage": 2}})
    assert code == 2 and "ZeRO stage 3" in reason


def test_it_says_plainly_whether_it_fits(validate):
    assert "It fits into 90% of 80 GiB." in validate(RUN)[1]
    code, printed = validate(RUN, "--memory-gib", "0.001")
    assert code == 0 and "It does not fit into 90% of 0.001 GiB." in printed
    assert "devices run at 53%" in printed and "An assumption, not a measurement." in printed


def test_a_checkpoint_is_trained_in_float32(validate, tmp_path):
    model = tiny_model("top_k").bfloat16()
    model.save_pretrained(tmp_path / "model")
    memory = counted(validate, RUN | {"model": str(tmp_path / "model")})["memory"]
    assert memory["optimizer"] == 8 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("flags", "launch", "message"),
    [
        (["--device", "h1000"], None, "h100"),
        (["--utilisation", "40"], None, "utilisation"),
        (["--memory-gib", "0"], None, "memory_gib"),
        (["--peak-tflops", "0"], None, "peak_tflops"),
        (["--devices", "0"], None, "devices"),
        ([], {"num_processes": 8}, "distributed_type"),
        (["--accelerate", "nowhere.yaml"], None, "nowhere.yaml"),
    ],
)
def test_refusals(flags, launch, message, validate):
    code, reason = validate(RUN, *flags, launch=launch)
    assert code == 2 and message in reason


def test_a_model_is_no_run(validate):
    assert "Training on" not in validate(RUN["model"])[1]
    code, reason = validate(RUN["model"], "--devices", "2")
    assert code == 2 and "training run" in reason
