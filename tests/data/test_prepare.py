import json
from pathlib import Path

import pytest

from sbp_fast.config import CorpusConfig, RunConfig
from sbp_fast.data import selected
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.tokenizer import train_tokenizer
from sbp_fast.errors import UserError
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.prepare import prepare

QUIET = Console(quiet=True)
HELDOUT = [(f"h{number}", f"Held out, {number}.") for number in range(4)]


def write_jsonl(path: Path, documents: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in documents))
    return path


def letters(count: int, parts: int = 4) -> list[tuple[str, str]]:
    return [
        (f"letter/{i // parts}/{i % parts}", f"Letter {i}, part {i % parts}:\nDear reader {i * i}, ...") for i in range(count)
    ]


def configure(path: Path, **corpus: object) -> RunConfig:
    settings = {
        "path": str(path),
        "vocabulary_size": 270,
        "unique_share": 0.25,
        "shard_tokens": 4000,
        "group_separator": "/",
        **corpus,
    }
    return RunConfig(corpus=CorpusConfig(**settings))


def run(config: RunConfig, out: Path) -> PreparedCorpus:
    prepare(config, out, console=QUIET)
    return PreparedCorpus(out)


def texts(corpus: PreparedCorpus, part: Corpus) -> dict[str, str]:
    return {part.ids[i]: corpus.text(part, i) for i in range(len(part))}


def test_prepare_writes_every_document_whole_and_once(tmp_path: Path) -> None:
    documents = letters(400)
    corpus = run(configure(write_jsonl(tmp_path / "c.jsonl", documents)), tmp_path / "out")
    train, heldout = texts(corpus, corpus.train), texts(corpus, corpus.heldout)
    assert train | heldout == dict(documents) and not train.keys() & heldout.keys()
    for part in (corpus.train, corpus.heldout):
        assert {(int(part[i][0]), int(part[i][-1])) for i in range(len(part))} == {
            (corpus.tokenizer.begin, corpus.tokenizer.end)
        }
        part.verify()
    assert list(corpus.train.text_bytes) == [len(text.encode()) for text in train.values()]
    assert len(list((tmp_path / "out/train").glob("tokens-*.bin"))) > 1


def test_counts_agree_with_the_written_corpus(tmp_path: Path) -> None:
    corpus = run(configure(write_jsonl(tmp_path / "c.jsonl", letters(400))), tmp_path / "out")
    counts, train = corpus.counts, corpus.train
    assert counts["documents"] == len(train) == 384 and counts["heldout_documents"] == len(corpus.heldout) == 16
    assert counts["unique_documents"] == len(corpus.unique) == 96
    assert counts["tokens"] == train.tokens and counts["unique_tokens"] == sum(len(train[i]) for i in range(96))
    assert counts["bytes_per_token"] == train.text_bytes.sum() / (train.tokens - 2 * len(train))
    assert counts["sources"] == {"text": 384} and counts["embedded"] is False
    assert counts["vocabulary_size"] == corpus.tokenizer.vocabulary_size == 270


