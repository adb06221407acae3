"""The operations as torch sees them: schemas, fake kernels, torch.compile, autocast, strides, the shared library."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import onepass
import oracle
import pytest
import torch
from onepass import _library
from oracle import Options
from torch import Tensor

ops = torch.ops.onepass
STATE = torch.tensor([17, 4])


def randn(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=dtype)


def transposed(batch: int, heads: int, seqlen: int, dim: int) -> Tensor:
    """(batch, heads, seqlen, dim) as most models hold it: (batch, seqlen, heads, dim) in memory."""
    return randn(batch, seqlen, heads, dim).transpose(1, 2)


DENSE: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": ((randn(2, 4, 5, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 3)), {}),
    "float32": (tuple(randn(2, 2, 5, 8, dtype=torch.float32) for _ in range(3)), {"causal": True}),
    "transposed": ((transposed(2, 4, 5, 8), transposed(2, 2, 6, 8), transposed(2, 2, 6, 3)), {"causal": True}),
    "any order": (
        (
            randn(5, 2, 4, 8).permute(1, 2, 0, 3),
            randn(6, 2, 2, 8).permute(1, 2, 0, 3),
            randn(2, 6, 2, 8).permute(2, 0, 1, 3),
        ),
        {},
    ),
    "strided rows": (tuple(randn(2, 2, 8, 5).transpose(-1, -2) for _ in range(3)), {}),
    "no batch": ((randn(0, 4, 5, 8), randn(0, 2, 6, 8), randn(0, 2, 6, 3)), {}),
    "options": (
        (randn(2, 4, 5, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 3)),
        {
            "softmax_scale": 0.5,
            "bias": randn(1, 4, 1, 6),
            "sinks": randn(4),
            "alibi_slopes": torch.rand(2, 4),
            "key_begin": torch.tensor([0, 2], dtype=torch.int32),
            "key_end": torch.tensor([6, 5], dtype=torch.int32),
            "window_left": 3,
            "window_right": 2,
            "softcap": 2.0,
            "top_left": True,
            "alibi_zero_for_future": True,
        },
    ),
    "dropout": (tuple(randn(1, 2, 4, 8) for _ in range(3)), {"dropout_p": 0.25, "dropout_state": STATE}),
}
BOUNDS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
RAGGED = (randn(7, 4, 8), randn(9, 2, 8), randn(9, 2, 3), BOUNDS, BOUNDS, 4, 4)


@pytest.mark.parametrize("name", DENSE)
def test_opcheck_dense(name: str) -> None:
    operands, options = DENSE[name]
    if not options.keys() - {"causal", "softmax_scale"}:
        torch.library.opcheck(ops.plain_attention.default, operands, options)
    torch.library.opcheck(ops.attention.default, operands, options)
    torch.library.opcheck(
        ops.attention_with_lse.default, operands, {**options, "return_total_attention": name == "options"}
    )
    out, lse, _ = ops.attention_with_lse(*operands, **options)
    request = {"bias_gradient": "bias" in options, "sinks_gradient": "sinks" in options}
    torch.library.opcheck(
        ops.attention_backward.default, (torch.randn_like(out), out, lse, *operands), {**options, **request}
    )


@pytest.mark.parametrize("options", [{}, {"causal": True, "sinks": randn(4), "window_left": 2}], ids=["plain", "more"])
def test_opcheck_ragged(options: dict[str, Any]) -> None:
    torch.library.opcheck(ops.varlen_attention.default, RAGGED, options)
    torch.library.opcheck(ops.varlen_attention_with_lse.default, RAGGED, {**options, "return_total_attention": True})
    out, lse, _ = ops.varlen_attention_with_lse(*RAGGED, **options)
    request = {"sinks_gradient": "sinks" in options, "deterministic": True}
    torch.library.opcheck(
        ops.varlen_attention_backward.default, (torch.randn_like(out), out, lse, *RAGGED), {**options, **request}
    )


def test_opcheck_merge_states() -> None:
    parts = randn(2, 3, 4, 5), randn(2, 3, 4), transposed(2, 3, 4, 5), randn(2, 3, 4)
    torch.library.opcheck(ops.merge_states.default, parts)


# Strides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)], ids=str)
def test_output_and_gradients_lie_like_the_inputs(order: tuple[int, ...]) -> None:
    sizes = (2, 4, 5, 8)
    inverse = sorted(range(4), key=lambda dim: order[dim])
    q, k, v = (
        randn(*(sizes[dim] for dim in order), dtype=torch.float32).permute(inverse).requires_grad_() for _ in range(3)
    )
    out = onepass.attention(q, k, v)
    assert out.shape == sizes
    assert out.stride() == q.stride()
    for operand, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.stride() == operand.stride()


def test_strided_last_dimensions_are_copied() -> None:
    q, k, v = (torch.randn(2, 3, 8, 6).transpose(-1, -2) for _ in range(3))
    torch.testing.assert_close(
        onepass.attention(q, k, v), onepass.attention(q.contiguous(), k.contiguous(), v.contiguous()), rtol=0, atol=0
    )


def test_inputs_are_read_where_they_lie() -> None:
    """Slices, expanded heads, odd offsets and size-1 dimensions with odd strides: the values decide, not the layout."""
    storage = torch.randn(10000)
    q = storage[1:].as_strided((1, 3, 5, 7), (12345, 700, 11, 1))
    k = storage[3:].as_strided((1, 3, 6, 7), (1, 0, 13, 1))
    v = storage[5:].as_strided((1, 3, 6, 9), (0, 500, 31, 1))
    torch.testing.assert_close(
        onepass.attention(q, k, v), onepass.attention(q.clone(), k.clone(), v.clone()), rtol=0, atol=0
    )


# torch.compile ----------------------------------------------------------------------------------------------------


def compiled_matches_eager(function: Any, *tensors: Tensor, **settings: Any) -> None:
    torch._dynamo.reset()
    results = []
    for candidate in (function, torch.compile(function, fullgraph=True, **settings)):
        leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
        learned = [tensor for tensor in leaves if tensor.requires_grad]
        torch.manual_seed(3)
        out = candidate(*leaves)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), learned)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
        assert eager.stride() == compiled.stride()


def test_compile_full_graph() -> None:
    q, k, v = (torch.randn(2, 6, 4, 8).transpose(1, 2) for _ in range(3))
    bias, sinks = torch.randn(4, 1, 6), torch.randn(4)
    compiled_matches_eager(lambda q, k, v: onepass.attention(q * 2, k, v, causal=True) + 1, q, k, v)
    compiled_matches_eager(
        lambda q, k, v, bias, sinks: onepass.attention(
            q, k, v, bias=bias, sinks=sinks, window=(3, None), softcap=2.0, alibi_slopes=onepass.alibi_slopes(4)
        ),
        q, k, v, bias, sinks,
    )  # fmt: skip


def test_compile_ragged_and_merge() -> None:
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    compiled_matches_eager(
        lambda q, k, v, bounds: onepass.varlen_attention(q, k, v, bounds, bounds, causal=True), q, k, v, BOUNDS
    )
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)

    def split(a: Tensor, b: Tensor) -> Tensor:
        parts = (onepass.attention(a, part, part, return_lse=True) for part in (a, b))
        return onepass.merge_states(*(tensor for part in parts for tensor in part[:2]))[0]

    compiled_matches_eager(split, a, b)


def test_compile_sdpa_with_masks() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    mask = torch.rand(2, 1, 1, 6) > 0.3
    compiled_matches_eager(lambda q, k, v, mask: onepass.scaled_dot_product_attention(q, k, v, mask), q, k, v, mask)


def test_compile_without_gradients_and_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: onepass.attention(q, k, k, causal=True, return_lse=True)[:2], fullgraph=True, dynamic=True
    )
    for seqlen in (5, 9, 33):
        q, k = torch.randn(2, 4, seqlen, 8), torch.randn(2, 2, seqlen + 3, 8)
        for actual, expected in zip(
            compiled(q, k), onepass.attention(q, k, k, causal=True, return_lse=True)[:2], strict=True
        ):
            torch.testing.assert_close(actual, expected)


def test_compile_dropout_draws_anew_and_repeats_by_seed() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 32, 8)
    compiled = torch.compile(lambda q: onepass.attention(q, q, q, dropout_p=0.5), fullgraph=True)
    torch.manual_seed(5)
    first, second = compiled(q), compiled(q)
    torch.manual_seed(5)
    assert torch.equal(compiled(q), first)
    assert not torch.equal(first, second)


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            out: Tensor = onepass.attention(q, k, k, causal=True)
            return out

    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    program = torch.export.export(Model(), (q, k))
    torch.testing.assert_close(program.module()(q, k), onepass.attention(q, k, k, causal=True))


# Autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 1, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = onepass.attention(q, k, v, bias=bias)
        inside = onepass.scaled_dot_product_attention(q, k, v)
        double = onepass.attention(q.double(), k.double(), v.double())
    assert out.dtype == inside.dtype == dtype
    assert double.dtype == torch.float64
    torch.testing.assert_close(out, onepass.attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias))
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert onepass.attention(q, k, v).dtype == torch.float32


# The package ------------------------------------------------------------------------------------------------------


def test_info() -> None:
    text = onepass.info()
    assert text.startswith(f"onepass {onepass.__version__}\n")
    assert f"torch: {torch.__version__}" in text
    for backend in ("cpu", "cuda", "hopper", "reference"):
        assert re.search(rf"^{backend}: .+", text, re.MULTILINE), backend


def test_library_needs_neither_python_nor_a_particular_torch() -> None:
    """Undefined symbols outside the C library are torch's C shims, present since 2.10; nothing of the core leaks."""
    undefined = subprocess.run(["nm", "-D", "--undefined-only", _library.LIBRARY], capture_output=True, text=True)
    if undefined.returncode != 0:
        pytest.skip("no nm")
    names = [line.split()[-1] for line in undefined.stdout.splitlines()]
    assert not [name for name in names if name.startswith(("Py", "_Py")) or "c10" in name or "2at" in name]
    newer = ("torch_exception", "torch_delete_stable", "torch_new_stable", "torch_from_blob", "torch_library_def")
    assert not [name for name in names if name.startswith(newer)]
    defined = subprocess.run(
        ["nm", "-D", "--defined-only", _library.LIBRARY], capture_output=True, text=True, check=True
    )
    assert "onepass" not in defined.stdout


