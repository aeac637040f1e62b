"""Exceptions for mistakes of the user, which the command line prints as one line, with exit code 2 and no traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct.

    Args:
        where: subject of the message, usually a file, with the record or the key ("corpus.jsonl, line 17").
        what: problem with it, in a few words.
        remedy: correction, in the imperative.
    """

    def __init__(self, where: object, what: str, remedy: str) -> None:
        self.where, self.what, self.remedy = str(where), what, remedy
        line = f"{self.where}: {what.rstrip('.')}; {remedy.rstrip('.')}"
        super().__init__(" ".join(line.split()))  # one line, even if an argument has several

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        return type(self), (self.where, self.what, self.remedy)  # so that a worker process can pass it on


class TransientError(UserError):
    """A failure after which the next attempt can use what was done so far, such as a store that does not answer."""
