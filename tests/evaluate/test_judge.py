import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from judge_server import completion, serving
from test_quality import inputs, run  # noqa: F401  (a fixture)

from sbp_fast.config import QualityConfig, RunConfig
from sbp_fast.errors import TransientError, UserError
from sbp_fast.evaluate.judge import Endpoint, LocalModel, fingerprint_directory, open_judge
from sbp_fast.evaluate.judge_answers import ANSWERS, PROMPTS, JudgeQuestion, collect_answers, parse_verdict, verdict_counts
from sbp_fast.experiment.run import run as run_experiment
from sbp_fast.pipeline import openai_client as module
from sbp_fast.pipeline.progress import Console
from sbp_fast.stages.quality import JUDGED

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.001)


def settings(url: str, **more: Any) -> QualityConfig:
    return QualityConfig(judge="endpoint", judge_url=url, judge_model="judge-7b", **more)


def answers(config: QualityConfig, *prompts: str) -> list[str]:
    by_index = dict(Endpoint(config).ask(prompts))
    return [by_index[index] for index in range(len(prompts))]


def test_endpoint_sends_model_and_key_and_returns_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serving(lambda before, body: completion(f"echo {body['messages'][0]['content']}")) as server:
        answered = answers(settings(server.url + "/", judge_key_variable="JUDGE_KEY", judge_requests=1), "one", "zwei ü")
    assert answered == ["echo one", "echo zwei ü"]
    assert server.paths == ["/v1/chat/completions"] * 2
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    body = server.requests[0]
    assert (body["model"], body["temperature"]) == ("judge-7b", 0)
    assert body["messages"] == [{"role": "user", "content": "one"}]
    judge = Endpoint(settings(server.url, judge_key_variable="JUDGE_KEY"))
    assert judge.identity["model"] == "judge-7b" and "secret" not in json.dumps(judge.identity)


def test_endpoint_without_a_key_variable_sends_no_key() -> None:
    with serving(lambda before, body: completion("YES")) as server:
        answers(settings(server.url), "one")
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("failure", [(500, b"busy"), (429, b"slow down"), (200, b"<html>"), (200, b'{"choices": []}'), None])
def test_endpoint_retries_after_a_transient_failure(failure: tuple[int, bytes] | None) -> None:
    def behaviour(before: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if before < 2:
            if failure is None:
                raise ConnectionResetError
            return failure
        return completion("NO")

    with serving(behaviour) as server:
        assert answers(settings(server.url), "one") == ["NO"]
    assert len(server.requests) == 3


def test_endpoint_retries_after_a_timeout() -> None:
    def behaviour(before: int, body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(0.6 if before == 0 else 0)
        return completion("YES")

    with serving(behaviour) as server:
        assert answers(settings(server.url, judge_timeout_seconds=0.2), "one") == ["YES"]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((503, b"no worker"), "answers 503: no worker; rerun when it does"),
        ((200, b"garbage"), "answers what is no chat completion: "),
    ],
)
def test_endpoint_that_fails_every_attempt_raises_transient_error(reply: tuple[int, bytes], message: str) -> None:
    with serving(lambda before, body: reply) as server, pytest.raises(TransientError, match=message):
        answers(settings(server.url), "one")
    assert len(server.requests) == module.ATTEMPTS


def test_endpoint_that_refuses_is_not_retried() -> None:
    message = r"answers 401: .*wrong key.*; correct quality.judge_url"
    refusal = (401, b'{"error": "wrong key"}')
    with serving(lambda before, body: refusal) as server, pytest.raises(UserError, match=message) as raised:
        answers(settings(server.url), "one")
    assert len(server.requests) == 1 and not isinstance(raised.value, TransientError)


def test_endpoint_without_a_server_raises_transient_error() -> None:
    with serving(lambda before, body: completion("")) as server:
        pass
    with pytest.raises(TransientError, match="does not answer"):
        answers(settings(server.url), "one")


def test_endpoint_has_at_most_judge_requests_in_flight() -> None:
    with serving(lambda before, body: completion(body["messages"][0]["content"]), seconds=0.05) as server:
        prompts = [str(number) for number in range(12)]
        assert answers(settings(server.url, judge_requests=4), *prompts) == prompts
    assert 2 <= server.most_at_once <= 4


