import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import QUIET, configure, make_corpus, make_stage

from sbp_fast.corpus.prepared import PreparedCorpus
from sbp_fast.corpus.shards import Corpus, CorpusWriter
from sbp_fast.errors import UserError
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.stage import Manifest
from sbp_fast.synthesize import synthesize as module
from sbp_fast.synthesize.generator import generate
from sbp_fast.synthesize.sampler import document_uniforms
from sbp_fast.synthesize.synthesize import SeedPlan, sampling_rule, synthesize

OVERRIDES = ("synthesize={samples_per_seed=3, shard_seeds=5, batch_documents=8, top_p=0.95}", "pretrain.tokens=3500")


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the program catches it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("synthesize")
    corpus = make_corpus(directory)
    shape = configure(directory).model.model_copy(update={"context": 30})
    model = Transformer(shape, PreparedCorpus(corpus).tokenizer.vocabulary_size)
    model.initialize(0)
    model.embed_tokens.weight.data.mul_(20)
    make_stage("train", corpus, directory / "model", lambda work: save_model(model, work.directory))
    return {"directory": directory, "corpus": corpus, "model": directory / "model"}


def run(inputs: dict[str, Path], out: Path, *overrides: str) -> Manifest:
    config = configure(inputs["directory"], *OVERRIDES, *overrides)
    return synthesize(config, out, corpus=inputs["corpus"], model=inputs["model"], console=QUIET)


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Path]) -> Path:
    run(inputs, inputs["directory"] / "unbroken")
    return inputs["directory"] / "unbroken"


def test_documents_are_what_the_generator_draws_for_each_seed_alone(inputs: dict[str, Path], unbroken: Path) -> None:
    config = configure(inputs["directory"], *OVERRIDES)
    prepared, model, written = PreparedCorpus(inputs["corpus"]), load_model(inputs["model"]), Corpus(unbroken)
    tokenizer, rule = prepared.tokenizer, sampling_rule(config, prepared.tokenizer, 30)
    assert (rule.first, rule.end, rule.maximum_tokens) == (tokenizer.partner, tokenizer.end, 30)
    assert set(rule.forbidden) == {tokenizer.begin, tokenizer.partner}
    assert any(len(prepared.unique[i]) > 30 for i in range(len(prepared.unique)))  # some seeds are cut
    for i in range(len(written)):
        seed, sample = int(written.column("seed")[i]), int(written.column("sample")[i])
        uniforms = document_uniforms(config.seed, seed, sample, 30)[None]
        draft = generate(model, [prepared.unique[seed][:30]], 1, uniforms, rule)[0]
        assert written[i].tolist() == [tokenizer.begin, *draft.tokens.tolist(), tokenizer.end]
        assert bool(written.column("finished")[i]) == draft.finished
        assert written.ids[i] == f"synthetic/{seed}/{sample}"
        assert written.text_bytes[i] == len(prepared.text(written, i).encode())
    assert set(written.sources) == {"synthetic"}
    assert set(written.column("finished")) == {True, False}


def test_seeds_and_samples(inputs: dict[str, Path], unbroken: Path) -> None:
    written, unique = Corpus(unbroken), PreparedCorpus(inputs["corpus"]).unique
    config = configure(inputs["directory"], *OVERRIDES)
    length = np.minimum(np.diff(unique.offsets), 30).mean()
    wanted = config.synthesize.oversample * config.joint.maximum_synthetic_share * 3500
    assert wanted <= len(written) * length < wanted + 3 * length
    seeds = written.column("seed")[::3].tolist()
    assert len(set(seeds[: len(unique)])) == min(len(unique), len(seeds))
    assert written.column("sample").tolist() == [0, 1, 2] * len(seeds)
    assert not list(unbroken.glob("parts*"))


def test_more_seeds_than_documents_go_on_with_other_samples(inputs: dict[str, Path]) -> None:
    unique = PreparedCorpus(inputs["corpus"]).unique
    plan = SeedPlan.make(configure(inputs["directory"], *OVERRIDES, "pretrain.tokens=20000"), unique, 30)
    rounds = len(plan.documents) // len(unique)
    assert rounds >= 2
    for number in range(rounds):
        part = slice(number * len(unique), (number + 1) * len(unique))
        assert sorted(plan.documents[part].tolist()) == list(range(len(unique)))
        assert set(plan.first_samples[part].tolist()) == {3 * number}
    assert plan.documents[: len(unique)].tolist() != plan.documents[len(unique) : 2 * len(unique)].tolist()


