"""The upload of an export, by the real huggingface_hub against a stand-in for the Hub (tests/support/hub_server.py)."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serving_hub

from sbp_fast.errors import TransientError, UserError
from sbp_fast.model.hub import check_repository, push_to_hub

TOKEN = "hf_a-secret-of-this-test"
FILES = {"README.md": b"---\nlibrary_name: transformers\n---\n", "config.json": b"{}", "model.safetensors": b"\0" * 999}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with serving_hub(TOKEN) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # a Hub may offer large files either way
        yield hub


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    directory = tmp_path / "exported"
    directory.mkdir()
    for name, content in {**FILES, "manifest.json": b"{}", "notes.txt": b"mine"}.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("public", [False, True], ids=["private", "public"])
def test_push_makes_the_repository_and_uploads_the_named_files_alone(
    public: bool, hub: Hub, exported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert push_to_hub(exported, FILES, "lab/demo-sbp", public=public) == f"{hub.url}/lab/demo-sbp"
    assert hub.repositories == {"lab/demo-sbp": not public} and hub.files == FILES
    assert TOKEN not in "".join(capfd.readouterr()) and set(hub.tokens) == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in path.read_bytes() for path in exported.iterdir())


def test_push_to_an_existing_repository_updates_it_and_leaves_its_visibility(hub: Hub, exported: Path) -> None:
    hub.repositories["lab/demo-sbp"] = True
    push_to_hub(exported, ["config.json"], "lab/demo-sbp", public=True)
    assert hub.repositories == {"lab/demo-sbp": True} and hub.files == {"config.json": b"{}"}


def test_push_with_a_token_that_the_hub_refuses_is_one_line_without_the_token(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another-secret")
    with pytest.raises(
        UserError, match=r"--push-to lab/demo: the Hub refused with status 401.*hf auth login.*HF_TOKEN"
    ) as caught:
        push_to_hub(exported, FILES, "lab/demo")
    assert "another-secret" not in str(caught.value) and not hub.files


def test_push_to_a_hub_that_does_not_answer_is_one_line_that_names_it(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    with pytest.raises(TransientError, match=f"the upload to {url} failed: Connect.*; check the connection and rerun"):
        push_to_hub(exported, FILES, "lab/demo")


@pytest.mark.parametrize("name", ["demo", "lab/demo/sbp", "/demo", "lab/", "lab/a b", "lab/--", "https://huggingface.co/a/b"])
def test_a_name_that_no_repository_has_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"--push-to .* is no repository of the Hub; write it as OWNER/NAME"):
        check_repository(name)
