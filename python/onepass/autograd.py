"""Gradients of the operations. Only calls that need one come here: a call without gradients runs no Python autograd.

Backward recomputes the attention weights from q, k and the saved log-sum-exp (LSE), O(seqlen) memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from onepass._library import call
from onepass._ops import Score, ScoreTensors, ops, option_arguments

# Whether torch.func transforms a call. A torch that does not say is taken to.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def differentiable(function: type[Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)`` with errors translated.

    Where nothing compiles or transforms the call, ``forward`` and ``setup_context`` run as one: torch binds the inputs
    of a forward with a separate ``setup_context`` by name, which takes longer than a small attention.
    """
    transformed = torch.compiler.is_compiling() or _transforms_active()
    return call((function if transformed else _combined(function)).apply, *inputs)


@cache
def _combined(function: type[Function]) -> type[Function]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (Function,), members)


class VarlenLimits(NamedTuple):
    """Upper bounds of the sequence lengths of a ragged batch; 0: unknown."""

    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


class _SecondOrder(Function):
    """Lets gradients pass and refuses to be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "attention_backward: second-order gradients: got a backward pass through a gradient "
            "(create_graph=True); need first-order gradients only"
        )


def _refuse_second_order(inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Grad mode is on in a backward pass only under create_graph=True.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    anchors = tuple(tensor for tensor in inputs if tensor is not None and tensor.requires_grad)
    return _SecondOrder.apply(*gradients, *anchors)[: len(gradients)] if anchors else gradients


class Attention(Function):
    """attention and varlen_attention (the latter when ``cu_seqlens_q`` is given) with their LSE and total attention."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        key_begin: Tensor | None,
        key_end: Tensor | None,
        dropout_state: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        limits: VarlenLimits,
        score: Score,
        deterministic: bool,
        return_lse: bool,
        return_total_attention: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = option_arguments(score, ScoreTensors(bias, sinks, alibi_slopes, key_begin, key_end, dropout_state))
        if cu_seqlens_q is None:
            return ops.attention_with_lse(q, k, v, *options, return_total_attention)
        ragged = (cu_seqlens_q, cu_seqlens_k, *limits)
        return ops.varlen_attention_with_lse(q, k, v, *ragged, *options, return_total_attention)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        out, lse, total_attention = output
        *tensors, ctx.limits, ctx.score, ctx.deterministic, return_lse, _ = inputs
        ctx.save_for_backward(out, lse, *tensors)
        # torch.compile makes zeros of absent gradients; an LSE that nobody asked for must not cost a gradient of zeros.
        ctx.mark_non_differentiable(*((total_attention,) if return_lse else (lse, total_attention)))
        ctx.has_lse_gradient = return_lse
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v, *score_tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        nothing = (None,) * 11  # the inputs after bias and sinks
        if not ctx.has_lse_gradient:
            dlse = None
        if dout is None and dlse is None:
            return (None,) * 5 + nothing
        tensors = ScoreTensors(*score_tensors)
        bias_gradient, sinks_gradient = ctx.needs_input_grad[3:5]
        score: Score = ctx.score
        if dout is None:
            dout = torch.zeros_like(out)
        head_dim_v = v.shape[-1]
        if dlse is not None:
            dout, out, v = _with_lse_gradient(dout, dlse, out, v, score)
        ragged = () if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k, *ctx.limits)
        operation = ops.attention_backward if cu_seqlens_q is None else ops.varlen_attention_backward
        gradients = call(
            operation, dout, out, lse, q, k, v, *ragged, *option_arguments(score, tensors),
            bias_gradient, sinks_gradient, ctx.deterministic,
        )  # fmt: skip
        gradients = _refuse_second_order((dout, q, k, v, tensors.bias, tensors.sinks), gradients)
        dq, dk, dv, dbias, dsinks = gradients
        if dlse is not None:
            dv = dv[..., :head_dim_v]
            if tensors.sinks is not None and sinks_gradient:
                dsinks = dsinks + _sinks_gradient_of_lse(dlse, lse, tensors.sinks)
        return (
            dq,
            dk,
            dv,
            dbias.to(tensors.bias.dtype) if tensors.bias is not None and bias_gradient else None,
            dsinks.to(tensors.sinks.dtype) if tensors.sinks is not None and sinks_gradient else None,
            *nothing,
        )


