"""Bad input: the kind of error, and a message that names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onepass
import pytest
import torch
from torch import Tensor

Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
PACKED = torch.randn(7, 4, 8)
BOUNDS = torch.tensor([0, 3, 7], dtype=torch.int32)


def dense(q: Any = Q, k: Any = K, v: Any = K, **options: Any) -> Callable[[], Any]:
    return lambda: onepass.attention(q, k, v, **options)


def ragged(cu_q: Any = BOUNDS, cu_k: Any = BOUNDS, q: Tensor = PACKED, **options: Any) -> Callable[[], Any]:
    return lambda: onepass.varlen_attention(q, PACKED, PACKED, cu_q, cu_k, **options)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # shapes
    "rank of q": (dense(Q[0]), ValueError, r"attention: q: got 3 dimensions; need 4"),
    "rank of v": (dense(v=K[0]), ValueError, r"attention: v: got 3 dimensions; need 4"),
    "batch": (
        dense(k=K[:1]),
        ValueError,
        r"attention: k: got float32 \(1, 2, 7, 8\) on cpu; need shape \(2, 2, 7, 8\)",
    ),
    "heads": (dense(Q[:, :3]), ValueError, r"attention: q: got 3 heads with 2 key/value heads; need num_heads div"),
    "seqlen": (dense(v=K[:, :, :6]), ValueError, r"attention: v: got .*\(2, 2, 6, 8\).*; need shape \(2, 2, 7, 8\)"),
    "head_dim": (dense(Q[..., :4]), ValueError, r"attention: k: got .*; need shape \(2, 2, 7, 4\)"),
    "head_dim 0": (dense(Q[..., :0], K[..., :0]), ValueError, r"attention: q: got head_dim 0; need 1 to 256"),
    "head_dim 257": (
        dense(torch.randn(1, 1, 2, 257), torch.randn(1, 1, 2, 257), torch.randn(1, 1, 2, 257)),
        ValueError,
        r"attention: q: got head_dim 257; need 1 to 256",
    ),
    # dtypes and devices
    "mixed dtypes": (dense(Q.half()), TypeError, r"attention: k: got float32 .*; need the dtype of q, float16"),
    "integers": (dense(Q.int(), K.int(), K.int()), TypeError, r"attention: q: got int32 .*; need float32 or"),
    "bool": (dense(Q.bool()), TypeError, r"attention: q: got bool; need"),
    "complex": (dense(Q.to(torch.complex64)), TypeError, r"attention: q: got another dtype; need"),
    "no tensor": (dense(q=[1.0]), TypeError, r"attention: q: got list; need torch.Tensor"),
    "no tensor for v": (dense(v=None), TypeError, r"attention: v: got NoneType; need torch.Tensor"),
    "no number for scale": (dense(softmax_scale="2"), TypeError, r"softmax_scale"),
    # values
    "nan scale": (dense(softmax_scale=float("nan")), ValueError, r"attention: softmax_scale: got nan; need a finite"),
    "softcap": (
        dense(softcap=-1.0),
        ValueError,
        r"attention: softcap: got -1\.0+; need a finite number, 0 \(none\) or",
    ),
    "dropout 1": (dense(dropout_p=1.0), ValueError, r"attention: dropout.p: got 1\.0+; need a probability in \[0, 1\)"),
    "dropout < 0": (dense(dropout_p=-0.1), ValueError, r"attention: dropout.p: got -0\.1.*; need"),
    "window left": (dense(window=(-1, 0)), ValueError, r"attention: window.left: got -1; need 0 or more"),
    "window": (dense(window=3), ValueError, r"attention: window: got 3; need None or a pair \(left, right\)"),
    "alignment": (dense(alignment="left"), ValueError, r"attention: alignment: got 'left'; need 'bottom_right' or"),
    # options' tensors
    "bias shape": (
        dense(bias=torch.zeros(4, 5, 6)),
        ValueError,
        r"attention: bias: got .*\(1, 4, 5, 6\).*; need sizes",
    ),
    "bias rank": (
        dense(bias=torch.zeros(1, 2, 4, 5, 7)),
        ValueError,
        r"attention: bias: got 5 dimensions; need at most",
    ),
    "bool bias": (
        dense(bias=torch.ones(5, 7, dtype=torch.bool)),
        TypeError,
        r"attention: bias: got torch.bool; need a",
    ),
    "sinks shape": (
        dense(sinks=torch.zeros(3)),
        ValueError,
        r"attention: sinks: got float32 \(3,\).*; need shape \(4,\)",
    ),
    "slopes shape": (dense(alibi_slopes=torch.zeros(2)), ValueError, r"attention: alibi_slopes: got .*; need shape"),
    "key_end dtype": (dense(key_end=torch.tensor([7.0, 7.0])), TypeError, r"attention: key_end: got float32 .* int32"),
    "key_begin shape": (dense(key_begin=int32(0)), ValueError, r"attention: key_begin: got .*; need shape \(2,\)"),
    # ragged
    "ragged rank": (ragged(q=Q), ValueError, r"varlen_attention: q: got 4 dimensions; need 3"),
    "first bound": (ragged(int32(1, 3, 7)), ValueError, r"varlen_attention: cu_seqlens_q: got first element 1; need 0"),
    "decreasing": (
        ragged(int32(0, 5, 3)),
        ValueError,
        r"varlen_attention: cu_seqlens_q: got 3 after 5 at 2; need non-",
    ),
    "last bound": (
        ragged(cu_k=int32(0, 3, 8)),
        ValueError,
        r"varlen_attention: cu_seqlens_k: got last element 8; need",
    ),
    "bounds differ": (
        ragged(cu_k=int32(0, 7)),
        ValueError,
        r"varlen_attention: cu_seqlens_k: got .*; need shape \(3,\)",
    ),
    "bounds' dtype": (
        ragged(BOUNDS.float()),
        TypeError,
        r"varlen_attention: cu_seqlens_q: got torch.float32; need int32",
    ),
    "max_seqlen": (ragged(max_seqlen_q=-3), ValueError, r"varlen_attention: max_seqlen_q: got -3; need 0"),
    # merge_states
    "merge shape": (
        lambda: onepass.merge_states(Q, Q[..., 0], Q[:1], Q[..., 0]),
        ValueError,
        r"merge_states: out_b: got .*\(1, 4, 5, 8\).*; need shape \(2, 4, 5, 8\)",
    ),
    "merge dtype": (
        lambda: onepass.merge_states(Q, Q[..., 0].half(), Q, Q[..., 0]),
        TypeError,
        r"merge_states: lse_a: got float16 .*; need float32",
    ),
    "merge rank": (
        lambda: onepass.merge_states(Q[0], Q[0, ..., 0], Q[0], Q[0, ..., 0]),
        ValueError,
        r"merge_states: out_a: got 3 dimensions; need 4",
    ),
    # scaled_dot_product_attention
    "mask and causal": (
        lambda: onepass.scaled_dot_product_attention(Q, Q, Q, torch.zeros(5, 5), is_causal=True),
        ValueError,
        r"scaled_dot_product_attention: attn_mask: got a mask with is_causal=True; need one of the two",
    ),
    "mask shape": (
        lambda: onepass.scaled_dot_product_attention(Q, Q, Q, torch.zeros(5, 4)),
        ValueError,
        r"scaled_dot_product_attention: attn_mask: got shape \(5, 4\); need one that broadcasts to \(2, 4, 5, 5\)",
    ),
    "mask dtype": (
        lambda: onepass.scaled_dot_product_attention(Q, Q, Q, torch.zeros(5, 5, dtype=torch.int32)),
        TypeError,
        r"scaled_dot_product_attention: attn_mask: got torch.int32; need bool or a floating-point dtype",
    ),
    "heads without gqa": (
        lambda: onepass.scaled_dot_product_attention(Q, K, K),
        ValueError,
        r"scaled_dot_product_attention: key, value: got .*; need leading dimensions that broadcast \(or enable_gqa",
    ),
    "vector": (
        lambda: onepass.scaled_dot_product_attention(Q[0, 0, 0], Q, Q),
        ValueError,
        r"scaled_dot_product_attention: query: got 1 dimensions; need at least 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refusal(name: str) -> None:
    function, kind, message = CASES[name]
    with pytest.raises(kind, match=message) as raised:
        function()
    assert type(raised.value) is kind
    assert "Exception raised from" not in str(raised.value), "a trace of C++ frames is no part of the message"


@pytest.mark.parametrize("name", ["mixed dtypes", "heads", "softcap", "bias shape", "decreasing"])
def test_refusal_of_a_differentiable_call(name: str) -> None:
    """The same errors on the way through autograd."""
    function, kind, message = CASES[name]
    Q.requires_grad_(), PACKED.requires_grad_()
    try:
        with pytest.raises(kind, match=message):
            function()
    finally:
        Q.requires_grad_(False), PACKED.requires_grad_(False)


def test_meta_tensors_give_shapes() -> None:
    out = onepass.attention(Q.to("meta"), K.to("meta"), K.to("meta"))
    assert out.shape == (2, 4, 5, 8)
    assert out.is_meta


def test_other_operation_after_an_error() -> None:
    with pytest.raises(ValueError, match="softcap"):
        onepass.attention(Q, K, K, softcap=-1.0)
    assert onepass.attention(Q, K, K).isfinite().all()


def test_an_unsupported_backward_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEPASS_BACKEND", "absent")
    with pytest.raises(NotImplementedError, match=r"attention: no backend for this call \(absent: no such backend"):
        onepass.attention(Q, K, K)
