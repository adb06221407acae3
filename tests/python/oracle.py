"""Attention by its formula in PyTorch, every option, differentiable: the tests' oracle in float64, and in the tested
dtype the naive implementation whose error bounds the allowed one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The options of onepass.attention, under their names."""

    causal: bool = False
    softmax_scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    key_begin: Tensor | None = None
    key_end: Tensor | None = None
    alignment: str = "bottom_right"
    alibi_zero_for_future: bool = False

    def arguments(self) -> dict[str, Any]:
        """The options that are set, as keyword arguments."""
        return {name: value for name, value in vars(self).items() if value is not DEFAULTS[name]}

    def map(self, transform: Any) -> Options:
        """``transform`` of the differentiable tensors, bias and sinks."""
        return replace(
            self,
            bias=None if self.bias is None else transform(self.bias),
            sinks=None if self.sinks is None else transform(self.sinks),
        )


DEFAULTS = vars(Options())


@dataclass(frozen=True)
class Result:
    out: Tensor
    lse: Tensor
    total_attention: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    addends: dict[str, float] = field(default_factory=dict)


def visible(seqlen_q: int, seqlen_k: int, batch: int, options: Options, device: torch.device) -> Tensor:
    """bool (batch, 1, seqlen_q, seqlen_k): which keys each query sees."""
    diagonal = 0 if options.alignment == "top_left" else seqlen_k - seqlen_q
    i = torch.arange(seqlen_q, device=device)[:, None] + diagonal
    j = torch.arange(seqlen_k, device=device)[None, :]
    left, right = options.window or (None, None)
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if options.causal:
        mask &= j <= i
    if left is not None:
        mask &= j >= i - left
    if right is not None:
        mask &= j <= i + right
    per_sequence = mask.expand(batch, 1, seqlen_q, seqlen_k).clone()
    if options.key_begin is not None:
        per_sequence &= j >= options.key_begin.long()[:, None, None, None]
    if options.key_end is not None:
        per_sequence &= j < options.key_end.long()[:, None, None, None]
    return per_sequence


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, dtype: torch.dtype = torch.float64, keep: Tensor | None = None
) -> Result:
    """softmax(scale·q·kᵀ + …)·v, computed in ``dtype``. ``keep``: the factors of dropout (0 or 1/(1 − p))."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = options.softmax_scale if options.softmax_scale is not None else q.shape[-1] ** -0.5
    s = (q @ k.transpose(-1, -2)) * scale
    if options.softcap:
        s = options.softcap * torch.tanh(s / options.softcap)
    if options.alibi_slopes is not None:
        s = s + _alibi(q.shape[2], k.shape[2], options).to(dtype)
    if options.bias is not None:
        s = s + options.bias.to(dtype)
    mask = visible(q.shape[2], k.shape[2], q.shape[0], options, q.device)
    s = s.masked_fill(~mask, -torch.inf)
    logits = s
    if options.sinks is not None:
        sink = options.sinks.to(dtype)[None, :, None, None].expand(*s.shape[:3], 1)
        logits = torch.cat((s, sink), dim=-1)
    # A row without a visible key is empty, its sink included.
    empty = (s == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0.0)
    lse = torch.logsumexp(logits, -1).masked_fill(empty.squeeze(-1), -torch.inf)
    weights = torch.softmax(logits, -1)[..., : k.shape[2]].masked_fill(empty, 0.0)
    dropped = weights if keep is None else weights * keep.to(dtype)
    # Keys that no query sees must not reach the output, NaN included.
    v = v.masked_fill(~mask.any(-2).unsqueeze(-1), 0.0)
    return Result(dropped @ v, lse, weights.sum(-2))


def _alibi(seqlen_q: int, seqlen_k: int, options: Options) -> Tensor:
    slopes = options.alibi_slopes
    assert slopes is not None
    diagonal = 0 if options.alignment == "top_left" else seqlen_k - seqlen_q
    i = torch.arange(seqlen_q, device=slopes.device)[:, None] + diagonal
    distance = (torch.arange(seqlen_k, device=slopes.device)[None, :] - i).double()
    distance = distance.clamp(max=0) if options.alibi_zero_for_future else -distance.abs()
    return slopes.double().reshape(-1, slopes.shape[-1], 1, 1) * distance


def with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    dout: Tensor,
    dtype: torch.dtype = torch.float64,
    keep: Tensor | None = None,
) -> Result:
    """The same with the gradients of q, k, v and, where given, bias and sinks."""
    leaves = {"q": q, "k": k, "v": v, "bias": options.bias, "sinks": options.sinks}
    variables = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    differentiable = replace(options, bias=variables.get("bias"), sinks=variables.get("sinks"))
    result = attention(variables["q"], variables["k"], variables["v"], differentiable, dtype, keep)
    gradients = torch.autograd.grad(result.out, list(variables.values()), dout.to(dtype))
    return replace(
        result, gradients=dict(zip(variables, gradients, strict=True)), addends=gradient_addends(q, k, v, options, dout)
    )


def gradient_addends(q: Tensor, k: Tensor, v: Tensor, options: Options, dout: Tensor) -> dict[str, float]:
    """The size of what is summed into each gradient. dP − delta may cancel, wholly where a row sees a single key, and
    leaves the rounding of dP = dout·vᵀ.
    """

    def largest(tensor: Tensor) -> float:
        finite = tensor.double().abs()
        return finite[finite.isfinite()].max().item() if finite.isfinite().any() else 0.0

    scale = abs(options.softmax_scale if options.softmax_scale is not None else q.shape[-1] ** -0.5)
    group = q.shape[1] // max(k.shape[1], 1)
    dp = largest(dout.double() @ v.double().repeat_interleave(group, 1).transpose(-1, -2))
    return {"q": dp * scale * largest(k), "k": dp * scale * largest(q), "v": 0.0, "bias": dp, "sinks": dp}


# Comparison -------------------------------------------------------------------------------------------------------


def assert_lse_close(actual: Tensor, exact: Tensor, what: str) -> None:
    """Of 16-bit calls: a naive one's LSE is much less accurate than any kernel's, so it is judged against float32."""
    torch.testing.assert_close(actual, exact.float(), rtol=1e-3, atol=2e-2, msg=lambda m: f"{what}: lse: {m}")


def assert_as_good_as_naive(actual: Tensor, exact: Tensor, naive: Tensor, what: str = "", addends: float = 0.0) -> None:
    """NaN and infinities at the same places, and the largest error at most twice that of the naive implementation in
    the same dtype, plus four roundings of the largest value or addend (64 in float64: the naive one is the oracle; an
    LSE is a logit plus a logarithm of order 1).
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, need {tuple(exact.shape)}"
    result, expected, rounded = actual.detach().double(), exact.detach().double(), naive.detach().double()
    assert torch.equal(result.isnan(), expected.isnan()), f"{what}: NaN at other places"
    infinite = expected.isinf()
    assert torch.equal(result.isinf(), infinite), f"{what}: infinities at other places"
    assert torch.equal(result[infinite], expected[infinite]), f"{what}: infinities of another sign"
    finite = expected.isfinite()
    if not finite.any():
        return
    error = (result - expected)[finite].abs().max().item()
    naive_error = (rounded - expected)[finite].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    roundings = 64 if actual.dtype == torch.float64 else 4
    largest = max(expected[finite].abs().max().item(), addends)
    floor = roundings * torch.finfo(actual.dtype).eps * largest
    assert error <= 2 * naive_error + floor, f"{what}: error {error:.3g}, naive {naive_error:.3g}, floor {floor:.3g}"
