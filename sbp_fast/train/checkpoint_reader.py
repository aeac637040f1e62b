"""Checkpoints read without running code: torch's own reader takes any pickle, and a pickle can run anything.

`torch.distributed.checkpoint` describes a checkpoint in a pickle, `.metadata`, and stores plain values such as a learning rate
as pickles too. Here the first may name nothing but what such a description consists of, and the second are loaded with
`weights_only=True`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from sbp_fast.errors import UserError

FOREIGN = "it was not written by sbp-fast: remove it, and the run goes on from the checkpoint before it"
# what a description consists of, by the module and the name under which pickle looks it up
DESCRIPTION = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(metadata, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{(module, "PosixPath"): Path for module in ("pathlib", "pathlib._local")},
}  # fmt: skip


class DescriptionUnpickler(pickle.Unpickler):
    """An unpickler of `.metadata`.

    Raises:
        pickle.UnpicklingError: the pickle names something that no description of a checkpoint consists of.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle calls `module.name`."""
        if (module, name) not in DESCRIPTION:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return DESCRIPTION[module, name]


class CheckpointReader(dcp.FileSystemReader):
    """A reader of checkpoints whose `.metadata` can run no code.

    Raises:
        UserError: `.metadata` is not the description of a checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self._description = _read_description(checkpoint / ".metadata")  # here, since dcp.load hides what read_metadata raises

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the description of the checkpoint."""
        self._description.storage_meta = self._description.storage_meta or metadata.StorageMeta()
        self._description.storage_meta.load_id = self.load_id
        return self._description


def _read_description(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            description: Metadata = DescriptionUnpickler(file).load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(path, f"is not the description of a checkpoint: {error}", FOREIGN) from error
    return description


class CheckpointPlanner(dcp.DefaultLoadPlanner):
    """A planner whose plain values can run no code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that is not a tensor.

        Raises:
            UserError: it is not a plain value.
        """
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = f"is not a plain value: {str(error).splitlines()[0]}"
            raise UserError(f"{read_item.dest_index.fqn} of a checkpoint", reason, FOREIGN) from error
        torch.save(plain, buffer := io.BytesIO())  # the method of torch loads whatever the buffer holds
        buffer.seek(0)
        super().load_bytes(read_item, buffer)


@contextmanager
def cause_of_failure() -> Iterator[None]:
    """Raise the first cause of a failed save or load in place of torch's report over all processes.

    Raises:
        BaseException: such as `OSError` for a full disk, or `UserError` for what the classes above refuse.
    """
    try:
        yield
    except dcp.CheckpointException as failed:
        raise next(iter(failed.failures.values()))[0] from failed
