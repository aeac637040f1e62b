"""Cases of the sweep: one kernel, one width of heads, one kind of documents; the providers are the candidates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sbp_kernels import PackedLayout, _tuned
from sbp_kernels._tuned import Configuration
from sbp_kernels.layout.plan import Tiles
from torch import Tensor

from bench import machine
from bench.case import Case, Prepared, Provider, Schedule, Tensors
from bench.length_distributions import documents
from bench.tune.candidates import DTYPE, HEADS, REPRESENTATIVES, TOKENS, Subject, launcher, subjects

PRODUCTS = {"forward": 2, "dq": 3, "dk_dv": 4}  # matrix products of the kernel
RESULTS = {"forward": ("out",), "dq": ("dq",), "dk_dv": ("dk", "dv")}
TABLES = ("query_tiles", "query_runs", "key_tiles", "key_runs", "splits")


def sweep() -> Iterator[Case]:
    """Every subject, what matters most first."""
    for subject in subjects():
        yield _case(subject)


def _case(subject: Subject) -> Case:
    tokens, (heads, key_heads) = (64, (2, 1)) if machine.tiny() else (TOKENS, HEADS)
    distribution = REPRESENTATIVES[subject.distribution]
    layout = PackedLayout.from_lengths(documents("dense" if machine.tiny() else distribution, tokens)[0])
    dtype = DTYPE if torch.cuda.is_available() else torch.float16  # the interpreter cannot multiply bfloat16

    def inputs(generator: torch.Generator) -> Tensors:
        """Return q, k, v and dout, and what the current configuration's other kernels make of them."""
        shapes = {"q": heads, "k": key_heads, "v": key_heads, "dout": heads}
        options: dict[str, Any] = {"device": machine.device(), "dtype": dtype, "generator": generator}
        made = {name: torch.randn(tokens, count, subject.width, **options) for name, count in shapes.items()}
        current = subject.current()
        tables = _tables(layout, current)
        made["out"], made["lse"] = launcher("forward", current, made | tables)()
        made["delta"] = launcher("dq", current, made | tables)()[1]
        return made

    pairs = layout.visible_pairs()
    flops = PRODUCTS[subject.kernel] * 2.0 * heads * subject.width * pairs
    key = {"capability": _tuned.architecture(machine.device()), "width": subject.width, "distribution": subject.distribution}
    return Case(
        {"kernel": subject.kernel, **key, "lengths": distribution, "tokens": tokens, "heads": f"{heads}:{key_heads}"},
        inputs,
        {name: _provider(subject.kernel, it, layout) for name, it in subject.candidates().items()},
        exact=None,
        work=flops / 1e12,
        unit="useful TFLOP",
        flops=flops,
        schedule=Schedule(rounds=7, min_rounds=3, seconds=10.0),
    )


def _provider(kernel: str, configuration: Configuration, layout: PackedLayout) -> Provider:
    def provider(tensors: Tensors) -> Prepared:
        run = launcher(kernel, configuration, tensors | _tables(layout, configuration))
        return Prepared(run, lambda output: dict(zip(RESULTS[kernel], output, strict=False)))

    return provider


def _tables(layout: PackedLayout, configuration: Configuration) -> dict[str, Tensor]:
    made = PackedLayout.from_lengths(layout.lengths or (), tiles=Tiles(*configuration.sizes)).planned().to(machine.device())
    assert made.plan is not None
    return dict(zip(TABLES, made.plan.tables, strict=True)) | {"visible_until": made.visible_until}
