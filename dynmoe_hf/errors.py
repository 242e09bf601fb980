"""What a user did wrong, as opposed to what went wrong."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A user's mistake, said in one sentence. The command line prints it without a traceback and exits with 2."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Everything that input can break, raised inside, becomes a UserError.

    For the part of a command that checks its input, before any work is done; errors of the work itself stay what they
    are.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, StrictDataclassError) as error:
        raise UserError(" ".join(str(error).split())) from error
