"""Reading training batches in order: tokens a second of one process, beside an index as Megatron's and MosaicML Streaming.

All three read the same documents from the same tokens into streams of the same length. What they promise differs: ours keeps
documents whole, needs no index file and gives the layout that attention needs; the others cut the joined documents anywhere.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.case import Case, Prepared, Provider, Tensors
from sbp_fast.config import RunConfig
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.train.data.corpus_batches import CorpusBatches
from sbp_fast.train.task import TrainTask

TOKENS, STREAM, CONTEXT, STREAMS = 16_000_000, 16_384, 4096, 64
END = 1  # token that ends a document
MEANS = {"lognormal documents of mean 821": 821, "short documents of mean 129": 129}


def order() -> Iterator[Case]:
    for name, mean in MEANS.items():
        folder = Path(tempfile.mkdtemp(prefix="sbp-fast-bench-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        corpus = write_corpus(folder / "corpus", mean)
        ours = Ours(corpus)
        facts = {"padding of our streams": ours.batches.packed["real"].packing.padding_share}
        providers: dict[str, Provider] = {
            "ours": _provider(ours.run),
            "ours, with the tile plan": _provider(ours.run_planned),
            "index as Megatron's": _provider(MegatronIndex(corpus).run),
            "MosaicML Streaming": partial(_mosaic, cache(partial(Mosaic, corpus, folder / "mds"))),
        }
        shape = {"corpus": name, "stream": STREAM, "streams": STREAMS}
        yield Case(shape, _no_inputs, providers, None, work=float(STREAM * STREAMS), unit="tokens", facts=facts)


def _provider(run: Callable[[], None]) -> Provider:
    return lambda _: Prepared(run, _nothing)


def _mosaic(opened: Callable[[], Mosaic], _: Tensors) -> Prepared:
    return Prepared(opened().run, _nothing)


def _no_inputs(_: torch.Generator) -> Tensors:
    return {}


def _nothing(_: Any) -> Tensors:
    return {}


def write_corpus(directory: Path, mean: int) -> Corpus:
    """Documents of random tokens with lognormal lengths."""
    random = np.random.default_rng(0)
    writer = CorpusWriter(directory, 1 << 15)
    lengths = np.clip(random.lognormal(np.log(mean) - 0.5, 1.0, TOKENS // mean), 8, 16 * CONTEXT).astype(int)
    for number, length in enumerate(lengths):
        tokens = np.append(random.integers(2, 1 << 15, length - 1), END)
        writer.add(tokens, id=str(number), source="bench", text_bytes=1)
    return writer.close()


class Ours:
    """Streams of whole documents with targets and layout."""

    def __init__(self, corpus: Corpus) -> None:
        values = {"tokens": 10**12, "tokens_per_step": STREAM * STREAMS, "microbatch_tokens": STREAM}
        config = RunConfig.model_validate({"pretrain": values, "model": {"context": CONTEXT}})
        self.batches, self.step = CorpusBatches(corpus, None, TrainTask.of_arm(config, "baseline"), CONTEXT), 0

    def run(self) -> None:
        self.step += 1
        for number in range(STREAMS):
            self.batches.stream(self.step, number)

    def run_planned(self) -> None:
        self.step += 1
        for number in range(STREAMS):
            self.batches.stream(self.step, number).layout.planned()


class MegatronIndex:
    """Three index arrays over joined documents (Megatron-LM's data loading guide): the order of documents, where each sample
    begins in it, and the order of samples. Each sample then gets labels, a loss mask, and positions that begin anew after
    each end token, with the ends that its attention takes."""

    def __init__(self, corpus: Corpus) -> None:
        random = np.random.default_rng(0)
        self.corpus, self.next = corpus, 0
        self.documents = random.permutation(len(corpus))
        ends = np.cumsum(np.diff(corpus.offsets)[self.documents])
        starts = np.arange(0, ends[-1] - STREAM - 1, STREAM)
        self.first = np.searchsorted(ends, starts, "right")
        self.offsets = starts - np.concatenate([[0], ends])[self.first]
        self.samples = random.permutation(len(starts))

    def run(self) -> None:
        for _ in range(STREAMS):
            self.sample(int(self.samples[self.next % len(self.samples)]))
            self.next += 1

    def sample(self, index: int) -> tuple[torch.Tensor, ...]:
        document, skip, missing, parts = int(self.first[index]), int(self.offsets[index]), STREAM + 1, []
        while missing > 0:
            part = self.corpus[int(self.documents[document])][skip : skip + missing]
            parts.append(part)
            document, skip, missing = document + 1, 0, missing - len(part)
        text = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        tokens, labels = text[:-1].contiguous(), text[1:].contiguous()
        mask, positions = torch.ones(STREAM), torch.arange(STREAM)
        ends = (tokens == END).nonzero().flatten()
        mask[ends] = 0.0
        before = 0
        for end in ends.tolist():
            positions[end + 1 :] -= end + 1 - before
            before = end + 1
        cu_seqlens = torch.cat([ends.new_zeros(1), ends + 1, ends.new_tensor([STREAM])])
        return tokens, labels, mask, positions, cu_seqlens


class Mosaic:
    """A shuffled StreamingDataset of streams cut from the joined documents, as llm-foundry writes them."""

    def __init__(self, corpus: Corpus, directory: Path) -> None:
        from streaming import MDSWriter, StreamingDataset

        with MDSWriter(out=str(directory), columns={"tokens": "ndarray:uint16"}) as writer:
            for start in range(0, corpus.tokens - STREAM, STREAM):
                writer.write({"tokens": np.array(corpus.slice(start, start + STREAM))})
        self.dataset = StreamingDataset(local=str(directory), shuffle=True, batch_size=1)
        self.samples = iter(self.dataset)

    def run(self) -> None:
        for _ in range(STREAMS):
            sample = next(self.samples, None)
            if sample is None:  # the next epoch
                self.samples = iter(self.dataset)
                sample = next(self.samples)
            text = torch.from_numpy(sample["tokens"].astype(np.int64))
            text[:-1].contiguous(), text[1:].contiguous()
