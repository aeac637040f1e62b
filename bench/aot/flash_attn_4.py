"""`python -m bench.aot.flash_attn_4`: compile FlashAttention-4 under the mask of a segment tree, without a GPU.

What is compiled is what `packed_attention(..., backend="flash-attn-4")` and its backward pass start on a GPU: they are called
on tensors without data. The library must be installed, or lie in the folder FOLDER beside the environment's packages.
"""

from __future__ import annotations

import argparse
import os
import site
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import flash_attn_4
from sbp_kernels.layout.blocks import list_blocks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.aot.binary import cubin_figures

FOLDER = Path(sys.prefix) / "flash-attn-4"  # where `make aot` installs it
TARGETS = {"sm_90a": ((9, 0), 132), "sm_100a": ((10, 0), 148)}  # compute capability, multiprocessors of H100 and B200
LAYOUT = PackedLayout.from_tree([300, 200, 100, 150, 250], [-1, 0, 1, 0, -1])


def main() -> int:
    """Compile what is chosen and print the figures of each kernel."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot.flash_attn_4", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="sm_90a")
    parser.add_argument("--heads", default="24:8", help="query heads and key heads")
    parser.add_argument("--width", type=int, default=128, help="of a head")
    options = parser.parse_args()
    heads = [int(number) for number in options.heads.split(":")]
    with tempfile.TemporaryDirectory() as folder:
        _prepare(options.target, Path(folder))
        started = time.perf_counter()
        with _pretended_gpu(*TARGETS[options.target]):
            _compile((heads[0], heads[1]), options.width)
        seconds = time.perf_counter() - started
        for path in sorted(Path(folder).rglob("*.cubin")):
            figures, opcodes = cubin_figures(path.read_bytes())
            products = sum(opcodes[name] for name in ("HGMMA", "UTCHMMA", "HMMA"))
            described = ", ".join(f"{name} {value}" for name, value in {**figures, "products": products}.items())
            print(f"{path.stem[:60]}: {described}")
    print(f"{options.target}: forward and backward compile in {seconds:.0f} s, {options.heads} heads of {options.width}")
    return 0


def _prepare(target: str, folder: Path) -> None:
    """Say what to compile for, which the library reads when it is imported, and import it."""
    os.environ |= {
        "FLASH_ATTENTION_ARCH": target.rstrip("a"),
        "CUTE_DSL_ARCH": target,
        "FLASH_ATTENTION_NUM_SMS": str(TARGETS[target][1]),
        "CUTE_DSL_KEEP": "cubin",
        "CUTE_DSL_DUMP_DIR": str(folder),
    }
    if FOLDER.is_dir():
        site.addsitedir(str(FOLDER))
    try:
        import_module("flash_attn.cute")
    except ImportError as problem:
        sys.exit(f"error: flash-attn-4 is not installed ({problem}). `make aot` installs it into {FOLDER}.")


@contextmanager
def _pretended_gpu(capability: tuple[int, int], multiprocessors: int) -> Iterator[None]:
    """Let torch and CuTe believe in a GPU, for tensors without data."""
    hardware = SimpleNamespace(get_device_multiprocessor_count=lambda: multiprocessors)
    with ExitStack() as stack:
        stack.enter_context(patch("cutlass.utils.HardwareInfo", lambda: hardware))
        for name, value in {
            "current_device": 0,
            "get_device_capability": capability,
            "_lazy_init": None,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, value=value: value))
        yield


def _compile(heads: tuple[int, int], width: int) -> None:
    """Start one forward and one backward pass on tensors without data, as autograd would."""
    tokens, cuda = len(LAYOUT), torch.device("cuda", 0)
    sizes = flash_attn_4.BLOCKS[torch.cuda.get_device_capability()[0]]
    by_query, by_key = list_blocks(LAYOUT.visible_until.numpy(), *sizes)
    shapes = [tensor.shape for tensor in (*by_query, *by_key)]
    function, context = import_module("flash_attn.cute.interface").FlashAttnFunc, _Context()
    with FakeTensorMode():
        q, k, v = (
            torch.empty(tokens, count, width, dtype=torch.bfloat16, device=cuda) for count in (heads[0], heads[1], heads[1])
        )
        until = torch.empty(tokens, dtype=torch.int32, device=cuda)
        layout = replace(LAYOUT, visible_until=until, positions=until)
        arguments = flash_attn_4.block_sparsity([torch.empty(shape, dtype=torch.int32, device=cuda) for shape in shapes], sizes)
        with (
            patch.object(flash_attn_4, "_lists_of", lambda layout: arguments),
            patch.object(function, "apply", lambda *arguments: function.forward(context, *arguments)),
        ):
            out, _ = packed_attention(q, k, v, layout, backend=flash_attn_4.NAME, return_lse=True)
        function.backward(context, torch.empty_like(out).unsqueeze(0), None)


class _Context:
    """What autograd would hand from the forward to the backward pass; it does not run without CUDA."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing: what the backward pass is called with is given whole."""


if __name__ == "__main__":
    sys.exit(main())
