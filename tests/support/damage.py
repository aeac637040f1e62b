"""Random damage to a file of a stage's directory: what a bad disk, a full one, an editor or a careless copy leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (None, True, -1, 0, 1e308, float("nan"), "", "x", [], {}, [[1]])


def damage(file: Path, dice: random.Random) -> str:
    """Damage a file, and return in a few words how."""
    kinds = [flip_bit, truncate, delete, *([mutate_json] * 2 if file.suffix == ".json" else [])]
    return dice.choice(kinds)(file, dice)


def flip_bit(file: Path, dice: random.Random) -> str:
    """Flip one bit; an empty file gets a byte."""
    content = bytearray(file.read_bytes() or b"\0")
    bit = dice.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} flipped"


def truncate(file: Path, dice: random.Random) -> str:
    """Cut the end off."""
    content = file.read_bytes()
    left = dice.randrange(len(content) or 1)
    file.write_bytes(content[:left])
    return f"truncated from {len(content)} to {left} bytes"


def delete(file: Path, dice: random.Random) -> str:
    """Remove the file."""
    file.unlink()
    return "deleted"


def mutate_json(file: Path, dice: random.Random) -> str:
    """Change, rename or remove one field anywhere in a JSON file."""
    value = json.loads(file.read_bytes())
    where, container = [], value
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            return flip_bit(file, dice)
        key = dice.choice(keys)
        where.append(str(key))
        if not isinstance(container[key], dict | list) or dice.random() < 0.2:
            break
        container = container[key]
    kind = dice.choice(("replaced", "removed", "renamed", "nudged"))
    before = container[key]
    if kind == "removed":
        del container[key]
    elif kind == "renamed" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    elif kind == "nudged" and isinstance(before, int | float):
        container[key] = before + dice.choice((1, -1, 0.5, 1e-9))
    else:
        container[key] = dice.choice(VALUES)
    file.write_text(json.dumps(value))
    return f"field {'.'.join(where)} {kind}"
