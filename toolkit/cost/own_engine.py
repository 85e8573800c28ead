"""The moments at which this project's own engine may hold most on one rank: it is ours, so nothing need be approximated.

Other frameworks are estimated per weight in toolkit.cost.memory; here padding, replicated norms, tied copies and DeepSpeed's
buffers are counted too. tests/cost/test_own_engine_runs.py holds the figures to what live engines hold.
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.cost.gathers import gathered, gathers, largest_cut, prefetched
from toolkit.cost.own_saved import final_norm, layer_saved, saved_by_chunk, stage_saved, turns
from toolkit.cost.own_states import states
from toolkit.cost.rank_weights import edge_weights, layer_weights
from toolkit.cost.reductions import LAST_BUCKET, reductions
from toolkit.cost.workload import Workload
from toolkit.parallel.order import warmup


def known(w: Workload) -> bool:
    """Whether the tensors that a layer keeps are those listed here: our layers, PyTorch's fused attention, a mode we offer."""
    return w.stack.name == "toolkit" and w.flash and w.recompute in ("none", "selective", "full")


def moments(w: Workload, stage: int, *, cpu: bool) -> dict[str, dict[str, float]]:
    """Bytes beyond the states at each moment that can be a stage's worst, by part.

    In the backward of the last layer everything kept is still there, with what was recomputed and the gradients of the widest tensors;
    at the loss, the logits, their fp32 copy and their gradient.
    """
    s, b, t = w.model, w.width, w.tokens
    kept = stage_saved(w, stage, cpu=cpu)
    redone = 0.0
    if w.recompute == "full":
        redone = layer_saved(replace(w, recompute="none"), cpu=cpu) - (0 if w.offload_activations else t / w.sequence_shards * b * s.hidden)
    stream = t / w.sequence_shards * b * s.hidden
    # the gate's product is already freed when the gradients of its two halves come: two of three buffers remain
    widest = t * b * max((2 if s.gated else 1) * s.ffn / w.tp, (s.query + s.key_value) / w.tp)
    held = kept["activations"]
    if stage == w.pp - 1:
        held -= final_norm(w, cpu=cpu)  # the final norm's backward is over
    found = {
        "backward": {"activations": held, "working set": redone + widest + 2 * stream},
        # no weight is whole any more, which base counts, and no bucket is there
        "optimizer step": {"working set": _step_copies(w, stage) - gathered(w, stage)},
    }
    if w.zero == 2 and w.offload_optimizer == "none":
        found["optimizer step"]["zero buffers"] = -states(w, stage)["zero buffers"]
    if w.zero < 3 and (b < 4 or w.zero == 2 or w.offload_optimizer != "none"):
        # a product's gradients: those of its output, its input (gathered from sequence parallel ranks) and its weight, before it is added
        inputs = t * b * s.hidden if w.sequence_shards > 1 else 0.0
        weight = b * max(x.count for x in layer_weights(w))
        wide = t * b * (2 if s.gated else 1) * s.ffn / w.tp
        found["weight gradient"] = {"activations": held, "working set": redone + wide + inputs + weight + stream}
    if stage == 0 and w.zero < 2:  # its last gradient is the embedding's, whole
        found["embedding"] = {
            "activations": held - held / min(warmup(stage=0, pp=w.pp, vpp=w.vpp, microbatches=w.microbatches) + 1, w.microbatches * w.vpp),
            "working set": b * s.rows * s.hidden / w.tp + stream,
        }
    if w.zero < 2 and w.offload_optimizer != "none":
        _grow(w, stage, found, cpu=cpu)
    for chunk, more in prefetched(w, stage).items():
        # early in a forward: what it keeps itself is not there yet
        running = saved_by_chunk(w, stage, cpu=cpu)[chunk]
        found[f"forward of chunk {chunk}"] = {"activations": max(0.0, held - running), "working set": more + widest / 2 + 4 * stream}
    buckets = w.zero == 2 and w.offload_optimizer == "none"
    if w.zero == 3 or (w.zero == 2 and w.shards > 1):
        found |= reductions(w, stage, held, redone=redone)
    if s.tied and w.pp == 1 and not (b == 4 and w.zero < 2):
        # a tied weight's gradient from the output layer waits for the embedding's, which comes last
        for moment in found.keys() - ({"optimizer step", f"{LAST_BUCKET} 0"} if w.zero == 3 else {"optimizer step"}):
            found[moment]["working set"] += b * s.rows * s.hidden / w.tp
    if stage == w.pp - 1:
        # the loss overwrites its fp32 logits with the softmax and that with the gradient; in 16 bits the logits as multiplied stay too
        found["loss"] = {**kept, "working set": stream + (t * s.rows / w.tp * b if b < 4 else 0.0)}
        if w.loss_chunk:
            # a piece's fp32 logits and what is multiplied of them, the gradient of the whole input, and the weight's in fp32
            piece = w.loss_chunk * s.rows / w.tp * (4 + (b if b < 4 else 0))
            summed = 4 * s.rows * s.hidden / w.tp if b < 4 or w.zero > 1 else 0.0
            found["loss"]["working set"] = t * b * s.hidden * (2 if w.sp else 1) + piece + summed
        if w.zero < 2 and w.offload_optimizer != "none" and not w.loss_chunk:
            # the output layer's gradient is whole before it is added
            whole = (t * s.rows + s.rows * s.hidden) / w.tp * b
            found["output layer"] = {"activations": kept["activations"], "working set": whole + stream}
        if w.zero == 3:
            found["loss"]["working set"] -= w.width * largest_cut(w, stage) if gathers(w) else 0  # its gradient is not there yet
        if w.zero == 3 and not w.loss_chunk:  # base counts the weight and its gradient
            found["output layer"] = {"activations": kept["activations"], "working set": t * s.rows / w.tp * b + 2 * stream}
        if buckets:
            # they are made when the first gradient comes, which is the output layer's
            found["loss"]["zero buffers"] = -states(w, stage)["zero buffers"]
            first = max(t * s.rows, s.rows * s.hidden) / w.tp * b
            found["output layer"] = {"activations": kept["activations"], "working set": first + 2 * stream}
    return found