def test_the_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    config = configure(write_jsonl(tmp_path / "c.jsonl", letters(400)))
    first, _ = run(config, tmp_path / "1"), run(config, tmp_path / "2")
    other = run(config.model_copy(update={"seed": 1}), tmp_path / "3")
    assert set(first.heldout.ids) != set(other.heldout.ids)
    heldout = write_jsonl(tmp_path / "h.jsonl", HELDOUT)
    same = configure(tmp_path / "c.jsonl", heldout=str(heldout))
    orders = [list(run(same.model_copy(update={"seed": seed}), tmp_path / f"s{seed}").train.ids) for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert len({Manifest.load(tmp_path / name).fingerprint for name in "12"}) == 1
    numbers = [int(id.split("/")[1]) for id in first.unique.ids]
    assert min(numbers) < 10 and max(numbers) > 90  # the unique documents are from everywhere


def test_the_holdout_split_holds_whole_originals(tmp_path: Path) -> None:
    corpus = run(configure(write_jsonl(tmp_path / "c.jsonl", letters(400)), heldout_share=0.1), tmp_path / "out")
    assert len(corpus.heldout) == 40
    groups = [{corpus.group(id) for id in part.ids} for part in (corpus.train, corpus.heldout)]
    assert not groups[0] & groups[1] and len(groups[1]) == 10


def test_validation_and_test_documents_are_whole_originals_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", letters(400))

    def split(name: str, seed: int = 0, **corpus: object) -> tuple[PreparedCorpus, list[set[str]]]:
        config = configure(path, heldout_share=0.1, **corpus).model_copy(update={"seed": seed})
        prepared = run(config, tmp_path / name)
        ids = prepared.heldout.ids
        return prepared, [{prepared.group(id) for id in ids[part]} for part in (prepared.validation, prepared.test)]

    prepared, (validation, test) = split("out", validation_share=0.3)
    assert sorted([*prepared.validation, *prepared.test]) == list(range(40)) and not validation & test
    assert len(prepared.validation) == prepared.counts["validation_documents"] == 12
    assert len(prepared.test) == prepared.counts["test_documents"] == 28
    heldout = write_jsonl(tmp_path / "h.jsonl", letters(40))
    path = write_jsonl(tmp_path / "other.jsonl", [(f"other/{id}", f"Other {text}") for id, text in letters(400)])
    parts = [split(f"given-{seed}-{n}", seed, heldout=str(heldout))[1] for n, seed in enumerate((0, 0, 1))]
    assert parts[0] == parts[1] != parts[2] and [len(part) for part in parts[0]] == [5, 5]


def test_sources_are_no_originals_in_a_given_holdout_split(tmp_path: Path) -> None:
    """Ids that only begin with the name of their source do not make one original of the whole source."""
    path = write_jsonl(tmp_path / "c.jsonl", letters(100))
    records = [{"id": f"pubmed/{n}", "text": f"Abstract {n}.", "source": "pubmed"} for n in range(6)]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, records)))
    corpus = run(configure(path, heldout=str(tmp_path / "h.jsonl")), tmp_path / "out")
    assert (len(corpus.validation), len(corpus.test)) == (3, 3)


@pytest.mark.parametrize("heldout", [HELDOUT[:3], [(f"book/{n}", f"Page {n}.") for n in range(9)]])
def test_held_out_documents_too_few_for_two_parts_are_refused(tmp_path: Path, heldout: list[tuple[str, str]]) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", letters(100))
    given = str(write_jsonl(tmp_path / "h.jsonl", heldout))
    with pytest.raises(
        UserError, match=rf"corpus\.validation_share: {len(heldout)} held-out documents.*hold out more"
    ) as refused:
        run(configure(path, heldout=given), tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out.partial").exists()


def test_originals_too_large_for_the_holdout_split_are_passed_over_or_refused(tmp_path: Path) -> None:
    def make(name: str, *sizes: int, **settings: object) -> PreparedCorpus:
        documents = [(f"o/{group}/{i}", f"{group} {i}") for group, size in enumerate(sizes) for i in range(size)]
        path = write_jsonl(tmp_path / f"{name}.jsonl", documents)
        return run(configure(path, heldout_share=0.1, **settings), tmp_path / name)

    corpus = make("one", 150, *[3] * 17)
    assert len(corpus.heldout) == 18 and len(corpus.train) == 183
    assert "0" in {id.split("/")[1] for id in corpus.train.ids}
    with pytest.raises(UserError, match=r"200 documents belong to 2 originals.*corpus.group_separator"):
        make("two", 100, 100)
    corpus = make("three", 100, 100, group_separator="")
    assert (len(corpus.train), len(corpus.heldout)) == (180, 20)


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    documents = letters(200)
    duplicates = [(f"copy/{i}", documents[0][1]) for i in range(5)]
    heldout = [*HELDOUT, ("taken", documents[7][1]), ("again", HELDOUT[0][1])]
    config = configure(
        write_jsonl(tmp_path / "c.jsonl", documents + duplicates), heldout=str(write_jsonl(tmp_path / "h.jsonl", heldout))
    )
    corpus = run(config, tmp_path / "out")
    assert sorted(corpus.heldout.ids) == sorted([*dict(HELDOUT), "taken"])
    assert len(corpus.train) == 199 and documents[7][0] not in corpus.train.ids and "letter/0/0" in corpus.train.ids
    assert corpus.counts["duplicates_dropped"] == 5 and corpus.counts["heldout_duplicates_dropped"] == 1


def test_the_tokenizer_is_trained_on_the_unique_documents_alone(tmp_path: Path) -> None:
    documents = [(str(i), f"{chr(97 + i % 26) * 3}{chr(97 + i // 26) * 3} " * 3) for i in range(400)]
    corpus = run(configure(write_jsonl(tmp_path / "c.jsonl", documents)), tmp_path / "out")
    train = [corpus.text(corpus.train, i) for i in range(len(corpus.train))]
    assert corpus.tokenizer.to_json() == train_tokenizer(train[: len(corpus.unique)], 270).to_json()
    assert corpus.tokenizer.to_json() != train_tokenizer(train, 270).to_json()


def test_the_tokenizer_is_trained_on_at_most_training_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected, "TRAINING_BYTES", 1000)
    documents = [(str(i), f"{chr(97 + i % 26) * 3}{chr(97 + i // 26) * 3} " * 3) for i in range(400)]
    corpus = run(configure(write_jsonl(tmp_path / "c.jsonl", documents)), tmp_path / "out")
    head = [corpus.text(corpus.train, i) for i in range(48)]  # of 21 bytes each
    assert corpus.tokenizer.to_json() == train_tokenizer(head, 270).to_json()


