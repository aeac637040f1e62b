"""Generation backends and seed samplers registered from outside the package."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_synthesis import make_inputs, run

from sbp_fast.config import RunConfig, SynthesizeConfig
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends import BACKENDS
from sbp_fast.generate.backends.backend import Backend, LoadedBackend
from sbp_fast.generate.engine import GenerationResult, Seed
from sbp_fast.generate.seeds import SEED_SAMPLERS, uniform
from sbp_fast.pipeline.distributed import Processes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("registries"))


class ReversingGenerator:
    """Writes each seed backwards."""

    def generate(self, seeds: Iterable[Seed]) -> Iterator[GenerationResult]:
        for seed in seeds:
            for sample in seed.samples:
                yield GenerationResult(seed.number, sample, seed.tokens[:0:-1].astype(np.int32), "length", -1.0)


def load_reversing(
    config: RunConfig, model: Path, prepared: PreparedCorpus, scratch: Path, processes: Processes
) -> LoadedBackend:
    return LoadedBackend([ReversingGenerator()], 1, {}, {"reversing": "7"})


def refuse_greedy(settings: SynthesizeConfig, device: torch.device) -> None:
    if settings.temperature == 0:
        raise UserError("synthesize.temperature = 0", "means nothing backwards", "choose another one")


def test_backend_registered_from_outside_generates_the_corpus_and_is_recorded(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKENDS, "_entries", dict(BACKENDS.items()))
    BACKENDS.register("reversing", Backend(load_reversing, refuse_greedy))
    manifest = run(inputs, tmp_path / "out", "synthesize.backend=reversing")
    unique, synthetic = PreparedCorpus(inputs["corpus"]).unique, Corpus(tmp_path / "out")
    for i, seed in enumerate(synthetic.column("seed").tolist()):
        assert synthetic[i][1:-1].tolist() == unique[seed][:30][:0:-1].tolist()
    assert (manifest.counts["backend"], manifest.counts["backend_versions"]) == ("reversing", [{"reversing": "7"}])
    assert not manifest.counts["reproducible"] and manifest.config["synthesize"]["backend"] == "reversing"
    with pytest.raises(UserError, match="means nothing backwards"):
        run(inputs, tmp_path / "refused", "synthesize.backend=reversing", "synthesize.temperature=0")


def test_seed_sampler_registered_from_outside_chooses_the_seeds(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SEED_SAMPLERS, "_entries", dict(SEED_SAMPLERS.items()))
    SEED_SAMPLERS.register("longest", lambda lengths, count, seed: np.argsort(-lengths, kind="stable")[:count])
    monkeypatch.setattr(BACKENDS, "_entries", dict(BACKENDS.items()))
    BACKENDS.register("reversing", Backend(load_reversing))
    run(inputs, tmp_path / "out", "synthesize.seeds=longest", "synthesize.backend=reversing", "synthesize.samples_per_seed=30")
    lengths = np.minimum(np.diff(PreparedCorpus(inputs["corpus"]).unique.offsets), 30)
    seeds = Corpus(tmp_path / "out").column("seed")[::30]
    assert lengths[seeds].tolist() == sorted(lengths.tolist(), reverse=True)[: len(seeds)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("synthesize.backend=engin", "generation backend 'engin': is unknown; did you mean engine.*engine, transformers, vllm"),
        ("synthesize.seeds=shuffled", "seed sampler 'shuffled': is unknown; known: uniform, length"),
    ],
)
def test_synthesize_with_an_unknown_name_lists_the_known_ones_and_leaves_nothing(
    inputs: dict[str, Path], tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(inputs, tmp_path / "out", override)
    assert not list(tmp_path.iterdir())


def test_registering_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="generation backend 'vllm' is registered twice"):
        BACKENDS.register("vllm", Backend(load_reversing))
    with pytest.raises(ValueError, match="seed sampler 'uniform' is registered twice"):
        SEED_SAMPLERS.register("uniform", uniform)
