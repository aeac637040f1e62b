"""`python -m bench.gpu_prepare.pretended MODULE [ARGUMENT ...]`: run a module with a pretended H200.

Tensors on it have shapes and no data (they are torch's "meta" tensors), and a launch of a Triton kernel compiles it, for the
cache, and does not run it. What the module reads from such a tensor is zero, or true where a condition is asked for, so that
comparisons of results pass.

The last line of standard output says how many kernels were launched, and standard error why some did not compile.
"""

from __future__ import annotations

import atexit
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

CAPABILITY, MULTIPROCESSORS, MEMORY, SHARED = (9, 0), 132, 150 << 30, 232_448  # of an H200; bytes
DEVICE = torch.device("cuda", 0)
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_permuted", "empty_strided", "eye", "full_like", "linspace"),
    *("multinomial", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm"),
    *("scalar_tensor", "tensor", "zeros", "zeros_like"),
)
METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
CUDA_VALUES = {
    "_lazy_init": None,
    "_sleep": None,
    "current_device": 0,
    "device_count": 1,
    "empty_cache": None,
    "get_device_capability": CAPABILITY,
    "get_device_name": "pretended GPU",
    "get_device_properties": SimpleNamespace(multi_processor_count=MULTIPROCESSORS, total_memory=MEMORY),
    "graph_pool_handle": (0, 0),
    "is_available": True,
    "is_current_stream_capturing": False,
    "is_initialized": False,
    "max_memory_allocated": 0,
    "mem_get_info": (MEMORY, MEMORY),
    "memory_allocated": 0,
    "reset_peak_memory_stats": None,
    "set_sync_debug_mode": None,
    "synchronize": None,
}
CUDA_CLASSES = ("CUDAGraph", "Event", "Stream", "current_stream", "device", "device_of", "graph", "stream")


def main() -> int:
    """Run the module that the arguments name, and say how many kernels it launched."""
    launched = pretend()
    sys.argv = sys.argv[1:]
    status: object = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    print(f"{len(launched)} kernels launched", flush=True)
    return status if isinstance(status, int) else 0 if status is None else 1


def pretend() -> set[str]:
    """Replace parts of torch and triton for the rest of this process; return a set that fills with the hashes of kernels."""
    _import_launching_operations()
    _pretend_device()
    _pretend_values()
    _pass_self_checks()
    return _pretend_launches()


def _import_launching_operations() -> None:
    """Import the kernels without the fake implementations of their operations, so that tensors without data are launched on."""
    register = torch.library.register_fake

    def register_others(name: Any, *arguments: Any, **options: Any) -> Any:
        return None if str(name).startswith("sbp_kernels::") else register(name, *arguments, **options)

    with patch.object(torch.library, "register_fake", register_others):
        import_module("sbp_kernels")


def _on_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _replace(owner: Any, values: Mapping[str, Any]) -> None:
    """Set attributes of a module or class for the rest of this process."""
    for name, value in values.items():
        setattr(owner, name, value)


def _pretend_device() -> None:
    """Let torch report a GPU, and make tensors of the meta device where that one is asked for."""
    _replace(torch.cuda, {name: lambda *_, value=value, **__: value for name, value in CUDA_VALUES.items()})
    _replace(torch.cuda, {name: type(name, (_Anything,), {}) for name in CUDA_CLASSES})
    _replace(torch, {name: _made(getattr(torch, name)) for name in FACTORIES} | {"full": _full(torch.full)})
    _replace(Tensor, {name: _made(getattr(Tensor, name)) for name in METHODS})
    device = torch._C.TensorBase.device.__get__
    _replace(
        Tensor,
        {
            "is_cuda": property(lambda x: x.is_meta),
            "device": property(lambda x: DEVICE if x.is_meta else device(x)),
            "to": _moved(Tensor.to),
            "cuda": lambda x, *_, **__: x.to("meta"),
            "pin_memory": lambda x, *_: x,
        },
    )
    _replace(torch, {"Generator": _Generator})


class _Anything(MagicMock):
    """An object of CUDA that takes any call and is a context."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class _Generator:
    """A generator of random numbers on the GPU; elsewhere torch's own is made in its place."""

    device = DEVICE

    def __new__(cls, device: Any = "cpu", *, real: type = torch.Generator) -> Any:
        return super().__new__(cls) if _on_gpu(device) else real(device)

    def __init__(self, device: Any = "cpu") -> None:
        """Take the device, which `__new__` has looked at."""

    def manual_seed(self, seed: int) -> _Generator:
        """Return the generator itself, which makes no numbers."""
        return self


