"""Files of evaluation questions: JSON lines, one question each, local, embedded or at an fsspec URL."""

from __future__ import annotations

import importlib.resources
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import fsspec

from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import parse_json

EMBEDDED = "embedded:"


class NamedQuestions(Protocol):
    """A set of questions, whatever their kind."""

    @property
    def name(self) -> str:
        """Name of the task, from which metrics have theirs."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the name and the questions."""
        ...

    @property
    def texts(self) -> list[str]:
        """Questions with an accepted answer each, which no synthetic document may contain."""
        ...


Q = TypeVar("Q")
S = TypeVar("S", bound=NamedQuestions)


@dataclass(frozen=True)
class QuestionRecord:
    """A record of a question file.

    Attributes:
        where: file and line, for messages.
        id: the record's id, by default the file's name and the line.
        source: the record's source, by default "questions".
        content: all fields.
    """

    where: str
    id: str
    source: str
    content: dict[str, Any]

    def text(self, field: str) -> str:
        """Return a field that must hold text.

        Raises:
            UserError: it holds none.
        """
        value = self.content.get(field)
        if not isinstance(value, str) or not value.strip():
            raise UserError(self.where, f"has no {field}", f"add a text as {field}")
        return value

    def texts(self, field: str, least: int) -> tuple[str, ...]:
        """Return a field that must hold a list of `least` texts or more.

        Raises:
            UserError: it holds no such list.
        """
        values = self.content.get(field)
        if not isinstance(values, list) or len(values) < least or not all(isinstance(v, str) and v.strip() for v in values):
            number = {1: "one text", 2: "two texts"}[least]
            raise UserError(self.where, f"has no {field}", f"add a list of {number} or more as {field}")
        return tuple(values)

    def bare_question(self) -> str:
        """Return the question without the prompt's other words, or "" where the record does not say it."""
        return self.text("question") if "question" in self.content else ""


def read_questions_of(path: str, setting: str, fields: str, parse: Callable[[QuestionRecord], Q]) -> tuple[Q, ...]:
    """Return the questions of a JSONL file: a local path, `embedded:NAME` or any fsspec URL, compressed or not.

    Args:
        path: of the file.
        setting: configuration key that names the file, for messages.
        fields: enumeration of the fields of a record, for messages.
        parse: makes a question of a record.

    Raises:
        UserError: a file or a record is unusable; the message names the file and the line.
    """
    lines = enumerate(_read_lines(path, setting), start=1)
    questions = tuple(parse(_record(path, number, line, fields)) for number, line in lines if line.strip())
    if not questions:
        raise UserError(path, "holds no question", f"give a JSONL file with {fields} in each line")
    return questions


def read_sets(paths: str | Sequence[str], read: Callable[[str, str], S]) -> list[S]:
    """Return the question set of each of one or more files, given their paths and task names.

    Raises:
        UserError: a file is unusable, or two files give one name.
    """
    sets: dict[str, S] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        name = task_name(path)
        if name in sets:
            raise UserError(path, f"a second file for the task {name}", "rename it")
        sets[name] = read(path, name)
    return list(sets.values())


def task_name(path: str) -> str:
    """Return the task of a question file: NAME for `eval_CORPUS_NAME.jsonl`, else the file's name."""
    stem = PurePosixPath(path.removeprefix(EMBEDDED)).name.partition(".")[0]
    named = re.fullmatch(r"eval_[^_]+_(.+)", stem)
    return named[1] if named else stem


def _read_lines(path: str, setting: str) -> list[str]:
    location = path
    if path.startswith(EMBEDDED):
        name = path.removeprefix(EMBEDDED)
        location = str(importlib.resources.files("sbp_fast.data") / "embedded" / f"{name}.jsonl")
    try:
        with fsspec.open(location, "rb", compression="infer") as file:
            return file.read().decode("utf-8").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(path, "no such file", f"correct {setting}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(path, f"cannot be read: {error}", "check that it is whole and that you may read it") from None
    except UnicodeDecodeError as error:
        raise UserError(path, f"not UTF-8 at byte {error.start}", "save it as UTF-8") from None


def _record(path: str, number: int, line: str, fields: str) -> QuestionRecord:
    where = f"{path}, line {number}"
    try:
        content: Any = parse_json(line)
    except ValueError as error:
        raise UserError(where, f"not valid JSON: {error}", "correct or remove the line") from None
    if not isinstance(content, dict):
        raise UserError(where, "not a JSON object", f"write an object with {fields}")
    identity, source = content.get("id", f"{Path(path).name}:{number}"), content.get("source", "questions")
    return QuestionRecord(where, str(identity), str(source), content)
