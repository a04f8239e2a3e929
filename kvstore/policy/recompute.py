"""What a chunk saves when it is read: the seconds that its prefill would take.

Covers: seconds from a chunk's length and position. Does not cover: measured speeds of this cluster's engines
(`router`), which change decisions between nodes; the order of evictions needs ratios only.

Source:
    Prefill of `n` tokens behind `c` tokens takes n x (2 x parameters + 4 x layers x width x (c + n / 2)) operations:
    the matrices of the model, and attention to what stands before. For a 70B model (80 layers of width 8,192) the
    second term equals the first at about 53,000 tokens of context, for an 8B model (32 layers of 4,096) at 30,500.
    The linear speed only gives figures in seconds a size that one node with such a model has.
"""

from typing import Final

LINEAR_TOKENS_PER_S: Final = 8000.0
"""Tokens prefilled per second behind no context."""
ATTENTION_TOKENS: Final = 53_000.0
"""Context at which attention takes as long as everything else."""


def recompute_s(num_tokens: float, *, base_position: int) -> float:
    """Seconds to compute the KV of `num_tokens` behind `base_position` tokens.

    Example:
        >>> recompute_s(8000, base_position=0), recompute_s(8000, base_position=49_000)
        (1.0754716981132075, 2.0)
    """
    context_tokens = base_position + num_tokens / 2
    return num_tokens / LINEAR_TOKENS_PER_S * (1.0 + context_tokens / ATTENTION_TOKENS)
