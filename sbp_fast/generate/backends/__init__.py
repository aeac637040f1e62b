"""Generation backends, registered by name: what `synthesize.backend` may name.

Importing this package registers the built-in ones: `engine`, `transformers` and `vllm`.
"""

from sbp_fast.generate.backends import engine, transformers, vllm
from sbp_fast.generate.backends.backend import BACKENDS

__all__ = ["BACKENDS", "engine", "transformers", "vllm"]
