"""Serve a loaded model through transformers' own server, which speaks the protocol of OpenAI.

`transformers serve` looks for the class of a model inside the library and finds no other. Here the server gets a
manager that holds our model already. Its parts are private to transformers: they stand in this one file, and
`tests/cli/test_serve.py` tells when one of them changes.

Raises on import:
    ImportError: packages of the server are missing, or this transformers has moved its parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers import ContinuousBatchingConfig
from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    raise ImportError("the server needs fastapi, uvicorn and openai: pip install 'dynmoe-hf[serve]'")

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

try:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState
except ImportError as error:
    raise ImportError(
        f"the server of transformers {transformers.__version__} is not built as in 5.20 to 5.23: {error}"
    ) from error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynmoe_hf import DynMoeForCausalLM


# Left to itself, the paged cache takes 80 to 90 % of the free memory, which is right for the memory of a GPU only.
CPU_CACHE_SHARE = 0.05


class LoadedModel(ModelManager):
    """The one model of a server, which loads no other.

    The library's manager asks the two overridden `_load_*` methods for a model that it does not hold, or no longer.
    """

    def __init__(
        self, name: str, model: DynMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, state: GenerationState
    ) -> None:
        self.name, self.model, self.tokenizer, self.state = name, model, tokenizer, state
        super().__init__(force_model=name)

    def _load_processor(self, model_id_and_revision: str, **_: Any) -> PreTrainedTokenizerBase:
        self._refuse_others(model_id_and_revision)
        return self.tokenizer

    def _load_model(self, model_id_and_revision: str, **_: Any) -> DynMoeForCausalLM:
        self._refuse_others(model_id_and_revision)
        return self.model

    def _refuse_others(self, model_id_and_revision: str) -> None:
        if model_id_and_revision != self.process_model_name(self.name):
            raise ValueError(f"This server has the model {self.name!r} only.")

    def shutdown(self) -> None:
        """End the thread of continuous batching too, for which the process would wait for ever; a request starts it."""
        self.state.shutdown()
        super().shutdown()

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model in the form of OpenAI's list, instead of a look into the Hub's cache."""
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "dynmoe_hf"}]


def build_app(
    name: str, model: DynMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, continuous_batching: bool = False
) -> FastAPI:
    """The server as an ASGI application: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health.

    A request that the model or its tokenizer refuses, such as a chat without a chat template, is answered with status
    400 and the reason.

    Args:
        name: what requests call the model.
        continuous_batching: answer requests together, from one paged cache, instead of one after the other.

    Raises:
        ValueError: continuous batching with a routing that reads attention.
    """
    if continuous_batching and any(block.statistic is not None for block in model.moe_blocks()):
        raise ValueError("routing by attention does not work with continuous batching; serve it without.")
    on_cpu = model.device.type == "cpu"
    cache = ContinuousBatchingConfig(max_memory_percent=CPU_CACHE_SHARE) if on_cpu else None
    state = GenerationState(continuous_batching=continuous_batching, cb_config=cache)
    manager = LoadedModel(name, model, tokenizer, state)
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        CompletionHandler(manager, state),
        ResponseHandler(manager, state),
        TranscriptionHandler(manager, state),
        SystemOneHandler(manager, state),
        state,
    )
    app.add_exception_handler(ValueError, _refusal)
    return app


def _refusal(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": " ".join(str(error).split())}, status_code=400)
