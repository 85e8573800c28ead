"""Into how many pieces the output layer and the loss are cut, so that a micro-batch's fp32 logits
never exist at once.
"""

from __future__ import annotations

PAYS_FROM = 2**30  # bytes of a micro-batch's fp32 logits on one rank: below, the second multiplication costs more than it saves
CHUNK = 2**28  # bytes of the fp32 logits of one piece
FEWEST = 4  # pieces where a piece is asked for


def loss_chunk(mode: str, *, tokens: int, columns: int) -> int:
    """Tokens of one piece; 0 where the logits are computed whole.

    mode: train.chunked_loss. tokens: of one rank's micro-batch. columns: its part of the vocabulary.
    """
    if mode == "never" or (mode == "auto" and 4 * tokens * columns < PAYS_FROM):
        return 0
    return max(1, min(max(128, CHUNK // (4 * columns)), -(-tokens // FEWEST)))
