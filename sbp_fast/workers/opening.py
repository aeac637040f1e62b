"""The workers that the command line names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sbp_fast.errors import UserError
from sbp_fast.workers.local import LOCAL
from sbp_fast.workers.workers import Workers


@contextmanager
def open_workers(engine: str, address: str | None) -> Iterator[Workers]:
    """Processes of this machine (engine "local"), which need nothing, or the Ray cluster at an address (engine "ray").

    Args:
        address: "auto" (also where it is None), HOST:PORT or ray://HOST:PORT.

    Raises:
        UserError: another engine, an address for the local one, Ray is not installed, or nothing answers at the address.
    """
    if engine == "local":
        if address is not None:
            raise UserError(f"--address {address}", "goes with --engine ray", "give that, or leave the address out")
        yield LOCAL
    elif engine == "ray":
        try:
            from sbp_fast.workers.cluster import connect
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UserError("--engine ray", "Ray is not installed", "run: pip install 'sbp-fast[ray]'") from None
        with connect(address or "auto") as workers:
            yield workers
    else:
        raise UserError(f"--engine {engine}", "is no engine", "give local or ray")
