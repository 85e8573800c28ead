"""Data sets that a program hands to the Trainer, in the place of data.source.

A data set is map-style: len(dataset) samples, and dataset[i] a dict of arrays (NumPy, or tensors on
the CPU) with {"tokens": int [seq_length], "labels": int [seq_length]} or {"text": int [seq_length +
1]}, whose labels are the next tokens. Other entries, such as a mask, reach the loss with the
micro-batch: "mask" of shape [s] is [b, s] there. Two of them mean something to the run itself:

- "loss_mask" [seq_length], 0 or 1: tokens whose label is left out of the loss. A label of -100 is
  left out too. Those that stay weigh the same over the whole global batch.
- "positions" [seq_length], which data.document_mask needs: counted from 0 within each document.

Order: a run takes each sample once. Step k takes places kG … (k+1)G - 1 of the order, G being
train.global_batch_size: the data set's own order, or a permutation of it that run.seed decides. A
resumed run goes on with the next place, on any layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from toolkit.config.schema import RunConfig
from toolkit.errors import DataError, ToolkitError, name_of, raised_by

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
_LOOKED_AT = 4  # samples checked before training; each sample is checked again when it is read


@dataclass(frozen=True, kw_only=True)
class GivenData:
    """Data sets for training and, where train.eval_every is set, for evaluation, which takes the
    first samples in their own order.

    shuffle: train in an order that run.seed decides. masked: whether samples may leave tokens out of
    the loss; False saves a look at each step. The attribute `identity` of a data set, a
    text, tells a checkpoint which data it belongs to; without it the data set's class and length
    do.
    """

    train: Any
    valid: Any = None
    shuffle: bool = True
    masked: bool = True

    tokenizer_hash: ClassVar[None] = None  # what PreparedData has of a tokenizer and of a blend
    weights: ClassVar[tuple[float, ...]] = ()

    @property
    def identity(self) -> str:
        """What a checkpoint remembers of the data, for a run that goes on from it to be held to."""
        named = getattr(self.train, "identity", None) or f"{name_of(self.train)} of {len(self.train):,} samples"
        return f"{named}, {'shuffled' if self.shuffle else 'in its own order'}"

    @property
    def summary(self) -> str:
        """The data in a few words, for the start of a run."""
        return self.identity

    def datasets(self, config: RunConfig) -> tuple[Samples, Samples | None]:
        """Training and evaluation samples in the order in which a run takes them."""
        # RandomState and not default_rng: its numbers are the same in every version of NumPy
        order = np.random.RandomState(config.run.seed).permutation(len(self.train)) if self.shuffle else None
        valid = Samples(self.valid, config, masked=self.masked) if self.valid is not None else None
        return Samples(self.train, config, order=order, masked=self.masked), valid

    def check(self, config: RunConfig) -> tuple[str, int, int | None]:
        """Length, shape and ids before anything is trained; returns what all ranks must find alike.
        Raises DataError.
        """
        try:
            self._check(config)
            return self.identity, len(self.train), len(self.valid) if self.valid is not None else None
        except ToolkitError:
            raise
        except Exception as error:  # the length of a data set is the user's code too
            raise raised_by(f"the data set {name_of(self.train)}", error, kind=DataError) from None

    def _check(self, config: RunConfig) -> None:
        t = config.train
        wanted = [("data set", "train.steps", self.train, t.steps)]
        if t.eval_every:
            if self.valid is None:
                raise DataError(
                    f"train.eval_every={t.eval_every} has no data",
                    why="a data set of your own was given for training alone",
                    fix="Give eval_dataset as well, or set train.eval_every to 0.",
                )
            wanted.append(("evaluation data set", "train.eval_steps", self.valid, t.eval_steps))
        for kind, key, dataset, steps in wanted:
            name = f"the {kind} {name_of(dataset)}"
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise DataError(f"{name} has no length or no samples by number", why="a resumed run has to find its place", fix="Define __len__ and __getitem__.")  # fmt: skip
            samples, need = len(dataset), steps * t.global_batch_size
            if samples < need:
                raise DataError(
                    f"{name} has {samples:,} samples, and the run takes {need:,}",
                    why=f"{key}={steps} global batches of train.global_batch_size={t.global_batch_size}, each sample once",
                    fix=f"Set {key} to at most {samples // t.global_batch_size}, or give more samples."
                    if samples >= t.global_batch_size
                    else "Give more samples.",
                )
            reader = Samples(dataset, config, masked=self.masked)
            for i in sorted({(samples - 1) * k // (_LOOKED_AT - 1) for k in range(_LOOKED_AT)} if samples else ()):
                if isinstance(found := reader[i], ToolkitError):
                    raise found


class Samples:
    """A data set as the loader reads it: checked samples of {"tokens", "labels"} and the user's
    other arrays, by place in the order.

    A sample that cannot be used is returned as its error: raised in a reading process it would come
    with a traceback.
    """

    def __init__(self, dataset: Any, config: RunConfig, *, order: np.ndarray | None = None, masked: bool = True) -> None:
        assert config.model.vocab_size is not None
        self.dataset, self.order = dataset, order
        self.seq_length, self.vocab_size = config.train.seq_length, config.model.vocab_size
        self.document_mask, self.masked = config.data.document_mask, masked

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, np.ndarray] | ToolkitError:
        i = int(place if self.order is None else self.order[place])
        name = f"sample {i} of the data set {name_of(self.dataset)}"
        try:
            return self._checked(self.dataset[i], name)
        except ToolkitError as error:
            return error
        except Exception as error:
            return raised_by(f"reading {name}", error, kind=DataError)

    def _checked(self, sample: Any, name: str) -> dict[str, np.ndarray]:
        if not isinstance(sample, Mapping) or not ("text" in sample or {"tokens", "labels"} <= sample.keys()):
            got = sorted(map(str, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            raise DataError(f"{name} is {got}", why="a sample is a dict", fix='Return {"tokens": …, "labels": …} or {"text": …}.')
        arrays = {key: np.asarray(value) for key, value in sample.items()}
        for key, length in (
            (("text", self.seq_length + 1),) if "text" in arrays else (("tokens", self.seq_length), ("labels", self.seq_length))
        ):
            found = arrays[key]
            if found.shape != (length,) or found.dtype.kind not in "iu":
                raise DataError(
                    f"{name} has {key} of shape {list(found.shape)} and type {found.dtype}",
                    why=f"with train.seq_length={self.seq_length} it takes whole numbers of shape [{length}]",
                    fix="Cut or pad the samples, or set train.seq_length.",
                )
            if key == "labels" and self.masked:
                arrays = self._without_ignored(arrays, name)
                found = arrays[key]
            low, high = int(found.min()), int(found.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"{name} has ids from {low} to {high} in {key}",
                    why=f"with model.vocab_size={self.vocab_size} they go from 0 to {self.vocab_size - 1}",
                    fix="Leave tokens out of the loss by a loss_mask, or by the label -100." if low < 0 else "Set model.vocab_size.",
                )
        if "text" in arrays:
            text = arrays.pop("text")
            arrays = {"tokens": text[:-1], "labels": text[1:], **arrays}
            arrays = self._without_ignored(arrays, name) if self.masked else arrays
            if self.document_mask and "positions" in arrays:  # the next document's first token is nobody's label
                arrays["loss_mask"][:-1] &= arrays["positions"][1:] != 0
        if self.document_mask:
            _check_positions(arrays.get("positions"), self.seq_length, name)
        return arrays

    def _without_ignored(self, arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        """With a loss_mask of 0 and 1, which leaves out labels of -100 too."""
        mask = arrays.get("loss_mask", np.ones(self.seq_length, np.uint8))
        if mask.shape != (self.seq_length,) or not np.isin(mask, (0, 1)).all():
            raise DataError(
                f"{name} has loss_mask of shape {list(mask.shape)} and type {mask.dtype}"
                + ("" if mask.shape != (self.seq_length,) else f" with values from {mask.min()} to {mask.max()}"),
                why=f"with train.seq_length={self.seq_length} it takes 0 and 1 of shape [{self.seq_length}], one for each label",
                fix="Give 1 where the label counts and 0 where it does not.",
            )
        ignored = arrays["labels"] == IGNORED
        return arrays | {"loss_mask": mask.astype(np.uint8) * ~ignored, "labels": np.where(ignored, 0, arrays["labels"])}


def _check_positions(found: np.ndarray | None, seq_length: int, name: str) -> None:
    """Hold a sample's positions to counting from 0 within each document."""
    if found is None or found.shape != (seq_length,) or found.dtype.kind not in "iu":
        raise DataError(
            f"{name} has " + ("no positions" if found is None else f"positions of shape {list(found.shape)} and type {found.dtype}"),
            why=f"with data.document_mask=true they say where documents begin: whole numbers of shape [{seq_length}]",
            fix="Count from 0 within each document, or set data.document_mask to false.",
        )
    steps = found.astype(np.int64)
    if steps[0] != 0 or not ((steps[1:] == 0) | (steps[1:] == steps[:-1] + 1)).all():
        raise DataError(
            f"{name} has positions {steps[:6].tolist()} …",
            why="they must begin with 0, and each must be one more than the one before it, or 0",
            fix="Count from 0 within each document.",
        )
