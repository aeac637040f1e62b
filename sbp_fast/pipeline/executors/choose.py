"""The choice of workers by --engine and --address."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbp_fast.errors import UserError
from sbp_fast.pipeline.executors.executor import Workers
from sbp_fast.pipeline.executors.local import LOCAL


@contextmanager
def open_workers(engine: str, address: str | None) -> Iterator[Workers]:
    """Yield the workers of an engine: processes of this machine ("local"), or a Ray cluster ("ray").

    Args:
        engine: "local" or "ray".
        address: address of the cluster: "auto" (the default), HOST:PORT or ray://HOST:PORT.

    Raises:
        UserError: the engine is unknown, "local" has an address, Ray is not installed, or no cluster answers at the address.
    """
    if engine == "local":
        if address is not None:
            raise UserError(f"--address {address}", "goes with --engine ray", "give that, or leave the address out")
        yield LOCAL
    elif engine == "ray":
        _send_token()
        try:
            from sbp_fast.pipeline.executors.ray import connect
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UserError("--engine ray", "Ray is not installed", "run: pip install 'sbp-fast[ray]'") from None
        with connect(address or "auto") as workers:
            yield workers
    else:
        raise UserError(f"--engine {engine}", "is no engine", "give local or ray")


def _send_token() -> None:
    """Make Ray send its authentication token if there is one, as `ray start` then requires; Ray reads this when imported."""
    has_token = (Path.home() / ".ray" / "auth_token").is_file() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
