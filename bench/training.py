"""`python -m bench.training`: whole training steps on one device, ours beside the same model without our kernels.

On a GPU the model is the 3B of `configs/3b-200b.toml`; two of them do not fit a card, so variants run one after the other, each
from its own start, and the one that is ours first and again last: the two together show how far the clocks drifted.
Elsewhere it is the demo's model, which shows that the bench works and nothing of a GPU.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import sbp_kernels.norm
import torch
import torch.nn.functional as F
from sbp_kernels import qk_norm_rope, swiglu
from sbp_kernels.norm import rms_norm
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import machine, records
from bench.mixes import Forest, documents, shared_seeds
from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.model import transformer
from sbp_fast.model.flops import palm_flops, peak_flops, training_flops
from sbp_fast.pipeline.distributed import Processes, join_processes
from sbp_fast.train.data.batches import NO_TARGET, Counts, PackedBatch
from sbp_fast.train.loop import train_step
from sbp_fast.train.optimizer import make_optimizers
from sbp_fast.train.sharding import build, make_mesh

STREAMS = 4  # a step: as many as keep the optimizer's part of it small
WARM_UP, STEPS, PARTNERS = 2, 5, 8
KINDS = {  # of device time, by the names of the kernels
    "attention": r"attention|flash|fmha|flex",
    "loss": r"cross_entropy|softmax|nll",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|mm_",
    "optimizer": r"adam|multi_tensor|foreach",
}


def main() -> None:
    asked = records.parser("bench.training", __doc__).parse_args()
    ends = time.monotonic() + asked.budget
    path, record = records.path_of(asked.out, "training"), records.record_of("training")
    for name, run in runs():
        if time.monotonic() > ends:
            print(f"{name} left out: the time was over")
            continue
        record["cases"].append({"variant": name} | run())
        show(record["cases"][-1])
        records.save(path, record)
    print(path)


def runs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured, in order of importance."""
    cuda = torch.cuda.is_available()
    config = load_config(["3b-200b"] if cuda else ["demo"], ["parallel.shard_processes=0"])
    tokens = 8192 if cuda else 2048
    packed = documents("lognormal, mean 821", tokens)
    trees = shared_seeds(PARTNERS, tokens)
    plain = "varlen" if cuda else "sdpa"
    yield "ours", partial(measured, config, packed, "auto")
    yield "ours, shared seeds", partial(measured, config, trees, "auto")
    yield "ours, seeds repeated", partial(measured, config, as_pairs(trees, tokens), "auto")
    yield "torch, compiled layers", partial(measured, config, packed, plain, without=True, compiled=True)
    yield "Liger, eager layers", partial(measured, config, packed, plain, liger=True)
    yield "ours, eager layers", partial(measured, config, packed, "auto", compiled=False)
    yield "torch, eager layers", partial(measured, config, packed, plain, without=True, compiled=False)
    yield "ours again", partial(measured, config, packed, "auto")


def as_pairs(forest: Forest, tokens: int) -> Forest:
    """The seeds with each of their partners alone, as many as fill the stream."""
    lengths: list[int] = []
    parents: list[int] = []
    for length, parent in zip(*forest, strict=True):
        if parent >= 0 and sum(lengths) + forest[0][parent] + length <= tokens:
            lengths += [forest[0][parent], length]
            parents += [-1, len(parents)]
    return lengths, parents


