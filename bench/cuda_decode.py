"""The record of attention over caches on a GPU: onepass beside torch's flash and cuDNN backends.

``python bench/cuda_decode.py [--output FOLDER] [--quick]`` writes ``cuda-decode.json`` and ``cuda-decode.png``. Every
case has as many caches as exceed the second-level cache, filled with random normal numbers; a call takes the next one,
as the layers of a model do. "graph": calls inside one CUDA graph; "eager": the same calls from Python. Contenders take
turns; a time is the median over the rounds of microseconds per call. KV bytes: everything stored for the visible keys,
scales included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import onepass
import torch
import torch.nn.functional as F
from gpu import command_line, write
from torch.nn.attention import SDPBackend, sdpa_kernel

CALLS = 20  # of one graph
COLD_BYTES = 200 << 20  # of all caches of a case: more than any second-level cache
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Case:
    """One shape. ``storage``: "bfloat16" or a quantization; ``seqlen_q`` queries of every sequence."""

    group: str
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_k: int
    head_dim: int
    seqlen_q: int = 1
    storage: str = "bfloat16"
    page_size: int | None = None

    def name(self) -> str:
        shape = f"{self.batch},{self.num_heads},{self.num_heads_kv},{self.seqlen_k},{self.head_dim}"
        pages = "" if self.page_size is None else f" pages of {self.page_size}"
        return f"{self.group}: {shape} x{self.seqlen_q} {self.storage}{pages}"


SHAPES = (
    (1, 32, 32, 1024, 128),
    (1, 32, 8, 8192, 128),
    (1, 32, 8, 131072, 128),
    (8, 32, 8, 8192, 128),
    (32, 32, 8, 4096, 128),
    (128, 32, 32, 1024, 128),
    (16, 32, 32, 4096, 128),
    (64, 64, 8, 8192, 128),
    (128, 32, 32, 128, 128),
    (10, 32, 32, 1024, 64),
)


def cases(quick: bool) -> list[Case]:
    found = [Case("decode", *shape) for shape in SHAPES]
    large, small = (32, 32, 8, 4096, 128), (1, 32, 8, 8192, 128)
    shapes = (large,) if quick else (large, small)
    for shape in shapes:
        found += [Case("storage", *shape, storage=storage) for storage in ("int8", "fp8_e4m3", "fp8_e5m2")]
        found += [Case("queries", *shape, seqlen_q=count) for count in ((4, 8) if quick else (1, 2, 4, 8))]
        found += [Case("pages", *shape, page_size=size) for size in ((16,) if quick else (16, 64, 256))]
    found += [Case("chunk", 1, 32, 8, 8192, 128, seqlen_q=512), Case("chunk", 4, 32, 8, 4096, 128, seqlen_q=256)]
    return found


def filled(case: Case) -> onepass.KVCache:
    dtype = torch.bfloat16
    quantization = None if case.storage == "bfloat16" else case.storage
    cache = onepass.KVCache(
        case.batch,
        case.seqlen_k,
        case.num_heads_kv,
        case.head_dim,
        device="cuda",
        quantization=quantization,
        page_size=case.page_size,
    )
    shape = (case.batch, case.num_heads_kv, case.seqlen_k, case.head_dim)
    cache.append(torch.randn(shape, dtype=dtype, device="cuda"), torch.randn(shape, dtype=dtype, device="cuda"))
    return cache


def contenders(case: Case) -> tuple[dict[str, Callable[[int], object]], int]:
    """Calls by contender, each given the number of the cache to use, and the KV bytes of one call."""
    first = filled(case)
    bytes_of_call = first.nbytes
    caches = [first] + [filled(case) for _ in range(min(CALLS, -(-COLD_BYTES // bytes_of_call)) - 1)]
    shape = (case.batch, case.num_heads, case.seqlen_q, case.head_dim)
    q = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    found: dict[str, Callable[[int], object]] = {
        "onepass": lambda i: onepass.cached_attention(q, caches[i % len(caches)], max_seqlen_q=case.seqlen_q)
    }
    if case.storage != "bfloat16" or case.page_size is not None or case.seqlen_q > 8:
        return found, bytes_of_call
    grouped = case.num_heads != case.num_heads_kv

    # torch's backends have no causal mask that ends at the last key: several queries run without one.
    def peer(backend: SDPBackend) -> Callable[[int], object]:
        def call(i: int) -> object:
            cache = caches[i % len(caches)]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, cache.k, cache.v, enable_gqa=grouped)

        return call

    return found | {name: peer(backend) for name, backend in PEERS.items()}, bytes_of_call


def captured(call: Callable[[int], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(i) for i in range(CALLS)]
    return lambda: (graph.replay(), results)


def microseconds(run: Callable[[], object], count: int) -> list[float]:
    """Of one call among the CALLS of a run."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / CALLS * 1e3 for begin, end in events]