def test_endpoint_yields_finished_answers_before_it_raises() -> None:
    def behaviour(before: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if body["messages"][0]["content"] == "bad":
            return 400, b"no"
        # the others take so long that a busy machine notices the failure before they end
        time.sleep(0.2 if body["messages"][0]["content"] == "good" else 1.5)
        return completion("YES")

    with serving(behaviour) as server:
        replies = Endpoint(settings(server.url, judge_requests=2)).ask(["good", "bad", *["never asked"] * 9])
        assert next(replies) == (0, "YES")
        with pytest.raises(UserError, match="400"):
            list(replies)
    assert len(server.requests) < 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"judge": "endpoint", "judge_url": "http://x"}, "quality.judge_model: is not set"),
        ({"judge": "endpoint", "judge_model": "m"}, "quality.judge_url = '': is no http address"),
        ({"judge": "endpoint", "judge_model": "m", "judge_url": "file:///etc"}, "is no http address"),
        (
            {"judge": "endpoint", "judge_model": "m", "judge_url": "http://x", "judge_key_variable": "NOT_SET_ANYWHERE"},
            "environment variable NOT_SET_ANYWHERE: is not set",
        ),
        ({"judge": "local", "judge_model": "/nowhere/at/all"}, "/nowhere/at/all: is no directory"),
    ],
)
def test_unusable_judge_settings_are_refused_before_anything_runs(values: dict[str, str], message: str, tmp_path: Path) -> None:
    for work in (
        lambda: open_judge(QualityConfig(**values), "cpu"),  # type: ignore[arg-type]
        lambda: run_experiment(RunConfig(quality=QualityConfig(**values)), tmp_path / "out", console=QUIET),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError) as raised:
            work()
        assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_open_judge_with_judge_none_returns_none() -> None:
    assert open_judge(QualityConfig(), "cpu") is None


class FakeTokenizer:
    chat_template: str | None = None

    def __call__(self, prompt: str, return_tensors: str) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.tensor([list(prompt.encode())])})

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return f"user: {messages[0]['content']} assistant:"

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return bytes(ids.tolist()).decode()


class FakeModel:
    device = "cpu"

    def generate(self, input_ids: torch.Tensor, do_sample: bool, max_new_tokens: int) -> torch.Tensor:
        assert not do_sample and max_new_tokens < 100
        answer = b"YES" if bytes(input_ids[0].tolist()).endswith(b"assistant:") else b"NO"
        return torch.cat([input_ids, torch.tensor([list(answer)])], dim=1)


def test_local_model_answers_with_its_generated_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    tokenizer = FakeTokenizer()
    monkeypatch.setattr("sbp_fast.evaluate.judge._load", lambda directory, device: (FakeModel(), tokenizer))
    judge = LocalModel(str(tmp_path), "cpu")
    assert list(judge.ask(["one", "two"])) == [(0, "NO"), (1, "NO")]
    tokenizer.chat_template = "as a chat"
    assert list(judge.ask(["one"])) == [(0, "YES")]
    assert judge.identity == {"kind": "local", "model": tmp_path.name, "files": fingerprint_directory(str(tmp_path))}
    (tmp_path / "config.json").write_text("{ }")
    assert judge.identity["files"] != fingerprint_directory(str(tmp_path))


def test_open_judge_with_a_transformers_directory_answers_the_same_twice(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"YES": 0, "NO": 1, "?": 2, "<end>": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<end>").save_pretrained(tmp_path)
    shape = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=3, bos_token_id=None, pad_token_id=3)).save_pretrained(tmp_path)
    judge = open_judge(QualityConfig(judge="local", judge_model=str(tmp_path)), "cpu")
    assert judge is not None
    first, second = dict(judge.ask(["NO ? YES", "YES"])), dict(judge.ask(["NO ? YES", "YES"]))
    assert first == second and set(" ".join(first.values()).split()) <= {"YES", "NO", "?"}


def test_local_model_of_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        LocalModel(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("YES", "yes"),
        (" no.\n", "no"),
        ("**No**", "no"),
        ("Answer: yes", "yes"),
        ("<think>yes or no? no, yes</think>\nNO", "no"),
        ("<think>yes, and so on", None),
        ("yes and no", None),
        ("", None),
        ("I cannot know", None),
        ("eyes", None),
    ],
)
def test_parse_verdict_takes_a_single_yes_or_no_and_nothing_else(answer: str, verdict: str | None) -> None:
    assert parse_verdict(answer) == verdict


