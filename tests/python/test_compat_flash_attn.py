"""onepass.compat.flash_attn: FlashAttention-2's signatures, and its documented use against formulas in float64."""

from __future__ import annotations

import inspect
import math

import onepass
import oracle
import pytest
import torch
from onepass.compat import flash_attn
from torch import Tensor

_SCORE = "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
_OPTIONS = f"dropout_p=0.0, {_SCORE}alibi_slopes=None, deterministic=False, return_attn_probs=False"
_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# flash_attn 2.8, flash_attn_interface.py.
SIGNATURES = {
    "flash_attn_qkvpacked_func": f"qkv, {_OPTIONS}",
    "flash_attn_kvpacked_func": f"q, kv, {_OPTIONS}",
    "flash_attn_func": f"q, k, v, {_OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_OPTIONS}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {_LENGTHS}, {_OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {_LENGTHS}, {_OPTIONS}, block_table=None",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
    f"{_SCORE}rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(found) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_nothing_else_is_exported():
    assert set(flash_attn.__all__) == set(SIGNATURES)


def close(got: Tensor, want: Tensor, tolerance: float = 5e-6) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)


CASES = {
    "plain": ({}, oracle.Options()),
    "causal": ({"causal": True}, oracle.Options(causal=True)),
    "window": ({"window_size": (7, 3)}, oracle.Options(window=(7, 3))),
    "causal window": ({"causal": True, "window_size": (5, 0)}, oracle.Options(causal=True, window=(5, 0))),
    "left window": ({"window_size": (4, -1)}, oracle.Options(window=(4, None))),
    "softcap, scale": ({"softcap": 3.0, "softmax_scale": 0.4}, oracle.Options(softcap=3.0, softmax_scale=0.4)),
    "alibi": (
        {"causal": True, "alibi_slopes": onepass.alibi_slopes(4)},
        oracle.Options(causal=True, alibi_slopes=onepass.alibi_slopes(4)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dense_functions(case):
    arguments, options = CASES[case]
    q = torch.randn(2, 11, 4, 32, requires_grad=True)
    kv = torch.randn(2, 23, 2, 2, 32, requires_grad=True)
    want = oracle.attention(*(x.transpose(1, 2) for x in (q, *kv.unbind(2))), options)
    out, lse, probabilities = flash_attn.flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **arguments)
    assert probabilities is None
    assert out.is_contiguous()
    close(out, want.out.transpose(1, 2))
    close(lse, want.lse)
    assert torch.equal(flash_attn.flash_attn_func(q, *kv.unbind(2), **arguments), out)
    gradient = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, kv), gradient)
    expected = torch.autograd.grad(want.out.transpose(1, 2), (q, kv), gradient.double())
    for a, b in zip(got, expected, strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_packed_functions(case):
    arguments, options = CASES[case]
    lengths = [9, 1, 30]
    ends = torch.tensor([0, 9, 10, 40], dtype=torch.int32)
    qkv = torch.randn(40, 3, 4, 32)
    dense = flash_attn.flash_attn_qkvpacked_func(qkv[None, :9], **arguments)
    out, lse, _ = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, ends, 30, return_attn_probs=True, **arguments)
    close(out[:9], dense[0])
    assert torch.equal(
        flash_attn.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], ends, ends, 30, 30, **arguments), out
    )
    for part in torch.arange(40).split(lengths):
        want = oracle.attention(*(x[part].transpose(0, 1)[None] for x in qkv.unbind(1)), options)
        close(out[part].transpose(0, 1), want.out[0])
        close(lse[:, part], want.lse[0])