def _with_lse_gradient(
    dout: Tensor, dlse: Tensor, out: Tensor, v: Tensor, score: Score
) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of a backward pass that also carries the gradient of the LSE.

    With P the weights, ∂lse_i/∂s_ij = P_ij, so ds_ij = P_ij·(dout_i·v_j + dlse_i − dout_i·out_i). A column more, of
    ones in v, of dlse in dout and of zeros in out, adds dlse_i to the first term and nothing to the last.
    """
    if score.dropout_p > 0.0:
        raise NotImplementedError(
            f"attention_backward: lse: got a gradient with dropout_p {score.dropout_p}; need dropout_p 0"
        )
    if dlse.dim() == 2:  # ragged: (num_heads, total_q), beside (total_q, num_heads, head_dim_v)
        dlse = dlse.transpose(0, 1)
    column = dlse.unsqueeze(-1).to(dout.dtype)
    return (
        torch.cat((dout, column), dim=-1),
        torch.cat((out, torch.zeros_like(column)), dim=-1),
        torch.cat((v, torch.ones_like(v[..., :1])), dim=-1),
    )


def _sinks_gradient_of_lse(dlse: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Σ over queries of dlse times the sink's share of the denominator, exp(sink − lse)."""
    share = torch.exp(sinks.to(lse.dtype).unsqueeze(-1) - lse)
    share = share.masked_fill(lse == -torch.inf, 0.0)
    per_row = share * dlse
    heads = 0 if lse.dim() == 2 else 1
    return per_row.sum(dim=[dim for dim in range(lse.dim()) if dim != heads])


class PiecewiseAttention(Function):
    """piecewise_attention with its LSE."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q1: Tensor,
        k1: Tensor,
        q2: Tensor,
        k2: Tensor,
        v: Tensor,
        dist_threshold: int,
        causal: bool,
        softmax_scale: float | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        return ops.piecewise_attention(q1, k1, q2, k2, v, dist_threshold, causal, softmax_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, lse = output
        *tensors, ctx.dist_threshold, ctx.causal, ctx.softmax_scale, ctx.has_lse_gradient = inputs
        ctx.save_for_backward(out, lse, *tensors)
        if not ctx.has_lse_gradient:  # as in Attention
            ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q1, k1, q2, k2, v = ctx.saved_tensors
        nothing = (None,) * 4  # the inputs after v
        if not ctx.has_lse_gradient:
            dlse = None
        if dout is None and dlse is None:
            return (None,) * 5 + nothing
        if dout is None:
            dout = torch.zeros_like(out)
        head_dim_v = v.shape[-1]
        if dlse is not None:
            dout, out, v = _with_lse_gradient(dout, dlse, out, v, Score())
        gradients = call(
            ops.piecewise_attention_backward, dout, out, lse, q1, k1, q2, k2, v,
            ctx.dist_threshold, ctx.causal, ctx.softmax_scale,
        )  # fmt: skip
        gradients = _refuse_second_order((dout, q1, k1, q2, k2, v), gradients)
        return (*gradients[:4], gradients[4][..., :head_dim_v], *nothing)


class MergeStates(Function):
    """Merge of two partial results, in closed form: with w_a = exp(lse_a − lse) and w_b likewise,
    out = w_a·out_a + w_b·out_b, so d lse_a = w_a·(dlse + dout·(out_a − out)).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        return ops.merge_states(out_a, lse_a, out_b, lse_b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 4
        out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
        gradients: list[Tensor] = []
        for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
            # Weight 0 where the part is empty, the merged row included (−inf − −inf is no number).
            weight = torch.exp(part_lse - lse).masked_fill(part_lse == -torch.inf, 0.0)
            d_part_lse = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
            if dout is None:
                gradients.append(torch.zeros_like(part))
            else:
                gradients.append((weight.unsqueeze(-1) * dout).to(part.dtype))
                d_part_lse = d_part_lse + (dout.to(lse.dtype) * (part - out).to(lse.dtype)).sum(-1)
            gradients.append(weight * d_part_lse)
        return _refuse_second_order((dout, dlse, out_a, lse_a, out_b, lse_b), tuple(gradients))
