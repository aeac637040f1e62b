"""`python -m bench.generation`: documents drawn after seeds, ours beside transformers on the same weights.

Weights are random; each document ends with the same probability at every token, so lengths are as uneven as real ones. The same
seeds are asked for everywhere; every provider draws its own documents, and what is compared is seconds a token, all reading of
seeds included. The limit shown is that of reading memory, or of multiplying where that is slower. Elsewhere than on a GPU the
models are the demo's and the miniature's, and every provider has all cores.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sbp_kernels import PackedLayout

from bench import machine, records
from bench.__main__ import show
from sbp_fast.config import ModelConfig
from sbp_fast.config.files import load_config
from sbp_fast.experiment.plan.costs import key_value_bytes
from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine, GenerationResult, Seed
from sbp_fast.model.flops import matrix_parameters
from sbp_fast.model.huggingface import hugging_face_config, to_hugging_face
from sbp_fast.model.transformer import Block, Transformer

BEGIN, END, PARTNER = 0, 1, 2
TOP_P, LOUD = 0.9, 8.0
ROUNDS = 2
CONTINUOUS = "transformers, generate_batch"
FEWER = {} if torch.cuda.is_available() else {CONTINUOUS: 4}  # minutes for what others do in one: a part of the seeds, once
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of all documents' log-probability, relative


@dataclass(frozen=True)
class Case:
    """What is drawn.

    Attributes:
        mean_tokens: of a document, before the longest are cut off at `longest`.
        rows: documents at once, for each of `engines`.
    """

    name: str
    shape: ModelConfig
    vocabulary_size: int
    seeds: int
    samples: int
    mean_tokens: int
    longest: int
    rows: int
    engines: int


def cases() -> Iterator[Case]:
    """The important ones first."""
    cuda = torch.cuda.is_available()
    for samples in (8, 1, 4) if cuda else (8, 2, 1):
        if cuda:
            config = load_config(["3b-200b"])
            shape = config.model.model_copy(update={"context": 1024})
            yield Case("3B", shape, config.corpus.vocabulary_size, 2048 // samples, samples, 512, 2048, 512, 1)
            continue
        threads = torch.get_num_threads()
        for name, documents, rows in (("demo", 192, 32), ("mini", 64, 16)):
            config = load_config([name])
            shape, size = config.model, config.corpus.vocabulary_size
            mean = shape.context // 4
            yield Case(name, shape, size, documents // samples, samples, mean, shape.context, rows, threads)


def main() -> None:
    asked = records.parser("bench.generation", __doc__).parse_args()
    ends = time.monotonic() + asked.budget
    path, record = records.path_of(asked.out, "generation"), records.record_of("generation")
    for case in cases():
        if time.monotonic() > ends:
            print(f"{case.name}, {case.samples} samples a seed left out: the time was over")
            continue
        record["cases"].append(measure(case, ends))
        records.save(path, record)
    show("generation", record["cases"])
    print(path)


def measure(case: Case, ends: float) -> dict[str, Any]:
    """Seconds a token of every provider, in interleaved rounds, where what ours draws has the right probabilities."""
    model, seeds = ending_model(case), some_seeds(case)
    drafts = Ours(model, case).draw(seeds)
    row: dict[str, Any] = {"shape": described(case), "unit": "tokens", "work": 1.0, "left_out": {}}
    row |= {"flops": operations(case), "bytes": bytes_read(case, seeds, drafts), "limits": machine.limits()}
    row |= {"facts": {"mean tokens of a document": statistics.mean(draft.generated_tokens for draft in drafts)}}
    row["check"] = check(model, seeds, drafts)
    if not row["check"]["right"]:
        return row
    times: dict[str, list[float]] = {}
    for turn in range(ROUNDS):
        for name, provider in providers(model, case).items():
            if name in row["left_out"] or (turn and (name in FEWER or time.monotonic() > ends)):
                continue
            try:
                draw = provider()
                started = time.perf_counter()
                tokens = draw(seeds[: len(seeds) // FEWER.get(name, 1)])
                machine.synchronize()
                times.setdefault(name, []).append((time.perf_counter() - started) / tokens)
            except (ImportError, ValueError, NotImplementedError, RuntimeError, AttributeError, TypeError) as reason:
                if name == "ours":
                    raise
                row["left_out"][name] = str(reason).strip().splitlines()[0][:200]
            gc.collect()
    row["seconds"] = {name: spread(found) for name, found in times.items()}
    ratios = {name: [b / a for a, b in zip(times["ours"], found, strict=False)] for name, found in times.items()}
    row["speed_up"] = {name: spread(found) for name, found in ratios.items() if name != "ours"}
    return row | {"memory": dict.fromkeys(times)}


def spread(values: list[float]) -> list[float]:
    """The least, the median and the greatest of a few rounds."""
    return [min(values), statistics.median(values), max(values)]


def described(case: Case) -> dict[str, Any]:
    return {
        "model": case.name,
        "seeds": case.seeds,
        "samples a seed": case.samples,
        "rows": case.rows * case.engines,
        "mean tokens": case.mean_tokens,
        "at most": case.longest,
        "precision": str(precision()).removeprefix("torch."),
    }


def precision() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def ending_model(case: Case) -> Transformer:
    """Random weights, but the end comes with probability 1 / mean_tokens everywhere.

    The first number of the stream is the same for every token and layer, and only the end's row of the output reads it.
    """
    shape = case.shape.model_copy(update={"tied_embeddings": False})
    with torch.device("meta"):
        model = Transformer(shape, case.vocabulary_size)
    model = model.to_empty(device=machine.device()).eval()
    model.initialize(0)
    assert model.lm_head is not None
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = LOUD * 0.02
        for block in cast(list[Block], list(model.layers)):
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[END] = 0
        tokens = torch.from_numpy(np.random.default_rng(0).integers(3, case.vocabulary_size, 256)).to(model.device)
        hidden = model(tokens, PackedLayout.from_lengths([256]).to(model.device))
        others = model.logits(hidden)[:, 3:].logsumexp(-1).mean()
        model.lm_head.weight[END, 0] = (others - np.log(case.mean_tokens - 1)) / hidden[:, 0].mean()
    return model.to(precision())


def some_seeds(case: Case) -> list[Seed]:
    """Lognormal lengths of half a context on average."""
    random = np.random.default_rng(1)
    lengths = random.lognormal(np.log(case.shape.context / 2) - 0.125, 0.5, case.seeds).clip(16, case.shape.context).astype(int)
    samples = tuple(range(case.samples))
    return [Seed(i, i, random.integers(3, case.vocabulary_size, n), samples) for i, n in enumerate(lengths)]


class Ours:
    """Our engine, once for each thread of a CPU."""

    def __init__(self, model: Transformer, case: Case) -> None:
        rule = SamplingParams(PARTNER, END, (BEGIN, PARTNER), case.longest, 1.0, TOP_P, repeated_tokens=0)
        context = case.shape.context
        room = KVCacheConfig(
            case.rows, case.samples, 0, 64, context, max(8192, context), str(precision()).removeprefix("torch.")
        )
        pages = 1 + case.rows * room.pages_of(case.longest) + (case.rows // case.samples + 8) * room.pages_of(context)
        if model.device.type == "cuda":
            page = key_value_bytes(case.shape) * room.page_tokens
            pages = min(pages, int(0.8 * torch.cuda.mem_get_info()[0] / page))
        self.engines = [Engine(model, rule, replace(room, pages=pages), 0) for _ in range(case.engines)]

    def draw(self, seeds: list[Seed]) -> list[GenerationResult]:
        shares = [seeds[number :: len(self.engines)] for number in range(len(self.engines))]
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(len(shares), initializer=torch.set_num_threads, initargs=(threads // len(shares),)) as pool:
            drafts = [
                draft
                for found in pool.map(lambda i: list(self.engines[i].generate(shares[i])), range(len(shares)))
                for draft in found
            ]
        torch.set_num_threads(threads)
        return drafts


Draw = Callable[[list[Seed]], int]


def providers(model: Transformer, case: Case) -> dict[str, Callable[[], Draw]]:
    """What makes a provider, outside of the time, and what it draws within it: the tokens drawn."""

    def ours() -> Draw:
        engines = Ours(model, case)
        return lambda seeds: sum(draft.generated_tokens for draft in engines.draw(seeds))

    return {
        "ours": ours,
        "transformers, generate": lambda: padded_batches(model, case, {}),
        "transformers, generate, static cache": lambda: padded_batches(
            model, case, {"cache_implementation": "static", "disable_compile": True}
        ),
        CONTINUOUS: lambda: continuous_batches(model, case),
    }


def theirs(model: Transformer) -> Any:
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    facts = hugging_face_config(model.config, model.vocabulary_size, where=Path("bench"))
    with model.device:
        found = AutoModelForCausalLM.from_config(Qwen3Config(**facts), dtype=precision(), attn_implementation="sdpa")
    found.load_state_dict(to_hugging_face(model))
    return found.eval()


def sampling(case: Case) -> dict[str, Any]:
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": TOP_P,
        "top_k": 0,
        "max_new_tokens": case.longest,
        "eos_token_id": END,
        "pad_token_id": END,
        "suppress_tokens": [BEGIN, PARTNER],
    }


def padded_batches(model: Transformer, case: Case, options: dict[str, Any]) -> Draw:
    """Batches of seeds of like lengths, padded on the left; as many rows as all of ours together, in one thread pool."""
    found = theirs(model)
    together = max(1, case.rows * case.engines // case.samples)

    @torch.inference_mode()
    def draw(seeds: list[Seed]) -> int:
        tokens, ordered = 0, sorted(seeds, key=lambda seed: len(seed.tokens))
        for start in range(0, len(ordered), together):
            batch = [np.append(seed.tokens, PARTNER) for seed in ordered[start : start + together]]
            longest = max(map(len, batch))
            ids = torch.tensor(np.stack([np.pad(one, (longest - len(one), 0)) for one in batch]), device=model.device)
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in batch], device=model.device)
            drawn = found.generate(ids, attention_mask=mask, num_return_sequences=case.samples, **sampling(case), **options)[
                :, longest:
            ]
            ended = (drawn == END).int()
            tokens += int(torch.where(ended.any(1), ended.argmax(1) + 1, drawn.shape[1]).sum())
        return tokens

    return draw


def continuous_batches(model: Transformer, case: Case) -> Draw:
    """transformers' own continuous batching over pages."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    found = theirs(model)
    found.set_attn_implementation("paged|sdpa")
    generation = GenerationConfig(**sampling(case))
    batching = ContinuousBatchingConfig(max_requests_per_batch=case.rows * case.engines, max_memory_percent=0.5)

    def draw(seeds: list[Seed]) -> int:
        prompts = [[*seed.tokens.tolist(), PARTNER] for seed in seeds for _ in seed.samples]
        outputs = found.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return draw


