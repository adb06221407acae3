"""Fails when a weak function of a static library contains AVX instructions.

The linker keeps one definition of each weak (inline or template) function of a program. One that was compiled for
AVX2 or AVX-512 would then also run on machines that lack them. Highway's per-target namespaces (N_AVX2, N_AVX3) are
exempt: their functions have a name of their own for each instruction set. Usage: isa_symbols.py libonepass.a
"""

import re
import subprocess
import sys
from collections.abc import Iterator

FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
AVX = re.compile(r"\t(v[a-z0-9]+|k(mov|or|and|not|xor|shift|unpck)[a-z]*)\s|%[yz]mm|%k[1-7]")
PER_TARGET = re.compile(r"\dN_(AVX|SSE|SSSE|EMU)")


def weak_functions(library: str) -> set[str]:
    lines = subprocess.run(["nm", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    return {line.split()[2] for line in lines.splitlines() if len(line.split()) == 3 and line.split()[1] in "WwVvu"}


def avx_functions(library: str) -> Iterator[tuple[str, str]]:
    """Each function with its first AVX instruction."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, found = "", True
        for line in process.stdout:
            if match := FUNCTION.match(line):
                name, found = match[1], False
            elif not found and AVX.search(line):
                found = True
                yield name, line.strip()


def main() -> int:
    library = sys.argv[1]
    weak = weak_functions(library)
    avx = dict(avx_functions(library))
    if not weak or not avx:
        print(f"{library}: {len(weak)} weak functions, {len(avx)} with AVX: nothing to check; is this the right file?")
        return 1
    wrong = sorted(name for name in weak & avx.keys() if not PER_TARGET.search(name))
    for name in wrong:
        print(f"weak and compiled for AVX: {name}\n  {avx[name]}")
    print(f"{len(weak)} weak functions, {len(avx)} with AVX, {len(wrong)} both")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