class ScriptedJudge:
    """A judge that answers from a table, and fails after `at_most` answers."""

    identity: dict[str, Any] = {"kind": "scripted", "model": "scripted"}  # noqa: RUF012

    def __init__(self, answers: dict[str, str], at_most: int = 99) -> None:
        self.answers, self.left, self.asked = answers, at_most, 0

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for number, prompt in enumerate(prompts):
            if self.left == 0:
                raise TransientError("judge", "went away", "rerun")
            self.left, self.asked = self.left - 1, self.asked + 1
            yield number, self.answers[prompt]


def test_collect_answers_after_a_kill_asks_only_the_unanswered_questions(tmp_path: Path) -> None:
    asked = [JudgeQuestion("non_factual", "synthetic", number, f"prompt {number}") for number in range(6)]
    scripted = {question.prompt: f"answer\nüber {question.document}" for question in asked}
    with pytest.raises(TransientError):
        collect_answers(ScriptedJudge(scripted, 4), asked, tmp_path, QUIET, lambda: None)
    with open(tmp_path / ANSWERS, "rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 5)  # killed while it wrote the last
    judge = ScriptedJudge(scripted)
    expected = {question.key: scripted[question.prompt] for question in asked}
    assert collect_answers(judge, asked, tmp_path, QUIET, lambda: None) == expected
    assert judge.asked == 3
    assert len((tmp_path / ANSWERS).read_text().splitlines()) == 6
    judge = ScriptedJudge(scripted)
    assert len(collect_answers(judge, asked, tmp_path, QUIET, lambda: None)) == 6 and judge.asked == 0


def test_collect_answers_asks_again_where_a_saved_line_was_changed(tmp_path: Path) -> None:
    asked = [JudgeQuestion("non_factual", "synthetic", number, f"prompt {number}") for number in range(6)]
    scripted = {question.prompt: "no" for question in asked}
    whole = collect_answers(ScriptedJudge(scripted), asked, tmp_path, QUIET, lambda: None)
    lines = (tmp_path / ANSWERS).read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"no"', b'"yes"')
    lines[3] = b"[1]\n"
    lines[4] = lines[4][:9] + b"\xff" + lines[4][9:]
    (tmp_path / ANSWERS).write_bytes(b"".join(lines))
    judge = ScriptedJudge(scripted)
    assert collect_answers(judge, asked, tmp_path, QUIET, lambda: None) == whole and judge.asked == 3
    assert len((tmp_path / ANSWERS).read_text().splitlines()) == 6


def test_collect_answers_from_a_judge_that_never_answered_leaves_no_file(tmp_path: Path) -> None:
    asked = [JudgeQuestion("non_factual", "synthetic", 0, "prompt")]
    with pytest.raises(TransientError):
        collect_answers(ScriptedJudge({}, 0), asked, tmp_path, QUIET, lambda: None)
    assert not list(tmp_path.iterdir()) or {path.name for path in tmp_path.iterdir()} == {"clock.json"}


def test_verdict_counts_leave_answers_without_a_verdict_out_of_the_rate() -> None:
    given = {"synthetic": ["yes", "NO", "maybe", "no"], "real": ["no", "no", "", "yes and no"]}
    asked = [
        JudgeQuestion("non_factual", group, number, f"{group} {number}")
        for group, replies in given.items()
        for number in range(len(replies))
    ]
    answered = {question.key: given[question.group][question.document] for question in asked}
    counts = verdict_counts(ScriptedJudge({}), asked, answered)
    assert counts["identity"] == ScriptedJudge.identity and counts["prompts"] == PROMPTS
    assert counts["verdicts"] == {
        "non_factual": {
            "synthetic": {"asked": 4, "unparsable": 1, "faulty": 1, "rate": 1 / 3},
            "real": {"asked": 4, "unparsable": 2, "faulty": 0, "rate": 0.0},
        }
    }


def judging(before: int, body: dict[str, Any]) -> tuple[int, bytes]:
    """Answer by the texts alone: a text of even length is not factual, one of a length that seven divides gets no verdict.

    Two texts are related if the first ends in a letter from a to m.
    """
    prompt = body["messages"][0]["content"]
    if "<first>" not in prompt:
        text = prompt.split("<text>\n")[1].split("\n</text>")[0]
        return completion("hard to say" if len(text) % 7 == 0 else "YES" if len(text) % 2 == 0 else "NO")
    return completion("Yes" if prompt.split("\n</first>")[0][-1] <= "m" else "No")


def test_quality_with_a_judge_asks_about_documents_and_controls(inputs: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    with serving(judging) as server:
        options = ("quality.judge=endpoint", "quality.judge_model=judge-7b", f"quality.judge_url='{server.url}'")
        manifest = run(inputs, tmp_path / "out", *options)
    from sbp_fast.data.prepared import PreparedCorpus
    from sbp_fast.data.token_shards.corpus import Corpus

    prepared, filtered = PreparedCorpus(inputs["corpus"]), Corpus(inputs["filtered"])
    rows = pq.read_table(tmp_path / "out" / JUDGED).to_pylist()
    texts = [prepared.text(filtered, number) for number in range(4)]
    wrong = [None if len(text) % 7 == 0 else len(text) % 2 == 0 for text in texts]
    seeds = [prepared.text(prepared.unique, row["seed"]) for row in rows]
    assert [row["judged_non_factual"] for row in rows] == wrong
    assert [row["judged_pair_irrelevance"] for row in rows] == [seed[-1] > "m" for seed in seeds]
    counts = manifest.counts
    quality, verdicts = counts["quality"], counts["judge"]["verdicts"]
    known = [verdict for verdict in wrong if verdict is not None]
    assert quality["non_factual"]["rate"] == (np.mean(known) if known else None)
    assert quality["non_factual"]["documents"] == len(known)
    real = [len(seed) % 2 == 0 for seed in seeds if len(seed) % 7]
    assert quality["non_factual"]["real_rate"] == np.mean(real)
    assert quality["pair_irrelevance"]["rate"] == np.mean([seed[-1] > "m" for seed in seeds])
    assert "judge-7b" in quality["pair_irrelevance"]["how"] and "random pairs" in quality["pair_irrelevance"]["how"]
    assert {name: verdicts["pair_irrelevance"][name]["asked"] for name in ("synthetic", "random", "neighbors")} == {
        "synthetic": 4,
        "random": 4,
        "neighbors": 3,
    }
    assert len(server.requests) == 4 * 4 + 3
    assert counts["similarity"]["means"]["seed"] is not None
    by_source = {source["rates"]["pair_irrelevance"] for source in counts["sources"].values()}
    assert by_source == {quality["pair_irrelevance"]["rate"]}


def test_quality_killed_while_judging_resumes_to_the_same_result(inputs: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    script = f"""
from pathlib import Path
import test_quality
inputs = {{name: Path(path) for name, path in { ({name: str(path) for name, path in inputs.items()})!r}.items()}}
test_quality.run(inputs, Path({str(tmp_path / "out")!r}), "quality.judge=endpoint", "quality.judge_model=judge-7b",
                 "quality.judge_url=URL", "quality.judge_requests=1")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    processes: list[subprocess.Popen[bytes]] = []
    saved = tmp_path / "out.partial" / ANSWERS

    def behaviour(before: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if before == 7:
            while saved.read_bytes().count(b"\n") < 7:  # the last answer may not be on disk yet
                time.sleep(0.01)
            processes[0].send_signal(signal.SIGKILL)
            processes[0].wait()
        return judging(before, body)

    options = ("quality.judge=endpoint", "quality.judge_model=judge-7b", "quality.judge_requests=1")
    with serving(behaviour) as server:
        processes.append(subprocess.Popen([sys.executable, "-c", script.replace("URL", server.url)], env=environment))
        assert processes[0].wait(120) == -signal.SIGKILL
        assert len(saved.read_text().splitlines()) == 7
        resumed = run(inputs, tmp_path / "out", *options, f"quality.judge_url='{server.url}'")
        assert len(server.requests) == 8 + 19 - 7  # the question whose answer was lost is asked again
        unbroken = run(inputs, tmp_path / "unbroken", *options, f"quality.judge_url='{server.url}'")
    assert resumed.counts == unbroken.counts and resumed.fingerprint == unbroken.fingerprint
