"""torch.distributed: importing this module teaches DTensor how attention is sharded, by batch and by heads.

    import onepass.distributed
    out = onepass.attention(q, k, v, causal=True)  # q, k, v: DTensors sharded on dimension 0 or 1

No communication takes place in the call: each rank computes its sequences or heads. Any other placement of an operand
is first brought into one of these by DTensor.
"""

from onepass.distributed.sharding import register_sharding_rules

__all__ = ["register_sharding_rules"]

register_sharding_rules()
