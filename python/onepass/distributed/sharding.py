"""DTensor's rules for the attention operations: which placements of operands and results go together.

Batch: everything that has a batch dimension is sharded on it; gradients of what has none are partial sums.
Heads (tensor parallel): queries and key/value heads are split alike, so a group never crosses ranks; a single key/value
head (MQA) is replicated instead, and its gradients are partial sums.
With dropout only replication would fit: the mask is keyed by batch and head index, which each rank would count from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from onepass._ops import bound_arguments, ops

# Placements of an operation's results and, by name, of its tensor operands.
_Rule = tuple[list[Placement], dict[str, Placement]]
_BATCH, _HEADS = 0, 1
_OPERATIONS = ("plain_attention", "attention", "attention_with_lse", "attention_backward")


def register_sharding_rules() -> None:
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name in _OPERATIONS:
        operation = getattr(ops, name).default
        register_sharding(operation)(_strategy(name))
        # DTensor remembers the placements of a call by its tensors and integers. Ours also depend on flags and on the
        # dropout probability, so all arguments from the first option on must count.
        first_option = [argument.name for argument in operation._schema.arguments].index("causal")
        info = RuntimeSchemaInfo(static_argnum=first_option, needs_pytree=True)
        propagator.register_op_strategy(operation, propagator.op_strategy_funcs[operation], info)


def _strategy(name: str) -> Callable[..., Any]:
    parameters = [argument.name for argument in getattr(ops, name).default._schema.arguments]

    def strategy(*args: Any, **kwargs: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        given = bound_arguments(name, args, kwargs)
        rules = [_replicated(name)]
        if not getattr(given, "dropout_p", 0.0):
            rules.append(_by_batch(name, given))
            if _heads_divide(given):
                rules.append(_by_heads(name, given))
        shardings = []
        for results, operands in rules:
            placements: list[Placement | None] = []
            for parameter, value in zip(parameters, args, strict=False):
                is_tensor = hasattr(value, "placements")
                placements.append(operands.get(parameter, Replicate()) if is_tensor else None)
            shardings.append((results, placements))
        return shardings

    return strategy


def _replicated(name: str) -> _Rule:
    return [Replicate() for _ in getattr(ops, name).default._schema.returns], {}


def _by_batch(name: str, given: SimpleNamespace) -> _Rule:
    shard = Shard(_BATCH)
    operands: dict[str, Placement] = dict.fromkeys(("q", "k", "v", "out", "lse", "dout", "key_begin", "key_end"), shard)
    bias, slopes = getattr(given, "bias", None), getattr(given, "alibi_slopes", None)
    shared_bias = bias is not None and bias.shape[0] == 1
    if bias is not None and not shared_bias:
        operands["bias"] = shard
    if slopes is not None and slopes.ndim == 2:
        operands["alibi_slopes"] = shard
    if name != "attention_backward":
        return _forward_results(name, given, shard), operands
    dbias = _gradient(given.bias_gradient, Partial() if shared_bias else shard)
    return [shard, shard, shard, dbias, _gradient(given.sinks_gradient, Partial())], operands


def _by_heads(name: str, given: SimpleNamespace) -> _Rule:
    shard = Shard(_HEADS)
    is_mqa = given.k.shape[_HEADS] == 1
    operands: dict[str, Placement] = dict.fromkeys(("q", "out", "lse", "dout"), shard)
    operands |= dict.fromkeys(("k", "v"), Replicate() if is_mqa else shard)
    bias, slopes = getattr(given, "bias", None), getattr(given, "alibi_slopes", None)
    shared_bias = bias is not None and bias.shape[_HEADS] == 1
    if bias is not None and not shared_bias:
        operands["bias"] = shard
    operands["sinks"] = Shard(0)
    if slopes is not None:
        operands["alibi_slopes"] = Shard(slopes.ndim - 1)
    if name != "attention_backward":
        return _forward_results(name, given, shard), operands
    dkv: Placement = Partial() if is_mqa else shard
    dbias = _gradient(given.bias_gradient, Partial() if shared_bias else shard)
    return [shard, dkv, dkv, dbias, _gradient(given.sinks_gradient, Shard(0))], operands


def _forward_results(name: str, given: SimpleNamespace, shard: Placement) -> list[Placement]:
    """Of out, and with it lse and total attention, (batch, heads, …) like out, or empty when not asked for."""
    if name != "attention_with_lse":
        return [shard]
    return [shard, shard, shard if given.return_total_attention else Replicate()]


def _gradient(is_wanted: bool, placement: Placement) -> Placement:
    """An absent gradient is an empty tensor on every rank."""
    return placement if is_wanted else Replicate()


def _heads_divide(given: SimpleNamespace) -> bool:
    """Whether every rank gets whole groups of heads on any dimension of the mesh, or on all of them together."""
    mesh = given.q.mesh
    heads, heads_kv = given.q.shape[_HEADS], given.k.shape[_HEADS]
    splits = [mesh.size(dim) for dim in range(mesh.ndim)]
    already = sum(placement.is_shard(_HEADS) for placement in given.q.placements)
    if already > 1:
        splits = [mesh.size()]
    return all(heads % split == 0 and (heads_kv == 1 or heads_kv % split == 0) for split in splits)
