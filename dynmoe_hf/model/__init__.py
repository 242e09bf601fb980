"""The portable floor: everything a saved model needs, and its registration with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_dynmoe import DynMoeConfig
from .modeling_dynmoe import (
    DynMoeForCausalLM,
    DynMoeForQuestionAnswering,
    DynMoeForSequenceClassification,
    DynMoeForTokenClassification,
    DynMoeModel,
    DynMoePreTrainedModel,
)

_AUTO_CLASSES = {
    AutoModel: DynMoeModel,
    AutoModelForCausalLM: DynMoeForCausalLM,
    AutoModelForSequenceClassification: DynMoeForSequenceClassification,
    AutoModelForTokenClassification: DynMoeForTokenClassification,
    AutoModelForQuestionAnswering: DynMoeForQuestionAnswering,
}

AutoConfig.register(DynMoeConfig.model_type, DynMoeConfig, exist_ok=True)
DynMoeConfig.register_for_auto_class()
for _auto_class, _model_class in _AUTO_CLASSES.items():
    _auto_class.register(DynMoeConfig, _model_class, exist_ok=True)
    # Saving then writes the source files of this folder beside the weights.
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "DynMoeConfig",
    "DynMoeForCausalLM",
    "DynMoeForQuestionAnswering",
    "DynMoeForSequenceClassification",
    "DynMoeForTokenClassification",
    "DynMoeModel",
    "DynMoePreTrainedModel",
]