def test_counts_and_operations(inputs: dict[str, Path], unbroken: Path) -> None:
    manifest, written, unique = Manifest.load(unbroken), Corpus(unbroken), PreparedCorpus(inputs["corpus"]).unique
    tokens = pairs = drawn = 0
    for i in range(len(written)):
        seed = min(len(unique[int(written.column("seed")[i])]), 30)
        if written.column("sample")[i] == 0:
            tokens += seed
            pairs += seed * (seed + 1) // 2
        count = len(written[i]) - 2 + int(written.column("finished")[i])
        drawn += count
        pairs += sum(seed + step for step in range(1, count + 1))
    shape = load_model(inputs["model"]).config
    assert manifest.flops == forward_flops(shape, written.vocabulary_size, tokens + drawn, pairs, drawn)
    assert manifest.counts["documents"] == len(written) == 3 * manifest.counts["seeds"]
    assert manifest.counts["tokens"] == written.tokens
    assert manifest.counts["mean_tokens"] == pytest.approx(written.tokens / len(written) - 2)
    assert manifest.counts["finished_share"] == written.column("finished").mean()


@pytest.mark.parametrize("moment", ["drawing", "first part", "joining", "index", "removing"])
def test_killed_and_rerun_gives_the_same_corpus(
    inputs: dict[str, Path], unbroken: Path, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = module._draw_shard

    def count(config: Any, plan: Any, shard: slice, *rest: Any) -> Any:
        drawn.append(shard.start)
        return draw(config, plan, shard, *rest)

    def kill(*arguments: Any, **options: Any) -> None:
        raise Killed

    def kill_after_two(*arguments: Any) -> Any:
        if len(drawn) == 2:
            raise Killed
        return count(*arguments)

    def remove_some(directory: Path, **options: Any) -> None:
        next(directory.iterdir()).unlink()
        raise Killed

    monkeypatch.setattr(module, "_draw_shard", count)
    with monkeypatch.context() as patch:
        if moment == "drawing":
            patch.setattr(module, "_draw_shard", kill_after_two)
        elif moment == "first part":
            patch.setattr(np, "savez", kill)
        elif moment == "joining":
            patch.setattr(CorpusWriter, "_flush", kill)
        elif moment == "index":
            patch.setattr("sbp_fast.corpus.shards.write_json", kill)
        else:
            patch.setattr(shutil, "rmtree", remove_some)
        with pytest.raises(Killed):
            run(inputs, tmp_path / "out")
    manifest = run(inputs, tmp_path / "out")
    repeated = 1 if moment == "first part" else 0
    assert len(drawn) - repeated == len(set(drawn)) == -(-manifest.counts["seeds"] // 5)  # no finished shard again
    expected = Manifest.load(unbroken)
    assert manifest.files == expected.files and manifest.fingerprint == expected.fingerprint
    assert (manifest.counts, manifest.flops) == (expected.counts, expected.flops)


@pytest.mark.parametrize(
    ("threads", "sizes"), [(2, "shard_seeds=1000, batch_documents=2"), (1, "shard_seeds=7, batch_documents=500")]
)
def test_documents_do_not_depend_on_shards_batches_and_threads(
    inputs: dict[str, Path], unbroken: Path, tmp_path: Path, threads: int, sizes: str
) -> None:
    run(inputs, tmp_path / "out", f"threads={threads}", f"synthesize={{samples_per_seed=3, top_p=0.95, {sizes}}}")
    assert Corpus(tmp_path / "out").fingerprint == Corpus(unbroken).fingerprint


def test_a_model_of_another_vocabulary_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    model = Transformer(configure(inputs["directory"]).model, 123)
    make_stage("train", inputs["corpus"], tmp_path / "model", lambda work: save_model(model, work.directory))
    with pytest.raises(UserError, match="vocabulary of 123, the corpus"):
        run(inputs | {"model": tmp_path / "model"}, tmp_path / "out")
