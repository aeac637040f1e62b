"""The data stages on a Ray cluster of two CPUs on this machine, against the same stages in this process."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_tasks import (
    die,
    killed_once,
    note_and_square,
    open_fake,
    process_number,
    read,
    return_directory,
    slowly_first,
    square,
    temporary_name,
    write_slowly,
    write_slowly_with_tool,
)
from rounding import NEEDS_SAME_BITS
from tiny_synthesis import make_inputs, settings
from tiny_training import QUIET, SETTINGS, WORDS, configure

from sbp_fast import cli_documents
from sbp_fast.config import RunConfig
from sbp_fast.data import preparation
from sbp_fast.errors import TransientError, UserError
from sbp_fast.generate.tasks import cut_chunks
from sbp_fast.pipeline.executors.executor import Holders, Placement, Workers
from sbp_fast.pipeline.executors.local import LOCAL
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.stages.embed import embed
from sbp_fast.stages.filter import filter_documents
from sbp_fast.stages.pair import pair
from sbp_fast.stages.prepare import prepare
from sbp_fast.stages.synthesize import synthesize

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # which is how to keep one to loopback
ray = pytest.importorskip("ray", reason="pip install 'sbp-fast[ray]'")
from sbp_fast.pipeline.executors.ray import RayWorkers, connect, spread  # noqa: E402

PARTITION_BYTES = 5000
DRIVER = """
import sys
from sbp_fast.data import preparation
from sbp_fast.cli import main
preparation.PARTITION_BYTES = int(sys.argv.pop(1))
main()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Its address."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]  # of what is pickled here
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=2, object_store_memory=100 << 20, **quiet)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("ray"))


SPARED = ("gather", "write_ranks")  # of `pair`: its other two series kill actors enough, which come back three times


