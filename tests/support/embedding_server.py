"""Answers of an OpenAI-compatible server that embeds, and the vectors that it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from judge_server import Reply

DIMENSION = 6


def vector_of(text: str) -> np.ndarray:
    """Return a vector that depends on the text alone, of no particular length."""
    return np.random.default_rng(list(text.encode())).normal(size=DIMENSION)


def embeddings(body: dict[str, Any], change: Callable[[list[dict[str, Any]]], Any] = lambda rows: rows[::-1]) -> Reply:
    """Return the embeddings of a request, in reverse order, or changed."""
    rows = [
        {"object": "embedding", "index": index, "embedding": vector_of(text).tolist()}
        for index, text in enumerate(body["input"])
    ]
    return 200, json.dumps({"object": "list", "model": body["model"], "data": change(rows)}).encode()
