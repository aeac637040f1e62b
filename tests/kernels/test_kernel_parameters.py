"""A rule for every kernel: Triton makes an argument that is 1 a Python integer, which has no method `.to`."""

import ast
import importlib.util
from pathlib import Path

import pytest
import sbp_kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no build for this platform", allow_module_level=True)

from bench.compilations import usual_launches

ROOT = Path(sbp_kernels.__file__).parent
KERNELS = [path for path in sorted(ROOT.rglob("*.py")) if "triton.jit" in path.read_text()]


def is_launched(function: ast.FunctionDef) -> bool:
    """Whether a function is a kernel; others are called by kernels, with values that are tensors by then."""
    return function.name.endswith("_kernel") and any("triton.jit" in ast.unparse(item) for item in function.decorator_list)


def cast_parameters(tree: ast.AST) -> list[str]:
    """Return `kernel: parameter` for each parameter of a kernel whose method `.to` is called before it is assigned."""
    casts = []
    for function in filter(lambda node: isinstance(node, ast.FunctionDef) and is_launched(node), ast.walk(tree)):
        parameters = {argument.arg for argument in function.args.args}
        assigned = {name.id for name in ast.walk(function) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            match call.func:
                case ast.Attribute(value=ast.Name(id=name), attr="to") if name in parameters - assigned:
                    casts.append(f"{function.name}: {name}")
    return casts


def test_kernels_are_those_that_are_compiled_ahead_of_time() -> None:
    nodes = [node for path in KERNELS for node in ast.walk(ast.parse(path.read_text()))]
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef) and is_launched(node)}
    assert found == {compilation.kernel.fn.__name__ for compilation in usual_launches()}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_parameter_of_a_kernel_is_cast_by_its_method(path: Path) -> None:
    assert not cast_parameters(ast.parse(path.read_text()))


def test_a_cast_by_the_method_is_found() -> None:
    kernel = "@triton.jit\ndef cut_kernel(x, count):\n    return x + {}\n"
    assert cast_parameters(ast.parse(kernel.format("count.to(tl.float64)"))) == ["cut_kernel: count"]
    assert not cast_parameters(ast.parse(kernel.format("tl.cast(count, tl.float64)")))
