"""`dynmoe serve`: the server of transformers answers with what `generate` says."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.cli import main
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import tiny_model

NEEDS_SERVER = pytest.mark.skipif(not is_serve_available(), reason="the extra `serve` is not installed")
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
MESSAGES = [{"role": "user", "content": "a few words"}]
NEW_TOKENS = 6


def save(folder, routing: str, chat_template: str | None):
    tokenizer = train_tokenizer(["a text to learn from, with a few words"], vocab_size=280)
    tokenizer.chat_template = chat_template
    tiny_model(routing, vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Client:
    def __init__(self, folder, url: str) -> None:
        self.folder, self.url = folder, url
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = DynMoeForCausalLM.from_pretrained(folder).eval()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answer(self, path: str, **body: Any) -> dict[str, Any]:
        status, text = self.ask(path, {"model": str(self.folder), "max_tokens": NEW_TOKENS, **body})
        assert status == 200, text
        return json.loads(text)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        body = {"model": str(self.folder), "max_tokens": NEW_TOKENS, "stream": True, **body}
        status, text = self.ask(path, body)
        assert status == 200, text
        return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]

    def expected(self, prompt: str) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        return self.tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module", params=["one by one", "continuous batching"])
def client(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("serve") / "model", "top_p", CHAT_TEMPLATE)
    flags = ["--continuous-batching"] if request.param == "continuous batching" else []
    command = [sys.executable, "-m", "dynmoe_hf", "serve", str(folder), "--port", "0", "--device", "cpu", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert "127.0.0.1" in line, line
        yield Client(folder, line.partition(" is served at ")[2].partition(";")[0].removesuffix("/v1"))
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.communicate()


@NEEDS_SERVER
def test_completions_are_those_of_generate(client) -> None:
    prompt = "a text to"
    found = client.answer("/v1/completions", prompt=prompt)
    assert found["choices"][0]["text"] == client.expected(prompt)
    assert found["usage"]["completion_tokens"] == NEW_TOKENS
    chunks = client.stream("/v1/completions", prompt=prompt)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == client.expected(prompt)
    assert len(chunks) > 2 and chunks[-1]["choices"][0]["finish_reason"] == "length"


@NEEDS_SERVER
def test_chats_are_those_of_generate(client) -> None:
    expected = client.expected(client.tokenizer.apply_chat_template(MESSAGES, tokenize=False))
    found = client.answer("/v1/chat/completions", messages=MESSAGES)
    assert found["choices"][0]["message"] == {"role": "assistant", "content": expected}
    chunks = client.stream("/v1/chat/completions", messages=MESSAGES)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


@NEEDS_SERVER
def test_a_server_has_one_model_and_keeps_it(client) -> None:
    status, text = client.ask("/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == [str(client.folder)]
    status, text = client.ask("/v1/completions", {"model": "another", "prompt": "a"})
    assert status == 400 and "another" in json.loads(text)["detail"]
    _, text = client.ask("/load_model", {"model": "another"})
    assert '"status": "error"' in text and "only" in text
    assert client.ask("/reset", {})[0] == 200
    assert client.answer("/v1/completions", prompt="a text to")["choices"][0]["text"] == client.expected("a text to")


@NEEDS_SERVER
def test_a_chat_without_a_chat_template_is_refused(tmp_path) -> None:
    from fastapi.testclient import TestClient

    from dynmoe_hf.evaluation.loading import load_model_and_tokenizer
    from dynmoe_hf.evaluation.serving import build_app

    model, tokenizer = load_model_and_tokenizer(save(tmp_path, "top_p", None), device="cpu")
    with TestClient(build_app("model", model, tokenizer)) as client:
        response = client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert response.status_code == 400 and "chat_template" in response.json()["detail"]


def refusal(capsys, *argv: Any) -> str:
    assert main(["serve", *map(str, argv)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("dynmoe serve: "))
    return line


@NEEDS_SERVER
def test_mistakes_are_one_line(capsys, tmp_path) -> None:
    assert "no model" in refusal(capsys, tmp_path, "--port", 0)
    assert "65535" in refusal(capsys, tmp_path, "--port", 65536)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refusal(capsys, tmp_path, "--port", taken.getsockname()[1])
    folder = save(tmp_path / "model", "da_moe", None)
    assert "continuous batching" in refusal(capsys, folder, "--port", 0, "--continuous-batching")


def test_a_missing_extra_is_one_line(capsys, monkeypatch) -> None:
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    monkeypatch.delitem(sys.modules, "dynmoe_hf.evaluation.serving", raising=False)
    assert "dynmoe-hf[serve]" in refusal(capsys, "anything")
