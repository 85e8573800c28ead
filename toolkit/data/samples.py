"""megatron-core's datasets, with indices that no killed or second process can leave half-built."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import shutil
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from toolkit.data.documents import cut_at_ends, laid_end_to_end
from toolkit.data.packing import Packs, best_fit
from toolkit.errors import DataError
from toolkit.files import LOCK, Partial, sync_file, write_durably
from toolkit.parallel.agree import everywhere, on_rank_0

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core warns about optional packages at import
    from megatron.core import __version__ as mcore_version
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

log = logging.getLogger(__name__)

_COMPLETE = "complete.json"


class Samples(GPTDataset):
    """megatron-core's samples as {"text": int64 [seq_length + 1]}, without the masks and positions
    that nothing here reads.
    """

    def __getitem__(self, idx: int | None) -> dict[str, np.ndarray]:
        # 0.16 returns two values, 0.19 three.
        return {"text": self._query_document_sample_shuffle_indices(int(idx or 0))[0]}


class Separate(Samples):
    """The same samples cut at the documents' ends: see toolkit.data.documents."""

    def __getitem__(self, idx: int | None) -> dict[str, np.ndarray]:
        return cut_at_ends(super().__getitem__(idx)["text"].astype(np.int32), eod=self.config.tokenizer.eod)