def measured(
    config: RunConfig,
    forest: Forest,
    attention: str,
    *,
    without: bool = False,
    liger: bool = False,
    compiled: bool | None = None,
) -> dict[str, Any]:
    """Seconds a step, the peak of memory, and where the device's time goes.

    Args:
        forest: of each stream. Where some of it has parents, only children carry loss.
        without: torch's own operations in place of our small ones and our loss.
        liger: Liger's norm, activation and loss in their place.
        compiled: as `parallel.compile`; None means "auto".
    """
    changes = {"compile": "auto" if compiled is None else compiled}
    recipe = config.pretrain.model_copy(update={"attention": attention})
    parallel = config.parallel.model_copy(update=changes)
    device, size = machine.device().type, config.corpus.vocabulary_size
    cuda = device == "cuda"
    try:
        with join_processes(device, group_of_one=cuda) as processes, replaced(without, liger):
            figures = steps(config, recipe, parallel, processes, streams(forest, size))
    except (ImportError, ValueError, torch.OutOfMemoryError) as reason:
        figures = {"left_out": str(reason).strip().splitlines()[0][:200]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    run = {
        "model": config.model.model_dump(mode="json"),
        "vocabulary_size": size,
        "microbatch_tokens": sum(forest[0]),
        "microbatches": STREAMS,
        "optimizer": recipe.optimizer,
        "parallel": parallel.model_dump(mode="json"),
        "gpus": 1,
    }
    return {"shape": run, "segments": len(forest[0])} | figures


def streams(forest: Forest, vocabulary_size: int) -> list[PackedBatch]:
    """Random tokens in the forest's segments."""
    lengths, parents = forest
    random, made = np.random.default_rng(0), []
    paired = any(parent >= 0 for parent in parents)
    ends = np.cumsum(lengths)
    for _ in range(STREAMS):
        tokens = random.integers(3, vocabulary_size, ends[-1])
        targets = np.append(tokens[1:], NO_TARGET)
        targets[ends - 1] = NO_TARGET
        for start, stop, parent in zip(ends - lengths, ends, parents, strict=True):
            if paired and parent == -1:
                targets[start:stop] = NO_TARGET
        made.append(PackedBatch.build(tokens, targets, lengths, length=len(tokens), parents=parents if paired else None))
    return made


def steps(config: RunConfig, recipe: Any, parallel: Any, processes: Processes, batches: list[PackedBatch]) -> dict[str, Any]:
    size, device = config.corpus.vocabulary_size, processes.device
    cuda = device.type == "cuda"
    model = build(config.model, size, recipe, parallel, device, make_mesh(recipe, parallel, processes))
    model.initialize(0)
    optimizers = make_optimizers(model, recipe)
    moved = [batch.to(device) for batch in batches]

    def step() -> tuple[Tensor, Tensor, Counts]:
        return train_step(model, iter(moved), STREAMS, optimizers, recipe, 1e-4, gather_once=parallel.gather_once)

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        loss, _, counts = step()
        machine.synchronize()
    if not torch.isfinite(loss):
        raise ValueError("the loss is not finite")
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        machine.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    flops = training_flops(config.model, size, counts.tokens, counts.visible_pairs, counts.loss_tokens)
    usual = palm_flops(config.model, size, counts.tokens, config.model.context)
    peak = peak_flops(torch.cuda.get_device_name(device)) if cuda else None
    return {
        "seconds": statistics.quantiles(seconds, n=4),
        "tokens_per_second": counts.tokens / median,
        "loss_tokens_per_second": counts.loss_tokens / median,
        "mfu": None if peak is None else flops / median / peak,
        "mfu_usual_formula": None if peak is None else usual / median / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "breakdown": breakdown(step) if cuda else None,
    }


def breakdown(step: Callable[[], Any]) -> dict[str, float]:
    """Share of the device's time in one step, by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        machine.synchronize()
    spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in trace.key_averages():
        found = next((kind for kind, names in KINDS.items() if re.search(names, event.key.lower())), "the rest")
        spent[found] += event.self_device_time_total
    total = sum(spent.values()) or 1.0
    return {kind: value / total for kind, value in spent.items()}


@contextmanager
def replaced(without: bool, liger: bool) -> Iterator[None]:
    """The model's small operations and loss by torch's own, or by Liger's."""
    with ExitStack() as stack:
        if without or liger:
            plain_rope = partial(qk_norm_rope, backend="torch")
            stack.enter_context(patch.object(transformer, "qk_norm_rope", plain_rope))
        if liger:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_rms_norm, liger_swiglu

            def norm(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, epsilon: float) -> Any:
                if residual is None:
                    return liger_rms_norm(x, weight, epsilon)
                total = x + residual
                return liger_rms_norm(total, weight, epsilon), total

            stack.enter_context(patch.object(sbp_kernels.norm, "rms_norm", norm))
            stack.enter_context(patch.object(transformer, "swiglu", lambda x: liger_swiglu(*x.chunk(2, -1))))
            loss = partial(liger_fused_linear_cross_entropy, reduction="sum")
            stack.enter_context(patch.object(transformer, "linear_cross_entropy", loss))
        elif without:
            stack.enter_context(patch.object(sbp_kernels.norm, "rms_norm", partial(rms_norm, backend="torch")))
            stack.enter_context(patch.object(transformer, "swiglu", partial(swiglu, backend="torch")))
            stack.enter_context(patch.object(transformer, "linear_cross_entropy", plain_loss))
        yield


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def show(case: dict[str, Any]) -> None:
    if "left_out" in case:
        print(f"{case['variant']:28} left out: {case['left_out']}")
        return
    memory = "" if case["peak_memory_bytes"] is None else f"{case['peak_memory_bytes'] / 2**30:6.1f} GiB"
    mfu = "" if case["mfu"] is None else f"MFU {case['mfu']:.1%} ({case['mfu_usual_formula']:.1%} by the usual formula)"
    rates = f"{case['tokens_per_second']:10,.0f} tokens/s {case['loss_tokens_per_second']:10,.0f} with loss/s"
    print(f"{case['variant']:28} {case['seconds'][1]:8.3f} s a step {rates} {memory} {mfu}")
    for kind, share in (case["breakdown"] or {}).items():
        print(f"{'':28} {share:6.1%} {kind}")


if __name__ == "__main__":
    main()
