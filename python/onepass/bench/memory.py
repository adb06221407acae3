"""Peak memory of one call, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onepass.bench.cases import KINDS, Case, Inputs
from onepass.bench.contenders import CONTENDERS


@dataclass(frozen=True)
class Peak:
    """Memory that a contender needs beyond the inputs, in MiB (outputs and gradients included); None: it failed."""

    case: Case
    contender: str
    mebibytes: float | None

    def row(self) -> dict[str, Any]:
        return {**self.case.describe(), "contender": self.contender, "mebibytes": self.mebibytes}


def measure(case: Case, contender: str, device: torch.device, timeout: float = 120.0) -> Peak:
    """Runs the case once in a child process and reads its peak memory there."""
    request = json.dumps({"case": case.describe(), "contender": contender, "device": str(device)})
    command = [sys.executable, "-m", "onepass.bench.memory", request]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Peak(case, contender, None)
    if child.returncode != 0:
        print(f"{contender}, {case.label()}: {child.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return Peak(case, contender, None)
    return Peak(case, contender, round(float(child.stdout), 2))


def _status(field: str) -> int:
    """A memory figure of this process from /proc, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"bench memory: /proc/self/status: got no {field}; need Linux")


def _child(request: str) -> float:
    """MiB that the requested call adds to this process' (or the GPU's) memory at its peak."""
    wanted = json.loads(request)
    case, device = Case(**wanted["case"]), torch.device(wanted["device"])

    def prepare(shape: Case) -> Any:
        return KINDS[shape.kind](Inputs.of(shape, device), CONTENDERS[wanted["contender"]](shape, device))

    prepare(case.at(batch=1, seqlen_q=64, seqlen_k=64))()  # libraries, thread pools and their buffers
    call = prepare(case)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    call()
    return (_status("VmHWM") - before) / 1024


if __name__ == "__main__":
    print(_child(sys.argv[1]))
