"""Forms of a kernel that a launch with unusual integers compiles, derived from the kernel's own signature.

Triton makes an integer argument of 1 a Python constant, on which the methods of its own values do not exist, and it makes
loads and stores narrower where it cannot tell that an integer is a multiple of 16. Arguments named in `do_not_specialize`
stay as they are.

`bench.compilations` has each kernel with all of its integers as 1. `python -m bench.aot.integers [ENTRIES]` translates every
form of every kernel with each integer alone as 1, as far as Triton's own representation, where such errors show, and lists
what fails. (A whole compilation of each would take hours.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from bench.aot.compilation import TARGETS as ALL_TARGETS
from bench.aot.compilation import Compilation, Requirements
from bench.aot.compiler import listed

INTEGERS = ("i32", "i64")
TARGETS = ("sm_80", "sm_90", "sm_100")
ANY_SPILLS = dict.fromkeys(TARGETS, 1 << 20)  # these forms must compile and start; they are not the fast ones


def unusual_integers(compilations: Iterable[Compilation]) -> Iterator[Compilation]:
    """Yield each kernel with all of its integers as 1, and with none of them known to be a multiple of 16.

    For each target it is the form of the kernel that has the most branches, and of those the one that compiles soonest.
    """
    fullest: dict[tuple[str, str], Compilation] = {}
    for compilation in compilations:
        for target in set(compilation.targets).intersection(TARGETS):
            key = qualified_name(compilation), target
            if key not in fullest or preference(compilation) > preference(fullest[key]):
                fullest[key] = compilation
    for chosen in {it.name: it for it in fullest.values()}.values():
        targets = tuple(target for target in TARGETS if fullest.get((qualified_name(chosen), target)) is chosen)
        forms = {"integers of 1": with_ones(chosen, specialised(chosen)), "odd integers": without_alignment(chosen)}
        requires = Requirements(spill_bytes=ANY_SPILLS, impossible=chosen.requires.impossible)
        for title, form in forms.items():
            yield replace(form, name=f"{chosen.name}, {title}", requires=requires, targets=targets)


def specialised(compilation: Compilation) -> tuple[str, ...]:
    """Return the integer arguments that Triton makes constants where they are 1."""
    free = {parameter.name for parameter in compilation.kernel.params if not parameter.do_not_specialize}
    return tuple(name for name, type_ in compilation.signature.items() if type_ in INTEGERS and name in free)


def with_ones(compilation: Compilation, names: Iterable[str]) -> Compilation:
    """Return the compilation with these arguments as the constant 1."""
    ones = dict.fromkeys(names, 1)
    signature = {name: type_ for name, type_ in compilation.signature.items() if name not in ones}
    constants = {**compilation.constants, **ones}
    return replace(compilation, signature=signature, constants=constants, aligned=compilation.aligned - ones.keys())


def without_alignment(compilation: Compilation) -> Compilation:
    """Return the compilation without multiples of 16 among its integers."""
    integers = {name for name, type_ in compilation.signature.items() if type_ in INTEGERS}
    return replace(compilation, aligned=compilation.aligned - integers)


def preference(compilation: Compilation) -> tuple[int, bool, int]:
    """Return the number of constants that are True, whether tensor cores multiply, and less for larger tiles."""
    values = compilation.constants.values()
    sizes = [value for value in values if isinstance(value, int) and value]
    return sum(value is True for value in values), compilation.constants.get("PRECISION") != "ieee", -math.prod(sizes)


def qualified_name(compilation: Compilation) -> str:
    """Return module and name of the kernel."""
    return f"{compilation.kernel.fn.__module__}.{compilation.kernel.fn.__qualname__}"


def single_ones(compilations: Iterable[Compilation]) -> Iterator[Compilation]:
    """Yield every form of every kernel with each of its integers alone as 1; a form is a kernel with its flags."""
    seen: set[tuple[str, ...]] = set()
    for compilation in compilations:
        switches = (f"{name}={value}" for name, value in sorted(compilation.constants.items()) if value in (True, False, None))
        form = qualified_name(compilation), *switches
        if form in seen:
            continue
        seen.add(form)
        for name in specialised(compilation):
            yield replace(with_ones(compilation, [name]), name=f"{compilation.name}, {name} = 1")


def translate(compilation: Compilation) -> None:
    """Translate the kernel to Triton's own representation, the first stage of `triton.compile`.

    Raises:
        CompilationError: Triton's, naming the line.
    """
    target = next(ALL_TARGETS[name] for name in TARGETS if name in compilation.targets)
    backend = make_backend(target)
    options = backend.parse_options(dict(compilation.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    compilation.source().make_ir(target, options, implementation, modules, context)


def main() -> int:
    """Translate the forms and return 1 where one fails."""
    entries = sys.argv[1] if len(sys.argv) > 1 else "bench.compilations"
    usual = (it for it in listed(entries).values() if set(it.targets).intersection(TARGETS))
    translated, failed = 0, 0
    for compilation in single_ones(usual):
        try:
            translate(compilation)
            translated += 1
        except Exception as error:  # noqa: BLE001 compilers raise anything
            failed += 1
            print(f"FAILURE: {compilation.name}: {str(error).strip().splitlines()[-1]}")
    print(f"{translated} forms of kernels with one integer as 1 were translated, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