def test_a_configured_tokenizer_is_used_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    train_tokenizer(["something else altogether, " * 50], 280).save(path)
    config = configure(write_jsonl(tmp_path / "c.jsonl", letters(200)), tokenizer=str(path))
    corpus = run(config, tmp_path / "out")
    assert corpus.tokenizer.to_json() == path.read_text()
    path.write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        prepare(config, tmp_path / "other", console=QUIET)
    assert not list(tmp_path.glob("other*"))


def test_long_documents_become_passages_of_one_original(tmp_path: Path) -> None:
    story = " ".join(f"Sentence {i} of the story." for i in range(100))
    documents = [("story/one", story), *letters(200)]
    corpus = run(configure(write_jsonl(tmp_path / "c.jsonl", documents), passage_characters=200), tmp_path / "out")
    everything = texts(corpus, corpus.train) | texts(corpus, corpus.heldout)
    parts = sorted(id for id in everything if id.startswith("story/one/"))
    assert parts[0] == "story/one/0000" and " ".join(everything[part] for part in parts) == story
    assert corpus.counts["passages_cut"] == len(parts) and max(map(len, everything.values())) <= 200
    assert {corpus.group(part) for part in parts} == {"story/one"}


def test_maximum_documents_bounds_what_is_read(tmp_path: Path) -> None:
    corpus = run(configure(write_jsonl(tmp_path / "c.jsonl", letters(400)), maximum_documents=200), tmp_path / "out")
    assert len(corpus.train) + len(corpus.heldout) == 200


