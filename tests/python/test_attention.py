"""onepass.attention and varlen_attention, forward and backward, against the float64 oracle: every option, dtype and
device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onepass
import oracle
import pytest
import torch
from oracle import Options
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 4
    heads_kv: int = 4
    seqlen_q: int = 37
    seqlen_k: int = 37
    head_dim: int = 32
    head_dim_v: int = 32


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape = Shape()
    options: Callable[[Shape], Options] = lambda shape: Options()


def randn(*size: int) -> Tensor:
    return torch.randn(size)


CASES = [
    Case("plain"),
    Case("causal", Shape(seqlen_q=129, seqlen_k=129), lambda s: Options(causal=True)),
    Case("causal, more keys", Shape(seqlen_q=19, seqlen_k=70), lambda s: Options(causal=True)),
    Case("causal, fewer keys: empty rows", Shape(seqlen_q=40, seqlen_k=23), lambda s: Options(causal=True)),
    Case("causal, top left", Shape(seqlen_k=70), lambda s: Options(causal=True, alignment="top_left")),
    Case("groups of query heads", Shape(heads=8, heads_kv=2), lambda s: Options(causal=True)),
    Case("one key/value head", Shape(heads=6, heads_kv=1)),
    Case("odd head_dim", Shape(head_dim=17, head_dim_v=17)),
    Case("head_dim_v", Shape(head_dim=40, head_dim_v=72)),
    Case("head_dim 256", Shape(heads=2, heads_kv=2, head_dim=256, head_dim_v=256)),
    Case("head_dim 1", Shape(head_dim=1, head_dim_v=1)),
    Case("one query", Shape(seqlen_q=1, seqlen_k=300)),
    Case("one key", Shape(seqlen_k=1)),
    Case("scale", options=lambda s: Options(softmax_scale=0.3)),
    Case("scale 0", options=lambda s: Options(softmax_scale=0.0)),
    Case("negative scale", options=lambda s: Options(softmax_scale=-0.2)),
    Case("window", Shape(seqlen_q=150, seqlen_k=150), lambda s: Options(window=(20, 7))),
    Case("window to the left", Shape(seqlen_q=150, seqlen_k=180), lambda s: Options(causal=True, window=(31, None))),
    Case("window to the right", Shape(seqlen_k=80), lambda s: Options(window=(None, 3))),
    Case("softcap", options=lambda s: Options(softcap=1.5)),
    Case("alibi", options=lambda s: Options(causal=True, alibi_slopes=onepass.alibi_slopes(s.heads))),
    Case("alibi, both sides", Shape(seqlen_k=50), lambda s: Options(alibi_slopes=onepass.alibi_slopes(s.heads))),
    Case(
        "alibi, future at 0",
        options=lambda s: Options(alibi_slopes=torch.rand(s.batch, s.heads), alibi_zero_for_future=True),
    ),
    Case("bias", options=lambda s: Options(bias=randn(s.batch, s.heads, s.seqlen_q, s.seqlen_k))),
    Case("bias per head", options=lambda s: Options(bias=randn(s.heads, s.seqlen_q, s.seqlen_k), causal=True)),
    Case("bias per key", Shape(seqlen_k=50), lambda s: Options(bias=randn(s.batch, 1, 1, s.seqlen_k))),
    Case("bias per query", options=lambda s: Options(bias=randn(s.seqlen_q, 1))),
    Case("sinks", options=lambda s: Options(sinks=randn(s.heads), causal=True)),
    Case("sinks and empty rows", Shape(seqlen_q=40, seqlen_k=23), lambda s: Options(sinks=randn(s.heads), causal=True)),
    Case(
        "padding on both sides",
        options=lambda s: Options(
            key_begin=torch.tensor([3, 0], dtype=torch.int32), key_end=torch.tensor([37, 30], dtype=torch.int32)
        ),
    ),
    Case(
        "all keys of one sequence hidden",
        options=lambda s: Options(key_end=torch.tensor([0, 30], dtype=torch.int32), causal=True),
    ),
    Case(
        "everything",
        Shape(heads=6, heads_kv=2, seqlen_q=70, seqlen_k=90, head_dim=24, head_dim_v=40),
        lambda s: Options(
            causal=True,
            softmax_scale=0.4,
            window=(40, None),
            softcap=3.0,
            alibi_slopes=onepass.alibi_slopes(s.heads),
            bias=randn(s.heads, 1, s.seqlen_k),
            sinks=randn(s.heads),
            key_begin=torch.tensor([0, 25], dtype=torch.int32),
        ),
    ),
]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = randn(shape.batch, shape.heads, shape.seqlen_q, shape.head_dim)
    k = randn(shape.batch, shape.heads_kv, shape.seqlen_k, shape.head_dim)
    v = randn(shape.batch, shape.heads_kv, shape.seqlen_k, shape.head_dim_v)
    dout = randn(shape.batch, shape.heads, shape.seqlen_q, shape.head_dim_v)
    q, k, v, dout = (tensor.to(device, dtype) for tensor in (q, k, v, dout))
    return q, k, v, dout


def on_device(options: Options, device: torch.device) -> Options:
    return Options(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in vars(options).items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, _ = inputs(case.shape, dtype, device)
    options = on_device(case.options(case.shape), device)
    result = onepass.attention(q, k, v, **options.arguments(), return_lse=True, return_total_attention=True)
    exact = oracle.attention(q, k, v, options)
    naive = oracle.attention(q, k, v, options, dtype)
    assert result.out.dtype == dtype
    assert result.lse.dtype == result.total_attention.dtype == torch.float32
    oracle.assert_as_good_as_naive(result.out, exact.out, naive.out, "out")
    oracle.assert_as_good_as_naive(result.lse, exact.lse, naive.lse, "lse", addends=1.0)
    oracle.assert_as_good_as_naive(
        result.total_attention, exact.total_attention, naive.total_attention, "total_attention"
    )
    alone = onepass.attention(q, k, v, **options.arguments())
    assert torch.equal(alone, result.out), "asking for statistics changed the output"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backward(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, dout = inputs(case.shape, dtype, device)
    options = on_device(case.options(case.shape), device)
    exact = oracle.with_gradients(q, k, v, options, dout)
    naive = oracle.with_gradients(q, k, v, options, dout, dtype)
    learned = options.map(lambda tensor: tensor.clone().requires_grad_())
    leaves = {"q": q, "k": k, "v": v, "bias": learned.bias, "sinks": learned.sinks}
    variables = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    learned = replace(learned, bias=variables.get("bias"), sinks=variables.get("sinks"))
    out = onepass.attention(variables["q"], variables["k"], variables["v"], **learned.arguments())
    gradients = torch.autograd.grad(out, list(variables.values()), dout)
    for (name, leaf), gradient in zip(variables.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype, name
        oracle.assert_as_good_as_naive(
            gradient, exact.gradients[name], naive.gradients[name], f"gradient of {name}", exact.addends[name]
        )


# Ragged batches ---------------------------------------------------------------------------------------------------

RAGGED = {
    "self-attention": ([5, 64, 0, 33, 1], [5, 64, 0, 33, 1]),
    "queries and keys differ": ([5, 17, 0, 40, 3], [9, 3, 4, 0, 80]),
    "one sequence": ([50], [70]),
    "all empty": ([0, 0], [0, 0]),
    "no sequences": ([], []),
}
RAGGED_OPTIONS = {
    "plain": Options(),
    "causal": Options(causal=True),
    "window, softcap": Options(causal=True, window=(7, None), softcap=2.0),
}


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", RAGGED_OPTIONS.values(), ids=list(RAGGED_OPTIONS))
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=list(RAGGED))
def test_varlen(
    lengths: tuple[list[int], list[int]], options: Options, dtype: torch.dtype, device: torch.device
) -> None:
    heads, heads_kv, head_dim, head_dim_v = 4, 2, 24, 40
    lengths_q, lengths_k = lengths
    q = randn(sum(lengths_q), heads, head_dim).to(device, dtype).requires_grad_()
    k = randn(sum(lengths_k), heads_kv, head_dim).to(device, dtype).requires_grad_()
    v = randn(sum(lengths_k), heads_kv, head_dim_v).to(device, dtype).requires_grad_()
    dout = randn(sum(lengths_q), heads, head_dim_v).to(device, dtype)
    cu_q, cu_k = cumulative(lengths_q, device), cumulative(lengths_k, device)
    result = onepass.varlen_attention(
        q, k, v, cu_q, cu_k, **options.arguments(), return_lse=True, return_total_attention=True
    )
    gradients = torch.autograd.grad(result.out, (q, k, v), dout)
    assert result.lse.shape == (heads, sum(lengths_q))
    assert result.total_attention.shape == (heads, sum(lengths_k))
    for b in range(len(lengths_q)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])

        def dense(tensor: Tensor, tokens: slice) -> Tensor:
            return tensor[tokens].detach().transpose(0, 1).unsqueeze(0)

        operands = dense(q, rows), dense(k, keys), dense(v, keys), options, dense(dout, rows)
        exact, naive = oracle.with_gradients(*operands), oracle.with_gradients(*operands, dtype)
        pairs = {
            "out": (dense(result.out, rows), exact.out, naive.out),
            "lse": (result.lse[None, :, rows], exact.lse, naive.lse),
            "total_attention": (
                result.total_attention[None, :, keys],
                exact.total_attention,
                naive.total_attention,
            ),
        }
        for name, gradient, tokens in zip("qkv", gradients, (rows, keys, keys), strict=True):
            pairs[f"gradient of {name}"] = (dense(gradient, tokens), exact.gradients[name], naive.gradients[name])
        for name, (actual, expected, rounded) in pairs.items():
            addends = exact.addends.get(name.removeprefix("gradient of "), 0.0)
            oracle.assert_as_good_as_naive(actual, expected, rounded, f"{name} of sequence {b}", addends)


def test_rows_past_the_last_sequence_are_empty(device: torch.device) -> None:
    q, k, v = (randn(20, 2, 16).to(device).requires_grad_() for _ in range(3))
    bounds = cumulative([5, 7], device)
    result = onepass.varlen_attention(q, k, v, bounds, bounds, return_lse=True, return_total_attention=True)
    gradients = torch.autograd.grad(result.out.sum(), (q, k, v))
    assert not result.out[12:].any()
    assert (result.lse[:, 12:] == -torch.inf).all()
    assert not result.total_attention[:, 12:].any()
    for gradient in gradients:
        assert gradient[:12].any()
        assert not gradient[12:].any()


def test_cu_seqlens_of_int64_are_converted(device: torch.device) -> None:
    q = randn(12, 2, 16).to(device)
    bounds = cumulative([5, 7], device)
    assert torch.equal(
        onepass.varlen_attention(q, q, q, bounds, bounds),
        onepass.varlen_attention(q, q, q, bounds.long(), bounds.long(), max_seqlen_q=7, max_seqlen_k=7),
    )


# Empty dimensions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "seqlen_q", "seqlen_k"),
    [(0, 2, 3, 4), (1, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0)],
)
def test_empty_dimensions(batch: int, heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> None:
    shape = Shape(batch, heads, heads, seqlen_q, seqlen_k, 8, 8)
    q, k, v, dout = inputs(shape, torch.float32, device)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    result = onepass.attention(q, k, v, return_lse=True, return_total_attention=True)
    gradients = torch.autograd.grad(result.out, (q, k, v), dout)
    assert result.out.shape == (batch, heads, seqlen_q, 8)
    assert not result.out.any()
    assert (result.lse == -torch.inf).all()
    assert not result.total_attention.any()
    assert not any(gradient.any() for gradient in gradients)
