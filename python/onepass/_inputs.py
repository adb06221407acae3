"""What a call does with its arguments before an operation gets them."""

from __future__ import annotations

import torch
from torch import Tensor

from onepass._ops import Score, ScoreTensors

Window = tuple[int | None, int | None]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def draw_dropout_state(device: torch.device) -> Tensor:
    """int64 ``(seed, offset)`` on the CPU, drawn from torch's generator of ``device`` (which advances)."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        torch.cuda.init()
        generator = torch.cuda.default_generators[device.index or 0]
        offset = generator.get_offset()
        generator.set_offset(offset + 4)  # torch counts in steps of 4
        return torch.tensor([generator.initial_seed() & (2**63 - 1), offset], dtype=torch.int64)
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device).cpu()


def needs_gradient(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_tensors(operation: str, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operation}: {name}: got {type(tensor).__name__}; need torch.Tensor")


def as_int32(operation: str, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operation}: {name}: got {tensor.dtype}; need int32 (or int64, which is converted)")
    return tensor.to(torch.int32)


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tensors`` without repetition while compiling: Dynamo refuses an autograd.Function given one tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    seen: list[Tensor] = []
    for tensor in tensors:
        if tensor is not None:
            seen.append(tensor.view_as(tensor) if any(tensor is other for other in seen) else tensor)
    distinct = iter(seen)
    return tuple(None if tensor is None else next(distinct) for tensor in tensors)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the autocast dtype, as torch does for its own attention (float64 stays)."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def score_of(
    operation: str,
    causal: bool,
    softmax_scale: float | None,
    window: Window | None,
    softcap: float,
    dropout_p: float,
    alignment: str,
    alibi_zero_for_future: bool,
) -> Score:
    if alignment not in ("bottom_right", "top_left"):
        raise ValueError(f"{operation}: alignment: got {alignment!r}; need 'bottom_right' or 'top_left'")
    if window is not None and not (isinstance(window, tuple | list) and len(window) == 2):
        raise ValueError(f"{operation}: window: got {window!r}; need None or a pair (left, right)")
    left, right = (None, None) if window is None else window
    top_left = alignment == "top_left"
    return Score(causal, softmax_scale, dropout_p, left, right, softcap, top_left, alibi_zero_for_future)


def prepared(operation: str, q: Tensor, tensors: ScoreTensors, score: Score) -> ScoreTensors:
    """The score's tensors in the forms that the operations take."""
    bias, sinks, slopes, key_begin, key_end, dropout_state = tensors
    if slopes is not None:
        if slopes.requires_grad:
            raise NotImplementedError(
                f"{operation}: alibi_slopes: got a tensor that requires grad; need one that does not (slopes are "
                "not differentiable; a bias is)"
            )
        slopes = slopes.to(torch.float32)
    if bias is not None:
        bias = _prepared_bias(operation, q, bias)
    if sinks is not None:
        sinks = as_score_dtype(operation, "sinks", q, sinks)
    if dropout_state is None and score.dropout_p > 0.0:
        dropout_state = draw_dropout_state(q.device)
    return ScoreTensors(bias, sinks, slopes, key_begin, key_end, dropout_state)


def _prepared_bias(operation: str, q: Tensor, bias: Tensor) -> Tensor:
    if bias.dim() > 4:
        raise ValueError(
            f"{operation}: bias: got {bias.dim()} dimensions; need at most 4, broadcastable to "
            "(batch, num_heads, seqlen_q, seqlen_k)"
        )
    bias = as_score_dtype(operation, "bias", q, bias)[(None,) * (4 - bias.dim())]
    if bias.requires_grad:  # an expanded dimension gets its gradient summed, not stored
        for dim in range(4):
            if bias.stride(dim) == 0 and bias.shape[dim] > 1:
                bias = bias.narrow(dim, 0, 1)
    return bias


def as_score_dtype(operation: str, name: str, q: Tensor, tensor: Tensor) -> Tensor:
    """In the dtype of q, or in float32 (float64 beside float64)."""
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{operation}: {name}: got {tensor.dtype}; need a floating-point tensor")
    if tensor.dtype == q.dtype:
        return tensor
    return tensor.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
