"""DTensor's rules for attention: two processes, each with its part, give the results and gradients of one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onepass
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
WORLD = 2
BATCH, HEADS, SEQLEN, DIM = 4, 8, 20, 16
ROWS, COLUMNS = Shard(0), Shard(1)
ALL = Replicate()


def inputs(heads_kv: int = 2, heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, count, SEQLEN, DIM) for count in (heads, heads_kv, heads_kv)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check(
    mesh: Any, placement: Any, tensors: list[Tensor], extra: dict[str, tuple[Tensor, Any]], **options: Any
) -> Any:
    """Forward and backward with sharded operands against the same without; the sharded results.

    Args:
        extra: further tensors by argument name, with their placement.
    """
    whole = [x.clone().requires_grad_() for x in tensors]
    whole_extra = {n: x.clone().requires_grad_(n != "alibi_slopes") for n, (x, _) in extra.items()}
    parts = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in tensors]
    parts_extra = {
        n: distribute_tensor(x, mesh, [p]).requires_grad_(n != "alibi_slopes") for n, (x, p) in extra.items()
    }
    want = onepass.attention(*whole, **whole_extra, **options, return_lse=True)
    got = onepass.attention(*parts, **parts_extra, **options, return_lse=True)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a.full_tensor(), b)
    weight = torch.randn(want.out.shape, generator=torch.Generator().manual_seed(1))
    (want.out * weight).sum().backward()
    (got.out * distribute_tensor(weight, mesh, [placement])).sum().backward()
    pairs = [*zip(parts, whole, strict=True), *((parts_extra[n], x) for n, x in whole_extra.items() if x.requires_grad)]
    for part, x in pairs:
        torch.testing.assert_close(part.grad.full_tensor(), x.grad, atol=2e-5, rtol=1e-4)
    return got, parts, parts_extra


def process(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    import onepass.distributed

    mesh = init_device_mesh("cpu", (WORLD,))
    for placement in (ROWS, COLUMNS, ALL):
        got, parts, _ = check(mesh, placement, inputs(), {}, causal=True)
        assert got.out.placements == got.lse.placements == (placement,)
        assert [part.grad.placements for part in parts] == 3 * [(placement,)]
        with torch.no_grad():  # the short way of a plain call
            assert onepass.attention(*parts).placements == (placement,)
            # The same operation with another flag: placements are not those remembered from before.
            total = onepass.attention(*parts, return_total_attention=True).total_attention
            assert total.placements == (placement,)
            want = onepass.attention(*inputs(), return_total_attention=True).total_attention
            torch.testing.assert_close(total.full_tensor(), want)

    # One key/value head: replicated, its gradients are partial sums.
    tensors = inputs(heads_kv=1)
    q, k, v = (distribute_tensor(x, mesh, [p]) for x, p in zip(tensors, (COLUMNS, ALL, ALL), strict=True))
    out = onepass.attention(q, k.requires_grad_(), v)
    assert out.placements == (COLUMNS,)
    torch.testing.assert_close(out.full_tensor(), onepass.attention(*tensors))
    gradients = torch.ops.onepass.attention_backward(
        out.detach(), *onepass.attention(q, k.detach(), v, return_lse=True)[:2], q, k.detach(), v
    )
    assert [gradient.placements for gradient in gradients] == [(COLUMNS,), (Partial(),), (Partial(),), (ALL,), (ALL,)]
    check(mesh, COLUMNS, inputs(heads_kv=2), {})

    # Tensors of the score: per head, per sequence, or shared.
    slopes, sinks = onepass.alibi_slopes(HEADS), torch.linspace(-1, 1, HEADS)
    score = {"alibi_slopes": (slopes, ROWS), "sinks": (sinks, ROWS)}
    *_, extra = check(mesh, COLUMNS, inputs(), score)
    assert extra["sinks"].grad.placements == (ROWS,)
    check(mesh, ROWS, inputs(), {"alibi_slopes": (slopes, ALL), "sinks": (sinks, ALL)})
    bias = torch.randn(BATCH, HEADS, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(2))
    check(mesh, ROWS, inputs(), {"bias": (bias, ROWS)})
    check(mesh, COLUMNS, inputs(), {"bias": (bias, COLUMNS)})
    check(mesh, ROWS, inputs(), {"bias": (bias[:1], ALL)})
    check(mesh, COLUMNS, inputs(), {"bias": (bias[:, :1], ALL)})

    # Three key/value heads do not divide: gathered, not cut through groups.
    tensors = inputs(heads_kv=3, heads=6)
    q, k, v = (distribute_tensor(x, mesh, [p]) for x, p in zip(tensors, (COLUMNS, ALL, ALL), strict=True))
    out = onepass.attention(q, k, v)
    assert isinstance(out, DTensor)
    assert out.placements == (ALL,)
    torch.testing.assert_close(out.full_tensor(), onepass.attention(*tensors))
    dist.barrier()  # gloo's threads abort the process that leaves while the other still talks
    dist.destroy_process_group()


def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (str(Path(folder) / "store"),), WORLD)