def test_varlen_over_pages(device):
    """block_table: k and v are pages of whole sequences, cu_seqlens_k their lengths."""
    page, lengths_q, lengths_k = 8, [3, 0, 10], [19, 8, 10]
    pages = torch.randn(2, 12, page, 2, 32, device=device)
    table = torch.randperm(12)[:9].view(3, 3).int().to(device)
    q = torch.randn(13, 4, 32, device=device)
    ends_q, ends_k = (torch.tensor([0, *x], device=device).cumsum(0).int() for x in (lengths_q, lengths_k))
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, *pages, ends_q, ends_k, 10, 19, causal=True, window_size=(12, 0), return_attn_probs=True, block_table=table
    )
    options = oracle.Options(causal=True, window=(12, 0))
    for b in (0, 2):
        rows = slice(int(ends_q[b]), int(ends_q[b + 1]))
        k, v = (side[table[b].long()].flatten(0, 1)[: lengths_k[b]].transpose(0, 1)[None] for side in pages)
        want = oracle.attention(q[rows].transpose(0, 1)[None], k, v, options)
        close(out[rows].transpose(0, 1), want.out[0])
        close(lse[:, rows], want.lse[0])


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Tokens (seqlen, heads, dim) as complex numbers, turned by the angles of ``positions``, in float64."""
    pairs = cos.shape[1]
    turning, rest = x[..., : 2 * pairs].double(), x[..., 2 * pairs :].double()
    shape = (pairs, 2) if interleaved else (2, pairs)
    split = turning.unflatten(-1, shape)
    real, imaginary = split.unbind(-1 if interleaved else -2)
    turned = torch.complex(real, imaginary) * torch.complex(cos.double(), sin.double())[positions, None]
    return torch.cat([torch.stack([turned.real, turned.imag], -1 if interleaved else -2).flatten(-2), rest], -1)


KVCACHE_CASES = {
    "decode": {"seqlen_q": 1},
    "several, causal": {"seqlen_q": 5, "causal": True},
    "several, not causal": {"seqlen_q": 5},
    "local": {"seqlen_q": 5, "window_size": (6, 2)},
    "more new keys than queries": {"seqlen_q": 2, "seqlen_new": 6, "causal": True},
    "no new keys": {"seqlen_q": 3, "seqlen_new": 0, "causal": True},
    "softcap, alibi, splits": {
        "seqlen_q": 4,
        "causal": True,
        "softcap": 5.0,
        "alibi_slopes": onepass.alibi_slopes(4),
        "num_splits": 3,
    },
}
STORES = ["contiguous", "leftpad", "batch_idx", "paged", "paged leftpad"]


@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("case", KVCACHE_CASES)
def test_with_kvcache(case, store, rotary, device):
    arguments = {"seqlen_new": KVCACHE_CASES[case]["seqlen_q"], **KVCACHE_CASES[case]}
    seqlen_q, seqlen_new = arguments.pop("seqlen_q"), arguments.pop("seqlen_new")
    if rotary is not None and seqlen_new == 0:
        pytest.skip("the original rotates only together with new keys")
    if "alibi_slopes" in arguments:
        arguments["alibi_slopes"] = arguments["alibi_slopes"].to(device)
    batch, page, dim, pairs = 2, 16, 32, 12
    lengths = torch.tensor([29, 40], dtype=torch.int32, device=device)
    first = torch.tensor([4, 0], dtype=torch.int32, device=device) if "leftpad" in store else None
    table = rows = None
    if "paged" in store:
        table = torch.randperm(10)[:8].view(batch, 4).int().to(device)
        k_cache, v_cache = torch.randn(2, 10, page, 2, dim, device=device)
    else:
        rows = torch.tensor([3, 1], dtype=torch.int32, device=device) if store == "batch_idx" else None
        k_cache, v_cache = torch.randn(2, 4 if rows is not None else batch, 64, 2, dim, device=device)

    def tokens(cache: Tensor, b: int) -> Tensor:
        if table is not None:
            return cache[table[b].long()].flatten(0, 1)
        return cache[b if rows is None else int(rows[b])]

    before = [(tokens(k_cache, b).clone(), tokens(v_cache, b).clone()) for b in range(batch)]
    q = torch.randn(batch, seqlen_q, 4, dim, device=device)
    k, v = torch.randn(2, batch, seqlen_new, 2, dim, device=device) if seqlen_new else (None, None)
    angles = torch.rand(64, pairs, device=device) * 2 * math.pi
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": rotary == "interleaved"}
    out, lse = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=lengths,
        cache_batch_idx=rows,
        cache_leftpad=first,
        block_table=table,
        return_softmax_lse=True,
        **arguments,
        **(tables if rotary else {}),
    )
    assert lengths.tolist() == [29, 40]
    causal, window = arguments.get("causal", False), arguments.get("window_size", (-1, -1))
    options = oracle.Options(
        causal=causal,
        window=tuple(None if side < 0 else side for side in window),
        softcap=arguments.get("softcap", 0.0),
        alibi_slopes=arguments.get("alibi_slopes"),
    )
    for b in range(batch):
        length, query = int(lengths[b]), q[b]
        keys, values = (side[:length] for side in before[b])
        if seqlen_new:
            new = k[b]
            if rotary:
                steps = torch.arange(max(seqlen_q, seqlen_new), device=device)
                turn = (tables["rotary_cos"], tables["rotary_sin"])
                new = rotated(new, *turn, length + steps[:seqlen_new], rotary == "interleaved").float()
                is_local = causal or window != (-1, -1)
                positions = length + (steps[:seqlen_q] if is_local else torch.zeros_like(steps[:seqlen_q]))
                query = rotated(query, *turn, positions, rotary == "interleaved").float()
            keys, values = torch.cat([keys, new]), torch.cat([values, v[b]])
            written = slice(length, length + seqlen_new)
            close(tokens(k_cache, b)[written], new)
            assert torch.equal(tokens(v_cache, b)[written], v[b])
        begin = None if first is None else first[b : b + 1]
        options = oracle.Options(**{**vars(options), "key_begin": begin})
        want = oracle.attention(*(x.transpose(0, 1)[None] for x in (query, keys, values)), options)
        close(out[b].transpose(0, 1), want.out[0], 1e-5)
        close(lse[b], want.lse[0], 1e-5)


def test_lengths_as_one_number():
    q, (k_cache, v_cache) = torch.randn(2, 1, 4, 32), torch.randn(2, 2, 20, 2, 32)
    some = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)
    every = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache)
    for out, length in ((some, 7), (every, 20)):
        close(out, flash_attn.flash_attn_func(q, k_cache[:, :length], v_cache[:, :length]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    q, k, v = (torch.randn(1, 40, 4, 64).to(dtype) for _ in range(3))
    want = oracle.attention(*(x.transpose(1, 2) for x in (q, k, v)), oracle.Options(causal=True)).out.transpose(1, 2)
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    cached = flash_attn.flash_attn_with_kvcache(q, k, v, causal=True)
    for got in (out, cached):
        assert got.dtype == dtype
        close(got, want, 4 * torch.finfo(dtype).eps)


def test_dropout_is_drawn_from_the_generator():
    q, k, v = torch.randn(3, 1, 64, 2, 32)
    torch.manual_seed(5)
    first = flash_attn.flash_attn_func(q, k, v, 0.3)
    second = flash_attn.flash_attn_func(q, k, v, 0.3)
    torch.manual_seed(5)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, dropout_p=0.3), first)
    assert not torch.equal(first, second)


TOKEN, CACHE = torch.zeros(2, 1, 2, 32), torch.zeros(2, 4, 2, 32)
REFUSALS = [
    ({"k": TOKEN}, "k, v: got one of the two"),
    ({"k": TOKEN, "v": TOKEN}, "cache_seqlens: got none"),
    ({"rotary_cos": torch.zeros(4, 16), "rotary_sin": torch.zeros(4, 16)}, "rotary_cos: got one without k and v"),
    ({"k": TOKEN, "v": TOKEN, "cache_seqlens": 4}, "cached_attention: cache: got 1 new tokens behind 4"),
    ({"cache_seqlens": 5}, "cached_attention: cache.seqlens: got"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match="need") as error:
        flash_attn.flash_attn_with_kvcache(TOKEN, CACHE, CACHE.clone(), **arguments)
    assert message in str(error.value)


def test_dropout_over_pages_is_refused():
    ends = torch.tensor([0, 2], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"dropout_p: got 0\.1 with a block_table; need 0"):
        flash_attn.flash_attn_varlen_func(CACHE[0, :2], CACHE, CACHE, ends, ends, 2, 2, 0.1, block_table=table)
