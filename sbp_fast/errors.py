"""The one exception for a user's mistake: it becomes a single line and exit code 2, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        where: what the message is about, usually a file, with the record or the key ("corpus.jsonl, line 17").
        what: what is wrong there, in a few words.
        remedy: what to do about it, in the imperative.
    """

    def __init__(self, where: object, what: str, remedy: str) -> None:
        self.where, self.what, self.remedy = str(where), what, remedy
        line = f"{self.where}: {what.rstrip('.')}; {remedy.rstrip('.')}"
        super().__init__(" ".join(line.split()))  # one line, whatever was put into it

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        return type(self), (self.where, self.what, self.remedy)  # so that a worker process can hand it on


class TransientError(UserError):
    """A failure that may not recur, such as a store that does not answer: what was done so far is kept for the next attempt."""
