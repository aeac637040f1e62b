import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rounding import NEEDS_SAME_BITS
from tiny_synthesis import Killed, documents, make_inputs, record_generated, run, settings
from tiny_training import configure, make_stage

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.generate import shard_writer
from sbp_fast.generate.backends.backend import sampling_params
from sbp_fast.generate.backends.engine import PAGE_TOKENS
from sbp_fast.generate.decoder import KVCacheConfig
from sbp_fast.generate.engine import Engine, Seed
from sbp_fast.generate.seeds import SEED_SAMPLERS, SeedPlan, earlier_occurrences
from sbp_fast.generate.shard_writer import ShardWriter
from sbp_fast.generate.tasks import ShardGenerator, generate_shards
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.executors.executor import Placement
from sbp_fast.pipeline.manifest import Manifest


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("synthesize"))


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Path]) -> Path:
    run(inputs, inputs["directory"] / "unbroken")
    return inputs["directory"] / "unbroken"


@NEEDS_SAME_BITS
def test_documents_equal_the_engines_for_each_seed_alone(inputs: dict[str, Path], unbroken: Path) -> None:
    config = settings(inputs["directory"])
    prepared, model, written = PreparedCorpus(inputs["corpus"]), load_model(inputs["model"]), Corpus(unbroken)
    tokenizer, sampling = prepared.tokenizer, sampling_params(config.synthesize, prepared, 30)
    assert (sampling.first, sampling.end, sampling.maximum_tokens) == (tokenizer.partner, tokenizer.end, 30)
    assert (set(sampling.forbidden), sampling.repeated_tokens) == ({tokenizer.begin, tokenizer.partner}, 4)
    assert any(len(prepared.unique[i]) > 30 for i in range(len(prepared.unique)))  # some seeds are cut
    engine = Engine(model, sampling, KVCacheConfig(16, 1, 9, PAGE_TOKENS, 30, 30), config.seed)
    for i, row in enumerate(written.documents.to_pylist()):
        (result,) = engine.generate([Seed(0, row["seed"], prepared.unique[row["seed"]][:30], (row["sample"],))])
        assert written[i].tolist() == [tokenizer.begin, *result.tokens.tolist(), tokenizer.end]
        assert (row["stop"], row["mean_log_probability"]) == (result.stop, result.log_probability / result.generated_tokens)
        assert (row["id"], row["source"]) == (f"synthetic/{row['seed']}/{row['sample']}", "synthetic")
        assert row["text_bytes"] == len(prepared.text(written, i).encode())
    assert set(written.column("stop")) == {"end", "length", "repetition"}


def test_corpus_has_the_wanted_tokens_in_order_of_seed_and_sample(inputs: dict[str, Path], unbroken: Path) -> None:
    written, unique = Corpus(unbroken), PreparedCorpus(inputs["corpus"]).unique
    config = settings(inputs["directory"])
    length = np.minimum(np.diff(unique.offsets), 30).mean()
    wanted = config.synthesize.oversample * config.arms["sbp"].share * config.pretrain.tokens
    assert wanted <= len(written) * length < wanted + 3 * length
    seeds = written.column("seed")[::3].tolist()
    assert len(set(seeds[: len(unique)])) == min(len(unique), len(seeds))
    assert written.column("sample").tolist() == [0, 1, 2] * len(seeds)
    assert not list(unbroken.glob("parts*"))


def test_uniform_seeds_choose_every_document_before_any_twice(inputs: dict[str, Path]) -> None:
    unique = PreparedCorpus(inputs["corpus"]).unique
    plan = SeedPlan.make(settings(inputs["directory"], "pretrain.tokens=20480"), unique, 30)
    rounds = len(plan.documents) // len(unique)
    assert rounds >= 2
    for number in range(rounds):
        part = slice(number * len(unique), (number + 1) * len(unique))
        assert sorted(plan.documents[part].tolist()) == list(range(len(unique)))
        assert {plan.sample_numbers(seed) for seed in range(part.start, part.stop)} == {
            tuple(range(3 * number, 3 * number + 3))
        }
    assert plan.documents[: len(unique)].tolist() != plan.documents[len(unique) : 2 * len(unique)].tolist()


def test_seeds_by_length_are_in_proportion_to_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 500)
    chosen = SEED_SAMPLERS["length"](lengths, 7000, 3)
    counts, expected = np.bincount(chosen, minlength=500), 7000 * lengths / lengths.sum()
    assert len(chosen) == 7000 and (np.abs(counts - expected) < 1 + 1e-9).all()
    assert (
        chosen.tolist()
        == SEED_SAMPLERS["length"](lengths, 7000, 3).tolist()
        != SEED_SAMPLERS["length"](lengths, 7000, 4).tolist()
    )
    assert earlier_occurrences(np.array([5, 2, 5, 5, 2])).tolist() == [0, 0, 1, 2, 1]


