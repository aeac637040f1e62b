"""Whole training steps on one device: ours beside the same model without our kernels.

On a GPU the model is the 3B of `configs/3b-200b.toml`. Two of them do not fit on one card, so variants run one after the other,
each from its own start; ours runs first and again last, which shows how far the clocks drifted. Without a GPU it is
the model of `small`, which shows that the benchmark works and says nothing about a GPU.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import sbp_kernels.norm.api
import torch
import torch.nn.functional as F
from sbp_kernels import qk_norm_rope, swiglu
from sbp_kernels.norm import rms_norm
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import machine
from bench.case import Case, Prepared, Provider, Schedule, Tensors, no_inputs
from bench.length_distributions import SegmentTree, documents, shared_seeds
from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.model import transformer
from sbp_fast.model.flops import palm_flops, peak_flops, training_flops
from sbp_fast.pipeline.distributed import join_processes
from sbp_fast.train.data.batches import NO_TARGET, Counts, PackedBatch
from sbp_fast.train.loop import train_step
from sbp_fast.train.optimizer import make_optimizers
from sbp_fast.train.sharding import build, make_mesh

TOKENS = 8192  # of a packed sequence on a GPU
SEQUENCES = 4  # a step: as many as keep the optimizer's part of it small
PARTNERS = 8
LEARNING_RATE = 1e-4
SCHEDULE = Schedule(rounds=1, min_rounds=1, seconds=float("inf"), warm_up=2, repeats=3, alone=True)
KERNEL_KINDS = {  # patterns in the names of the kernels
    "attention": r"attention|flash|fmha|flex",
    "loss": r"cross_entropy|softmax|nll",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|mm_",
    "optimizer": r"adam|multi_tensor|foreach",
}
Step = Callable[[], tuple[Tensor, Tensor, Counts]]


def training() -> Iterator[Case]:
    """Steps on documents, then on seeds with partners, packed once or repeated for each partner."""
    cuda = torch.cuda.is_available()
    config = load_config(["3b-200b"] if cuda else ["small"], ["parallel.shard_processes=0"])
    tokens = 64 if machine.tiny() else TOKENS if cuda else 2048
    packed, trees = documents("lognormal, mean 821", tokens), shared_seeds(PARTNERS, tokens)
    ours, plain = partial(_provider, config, packed, "auto"), partial(_provider, config, packed, "varlen" if cuda else "sdpa")
    providers = {
        "ours": ours(),
        "torch, compiled layers": plain(kernels="torch", compiled=True),
        "Liger, eager layers": plain(kernels="liger"),
        "ours, eager layers": ours(compiled=False),
        "torch, eager layers": plain(kernels="torch", compiled=False),
        "ours again": ours(),
    }
    yield _case(config, packed, providers, {})
    shared = {
        "ours": _provider(config, trees, "auto"),
        "ours, seeds repeated": _provider(config, as_pairs(trees, tokens), "auto"),
    }
    yield _case(config, trees, shared, {"lengths": f"{PARTNERS} partners a seed"})


def _case(config: RunConfig, tree: SegmentTree, providers: Mapping[str, Provider], extra: Mapping[str, Any]) -> Case:
    """The shape of the case is what `sbp-fast plan` looks for, to show the measured peak of memory of a configuration."""
    size, counts = config.corpus.vocabulary_size, total(batches(tree, config.corpus.vocabulary_size))
    shape = {
        "model": config.model.model_dump(mode="json"),
        "vocabulary_size": size,
        "microbatch_tokens": sum(tree[0]),
        "microbatches": SEQUENCES,
        "optimizer": config.pretrain.optimizer,
        "parallel": config.parallel.model_dump(mode="json") | {"compile": "auto"},
        "gpus": 1,
    }
    return Case(
        shape | dict(extra),
        no_inputs,
        providers,
        None,
        work=float(counts.loss_tokens),
        unit="loss tokens",
        flops=training_flops(config.model, size, counts.tokens, counts.visible_pairs, counts.loss_tokens),
        clock=time.perf_counter,
        schedule=SCHEDULE,
    )


def as_pairs(tree: SegmentTree, tokens: int) -> SegmentTree:
    """Return a tree in which each partner has its own copy of the seed, with as many pairs as fit into `tokens`."""
    lengths: list[int] = []
    parents: list[int] = []
    for length, parent in zip(*tree, strict=True):
        if parent >= 0 and sum(lengths) + tree[0][parent] + length <= tokens:
            lengths += [tree[0][parent], length]
            parents += [-1, len(parents)]
    return lengths, parents


def batches(tree: SegmentTree, vocabulary_size: int) -> list[PackedBatch]:
    """Return the packed sequences of a step: random tokens in the segments; where some have parents, only they carry loss."""
    lengths, parents = tree
    random, packed = np.random.default_rng(0), []
    paired = any(parent >= 0 for parent in parents)
    ends = np.cumsum(lengths)
    for _ in range(SEQUENCES):
        tokens = random.integers(3, vocabulary_size, ends[-1])
        targets = np.append(tokens[1:], NO_TARGET)
        targets[ends - 1] = NO_TARGET
        for start, stop, parent in zip(ends - lengths, ends, parents, strict=True):
            if paired and parent == -1:
                targets[start:stop] = NO_TARGET
        packed.append(PackedBatch.build(tokens, targets, lengths, length=len(tokens), parents=parents if paired else None))
    return packed


def total(packed: list[PackedBatch]) -> Counts:
    """Return the counts of all sequences together."""
    counts = Counts()
    for batch in packed:
        counts.add(batch.counts)
    return counts


def _provider(
    config: RunConfig, tree: SegmentTree, attention: str, *, kernels: str = "ours", compiled: bool | None = None
) -> Provider:
    """Training steps of one variant.

    Args:
        config: model and recipe.
        tree: segments of each packed sequence.
        attention: backend.
        kernels: of the small operations and the loss: "ours", "torch" or "liger".
        compiled: as `parallel.compile`; None means "auto".
    """

    def provider(_: Tensors) -> Prepared:
        cuda = machine.device().type == "cuda"
        with ExitStack() as stack:
            processes = stack.enter_context(join_processes(machine.device().type, group_of_one=cuda))
            stack.enter_context(replaced(kernels))
            stack.callback(torch._dynamo.reset)
            recipe = config.pretrain.model_copy(update={"attention": attention})
            parallel = config.parallel.model_copy(update={"compile": "auto" if compiled is None else compiled})
            mesh = make_mesh(recipe, parallel, processes)
            model = build(config.model, config.corpus.vocabulary_size, recipe, parallel, processes.device, mesh)
            model.initialize(0)
            optimizers = make_optimizers(model, recipe)
            packed = [batch.to(processes.device) for batch in batches(tree, config.corpus.vocabulary_size)]

            def step() -> tuple[Tensor, Tensor, Counts]:
                gather_once = parallel.gather_once
                return train_step(model, iter(packed), SEQUENCES, optimizers, recipe, LEARNING_RATE, gather_once=gather_once)

            return Prepared(
                step,
                work=lambda output: float(output[2].loss_tokens),
                statistics=partial(_statistics, config, total(packed), step),
                close=stack.pop_all().close,
            )

    return provider


def _statistics(config: RunConfig, counts: Counts, step: Step, seconds_a_loss_token: float) -> dict[str, float]:
    """Tokens a second, and on a GPU both MFUs and the share of its time that each kind of kernel takes.

    Args:
        config: model and recipe.
        counts: what is in a step.
        step: runs one more step.
        seconds_a_loss_token: from the median of the timed steps.

    Raises:
        ValueError: the loss is not finite.
    """
    loss, _, _ = step()
    if not torch.isfinite(loss):
        raise ValueError("the loss is not finite")
    seconds = seconds_a_loss_token * counts.loss_tokens
    figures = {"tokens a second": counts.tokens / seconds}
    if torch.cuda.is_available():
        size = config.corpus.vocabulary_size
        flops = training_flops(config.model, size, counts.tokens, counts.visible_pairs, counts.loss_tokens)
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            usual = palm_flops(config.model, size, counts.tokens, config.model.context)
            figures |= {"MFU": flops / seconds / peak, "MFU by the usual formula": usual / seconds / peak}
        figures |= {f"share of {kind}": share for kind, share in breakdown(step).items()}
    return figures


def breakdown(step: Step) -> dict[str, float]:
    """Return the share of the device's time in one step by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        machine.synchronize()
    spent = dict.fromkeys([*KERNEL_KINDS, "the rest"], 0.0)
    for event in trace.key_averages():
        matches = (kind for kind, names in KERNEL_KINDS.items() if re.search(names, event.key.lower()))
        spent[next(matches, "the rest")] += event.self_device_time_total
    whole = sum(spent.values()) or 1.0
    return {kind: value / whole for kind, value in spent.items()}


