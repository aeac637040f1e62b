"""The Dockerfile as far as it can be checked without docker: what it copies exists, and it installs by the Makefile."""

import json
import re
import tomllib
from fnmatch import fnmatch

import yaml
from page_commands import ROOT

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
LINES = re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES if line.strip()]
KNOWN = {"FROM", "ARG", "RUN", "USER", "WORKDIR", "COPY", "ENV", "CMD"}


def arguments(name: str) -> list[str]:
    """Return the arguments of every instruction of a name, in order."""
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def copied() -> list[str]:
    """Return the sources of the COPY instructions."""
    return [word for rest in arguments("COPY") for word in rest.split()[:-1] if not word.startswith("--")]


def test_every_instruction_is_a_known_one() -> None:
    assert {name for name, _ in INSTRUCTIONS} == KNOWN


def test_base_image_is_pinned_by_tag_and_digest_and_its_python_is_supported() -> None:
    (base,) = arguments("FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert version is not None and version[1] in ("3.11", "3.12", "3.13")


def test_copied_files_exist_and_the_context_holds_them() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    assert sorted(copied()) == sorted(kept)
    assert all((ROOT / path).exists() for path in kept)


def test_copied_files_are_all_that_the_package_is_built_from() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [settings["project"]["readme"], *settings["project"]["license-files"], *wheel["packages"], *wheel["force-include"]]
    assert all(any(fnmatch(path, f"{source}*") for source in copied()) for path in needed)


def test_user_is_not_root_and_what_is_installed_comes_from_the_makefile() -> None:
    assert arguments("USER") == ["sbp"]
    installing = [command for command in arguments("RUN") if "apt-get" not in command and "useradd" not in command]
    assert len(installing) == 1
    make = re.fullmatch(r'PIP_NO_CACHE_DIR=1 make ([a-z-]+) \$\{TORCH:\+TORCH="\$TORCH"\}', installing[0])
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert make is not None and re.search(rf"^{make[1]}:", makefile, re.MULTILINE)
    assert re.search(r"^TORCH \?= ", makefile, re.MULTILINE) and '"$(TORCH)"' in makefile


def test_container_starts_a_command_of_the_environment() -> None:
    (command,) = arguments("CMD")
    assert json.loads(command) == ["sbp-fast", "doctor"]
    virtual_environment = re.search(r"^VENV \?= (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert virtual_environment is not None
    assert arguments("ENV")[0].startswith(f"PATH={arguments('WORKDIR')[0]}/{virtual_environment[1]}/bin:")


def test_workflow_builds_the_image_only_where_docker_is() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/image.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    script = job["steps"][-1]["run"].splitlines()
    assert script[0].startswith("if ! command -v docker; then") and script[1].startswith("docker build ")
    paths = workflow[True]["pull_request"]["paths"]  # YAML 1.1 reads the key `on` as true
    assert all((ROOT / path).is_file() for path in paths)