def measure(case: Case, rounds: int, eager: bool) -> tuple[dict[tuple[str, str], list[float]], int]:
    calls, bytes_of_call = contenders(case)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, call in calls.items():
        runs[name, "graph"] = captured(call)
        if eager:
            runs[name, "eager"] = lambda call=call: [call(i) for i in range(CALLS)]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for run in runs.values():
        microseconds(run, 1)
    for turn in range(rounds):
        for key in sorted(runs, reverse=turn % 2 == 1):
            times[key] += microseconds(runs[key], 3)
    return times, bytes_of_call


def draw(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("onepass", *PEERS)
    shown = [row for row in rows if row["group"] == "decode" and row["mode"] == "graph"]
    labels = list(dict.fromkeys(str(row["name"]) for row in shown))
    figure, axis = plt.subplots(figsize=(11, 5))
    for number, name in enumerate(names):
        heights = [next(row["kv_tb_per_s"] for row in shown if (row["name"], row["contender"]) == (label, name))
                   for label in labels]  # fmt: skip
        axis.bar([i + 0.27 * (number - 1) for i in range(len(labels))], heights, 0.25, label=name)
    axis.set_xticks(range(len(labels)), [label.split()[1].replace(",", "\n") for label in labels])
    axis.set_xlabel("batch, query heads, key/value heads, cached tokens, head_dim")
    axis.set_ylabel("TB/s of keys and values")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    axis.set_title("Decode, one bfloat16 query, caches not in L2, CUDA graph, " + torch.cuda.get_device_name())
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--group", help="only this group of cases")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    ratios: dict[str, list[float]] = {name: [] for name in PEERS}
    with torch.no_grad():
        for case in cases(arguments.quick):
            if arguments.group not in (None, case.group):
                continue
            times, bytes_of_call = measure(case, rounds=3 if arguments.quick else 7, eager=not arguments.quick)
            medians = {key: statistics.median(values) for key, values in times.items()}
            for (name, mode), values in times.items():
                quartiles = statistics.quantiles(values, n=4)
                rows.append(
                    {
                        "name": case.name(),
                        **asdict(case),
                        "contender": name,
                        "mode": mode,
                        "us": round(medians[name, mode], 3),
                        "us_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
                        "kv_tb_per_s": round(bytes_of_call / medians[name, mode] * 1e-6, 3),
                    }
                )
            text = "  ".join(
                f"{name}{'' if mode == 'graph' else '(eager)'} {time:.1f}us {bytes_of_call / time * 1e-6:.2f}"
                for (name, mode), time in medians.items()
            )
            print(f"{case.name():50s} {text}", flush=True)
            if case.group == "decode":
                for name in PEERS:
                    ratios[name].append(medians[name, "graph"] / medians["onepass", "graph"])
            torch.cuda.empty_cache()
    summary = {name: round(statistics.geometric_mean(values), 4) for name, values in ratios.items() if values}
    print("decode, geometric mean of peer over onepass:", summary)
    write(arguments, "cuda-decode", rows, decode_geometric_mean_over=summary)
    if not arguments.quick and arguments.group is None:
        draw(rows, arguments.output / "cuda-decode.png")


if __name__ == "__main__":
    main()
