"""The functions of the public API. Tensors are ``(batch, num_heads, seqlen, head_dim)`` or, ragged, ``(total,
num_heads, head_dim)``; strides are free, except that inputs whose last dimension is not contiguous are copied.

Method: tiled online softmax (Milakov and Gimelshein 2018; Rabe and Staats 2021; Dao et al. 2022, FlashAttention):
exact, without ever storing the score matrix. Options and their order are those of docs/semantics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from onepass._inputs import (
    Window,
    as_int32,
    autocast,
    check_tensors,
    distinct,
    needs_gradient,
    prepared,
    score_of,
)
from onepass._library import call, translated
from onepass._ops import Score, ScoreTensors, ops, option_arguments
from onepass.autograd import Attention, MergeStates, VarlenLimits, differentiable

if TYPE_CHECKING:
    from typing_extensions import Unpack

Alignment = Literal["bottom_right", "top_left"]

# A small call costs a few microseconds, so what lies on its way is looked up once, and the operation is called without
# the Python frame of its packet (which torch.compile needs to see).
_plain_attention = ops.plain_attention
_plain_attention_eager = getattr(ops.plain_attention, "_op", ops.plain_attention)
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_autocast_enabled = torch._C._is_any_autocast_enabled


class AttentionResult(NamedTuple):
    """What a call with a ``return_*`` flag gives; ``None`` where not asked for."""

    out: Tensor
    lse: Tensor | None = None
    total_attention: Tensor | None = None


class _VarlenOptions(TypedDict, total=False):
    causal: bool
    softmax_scale: float | None
    window: Window | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    deterministic: bool
    key_begin: Tensor | None
    key_end: Tensor | None
    alignment: Alignment
    alibi_zero_for_future: bool


class _Options(_VarlenOptions, total=False):
    bias: Tensor | None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_total_attention: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_total_attention: bool = ...,
    **options: Unpack[_Options],
) -> AttentionResult: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    return_total_attention: Literal[True],
    **options: Unpack[_Options],
) -> AttentionResult: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    return_total_attention: bool = ...,
    **options: Unpack[_Options],
) -> Any: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    return_total_attention: bool = False,
    key_begin: Tensor | None = None,
    key_end: Tensor | None = None,
    alignment: Alignment = "bottom_right",
    alibi_zero_for_future: bool = False,
) -> Any:
    """Exact attention, ``softmax(softmax_scale · q @ kᵀ + …) @ v``, differentiable.

    Args:
        q: ``(batch, num_heads, seqlen_q, head_dim)``: float32, float16 or bfloat16 (float64 on the CPU: the slow
            reference, for gradcheck). Its memory order of dimensions is that of the output.
        k: ``(batch, num_heads_kv, seqlen_k, head_dim)``; ``num_heads`` is a multiple of ``num_heads_kv``.
        v: ``(batch, num_heads_kv, seqlen_k, head_dim_v)``.
        causal: query i sees key j iff ``j ≤ i + seqlen_k − seqlen_q`` (bottom-right aligned; see ``alignment``).
        softmax_scale: factor of the logits, default ``1/√head_dim``.
        window: ``(left, right)``: key j is visible iff ``i' − left ≤ j ≤ i' + right`` with
            ``i' = i + seqlen_k − seqlen_q``; ``None`` inside the pair is unbounded. The token itself is not counted.
        softcap: if > 0, logits become ``softcap · tanh(logit / softcap)``.
        alibi_slopes: float32 ``(num_heads)`` or ``(batch, num_heads)``: adds ``−slope · |i' − j|``. Not differentiable.
        bias: added to the logits, broadcastable to ``(batch, num_heads, seqlen_q, seqlen_k)``, any float dtype,
            differentiable.
        sinks: ``(num_heads)``: one more logit per head, in the denominator only; differentiable.
        dropout_p: probability, in [0, 1), of dropping an attention weight; survivors are scaled by ``1/(1 − p)``.
            Seed and offset come from torch's generator of the device.
        deterministic: the backward pass gives the same bits every run (the forward pass always does).
        return_lse: also return the natural logarithm of the softmax denominators, float32
            ``(batch, num_heads, seqlen_q)``; differentiable without dropout.
        return_total_attention: also return the sum over queries of the weights before dropout, float32
            ``(batch, num_heads, seqlen_k)``; not differentiable.
        key_begin: int32 ``(batch)``: first visible key of each sequence (left padding). Alignment is not affected.
        key_end: int32 ``(batch)``: one past the last visible key of each sequence (right padding).
        alignment: ``"top_left"`` takes ``i' = i`` everywhere: PyTorch's causal rule.
        alibi_zero_for_future: without a causal mask, ALiBi leaves future keys at 0 instead of ``−slope · |i' − j|``.

    Returns:
        ``(batch, num_heads, seqlen_q, head_dim_v)`` in the dtype of ``q`` (the autocast dtype under autocast); with a
        ``return_*`` flag an :class:`AttentionResult`. Rows that see no key: out 0, lse −inf, gradients 0.

    Raises:
        ValueError: a shape or value that no backend could take; nothing has been written.
        TypeError: a dtype or device that the operation does not take.
        NotImplementedError: a request that no backend here serves; the message says why.
    """
    try:
        plain = (
            window is None
            and bias is None
            and sinks is None
            and alibi_slopes is None
            and key_begin is None
            and key_end is None
            and not (softcap or dropout_p or return_lse or return_total_attention)
            and alignment == "bottom_right"
            and not _autocast_enabled()
            and not (_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        )
        if plain:
            if _is_compiling():
                return _plain_attention(q, k, v, causal, softmax_scale)
            return _plain_attention_eager(q, k, v, causal, softmax_scale)
    except AttributeError:
        check_tensors("attention", q=q, k=k, v=v)
        raise
    except RuntimeError as error:
        raise translated(error) from None
    result = attention_with_state(
        q,
        k,
        v,
        ScoreTensors(bias, sinks, alibi_slopes, key_begin, key_end),
        score_of("attention", causal, softmax_scale, window, softcap, dropout_p, alignment, alibi_zero_for_future),
        deterministic=deterministic,
        return_lse=return_lse,
        return_total_attention=return_total_attention,
    )
    return result if return_lse or return_total_attention else result.out


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[False] = ...,
    return_total_attention: Literal[False] = ...,
    **options: Unpack[_VarlenOptions],
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[True],
    return_total_attention: bool = ...,
    **options: Unpack[_VarlenOptions],
) -> AttentionResult: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: bool = ...,
    return_total_attention: Literal[True],
    **options: Unpack[_VarlenOptions],
) -> AttentionResult: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: bool,
    return_total_attention: bool = ...,
    **options: Unpack[_VarlenOptions],
) -> Any: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    return_total_attention: bool = False,
    key_begin: Tensor | None = None,
    key_end: Tensor | None = None,
    alignment: Alignment = "bottom_right",
    alibi_zero_for_future: bool = False,
) -> Any:
    """Attention over a ragged batch: sequences packed one after the other, no padding.

    Args:
        q: ``(total_q, num_heads, head_dim)``.
        k: ``(total_k, num_heads_kv, head_dim)``.
        v: ``(total_k, num_heads_kv, head_dim_v)``.
        cu_seqlens_q: int32 ``(batch + 1)`` cumulative lengths: first 0, not decreasing, last ≤ total_q. int64 is
            converted.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: length of the longest sequence, if known. On the CPU it is computed; on CUDA a bound spares work.
        max_seqlen_k: the same of the keys.

    The other options are those of :func:`attention`, except that a bias is not taken; ``key_begin`` and ``key_end``
    count from the sequence's first key.

    Returns:
        ``(total_q, num_heads, head_dim_v)``; with a ``return_*`` flag an :class:`AttentionResult` whose ``lse`` is
        ``(num_heads, total_q)`` and ``total_attention`` ``(num_heads, total_k)``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`attention`.
    """
    result = attention_with_state(
        q,
        k,
        v,
        ScoreTensors(None, sinks, alibi_slopes, key_begin, key_end),
        score_of(
            "varlen_attention", causal, softmax_scale, window, softcap, dropout_p, alignment, alibi_zero_for_future
        ),
        ragged=(cu_seqlens_q, cu_seqlens_k, VarlenLimits(max_seqlen_q or 0, max_seqlen_k or 0)),
        deterministic=deterministic,
        return_lse=return_lse,
        return_total_attention=return_total_attention,
    )
    return result if return_lse or return_total_attention else result.out


def attention_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: ScoreTensors,
    score: Score,
    *,
    ragged: tuple[Tensor, Tensor, VarlenLimits] | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_total_attention: bool = False,
) -> AttentionResult:
    """The general call behind the public ones. ``tensors.dropout_state`` fixes the dropout mask (see
    :func:`onepass._inputs.draw_dropout_state`); without it one is drawn when ``score.dropout_p`` > 0.
    """
    operation = "attention" if ragged is None else "varlen_attention"
    check_tensors(operation, q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    tensors = prepared(operation, q, tensors, score)
    cu_seqlens_q, cu_seqlens_k, limits = (None, None, VarlenLimits()) if ragged is None else ragged
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_tensors(operation, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        cu_seqlens_q = as_int32(operation, "cu_seqlens_q", cu_seqlens_q)
        cu_seqlens_k = as_int32(operation, "cu_seqlens_k", cu_seqlens_k)
    if needs_gradient(q, k, v, tensors.bias, tensors.sinks):
        out, lse, total_attention = differentiable(
            Attention, *distinct(q, k, v, *tensors, cu_seqlens_q, cu_seqlens_k), limits, score, deterministic,
            return_lse, return_total_attention,
        )  # fmt: skip
        return AttentionResult(out, lse if return_lse else None, total_attention if return_total_attention else None)
    arguments = (q, k, v, *option_arguments(score, tensors))
    if ragged is not None:
        arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, *limits, *option_arguments(score, tensors))
    if not (return_lse or return_total_attention):
        return AttentionResult(call(getattr(ops, operation), *arguments))
    out, lse, total_attention = call(getattr(ops, f"{operation}_with_lse"), *arguments, return_total_attention)
    return AttentionResult(out, lse if return_lse else None, total_attention if return_total_attention else None)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The result over the union of two disjoint sets of keys from the results over each, exactly; differentiable.

    Args:
        out_a, out_b: ``(batch, num_heads, seqlen_q, head_dim_v)`` of one dtype.
        lse_a, lse_b: float32 ``(batch, num_heads, seqlen_q)`` (float64 beside float64), natural logarithms.

    Returns:
        ``(out, lse)`` with ``lse = log(exp(lse_a) + exp(lse_b))``. Two empty parts give (0, −inf); an empty part
        leaves the other's bits as they are.

    Raises:
        ValueError, TypeError: as :func:`attention`.
    """
    parts = out_a, lse_a, out_b, lse_b
    if needs_gradient(*parts):
        out, lse = differentiable(MergeStates, *distinct(*parts))
    else:
        out, lse = call(ops.merge_states, *parts)
    return out, lse


def alibi_slopes(num_heads: int, *, geometric: bool = False, device: torch.device | str | None = None) -> Tensor:
    """The standard slopes of attention with linear biases (Press et al. 2021), float32 ``(num_heads)``.

    Args:
        num_heads: any count ≥ 1. A power of two: head h (from 0) gets ``2^(−8(h + 1)/num_heads)``. Others: the slopes
            of the next lower power of two, then every other one of twice that count (as in the authors' code).
        geometric: use the formula of powers of two for every count.
        device: of the result, default the CPU.

    Raises:
        ValueError: ``num_heads`` < 1.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads: got {num_heads}; need at least 1")

    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    lower = 1 << (num_heads.bit_length() - 1)
    slopes = powers(num_heads) if geometric else powers(lower) + powers(2 * lower)[0::2][: num_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def info() -> str:
    """Version, backends with the reason where one is absent, instruction set or GPU, threads and build, as text."""
    return f"{ops.info().rstrip()}\ntorch: {torch.__version__}, {torch.get_num_threads()} threads"