def test_errors_of_a_missing_library_and_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "LIBRARY", _library.LIBRARY.with_name("absent.so"))
    with pytest.raises(ImportError, match=r"onepass: library: .*absent.so does not exist; install the wheel"):
        _library._load()
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"onepass: torch: got 2.9.1; need 2.10 or newer"):
        _library._load()


@pytest.mark.parametrize("num_heads", [1, 2, 8, 12, 20])
def test_alibi_slopes(num_heads: int) -> None:
    slopes = onepass.alibi_slopes(num_heads)
    lower = 2 ** (num_heads.bit_length() - 1)
    expected = [2.0 ** (-8.0 * n / lower) for n in range(1, lower + 1)]
    expected += [2.0 ** (-4.0 * n / lower) for n in range(1, 2 * lower, 2)][: num_heads - lower]
    torch.testing.assert_close(slopes, torch.tensor(expected))
    geometric = onepass.alibi_slopes(num_heads, geometric=True)
    torch.testing.assert_close(geometric, torch.tensor([2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)]))


def test_alibi_slopes_refuse_no_heads() -> None:
    with pytest.raises(ValueError, match="alibi_slopes: num_heads: got 0; need at least 1"):
        onepass.alibi_slopes(0)


def test_float64_is_the_formula() -> None:
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 6)
    exact = oracle.attention(q, k, v, Options(causal=True))
    torch.testing.assert_close(onepass.attention(q, k, v, causal=True), exact.out, rtol=1e-13, atol=1e-13)