class Killing(RayWorkers):
    """A cluster of which one process is killed in each series of tasks, before the first file it writes has its name."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.kills = directory, 0

    def dying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if getattr(function, "__name__", "") in SPARED:
            return function
        self.kills += 1
        return partial(killed_once, self.directory / f"kill-{self.kills}", function)

    def run(self, function: Callable[..., Any], tasks: Any, processes: int) -> Iterator[Any]:
        return super().run(self.dying(function), tasks, processes)

    def hold(self, make: Callable[..., Any], config: RunConfig) -> AbstractContextManager[Any]:
        return Hold(super().hold(make, config), self.dying)

    def all_died(self) -> bool:
        return self.kills > 0 and len(list(self.directory.glob("kill-*"))) == self.kills


class Hold:
    """Holders whose tasks run a wrapped function."""

    def __init__(self, context: AbstractContextManager[Any], wrap: Callable[..., Any]) -> None:
        self.context, self.wrap = context, wrap

    def __enter__(self) -> Hold:
        self.holders: Holders[Any] = self.context.__enter__()
        self.placement, self.count = self.holders.placement, self.holders.count
        return self

    def run(self, function: Callable[..., Any], tasks: Any, advance: Any) -> Iterator[Any]:
        return self.holders.run(self.wrap(function) if tasks and not isinstance(tasks[0], Path) else function, tasks, advance)

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def test_ray_workers_return_results_in_order_and_raise_the_error_of_a_task(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = RayWorkers()
    assert list(workers.run(square, [1, 2, 3, 4, 5, 6, 7], 1)) == [1, 4, 9, 16, 25, 36, 49]
    assert list(workers.run(square, [], 1)) == []
    found: list[int] = []
    with pytest.raises(UserError) as caught:
        for result in workers.run(partial(note_and_square, tmp_path), [1, -2, *range(3, 100)], 1):
            found.append(result)
    assert found == [1] and type(caught.value) is UserError and str(caught.value) == "-2: is negative; give a positive number"
    assert len(list(tmp_path.iterdir())) < 20
    with pytest.raises(UserError, match="nowhere: is not there on a node of the cluster; let all nodes see the same file"):
        list(workers.run(read, [Path("/nowhere")], 1))
    (tmp_path / "only_here.py").write_text("def work(number): pass")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"a node cannot load the task: .*No module named 'only_here'; install the same"):
        list(workers.run(importlib.import_module("only_here").work, [1], 1))


@pytest.mark.parametrize("with_tool", [False, True])
def test_failed_task_ends_the_other_tasks_before_they_write(cluster: str, tmp_path: Path, with_tool: bool) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match="0: is nothing"):
        if with_tool:
            with RayWorkers().hold(partial(return_directory, tmp_path), RunConfig(threads=1)) as holders:
                assert (holders.count, holders.placement) == (2, Placement("cpu", 1))
                list(holders.run(write_slowly_with_tool, [1, 0], print))
        else:
            list(RayWorkers().run(partial(write_slowly, tmp_path), [0, 1], 1))
    assert time.monotonic() - begun < 50
    before = (tmp_path / "written").read_bytes()
    time.sleep(0.3)
    assert (tmp_path / "written").read_bytes() == before


def test_actors_share_the_tasks_and_return_results_in_order(cluster: str) -> None:
    advanced: list[float] = []
    with RayWorkers().hold(process_number, RunConfig(threads=1)) as holders:
        results = list(holders.run(slowly_first, [1, 2, 3, 4, 5, 6], advanced.append))
        again = list(holders.run(slowly_first, [7], advanced.append))
    assert [task for task, _ in results + again] == [1, 2, 3, 4, 5, 6, 7] and sorted(advanced) == [1, 2, 3, 4, 5, 6, 7]
    processes = {process for _, process in results}
    assert len(processes) == 2 and again[0][1] in processes


def test_synthesize_with_several_processes_and_a_cluster_is_refused(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"corpus": inputs["corpus"], "model": inputs["model"]}
    with pytest.raises(UserError, match="options: exclude each other; give --gpus, or --engine ray"):
        cli_documents.synthesize([str(inputs["directory"] / "empty.toml")], out=Path("out"), gpus=2, engine="ray", **how)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="options: several processes do not share a cluster"):
        synthesize(settings(inputs["directory"]), Path("out"), console=QUIET, workers=RayWorkers(), **how)


def test_two_ray_tasks_that_write_one_file_leave_a_whole_file(cluster: str, tmp_path: Path) -> None:
    names = list(RayWorkers().run(temporary_name, [tmp_path / "file"] * 2, 1))
    assert len(set(names)) == 2 and all(name.startswith("file.") and name.endswith(".tmp") for name in names)


def test_task_that_kills_every_process_raises_transient_error(cluster: str) -> None:
    with pytest.raises(TransientError, match=r"--engine ray: a task was lost 4 times: .*; check the cluster"):
        list(RayWorkers().run(die, [1], 1))


def write_documents(folder: Path) -> None:
    random = np.random.default_rng(1)
    folder.mkdir()
    for file in range(3):
        texts = [" ".join(random.choice(WORDS, random.integers(10, 60))) for _ in range(60)]
        (folder / f"{file}.txt").write_text("\n".join(texts))
        lines = "".join(f'{{"text": "{text}"}}\n' for text in [*texts, texts[0] + " twice"])
        (folder / f"{file}.jsonl").write_text(lines)
        (folder / f"{file}.txt").unlink()


@pytest.mark.slow
def test_prepare_on_ray_with_killed_workers_equals_the_local_result(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "documents")
    monkeypatch.setattr(preparation, "PARTITION_BYTES", PARTITION_BYTES)
    config = configure(tmp_path, f"corpus.path='{tmp_path}/documents/*.jsonl'", "corpus.deduplicate=near")
    whole = prepare(config, tmp_path / "whole", console=QUIET)
    killing = Killing(tmp_path)
    broken = prepare(config, tmp_path / "broken", console=QUIET, workers=killing)
    assert killing.all_died() and killing.kills == 4
    assert whole.counts["near_duplicates_dropped"] == 3 and len(whole.files) > 20
    assert (broken.files, broken.counts, broken.fingerprint) == (whole.files, whole.counts, whole.fingerprint)


def faked(workers: Workers, corpus: Path) -> Any:
    """The workers with the fake encoder."""

    class Faked:
        def hold(self, make: Callable[..., Any], config: RunConfig) -> AbstractContextManager[Any]:
            return workers.hold(partial(open_fake, corpus), config)

    return Faked()


def content(manifest: Manifest) -> tuple[Any, ...]:
    """Return what must not depend on the workers."""
    return manifest.files, manifest.counts, manifest.flops, manifest.device, manifest.fingerprint


@pytest.mark.slow
def test_embed_and_pair_on_ray_with_killed_workers_equal_the_local_result(
    cluster: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    partitions = "partition_documents=24, partition_overlap=2, memory_gib=1e-4, backend='ivf'"
    pairing = f"pair={{{partitions}, target_recall=0.3, similarity_low=0.6, neighbors=16}}"
    config, corpus = configure(inputs["directory"], "embed.shard_documents=5", pairing), inputs["corpus"]
    manifests: dict[str, list[Manifest]] = {"embed": [], "pair": []}
    killing = Killing(tmp_path)
    for name, workers in {"here": LOCAL, "there": killing}.items():
        vectors = tmp_path / f"vectors-{name}"
        manifests["embed"].append(embed(config, corpus, vectors, console=QUIET, workers=faked(workers, corpus)))
        out = tmp_path / f"pairs-{name}"
        manifests["pair"].append(pair(config, corpus, vectors, out, console=QUIET, workers=workers))
    assert killing.all_died() and killing.kills == 3
    assert manifests["pair"][0].counts["self_join"]["partitions"] >= 3 and len(manifests["embed"][0].files) >= 18
    for here, there in manifests.values():
        assert content(here) == content(there)


@pytest.mark.slow
@NEEDS_SAME_BITS
def test_synthesize_and_filter_on_ray_with_killed_workers_equal_the_local_result(
    cluster: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    config = settings(inputs["directory"], "filter={minimum_tokens=2, keep_unfinished=true, maximum_malformed_characters=1.0}")
    killing = Killing(tmp_path)
    contents: list[list[Any]] = []
    for name, workers in {"here": LOCAL, "there": killing}.items():
        how: dict[str, Any] = {"corpus": inputs["corpus"], "console": QUIET, "workers": workers}
        generated = synthesize(config, tmp_path / f"generated-{name}", model=inputs["model"], **how)
        filtered = filter_documents(config, tmp_path / f"filtered-{name}", synthetic=tmp_path / f"generated-{name}", **how)
        assert generated is not None and len(generated.files) > 10
        assert 0 < filtered.counts["filtered_documents"] < filtered.counts["documents"]
        contents.append([content(generated), content(filtered)])
    assert killing.all_died() and killing.kills == 3
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_prepare_on_ray_with_a_killed_driver_resumes_to_the_same_result(cluster: str, tmp_path: Path) -> None:
    write_documents(tmp_path / "documents")
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "empty.toml").touch()
    settings = [*SETTINGS, "corpus.path=documents/*.jsonl"]  # relative to where the driver is started

    def start(out: str, *engine: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "driver.py", str(PARTITION_BYTES), "prepare", "empty.toml", *settings, "--out", out, *engine]
        # as from a shell: this process's Ray has put how it authenticates into its environment
        environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, env=environment)

    assert start("whole").wait() == 0
    process = start("broken", "--engine", "ray", "--address", cluster)
    while process.poll() is None and not list(tmp_path.glob("broken.partial/scratch/partition-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start("broken", "--engine", "ray", "--address", cluster).wait() == 0
    whole, broken = (Manifest.load(tmp_path / name) for name in ("whole", "broken"))
    assert (broken.files, broken.counts, broken.fingerprint) == (whole.files, whole.counts, whole.fingerprint)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nonsense", "host:port"])
def test_connect_to_an_address_without_a_cluster_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"nothing answers there; start one \(ray start --head\)"), connect(address):
        pass


def test_spread_gives_a_tool_to_each_gpu_or_to_each_share_of_cpus() -> None:
    small, large, head = {"CPU": 8.0}, {"CPU": 33.0, "memory": 1e9}, {"memory": 1e9}
    assert spread([small, large, head], "auto", 0) == (Placement("cpu", 8), 5, {"num_cpus": 8})
    assert spread([small, large], "cpu", 3) == (Placement("cpu", 3), 2 + 11, {"num_cpus": 3})
    assert spread([small], "cpu", 99) == (Placement("cpu", 8), 1, {"num_cpus": 8})
    eight, one = {"CPU": 96.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}
    for device in ("auto", "cuda", "cuda:0"):
        assert spread([eight, one, small], device, 0) == (Placement("cuda", 12), 9, {"num_gpus": 1, "num_cpus": 12})
    assert spread([eight], "auto", 4) == (Placement("cuda", 4), 8, {"num_gpus": 1, "num_cpus": 4})
    assert spread([{"GPU": 2.0}], "auto", 0) == (Placement("cuda", 1), 2, {"num_gpus": 1, "num_cpus": 0})
    assert spread([eight], "cpu", 0) == (Placement("cpu", 96), 1, {"num_cpus": 96})
    with pytest.raises(UserError, match="device = cuda: the cluster has no GPU"):
        spread([small], "cuda", 0)
    with pytest.raises(UserError, match="the cluster has no CPU"):
        spread([head], "auto", 0)


@pytest.mark.parametrize(("shards", "count"), [(0, 2), (1, 4), (7, 2), (1000, 3), (100_000, 64)])
def test_chunks_hold_every_shard_once_and_end_with_single_ones(shards: int, count: int) -> None:
    chunks = cut_chunks(list(range(0, 2 * shards, 2)), count)
    assert [shard for chunk in chunks for shard in chunk] == list(range(0, 2 * shards, 2))
    sizes = [len(chunk) for chunk in chunks]
    assert sizes == sorted(sizes, reverse=True) and max(sizes, default=0) <= 32
    assert sizes[-2 * count :] == [1] * min(shards, 2 * count)
