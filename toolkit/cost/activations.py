"""Bytes of activations that a transformer layer keeps for its backward, term by term."""

from __future__ import annotations

from toolkit.cost.workload import Workload


def layer_bytes(w: Workload) -> float:
    """Bytes one layer saves for one micro-batch on one rank, nothing recomputed.

    The tensors are those of arXiv 2205.05198 (section 4) for the layer as built today: inputs of both norms and of
    all four matrix multiplies, queries, keys and values after rotation, fused attention's output and log-sum-exp
    (or softmax and dropout outputs without it), the MLP's products. Terms of width h are split over TP only with
    sequence parallelism; the rest always is. Unfused stacks also keep fp32 copies inside the norm and each factor of the gate.
    """
    s, b, t = w.model, w.width, w.tokens
    whole = t / w.sequence_shards
    split = t / w.tp
    if not w.stack.norm_fused and s.norm == "rms":
        norms = 2 * (b + b + 4) * s.hidden  # PyTorch's RMSNorm chain keeps the fp32 input, the normalised and the scaled output
    else:
        norms = 2 * (b + b) * s.hidden  # input, output
    gate = (4 if not w.stack.gate_fused else 3) if s.gated else 2
    per_split = b * (s.query + s.key_value) + b * gate * s.ffn + attention_bytes(w) / max(1, t)
    dropout = 2 * s.hidden if s.dropout else 0
    gathered = (t - whole) * 2 * b * s.hidden if w.stack.saved_gathers else 0.0
    return whole * (norms + dropout) + split * per_split + gathered


def attention_bytes(w: Workload) -> float:
    """Bytes attention itself saves for one micro-batch over all of its heads: output and statistics, or the score matrices."""
    s, b, t = w.model, w.width, w.tokens
    output = t * b * s.query
    if w.flash:
        return output + t * 4 * s.heads
    scores = t * w.seq * s.heads
    probabilities = b if w.stack.softmax_fused else b + 4  # PyTorch's softmax in fp32 keeps its result beside the 16-bit one
    return output + scores * (probabilities + (1 + b if s.dropout else 0))


def boundary_bytes(w: Workload) -> float:
    """Bytes of the residual stream of one micro-batch on one rank: what a recomputed layer keeps, what a stage sends."""
    return w.tokens * w.width * w.model.hidden / w.sequence_shards


def saved_per_layer(w: Workload) -> float:
    """Bytes a layer keeps between its forward and its backward under the recompute mode."""
    full = layer_bytes(w)
    edge = boundary_bytes(w) / (w.tp if w.split_checkpoints and not w.sp else 1)
    s, b = w.model, w.width
    if w.recompute == "full":
        return 0.0 if w.offload_activations else edge
    if w.recompute == "alternate":
        return (full + edge) / 2
    if w.recompute == "half":  # kept: attention's output and those of every second multiply (query, value, first MLP, last MLP)
        return edge + w.tokens / w.tp * b * (2 * s.query + s.key_value / 2 + s.ffn + s.hidden)
    if w.recompute == "selective":  # core attention is redone from queries, keys and values
        if w.flash:
            return full - w.tokens / w.tp * 4 * s.heads
        return full - (attention_bytes(w) - w.tokens * b * s.query) / w.tp
    return full


def working_bytes(w: Workload) -> float:
    """Bytes alive only while one layer's backward runs: what was recomputed, and the gradients of its widest tensors."""
    s, b = w.model, w.width
    redone = 0.0
    if w.recompute in ("full", "alternate", "half"):
        redone = layer_bytes(w) + (boundary_bytes(w) if w.offload_activations else 0.0)
    elif w.recompute == "selective" and not w.flash:
        redone = (attention_bytes(w) - w.tokens * b * s.query) / w.tp
    if not w.flash:  # the gradient of the scores; as PyTorch operators, in fp32 of softmax, mask and scale
        redone += w.tokens * w.seq * s.heads / w.tp * (b if w.stack.softmax_fused else b + 8)
    in_place = w.stack.chunked_loss  # Liger's gated activation writes its gradients over its inputs
    widest = max((2 if s.gated and not in_place else 1) * s.ffn / w.tp, s.hidden / w.sequence_shards, (s.query + s.key_value) / w.tp)
    return redone + w.tokens * b * (widest + 2 * s.hidden / (1 if w.sp else w.sequence_shards))


def logits_bytes(w: Workload) -> float:
    """Bytes alive at the loss: logits of one micro-batch, their fp32 copies and gradients, split over TP by vocabulary unless the stack gathers them."""
    if w.loss_chunk:
        return w.loss_chunk * w.model.rows / w.tp * w.stack.logit_bytes
    if w.stack.chunked_loss:  # a few thousand rows at a time
        return min(w.tokens, 4096) * w.model.rows / w.tp * w.stack.logit_bytes
    split = 1 if w.stack.whole_logits else w.tp
    return w.tokens * w.model.rows / split * w.stack.logit_bytes * (w.width / 2 if w.width == 4 and w.stack.logit_bytes < 8 else 1)


def in_flight(w: Workload, stage: int) -> float:
    """Micro-batches whose activations a stage holds at its peak, in units of the stage's whole layer set.

    1F1B (arXiv 2104.04473, section 2.2): the warm-up of pp - stage - 1 plus the running one; interleaved:
    2·(pp - stage - 1) + (vpp - 1)·pp + 1 chunks of layers/(pp·vpp); never more than there are.
    """
    if w.vpp > 1:
        chunks = 2 * (w.pp - stage - 1) + (w.vpp - 1) * w.pp + 1
        return min(chunks, w.microbatches * w.vpp) / w.vpp
    return min(w.pp - stage, w.microbatches)