@torch.inference_mode()
def check(model: Transformer, seeds: list[Seed], drafts: list[GenerationResult]) -> dict[str, Any]:
    """Whether transformers gives some of our documents the log-probability that ours says they have."""
    found, ours, exact = theirs(model), 0.0, 0.0
    for draft in drafts[:16]:
        text = [*draft.tokens.tolist(), *[END] * (draft.stop == "end")]
        whole = torch.tensor([[*seeds[draft.seed].tokens.tolist(), PARTNER, *text]], device=model.device)
        logits = found(whole).logits[0, -len(text) - 1 : -1].float()
        exact += float(logits.log_softmax(-1).gather(1, whole[0, -len(text) :, None]).sum())
        ours += draft.log_probability
    difference = abs(ours - exact) / abs(exact)
    return {"right": difference <= AGREEMENT[precision()], "errors": {"log-probability": difference}}


def operations(case: Case) -> float:
    """Of one token drawn, but for attention and the reading of seeds."""
    return 2.0 * (matrix_parameters(case.shape) + case.vocabulary_size * case.shape.hidden_size)


def bytes_read(case: Case, seeds: list[Seed], drafts: list[GenerationResult]) -> float:
    """By one token drawn, at the least: its share of the weights, which are read for all rows, of its seed, which is read for
    all samples, and half of its document on average."""
    size = precision().itemsize
    lengths = np.array([draft.generated_tokens for draft in drafts], np.float64)
    seed = sum(len(seeds[draft.seed].tokens) * draft.generated_tokens for draft in drafts) / lengths.sum()
    own = (lengths**2).sum() / lengths.sum() / 2
    weights = size * (matrix_parameters(case.shape) + case.vocabulary_size * case.shape.hidden_size)
    return float(weights / case.rows + key_value_bytes(case.shape) * size / 2 * (seed / case.samples + own))


if __name__ == "__main__":
    main()
