"""Uploading an exported model to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.credentials import without_credentials

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def check_repository(name: str) -> None:
    """Refuse a name that no repository of the Hub can have.

    Raises:
        UserError: it is not OWNER/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name_is_valid = False
    else:
        name_is_valid = name.count("/") == 1
    if not name_is_valid:
        raise UserError(f"--push-to {name}", "is no repository of the Hub", "write it as OWNER/NAME")


def push_to_hub(directory: Path, files: Iterable[str], repository: str, *, public: bool = False) -> str:
    """Upload files of a directory in one commit, and return the address of the repository.

    The token is the one that `hf auth login` or HF_TOKEN gives to huggingface_hub; it is neither printed nor written. The
    address of the Hub is HF_ENDPOINT.

    Args:
        directory: of the files.
        files: paths of the files in the directory; others stay here.
        repository: OWNER/NAME; made where it does not exist.
        public: whether a repository that is made can be read by everybody. An existing one stays as it is.

    Raises:
        UserError: the Hub refuses, such as without a token that may write there.
        TransientError: the Hub does not answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    where, api = f"--push-to {repository}", HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=directory,
            allow_patterns=sorted(files),
            commit_message="Upload a model exported by sbp-fast",
        )
    except LocalTokenNotFoundError:
        raise UserError(where, "no token of the Hub is known here", LOG_IN) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        problem = f"the Hub refused with status {status}: {error.server_message or error.response.reason_phrase}"
        raise UserError(where, without_credentials(problem), LOG_IN if status in (401, 403, 404) else "try again") from None
    except (HTTPError, OSError) as error:
        problem = f"the upload to {constants.ENDPOINT} failed: {type(error).__name__}: {error}"
        raise TransientError(
            where, without_credentials(problem), "check the connection and rerun: what is exported stays"
        ) from None
    return str(made)
