"""A conversion takes the memory of its largest shard, not of the model; measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

MIB = 2**20
SIZES = {
    "vocab_size": 64,
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
# The first conversion, of something small, has imported and set up what any conversion needs.
MEASURE = """
import json, sys
from pathlib import Path
from dynmoe_hf.convert import convert, upcycle
run = {"convert": convert, "upcycle": upcycle}[sys.argv[1]]
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
run(sys.argv[2], sys.argv[4] + "-warm", **json.loads(sys.argv[5]))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
report = run(sys.argv[3], sys.argv[4], **json.loads(sys.argv[5]))
print(json.dumps({"peak": resident("VmHWM") - before, "bytes": report.num_bytes}))
"""


def save(config: PreTrainedConfig, folder: Path, shard: int) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux")
@pytest.mark.parametrize("command", ["convert", "upcycle"])
def test_the_peak_is_near_the_largest_shard(command: str, tmp_path: Path) -> None:
    sizes = SIZES | {"intermediate_size": 512}
    if command == "convert":
        config, small = (MixtralConfig(**sizes | {"num_hidden_layers": n}, num_local_experts=8) for n in (8, 1))
    else:
        config, small = (LlamaConfig(**sizes | {"num_hidden_layers": n}) for n in (8, 1))
    save(config, tmp_path / "source", shard=32)
    save(small, tmp_path / "small", shard=32)
    options = {"num_experts": 8} if command == "upcycle" else {}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, command, "small", "source", "target", json.dumps(options)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["bytes"] > 200 * MIB
    print(f"{command}: {measured['peak'] / MIB:.0f} of {measured['bytes'] / MIB:.0f} MiB")
    assert measured["peak"] < 130 * MIB
