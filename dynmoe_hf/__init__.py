"""dynmoe_hf: a Transformers model family whose experts are chosen by a selectable routing method.

Importing the package registers the family with transformers' Auto classes. It does not import torch by itself: the
public names, and the registration, load when they are needed.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dynmoe_hf.model import (
        DynMoeConfig,
        DynMoeForCausalLM,
        DynMoeForQuestionAnswering,
        DynMoeForSequenceClassification,
        DynMoeForTokenClassification,
        DynMoeModel,
        DynMoePreTrainedModel,
    )

__all__ = [
    "DynMoeConfig",
    "DynMoeForCausalLM",
    "DynMoeForQuestionAnswering",
    "DynMoeForSequenceClassification",
    "DynMoeForTokenClassification",
    "DynMoeModel",
    "DynMoePreTrainedModel",
    "__version__",
]
_MODEL_NAMES = frozenset(__all__) - {"__version__"}
_AUTO_MODULE = "transformers.models.auto.modeling_auto"


def __getattr__(name: str) -> Any:
    if name in _MODEL_NAMES:
        return getattr(importlib.import_module("dynmoe_hf.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODEL_NAMES])


class _RegisterWithAuto(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads transformers' Auto classes as ever, and our family right after them."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module("dynmoe_hf.model")


if _AUTO_MODULE in sys.modules:
    importlib.import_module("dynmoe_hf.model")
else:
    sys.meta_path.insert(0, _RegisterWithAuto())