def test_counts_and_flops_equal_brute_force(inputs: dict[str, Path], unbroken: Path) -> None:
    manifest, written, unique = Manifest.load(unbroken), Corpus(unbroken), PreparedCorpus(inputs["corpus"]).unique
    tokens = pairs = generated = 0
    nats = 0.0
    for i, row in enumerate(written.documents.to_pylist()):
        seed = min(len(unique[row["seed"]]), 30)
        if row["sample"] == 0:
            tokens += seed
            pairs += seed * (seed + 1) // 2
        count = len(written[i]) - 2 + (row["stop"] == "end")
        generated += count
        nats += row["mean_log_probability"] * count
        pairs += sum(seed + step for step in range(1, count + 1))
    shape = load_model(inputs["model"]).config
    counts = manifest.counts
    assert manifest.flops == forward_flops(shape, written.vocabulary_size, tokens + generated, pairs, generated)
    assert counts["documents"] == len(written) == 3 * counts["seeds"] == sum(counts["stops"].values())
    assert counts["tokens"] == written.tokens
    assert counts["mean_tokens"] == pytest.approx(written.tokens / len(written) - 2)
    assert counts["finished_share"] == (written.column("stop") == "end").mean()
    assert counts["mean_log_probability"] == pytest.approx(nats / generated)
    assert set(manifest.inputs) == {"corpus", "model"}


@NEEDS_SAME_BITS
@pytest.mark.parametrize("moment", ["generating", "last document", "shard", "entry", "index", "removing"])
def test_killed_and_rerun_gives_the_same_corpus(
    inputs: dict[str, Path], unbroken: Path, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = record_generated(monkeypatch, kill_at=20 if moment == "generating" else 0)

    def kill(*arguments: Any, **options: Any) -> None:
        raise Killed

    def remove_some(directory: Path, **options: Any) -> None:
        next(directory.iterdir()).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "last document":
            patch.setattr(ShardWriter, "_finish", kill)
        elif moment == "shard":
            patch.setattr("sbp_fast.data.token_shards.writer._parquet", kill)
        elif moment == "entry":
            patch.setattr(shard_writer, "write_marker", kill)
        elif moment == "index":
            patch.setattr("sbp_fast.data.token_shards.writer.write_json", kill)
        elif moment == "removing":
            patch.setattr(shutil, "rmtree", remove_some)
        with pytest.raises(Killed):
            run(inputs, tmp_path / "out")
    manifest = run(inputs, tmp_path / "out")
    assert len(generated) == len(set(generated)) == manifest.counts["documents"]  # none is generated twice
    expected = Manifest.load(unbroken)
    assert manifest.files == expected.files and manifest.fingerprint == expected.fingerprint
    assert (manifest.counts, manifest.flops) == (expected.counts, expected.flops)


@NEEDS_SAME_BITS
@pytest.mark.parametrize(
    ("threads", "sizes"), [(2, "shard_seeds=1000, batch_documents=2"), (1, "shard_seeds=7, batch_documents=500")]
)
def test_documents_do_not_depend_on_shards_batches_and_threads(
    inputs: dict[str, Path], unbroken: Path, tmp_path: Path, threads: int, sizes: str
) -> None:
    changed = f"synthesize={{samples_per_seed=3, top_p=0.95, repeated_tokens=4, {sizes}}}"
    run(inputs, tmp_path / "out", f"threads={threads}", changed)
    assert documents(tmp_path / "out") == documents(unbroken)


def test_failure_in_one_thread_ends_the_others(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ShardWriter.add

    def fail_once(self: Any, result: Any) -> None:
        if result.seed == 3:
            raise OSError(28, "No space left on device")
        add(self, result)

    monkeypatch.setattr(ShardWriter, "add", fail_once)
    with pytest.raises(UserError, match="free some space"):
        run(inputs, tmp_path / "out", "threads=2")


def test_model_of_another_vocabulary_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    model = Transformer(configure(inputs["directory"]).model, 123)
    make_stage("train", inputs["corpus"], tmp_path / "model", lambda work: save_model(model, work.directory))
    with pytest.raises(UserError, match="vocabulary of 123, the corpus"):
        run(inputs | {"model": tmp_path / "model"}, tmp_path / "out")


def test_memory_for_less_than_one_document_is_refused_and_leaves_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"synthesize.cache_gib: .*do not hold one seed and one document, which take .* GiB"):
        run(inputs, tmp_path / "out", "synthesize.cache_gib=1e-5")
    assert not list(tmp_path.iterdir())  # nothing is begun that mended settings would contradict


def test_repeated_chunk_generates_only_unfinished_shards(inputs: dict[str, Path], tmp_path: Path) -> None:
    generator = ShardGenerator.open(
        settings(inputs["directory"]), inputs["model"], inputs["corpus"], tmp_path, Placement("cpu", 1)
    )
    advanced: list[float] = []
    for chunk in ([0], [0, 1], [0, 1]):
        generate_shards(generator, chunk, advanced.append)
    assert advanced == [15, 15, 0] and not {0, 1} & set(generator.writer.missing())
