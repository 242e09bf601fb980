"""What to quantise in a model of this family, said in the terms of torchao.

Experts are fused parameters (E, out, in), no `nn.Linear`: a configuration that does not name them leaves most of the
weights as they are, and says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TorchAoConfig
from transformers.utils import is_torchao_available

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

OLDEST_TORCHAO = "0.18"
# Names of parameters, as `FqnToConfig` of torchao takes them: the experts of every layout, and all that is `nn.Linear`
# in a decoder layer. Routers stay as they are, because a rounded score changes which experts run, and with them
# `gate_down_proj`, by which low-rank experts are ranked; so do norms, and the embeddings and the head, which are not
# repeated in every layer.
WEIGHTS = (
    r"re:.*\.experts\.(gate_up_proj|gate_up_proj_lowrank|up_proj|down_proj)",
    r"re:.*\.(self_attn|mlp|shared_experts)\.\w+_proj\.weight",
)


def int8_weight_only() -> TorchAoConfig:
    """The weights of experts, attention and dense FFNs in int8, with one scale a row; nothing else.

    For `from_pretrained(..., quantization_config=int8_weight_only())`. A model in memory takes its `quant_type`:
    `torchao.quantization.quantize_(model, int8_weight_only().quant_type, filter_fn=None)`.

    Raises:
        ValueError: torchao is not installed, or too old.
    """
    if not is_torchao_available(OLDEST_TORCHAO):
        raise ValueError(f"quantisation needs torchao {OLDEST_TORCHAO}: pip install 'dynmoe-hf[quantization]'.")
    from torchao.quantization import Int8WeightOnlyConfig

    # The recommended settings of the compiler would be those of the whole process.
    return weight_config(Int8WeightOnlyConfig(set_inductor_config=False))


def weight_config(how: AOBaseConfig) -> TorchAoConfig:
    """The same weights, quantised in another way of torchao: one that can quantise three-dimensional parameters."""
    from torchao.quantization import FqnToConfig

    return TorchAoConfig(FqnToConfig(dict.fromkeys(WEIGHTS, how)))