@contextmanager
def replaced(kernels: str) -> Iterator[None]:
    """Replace the small operations and the loss of the model: by those of "torch" or "liger", or not at all ("ours")."""
    with ExitStack() as stack:
        if kernels != "ours":
            plain_rope = partial(qk_norm_rope, backend="torch")
            stack.enter_context(patch.object(transformer, "qk_norm_rope", plain_rope))
        if kernels == "liger":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_rms_norm, liger_swiglu

            def norm(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, epsilon: float) -> Any:
                if residual is None:
                    return liger_rms_norm(x, weight, epsilon)
                total = x + residual
                return liger_rms_norm(total, weight, epsilon), total

            stack.enter_context(patch.object(sbp_kernels.norm.api, "rms_norm", norm))
            stack.enter_context(patch.object(transformer, "swiglu", lambda x: liger_swiglu(*x.chunk(2, -1))))
            loss = partial(liger_fused_linear_cross_entropy, reduction="sum")
            stack.enter_context(patch.object(transformer, "linear_cross_entropy", loss))
        elif kernels == "torch":
            stack.enter_context(patch.object(sbp_kernels.norm.api, "rms_norm", partial(rms_norm, backend="torch")))
            stack.enter_context(patch.object(transformer, "swiglu", partial(swiglu, backend="torch")))
            stack.enter_context(patch.object(transformer, "linear_cross_entropy", plain_loss))
        yield


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy by torch's own operations."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