def test_unique_share_is_rounded_up_from_its_decimal_value(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", letters(300))
    heldout = write_jsonl(tmp_path / "h.jsonl", HELDOUT)
    corpus = run(configure(path, heldout=str(heldout), unique_share=0.07), tmp_path / "out")  # 0.07 * 300 > 21 in binary
    assert len(corpus.unique) == 21


@pytest.mark.parametrize(("count", "share"), [(1, 1.0), (6, 1.0), (20, 1.0), (100, 0.1)])
def test_too_few_documents_are_refused(tmp_path: Path, count: int, share: float) -> None:
    config = configure(write_jsonl(tmp_path / "c.jsonl", letters(count)), unique_share=share)
    with pytest.raises(UserError) as caught:
        prepare(config, tmp_path / "out", console=QUIET)
    assert "unique" in caught.value.what and "unique_share" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_corrected_input_is_prepared_after_a_refusal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", letters(200))
    good = path.read_text()
    path.write_text(good + '{"text": ')
    with pytest.raises(UserError, match="line 201: malformed JSON"):
        run(configure(path), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    path.write_text(good)
    assert len(run(configure(path), tmp_path / "out").unique) == 48


def test_moved_input_is_done_before_and_changed_input_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", letters(200))
    first = prepare(configure(path), tmp_path / "out", console=QUIET)
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved/c.jsonl")
    assert prepare(configure(moved), tmp_path / "out", console=QUIET) == first
    with pytest.raises(UserError, match=r"corpus\.unique_share: 0\.25 -> 0\.5"):
        prepare(configure(moved, unique_share=0.5), tmp_path / "out", console=QUIET)
    write_jsonl(moved, letters(201))
    with pytest.raises(UserError, match="input documents changed"):
        prepare(configure(moved), tmp_path / "out", console=QUIET)


def test_an_id_used_twice_names_both_records(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "c/1.jsonl", [("same", "x"), *letters(200)])
    second = write_jsonl(tmp_path / "c/2.jsonl", [("same", "z")])
    with pytest.raises(UserError) as caught:
        run(configure(tmp_path / "c"), tmp_path / "out")
    assert str(caught.value).startswith(f"{second}, line 1: the id 'same' stands also in {first}, line 1;")
    heldout = write_jsonl(tmp_path / "h.jsonl", [("same", "held out"), ("letter/0/0", "too"), *HELDOUT])
    second.unlink()
    assert len(run(configure(tmp_path / "c", heldout=str(heldout)), tmp_path / "out").heldout) == 6


def test_prepare_of_the_embedded_corpus_uses_its_own_heldout_documents(tmp_path: Path) -> None:
    config = RunConfig(corpus=CorpusConfig(maximum_documents=2000))
    corpus = run(config, tmp_path / "out")
    assert corpus.embedded and len(corpus.heldout) == 471 and len(corpus.unique) == 400
    assert set(corpus.heldout.sources) == {"sotu", "factbook"}


def test_named_unique_documents_are_the_unique_ones_and_the_oracle_reads_both(tmp_path: Path) -> None:
    unique, others = letters(40), [(f"other-{id}", text) for id, text in letters(400)]
    heldout = [(f"heldout-{id}", text) for id, text in letters(12)]
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", documents) for name, documents in
             [("unique", unique), ("others", others), ("heldout", heldout)]}  # fmt: skip
    config = configure(
        files["others"], unique=str(files["unique"]), heldout=str(files["heldout"]), unique_share=0.2, deduplicate="none"
    )
    corpus = run(config, tmp_path / "out")
    assert texts(corpus, corpus.unique) == dict(unique)
    assert texts(corpus, corpus.train) == dict(unique + others)  # every text stands in both, and in the holdout split
    assert texts(corpus, corpus.heldout) == dict(heldout)
    changed = write_jsonl(tmp_path / "unique.jsonl", unique[1:])
    with pytest.raises(UserError, match="unique"):
        run(config.model_copy(update={"corpus": config.corpus.model_copy(update={"unique": str(changed)})}), tmp_path / "out")


def test_deduplicate_none_keeps_equal_texts(tmp_path: Path) -> None:
    documents = [(f"{copy}-{id}", text) for copy in "ab" for id, text in letters(100)]
    config = configure(write_jsonl(tmp_path / "c.jsonl", documents), deduplicate="none", group_separator="")
    corpus = run(config, tmp_path / "out")
    assert texts(corpus, corpus.train) | texts(corpus, corpus.heldout) == dict(documents)
    assert corpus.counts["duplicates_dropped"] == corpus.counts["heldout_duplicates_dropped"] == 0


@pytest.mark.parametrize(
    "settings", [{"unique_share": 0.5, "deduplicate": "none"}, {"deduplicate": "exact"}, {"deduplicate": "near"}]
)
def test_named_unique_documents_with_settings_that_they_exclude_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="unique"):
        CorpusConfig(unique="unique.jsonl", **settings)


def test_too_few_named_unique_documents_are_refused(tmp_path: Path) -> None:
    unique, others = write_jsonl(tmp_path / "u.jsonl", letters(5)), write_jsonl(tmp_path / "o.jsonl", letters(400)[5:])
    with pytest.raises(UserError, match=r"corpus\.unique leaves 5"):
        run(configure(others, unique=str(unique), unique_share=0.2, deduplicate="none", heldout_share=0.1), tmp_path / "out")
