"""Our cartesian layers against an independent computation in float64 (`tests/vectors/README.md`)."""

from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.attention import DynMoeRMSNorm
from dynmoe_hf.model.blocks import DynMoeCartesianBlock
from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.model.modeling_dynmoe import build_experts
from dynmoe_hf.model.routing import RoutingContext
from tests.recorded import FOLDER
from tests.tiny import ENGINES

FILE = FOLDER / "cartesian_ref_f64.safetensors"
EXACT = "float64 throughout"
PRECISIONS = {"float32": (torch.float32, 1e-5), "float64": (torch.float64, 1e-5), EXACT: (torch.float64, 1e-12)}
CASES: dict[str, dict[str, Any]] = {
    "prenorm": {},
    "prenorm_renorm": {"selector": {"norm_topk_prob": True}},
    "prenorm_noshared": {"num_shared_experts": 0},
    "prenorm_droptop1": {"selector": {"disable_top1": True}},
    "prenorm_input_residual": {"experts": {"composition": "prenorm_input_residual"}},
    "nested": {"experts": {"composition": "nested"}},
    "postnorm": {"experts": {"composition": "postnorm"}},
    "postnorm_input_residual": {"experts": {"composition": "postnorm_input_residual"}},
}


@cache
def vectors() -> dict[str, Tensor]:
    return load_file(FILE)


def expected(case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}."): value for name, value in vectors().items() if name.startswith(f"{case}.")}


def our_state_dict(shared: bool) -> dict[str, Tensor]:
    recorded = {name.removeprefix("param."): value for name, value in vectors().items() if name.startswith("param.")}
    ours = {"inner_norm.weight": recorded["norm_inner.weight"]}
    for number, bank in enumerate("AB"):
        experts = {name: recorded[f"{bank}.experts.{name}_proj"] for name in ("gate", "up", "down")}
        prefix = f"sub_layers.{number}"
        ours[f"{prefix}.gate.weight"] = recorded[f"{bank}.router.weight"]
        ours[f"{prefix}.experts.gate_up_proj"] = torch.cat([experts["gate"], experts["up"]], dim=1)
        ours[f"{prefix}.experts.down_proj"] = experts["down"]
        for name in ("gate", "up", "down") if shared else ():
            ours[f"{prefix}.shared_experts.{name}_proj.weight"] = recorded[f"{bank}.shared.{name}_proj"]
    return ours


def our_layer(case: str, dtype: torch.dtype, engine: str = "eager") -> tuple[DynMoeCartesianBlock, nn.Module]:
    """The FFN half of a layer, and the layer's own norm."""
    routing = dict(CASES[case])
    shared = routing.pop("num_shared_experts", 1)
    config = DynMoeConfig(
        hidden_size=16,
        moe_intermediate_size=12,
        num_attention_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=shared,
        rms_norm_eps=1e-6,
        routing={"method": "cartesian", **routing},
        experts_implementation=engine,
    )
    block = DynMoeCartesianBlock(config, 0, build_experts).to(dtype)
    outer_norm = DynMoeRMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype)
    block.load_state_dict(our_state_dict(bool(shared)))
    name = "norm_final" if case.startswith("postnorm") else "norm_outer"
    outer_norm.load_state_dict({"weight": vectors()[f"param.{name}.weight"]})
    return block.eval(), outer_norm


def record(module: nn.Module, input_name: str, output_name: str, into: dict[str, Tensor]) -> None:
    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        into[input_name], into[output_name] = inputs[0], output[0] if isinstance(output, tuple) else output

    module.register_forward_hook(keep)


def run(case: str, dtype: torch.dtype, engine: str = "eager", mask: Tensor | None = None) -> dict[str, Tensor]:
    """What the layer computes, under the names of the vectors; row `i` of a Routing is token `i`."""
    block, outer_norm = our_layer(case, dtype, engine)
    found: dict[str, Tensor] = {}
    record(block.sub_layers[0], "n1", "a", found)
    record(block.inner_norm, "mid", "n2", found)
    record(block.sub_layers[1], "n2", "b", found)
    context = RoutingContext(0, None if mask is None else mask.flatten())
    found["out"], routings = block(vectors()["input"].to(dtype), outer_norm, context)
    for bank, routing in zip("AB", routings, strict=True):
        found |= {f"logits_{bank}": routing.logits, f"idx_{bank}": routing.expert_ids, f"w_{bank}": routing.weights}
        found[f"routing_{bank}"] = routing
    return found


def compare(found: dict[str, Tensor], case: str, tolerance: float, rows: Tensor) -> None:
    """Compare the tokens in `rows` (B, S)."""
    for name, value in expected(case).items():
        if name.startswith("aux"):
            continue
        ours = found[name][rows] if value.ndim == 3 else found[name][rows.flatten()]
        theirs = value[rows] if value.ndim == 3 else value[rows.flatten()]
        if name.startswith("idx"):
            assert torch.equal(ours, theirs), f"{name}: another choice"
        else:
            torch.testing.assert_close(
                ours.double(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_every_recorded_case_is_compared() -> None:
    assert {name.partition(".")[0] for name in vectors()} == {*CASES, "input", "attention_mask", "param"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_step_of_the_layer(case: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, tolerance = PRECISIONS[precision]
    if precision == EXACT:
        # Routers and norms work in float32 whatever the model's dtype; here they do so in float64 too.
        monkeypatch.setattr(Tensor, "float", Tensor.double)
    compare(run(case, dtype), case, tolerance, torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(engine: str) -> None:
    compare(run("prenorm", torch.float32, engine), "prenorm", 1e-5, torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_no_other_token(case: str) -> None:
    real = vectors()["attention_mask"].bool()
    found = run(case, torch.float64, mask=real)
    assert not found["routing_A"].used[~real.flatten()].any()
    compare(found, case, 1e-5, real)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_load_balance_of_each_bank(case: str, padded: bool) -> None:
    real = vectors()["attention_mask"].bool() if padded else torch.ones(2, 6, dtype=torch.bool)
    found = run(case, torch.float32, mask=real if padded else None)
    weights = TokenWeights.build(real, None, (2, 6), torch.device("cpu"))
    losses = load_balance([found["routing_A"], found["routing_B"]], weights, scope="micro")
    suffix = "_masked" if padded else ""
    for loss, bank in zip(losses, "AB", strict=True):
        value = expected(case)[f"aux_{bank}{suffix}"]
        torch.testing.assert_close(loss.double()[None], value, rtol=1e-6, atol=1e-6)
