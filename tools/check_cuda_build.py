#!/usr/bin/env python3
"""Static checks of compiled CUDA kernels: registers, stack frames, spills and tensor-core instructions.

Usage: check_cuda_build.py [--log BUILD_LOG] FILE…    (objects or a library that hold device code)

Reads the machine code with cuobjdump (from the CUDA toolkit, or the copy that Triton's package carries) and fails when

* a kernel has a stack frame beyond its allowance, or local-memory traffic beyond it (spills),
* a kernel of 16-bit operands lacks the matrix instructions it was written for (HMMA; HGMMA or QGMMA on sm_90a), or
* the build log holds a ptxas warning that costs speed: C7508 (setmaxnreg ignored), C7509/C7510 (wgmma serialized),
  C7513/C7514 (wgmma operands not in flight).
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PTXAS_WARNINGS = ("C7508", "C7509", "C7510", "C7513", "C7514")
# Kernels that must use tensor cores, whenever their operands are 16-bit.
MATRIX_KERNELS = re.compile(r"forward|backward_keys|backward_queries|bias_gradient|total_attention|decode|piecewise")
HALF = re.compile(r"__half|__nv_bfloat16|cutlass::half_t|cutlass::bfloat16_t")
# Local loads and stores allowed in a kernel, by name: outside its loops, found harmless by measurement.
ALLOWED_LOCAL = {
    re.compile(r"forward_kernel<.*ForwardConfig<(__half|__nv_bfloat16), 128, false>"): 16,
    re.compile(r"backward_keys_kernel<.*KeyPassConfig<(__half|__nv_bfloat16), (64|128),"): 24,
}


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    instructions: Counter[str] = field(default_factory=Counter)
    registers: int = 0
    stack: int = 0

    @property
    def local(self) -> int:
        """Instructions that read or write local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]

    def problems(self) -> list[str]:
        """What is wrong with the kernel; empty when nothing is."""
        found = []
        allowed = next((count for pattern, count in ALLOWED_LOCAL.items() if pattern.search(self.name)), 0)
        if self.local > allowed:
            found.append(f"{self.local} local-memory instructions (at most {allowed})")
        if self.stack > 0 and allowed == 0:
            found.append(f"stack frame of {self.stack} bytes (none)")
        if HALF.search(self.name) and MATRIX_KERNELS.search(self.name):
            wanted = ("HGMMA", "QGMMA") if self.arch.endswith("a") else ("HMMA",)
            if not any(self.instructions[name] for name in wanted):
                found.append(f"no {' or '.join(wanted)}")
        return found


def find_cuobjdump() -> str:
    """Path of cuobjdump; exits with what to install when there is none."""
    candidates = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return candidate
    sys.exit("check_cuda_build: no cuobjdump; install cuda-cuobjdump or Triton's package")


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names, without parameter lists and namespaces."""
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    readable = (re.sub(r"\(onepass.*|^void |onepass::cuda::", "", line) for line in output.splitlines())
    return dict(zip(names, readable, strict=True))


def read_kernels(cuobjdump: str, file: Path) -> list[Kernel]:
    """Every kernel in the file's machine code."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch, current = "", None
    sass = subprocess.run([cuobjdump, "-sass", str(file)], capture_output=True, text=True, check=True).stdout
    for line in sass.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            current = kernels.setdefault((match[1], arch), Kernel(match[1], arch))
        elif current and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", line)):
            current.instructions[match[1]] += 1
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True
    ).stdout
    for line in usage.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            current = kernels.get((match[1], arch))
        elif current and (match := re.search(r"REG:(\d+) STACK:(\d+)", line)):
            current.registers, current.stack = int(match[1]), int(match[2])
    readable = demangle([kernel.name for kernel in kernels.values()])
    for kernel in kernels.values():
        kernel.name = readable[kernel.name]
    return list(kernels.values())


def main() -> int:
    """Prints one line a kernel and the problems; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="objects or libraries with device code")
    parser.add_argument("--log", type=Path, help="output of the build, searched for ptxas warnings")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    arguments = parser.parse_args()
    cuobjdump = find_cuobjdump()
    problems, count = [], 0
    for file in arguments.files:
        for kernel in read_kernels(cuobjdump, file):
            count += 1
            found = kernel.problems()
            problems += [f"{kernel.arch} {kernel.name}: {problem}" for problem in found]
            if not arguments.quiet:
                matrix = sum(kernel.instructions[name] for name in ("HMMA", "HGMMA", "QGMMA"))
                numbers = (
                    f"{kernel.registers:3} registers {kernel.stack:4} B stack {kernel.local:3} local {matrix:4} matrix"
                )
                print(f"{kernel.arch:7} {numbers} {sum(kernel.instructions.values()):6} total  {kernel.name}")
    if arguments.log:
        lines = arguments.log.read_text(errors="replace").splitlines()
        problems += [line.strip() for line in lines if any(warning in line for warning in PTXAS_WARNINGS)]
    if count == 0:
        problems.append("no kernels found")
    for problem in problems:
        print(f"check_cuda_build: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