class Packed(GPTDataset):
    """Whole documents, packed by toolkit.data.packing anew for each epoch, and cut at their ends."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, None]:
        """Pieces and bounds as toolkit.data.packing.Packs has them; documents by their number in the file."""
        base = Path(self.config.path_to_cache) / f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        files = [base.with_name(f"{base.name}-{part}.npy") for part in ("pieces", "bounds")]
        if not all(f.exists() for f in files):
            packs = self._packed()
            files[0].parent.mkdir(parents=True, exist_ok=True)
            for file, array in zip(files, (packs.pieces, packs.bounds), strict=True):
                np.save(file, array)
        pieces, bounds = (np.load(f, mmap_mode="r") for f in files)
        return pieces, bounds, None

    def _packed(self) -> Packs:
        random = np.random.RandomState(self.config.random_seed)
        lengths = self.dataset.sequence_lengths[self.indices]
        epochs: list[Packs] = []
        samples = 0
        while samples < self.num_samples or not epochs:
            epochs.append(best_fit(lengths, self.config.sequence_length, random=random))
            samples += len(epochs[-1])
        pieces = np.concatenate([e.pieces for e in epochs])
        pieces[:, 0] = self.indices[pieces[:, 0]]
        starts = np.cumsum([0, *(len(e.pieces) for e in epochs)])
        bounds = np.concatenate([[0], *(e.bounds[1:] + start for e, start in zip(epochs, starts, strict=False))])
        return Packs(bounds, pieces)

    def __len__(self) -> int:
        return len(self.sample_index) - 1

    def __getitem__(self, idx: int | None) -> dict[str, np.ndarray]:
        low, high = self.sample_index[int(idx or 0) : int(idx or 0) + 2]
        pieces, whole = [], []
        for document, first, count in self.document_index[low:high].tolist():
            whole.append(first + count == self.dataset.sequence_lengths[document])
            pieces.append(self.dataset.get(document, offset=first, length=count + (not whole[-1])))
        return laid_end_to_end(pieces, whole, seq_length=self.config.sequence_length)


class _Builder(BlendedMegatronDatasetBuilder):
    """megatron-core's splitting and blending, without its barriers: who builds and who waits is
    decided in build().
    """

    @staticmethod
    def build_generic_dataset(kind: Callable[..., Any], is_built_on_rank: Callable[..., bool], synchronize_ranks: bool, *args: Any) -> Any:
        if kind is BlendedDataset:
            members, weights, size, config = args
            if not size:
                return None
            if not dist.is_initialized():
                # 0.16 asks for the rank before it saves a blend; without process groups the blend
                # stays in memory.
                config = copy.copy(config)
                config.path_to_cache = None
            return BlendedDataset(members, weights, size, config)
        low_level, path, indices, size, split, config = args
        return kind(low_level, path, indices, size, split, config) if size else None

    def _build_megatron_datasets_parallel(self, prefixes: list[str], split: Any, sizes: list[list[int]]) -> list[list[Any]]:
        per_prefix = [self._build_megatron_dataset_splits(prefix, split, size) for prefix, size in zip(prefixes, sizes, strict=True)]
        return [list(one) for one in zip(*per_prefix, strict=True)]


class _TokenizerStub:
    """All that GPTDatasetConfig wants to know of a tokenizer; there is nothing left to tokenize."""

    def __init__(self, *, eod: int | None, vocab_size: int, name: str) -> None:
        self.eod, self.vocab_size = eod, vocab_size
        self.unique_identifiers = {"tokenizer": name}


def build(
    *,
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    split: str,
    seq_length: int,
    seed: int,
    sizes: tuple[int, int, int],
    eod: int | None,
    vocab_size: int,
    identity: str,
    cache: Path,
    document_mask: bool = False,
    packing: str = "concat",
) -> list[Any]:
    """Train, valid and test datasets; None where the size is 0. Collective: every rank of the world calls it.

    document_mask, packing: as in the data section, which refuses best_fit without the mask. sizes:
    samples of each; identity: changes when the files' contents do; cache: folder for the indices,
    on a disk that all hosts share. Rank 0 builds missing indices; if it fails, or another rank
    cannot see them, all ranks raise the same DataError.
    """
    in_memory_blend = len(prefixes) > 1 and not dist.is_initialized()
    facts = [list(prefixes), list(weights or []), split, seq_length, seed, sizes, identity, in_memory_blend, mcore_version]
    kind = Packed if packing == "best_fit" else Separate if document_mask else Samples
    facts += [kind.__name__] if kind is not Samples else []
    folder = cache / "indices" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]

    def datasets(at: Path) -> list[Any]:
        known = {f.name for f in dataclasses.fields(GPTDatasetConfig)}
        options: dict[str, Any] = {"mid_level_dataset_surplus": 0.005} if "mid_level_dataset_surplus" in known else {}
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend=(list(prefixes), list(weights) if weights is not None else None),
            split=split,
            path_to_cache=str(at),
            tokenizer=_TokenizerStub(eod=eod, vocab_size=vocab_size, name=identity),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **options,
        )
        return list(_Builder(kind, list(sizes), lambda: True, config).build())

    on_rank_0(lambda: _ensure(folder, datasets))
    everywhere(lambda: _visible(folder))
    return datasets(folder)


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _COMPLETE).read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _ensure(folder: Path, datasets: Callable[[Path], list[Any]]) -> None:
    """Build the indices in a folder of their own and rename it: a killed build leaves nothing that
    looks finished.
    """
    if _is_complete(folder):
        return
    try:
        with Partial(folder) as partial:
            log.info("building sample indices in %s", folder)
            datasets(partial.folder)
            built = sorted(p for p in partial.folder.iterdir() if p.name != LOCK)
            for path in built:
                sync_file(path)
            write_durably(partial.folder / _COMPLETE, json.dumps({p.name: p.stat().st_size for p in built}))
            if folder.exists() and not _is_complete(folder):
                log.warning("%s is incomplete; replacing it", folder)
                shutil.rmtree(folder)
            try:
                partial.publish()
            except OSError:
                # Another run with the same config was faster; its indices are the same.
                if not _is_complete(folder):
                    raise
    except DataError:
        raise
    except OSError as e:
        raise DataError(
            f"the sample indices could not be written to {folder}",
            why=str(e),
            fix="Set data.cache_dir to a folder with space that you may write to.",
        ) from e
    except Exception as e:
        log.exception("building the sample indices failed")
        raise DataError(
            "the sample indices could not be built", why=f"{type(e).__name__}: {e}", fix="Check data.cache_dir and the data files."
        ) from e


def _visible(folder: Path) -> None:
    if not _is_complete(folder):
        raise DataError(
            f"host {socket.gethostname()} does not see {folder}",
            why="rank 0 built the sample indices there",
            fix="Set data.cache_dir to a folder that all hosts share.",
        )