def _made(function: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of tensors that makes those of the GPU without data."""

    def make(*arguments: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        if _on_gpu(options.get("device")):
            options["device"] = "meta"
        if isinstance(options.get("generator"), _Generator):
            options.pop("generator")
        return function(*arguments, **options)

    return make


def _full(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.full`, which on the meta device would call `torch.empty`, which tests replace by what calls `torch.full`."""
    empty = torch.empty

    def make(size: Any, value: Any, **options: Any) -> Any:
        if _on_gpu(options.get("device")):
            return empty(size, dtype=options.get("dtype") or torch.tensor(value).dtype, device="meta")
        return function(size, value, **options)

    return make


def _moved(function: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to`, which loses the data on the way to the GPU and finds zeros on the way back."""

    def move(x: Tensor, *arguments: Any, **options: Any) -> Any:
        arguments = tuple("meta" if _on_gpu(argument) else argument for argument in arguments)
        options = {name: "meta" if _on_gpu(value) else value for name, value in options.items()}
        if x.is_meta and any(str(target).startswith("cpu") for target in (*arguments, options.get("device"))):
            return function(_zeros(x), *arguments, **options)
        return function(x, *arguments, **options)

    return move


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype)


def _pretend_values() -> None:
    """Let what is read from tensors without data be zero or true, and leave out operations that cannot do without data."""
    values: dict[str, Callable[[Tensor], Any]] = {
        "__bool__": lambda x: True,
        "__float__": lambda x: 0.0,
        "__index__": lambda x: 0,
        "__int__": lambda x: 0,
        "cpu": _zeros,
        "data_ptr": lambda x: 0,
        "item": lambda x: _zeros(x).flatten()[0].item(),
        "numpy": lambda x: _zeros(x).numpy(),
        "tolist": lambda x: _zeros(x).tolist(),
        **dict.fromkeys(("normal_", "random_", "uniform_"), lambda x: x),
    }
    functions: dict[str, Callable[[Tensor], Any]] = {
        "addmm": lambda total: total,  # torch 2.11 cannot do it on tensors without data
        "allclose": lambda x: True,
        "equal": lambda x: True,
    }
    _replace(Tensor, {name: _read(getattr(Tensor, name), value) for name, value in values.items()})
    _replace(torch, {name: _read(getattr(torch, name), value) for name, value in functions.items()})


def _read(function: Callable[..., Any], value: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def read(x: Tensor, *arguments: Any, **options: Any) -> Any:
        return value(x) if x.is_meta else function(x, *arguments, **options)

    return read


def _pass_self_checks() -> None:
    """Let a kernel that compares its results before its first use launch once for that, and pass."""
    self_check: Any = import_module("sbp_kernels.attention.self_check")
    find_fault = self_check.find_fault
    self_check.find_fault = lambda *what: find_fault(*what, repeats=1) and None


def _pretend_launches() -> set[str]:
    """Compile what is launched, with the C code that launches it, instead of running it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime import build
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: DEVICE,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED}),
    )
    triton.runtime.driver.set_active(driver)
    triton.knobs.nvidia.libcuda_path = str(_empty_driver_library())
    build._load_module_from_path = MagicMock()  # what is built needs a GPU's driver to load
    CudaUtils()
    run, kernels, failures = JITFunction.run, set[str](), set[str]()

    def compile_alone(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            compiled = run(self, *arguments, grid=grid, warmup=True, **options)
            if compiled.hash not in kernels:
                kernels.add(compiled.hash)
                CudaLauncher(compiled.src, compiled.metadata)
        except Exception as failure:  # noqa: BLE001 compilers raise anything
            reason = f"{self.fn.__name__} does not compile: {type(failure).__name__}: {failure}"
            if reason not in failures:
                failures.add(reason)
                print(reason, file=sys.stderr, flush=True)

    JITFunction.run = compile_alone
    return kernels


def _empty_driver_library() -> Path:
    """Build a libcuda.so.1 with nothing in it, which launchers are linked to; return its folder."""
    folder = Path(tempfile.mkdtemp(prefix="no-gpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
