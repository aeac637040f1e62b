"""Configurations as TOML: files composed left to right, then `key.path=value`; and the differences of two configurations."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args, get_origin

import tomli_w
from pydantic import ValidationError

from sbp_fast.config import RunConfig
from sbp_fast.config.arms import DEFAULT_ARMS
from sbp_fast.config.renamed import REMOVED, RENAMED
from sbp_fast.config.sources import DEFAULT_SOURCES
from sbp_fast.errors import UserError


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of TOML `files`, composed left to right, and `key.path=value` overrides.

    The name of a shipped configuration ("demo") may be given in place of a file.

    Raises:
        UserError: a file is missing or malformed, a key is unknown (the message names the nearest), or a value is unusable.
    """
    values: dict[str, Any] = {"arms": deepcopy(DEFAULT_ARMS), "sources": deepcopy(DEFAULT_SOURCES)}
    for file in files:
        path = find_config(file)
        try:
            _merge(values, tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(path, f"not valid TOML: {error}", "correct the file") from None
    for override in overrides:
        _merge(values, _parse_override(override))
    _refuse_old_keys(values, " + ".join(map(str, files)) or "configuration")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, " + ".join(map(str, files)) or "configuration") from None


def refuse_repeated_keys(overrides: Sequence[str]) -> None:
    """Raise a UserError if two overrides give one key; tables may be given again, and later ones change earlier ones."""
    given: set[str] = set()
    for override in overrides:
        key, _, value = (part.strip() for part in override.partition("="))
        if key in given:
            raise UserError(override, f"{key} is given twice", "leave out one of them")
        if not value.startswith("{"):
            given.add(key)


def find_config(file: str | Path) -> Path:
    """Return the path of a configuration file, or of the shipped one with that name."""
    path = Path(file)
    if path.is_file():
        return path
    shipped = [Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"]
    for folder in shipped:
        if path.name == str(file) and (folder / f"{path.stem}.toml").is_file():
            return folder / f"{path.stem}.toml"
    names = sorted({path.stem for folder in shipped for path in folder.glob("*.toml")})
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        path, "no such configuration file", f"{hint}give a .toml file or one of the shipped names: {', '.join(names)}"
    )


def dump_config(config: RunConfig) -> str:
    """Return the whole configuration as TOML, from which `load_config` makes an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def diff_config(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a line "key: old -> new" for every leaf that differs between two nested dictionaries."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(was, dict) and isinstance(now, dict):
            lines += diff_config(was, now, f"{prefix}{key}.")
        elif was != now:
            lines.append(f"{prefix}{key}: {was} -> {now}")
    return lines


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _refuse_old_keys(values: dict[str, Any], where: str) -> None:
    renamed = {old: (f"{old} has a new name", f"write it as {new}") for old, new in RENAMED.items()}
    removed = {old: (f"{old} is no longer a setting", remedy) for old, remedy in REMOVED.items()}
    for old, (problem, remedy) in (renamed | removed).items():
        section: Any = values
        for name in old.split("."):
            section = section.get(name) if isinstance(section, dict) else None
        if section is not None:
            raise UserError(where, problem, remedy)


def _parse_override(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise UserError(override, "not an override", "write it as key.path=value, such as pretrain.tokens=2000000")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare string, such as a path
    nested: Any = value
    for key in reversed(path.strip().split(".")):
        nested = {key: nested}
    return nested


def _explain(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    path = _setting_path(first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_beside(path)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        remedy = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return UserError(where, f"unknown key {'.'.join(path)}", remedy)
    if isinstance(first.get("input"), dict):  # a whole section whose values contradict each other
        message = first["msg"].removeprefix("Value error, ")
        return UserError(where, f"{'.'.join(path)}: {message}" if path else message, "correct the values")
    shown, reason = str(first.get("input"))[:80], first["msg"].removeprefix("Value error, ")
    remedy = f'put text in quotes: {path[-1]} = "{shown}"' if first["type"] == "string_type" else "correct the value"
    return UserError(where, f"{'.'.join(path)} = {shown} is not usable: {reason}", remedy)


def _setting_path(location: Sequence[str | int]) -> list[str]:
    """Return the keys of a setting, without what pydantic puts behind them: members of its union type, indices of its items."""
    if not location:  # the whole configuration contradicts itself
        return []
    field = RunConfig.model_fields.get(str(location[0]))
    annotation = field.annotation if field is not None else None
    depth = 2 if hasattr(annotation, "model_fields") else 3 if get_origin(annotation) is dict else 1
    return [str(part) for part in location[:depth]]


def _keys_beside(path: list[str]) -> list[str]:
    section: Any = RunConfig
    for name in path[:-1]:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field is not None else get_args(section)[1]
    return list(section.model_fields)
