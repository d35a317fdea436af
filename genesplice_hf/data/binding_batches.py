"""Batches of binding data: unique windows and factors with the pairs between them, augmentation, balance.

Shapes: P pairs (rows), W windows, F factors, L tokens, R residues of the longest factor, T bins.
"""

import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from genesplice_hf.data.protein_embeddings import FactorStates
from genesplice_hf.data.proteins import PROTEIN_PAD_ID
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement


class BindingCollator:
    """Rows of `BindingDataset` or `TFBindTrackDataset` as inputs of a TF-binding model.

    Every window and every factor goes through its encoder once: `input_ids` (W, L) and `protein_embeds`
    (F, R, width) hold unique rows, `pairs` (P, 2) says which window and factor each label belongs to. Without
    `deduplicate` they have one row per pair and there is no `pairs`.

    In training a window is shifted by up to `max_shift` and, with probability one half, read from the other
    strand; the labels of bins then turn round with it. Rows of the same window get the same treatment, which
    depends on seed, epoch and window alone. In evaluation nothing is changed.

    Args:
        tokenizer: for DNA, such as `NucleotideTokenizer(preset="enformer")`.
        proteins: factor -> its residues, such as `FactorEmbeddings`; states (R, width) become `protein_embeds`,
            ids (R,) become `protein_input_ids`.
        contexts: cell -> vector (C,) or ids (fields,), given as `context` (P, C).
        context_texts: cell -> text, given through `context_tokenizer` as `context_input_ids` and `context_mask`.
        context_tokenizer: of the text encoder.
        training: augment.
        max_shift: largest shift in bp; the rows must carry a margin of at least that.
        rc_probability: of the other strand.
        pad_to_multiple_of: pad residues to a multiple of this.
        deduplicate: see above.
        read_values: also give `read_value` and `peaks_nr` (P,), for models with `aux_read_value`.
        seed: of the augmentation.

    Raises:
        DataError: arguments that do not fit, rows without the margin for shifts, a factor without residues.
    """

    def __init__(
        self,
        tokenizer: Any,
        proteins: Callable[[str], FactorStates] | None,
        contexts: Callable[[str], np.ndarray] | None = None,
        context_texts: Callable[[str], str] | None = None,
        context_tokenizer: Any = None,
        training: bool = False,
        max_shift: int = 2,
        rc_probability: float = 0.5,
        pad_to_multiple_of: int | None = None,
        deduplicate: bool = True,
        read_values: bool = False,
        seed: int = 0,
    ) -> None:
        if (context_texts is None) != (context_tokenizer is None):
            raise DataError("`context_texts` and `context_tokenizer` must be given together.")
        if max_shift < 0 or not 0 <= rc_probability <= 1:
            raise DataError("`max_shift` must be 0 or more and `rc_probability` must lie in [0, 1].")
        self.tokenizer, self.proteins, self.contexts = tokenizer, proteins, contexts
        self.context_texts, self.context_tokenizer = context_texts, context_tokenizer
        self.training, self.max_shift, self.rc_probability = training, max_shift, rc_probability
        self.pad_to_multiple_of, self.read_values = pad_to_multiple_of, read_values
        self.deduplicate = deduplicate and proteins is not None
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draws other shifts and strands from now on."""
        self.epoch = epoch

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the inputs of the model; see the class."""
        if not features:
            raise DataError("`features` must hold at least one row.")
        features = [one for row in features for one in _experiments(row)]
        treated = [self._augment(row) for row in features]
        windows, window_of = self._unique([sequence for sequence, _ in treated])
        batch = self._dna(windows)
        if self.proteins is not None:
            factors, factor_of = self._unique([row["factor"] for row in features])
            batch |= self._factors(factors)
            if self.deduplicate:
                batch["pairs"] = torch.tensor([window_of, factor_of]).T.contiguous()
        batch |= self._context([row.get("cell", "") for row in features])
        if self.read_values:
            for name in ("read_value", "peaks_nr"):
                batch[name] = torch.tensor([row[name] for row in features], dtype=torch.float32)
        labels = np.stack([np.asarray(label, dtype=np.float32) for _, label in treated])
        return batch | {"labels": torch.from_numpy(labels)}

    def _augment(self, row: Mapping[str, Any]) -> tuple[str, Any]:
        """The letters of a row without their margin, and its label, both turned round where the strand is."""
        sequence, label, margin = row["sequence"], row["label"], row.get("margin", 0)
        if not self.training:
            return sequence[margin : len(sequence) - margin], label
        if margin < self.max_shift:
            raise DataError(f"Rows have a margin of {margin} bp, less than `max_shift` ({self.max_shift}); raise it.")
        # Shuffled negatives have the place of their positive, so the letters are part of the seed.
        place = zlib.crc32(f"{row.get('chrom')}:{row.get('start')}:{sequence}".encode())
        rng = np.random.default_rng([self.seed, self.epoch, place])
        start = margin + int(rng.integers(-self.max_shift, self.max_shift + 1))
        sequence = sequence[start : start + len(sequence) - 2 * margin]
        if rng.random() >= self.rc_probability:
            return sequence, label
        return reverse_complement(sequence), label if np.ndim(label) == 0 else np.flip(label, axis=0)

    def _unique(self, values: list[Any]) -> tuple[list[Any], list[int]]:
        if not self.deduplicate:
            return values, list(range(len(values)))
        place = {value: at for at, value in enumerate(dict.fromkeys(values))}
        return list(place), [place[value] for value in values]

    def _dna(self, windows: list[str]) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(windows, padding=True, return_tensors="pt")
        batch = {"input_ids": encoded["input_ids"]}
        mask = encoded.get("attention_mask")
        return batch if mask is None or bool(mask.all()) else batch | {"attention_mask": mask}

    def _factors(self, factors: list[str]) -> dict[str, torch.Tensor]:
        assert self.proteins is not None
        states = [self.proteins(factor) for factor in factors]
        lengths = [len(one.states) for one in states]
        if not all(lengths):
            raise DataError(f"The factor {factors[lengths.index(0)]!r} has no residues; leave it out of the data.")
        residues, multiple = max(lengths), self.pad_to_multiple_of or 1
        residues = -(-residues // multiple) * multiple
        are_ids = states[0].states.ndim == 1
        shape = (len(states), residues) if are_ids else (len(states), residues, states[0].states.shape[1])
        values = np.full(shape, PROTEIN_PAD_ID if are_ids else 0, dtype=np.int64 if are_ids else np.float32)
        chains, mask = np.zeros(shape[:2], dtype=np.int64), np.zeros(shape[:2], dtype=bool)
        for row, (one, length) in enumerate(zip(states, lengths, strict=True)):
            values[row, :length], chains[row, :length], mask[row, :length] = one.states, one.chain_ids, True
        arrays = {
            "protein_input_ids" if are_ids else "protein_embeds": values,
            "protein_mask": mask,
            "protein_chain_ids": chains,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _context(self, cells: list[str]) -> dict[str, torch.Tensor]:
        batch = {}
        if self.contexts is not None:
            vectors = np.stack([self.contexts(cell) for cell in cells])
            batch["context"] = torch.from_numpy(vectors if vectors.dtype.kind in "iu" else vectors.astype(np.float32))
        if self.context_texts is not None:
            texts = [self.context_texts(cell) for cell in cells]
            encoded = self.context_tokenizer(texts, padding=True, return_tensors="pt")
            batch |= {"context_input_ids": encoded["input_ids"], "context_mask": encoded["attention_mask"]}
        return batch


def _experiments(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row of several experiments, `factors`, `cells` and labels (E, T), as one row for each."""
    if "factors" not in row:
        return [row]
    columns = zip(row["factors"], row["cells"], row["label"], strict=True)
    return [{**row, "factor": factor, "cell": cell, "label": label} for factor, cell, label in columns]


class BalancedSampler:
    """Row numbers in which every group is as likely as any other: a `sampler` of `DataLoader`.

    An epoch draws as many rows as there are (or `num_samples`), with replacement: a group uniformly, then a row of
    it uniformly.

    Args:
        groups: the group of each row, such as `BindingDataset.targets`.
        num_samples: rows of an epoch.
        seed: of the draws; every epoch draws others.

    Raises:
        DataError: no rows.
    """

    def __init__(self, groups: Sequence[Hashable], num_samples: int | None = None, seed: int = 0) -> None:
        if not len(groups):
            raise DataError("`groups` must hold at least one row.")
        members: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        self._members = [np.array(rows) for rows in members.values()]
        self._num_samples, self.seed, self.epoch = num_samples or len(groups), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draws other rows from now on; `DataLoader`s of accelerate call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        for group in rng.integers(len(self._members), size=self._num_samples).tolist():
            rows = self._members[group]
            yield int(rows[int(rng.integers(len(rows)))])
