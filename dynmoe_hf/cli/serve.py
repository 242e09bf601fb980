"""`dynmoe serve`: answer requests in the protocol of OpenAI."""

from __future__ import annotations

import argparse
import contextlib
import socket

from .model_arguments import add_model_arguments, load


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; default: 8000")
    parser.add_argument(
        "--continuous-batching",
        action="store_true",
        help="answer requests together; not for routing that reads attention",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command until it is interrupted. Raises UserError for what the user can mend."""
    from dynmoe_hf.errors import UserError, user_errors

    try:
        import uvicorn

        from dynmoe_hf.evaluation.serving import build_app
    except ImportError as error:
        raise UserError(str(error)) from error
    with contextlib.ExitStack() as opened:
        with user_errors():
            listener = opened.enter_context(_listener(args.host, args.port))
            model, tokenizer = load(args)
            app = build_app(args.model, model, tokenizer, continuous_batching=args.continuous_batching)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        print(f"{args.model} is served at http://{address}:{port}/v1; Ctrl-C ends it.", flush=True)
        if tokenizer.chat_template is None:
            print("Its tokenizer has no chat template, so only /v1/completions will work.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded.

    Raises:
        ValueError: there is no such port, the address is none of this machine's, or the port is taken.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be 0 to 65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror}") from error