def _grow(w: Workload, stage: int, found: dict[str, dict[str, float]], *, cpu: bool) -> None:
    """Correct a backward's moment where gradients are not there from the start: ZeRO-1 with its optimizer offloaded.

    Autograd makes each chunk's gradients in its first backward, when what earlier forwards have kept begins to go. The worst backward is
    found by following the schedule, a chunk at a time.
    """
    each, layers = saved_by_chunk(w, stage, cpu=cpu), sum(x.count for x in layer_weights(w))
    before, after = edge_weights(w, stage)
    gradients = [w.width * layers * w.layers_in(stage, chunk) for chunk in range(w.vpp)]
    gradients[0] += w.width * sum(x.count for x in before)
    gradients[-1] += w.width * sum(x.count for x in after)
    total, absent, now, best = sum(gradients), float(sum(gradients)), 0.0, (0.0, float(sum(gradients)))
    first = best  # of the first chunk's backwards, at their ends
    made: set[int] = set()
    for forward, chunk in turns(stage, w.pp, w.vpp, w.microbatches):
        now += each[chunk] if forward else 0.0
        if now - absent > best[0] - best[1]:
            best = now, absent
        if not forward:
            now -= each[chunk]
            if chunk not in made:
                made.add(chunk)
                absent = float(total - sum(gradients[other] for other in made))
            if chunk == 0 and now - absent > first[0] - first[1]:
                first = now, absent
    fullest = stage_saved(w, stage, cpu=cpu)["activations"]
    for name in ("backward", "weight gradient"):
        found[name]["activations"] = max(0.0, found[name]["activations"] - max(0.0, fullest - best[0]))
        found[name]["gradients"] = -best[1]
    if "embedding" in found:
        found["embedding"] |= {"activations": first[0], "gradients": -first[1]}


def _step_copies(w: Workload, stage: int) -> float:
    """DeepSpeed's ZeRO-2 and 3 flatten a rank's gradients once more for the step, in fp32; Muon computes on whole matrices."""
    if w.optimizer.whole:
        # in bf16 as gathered, three iterates and their product at most; in fp32 the update, scaled and cut
        matrices = [weight.count for weight in w.model.layer if weight.group == "matrix"]
        return 20.0 * max(matrices)
    if w.zero < 2 or w.offload_optimizer != "none":
        return 0.0
    part = w.parameters_on(stage) / w.shards
    return 4 * (min(part, w.sub_group) if w.zero == 3 else part)
