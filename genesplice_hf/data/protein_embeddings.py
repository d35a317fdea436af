"""Residue states of proteins, computed once: any encoder, long proteins in windows, complexes joined.

Shapes: R residues, P width of a state.
"""

import logging
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from genesplice_hf.data.embedding_store import EmbeddingStore, EncoderIdentity, write_embeddings
from genesplice_hf.data.proteins import Protein, ProteinStore, residue_ids
from genesplice_hf.errors import DataError

logger = logging.getLogger(__name__)

Overflow = Literal["truncate", "window", "error"]


class ProteinEncoder(Protocol):
    """Turns sequences into states `(R, P)`, one row per residue, and says who it is."""

    identity: EncoderIdentity

    def __call__(self, sequences: Sequence[str]) -> Sequence[np.ndarray]: ...


class FactorStates(NamedTuple):
    """The residues of a factor: `states` (R, P), or ids (R,), and `chain_ids` (R,) int64, 0 for the first subunit."""

    states: np.ndarray
    chain_ids: np.ndarray


def embed_proteins(
    store: ProteinStore,
    encoder: ProteinEncoder,
    out: str | PathLike[str],
    max_length: int = 1022,
    overflow: Overflow = "window",
    overlap: int = 128,
    batch_size: int = 8,
) -> EmbeddingStore:
    """Encodes every protein of `store` that `out` does not hold yet.

    Args:
        store: the proteins.
        encoder: gives one state per residue; `TransformersEncoder` wraps models of transformers.
        out: folder for safetensors shards and `index.json`, new or of the same encoder.
        max_length: residues that the encoder takes at once.
        overflow: for longer proteins: `"truncate"` keeps their first `max_length` residues, `"window"` encodes
            windows that share `overlap` residues and averages there, `"error"` refuses.
        overlap: see there.
        batch_size: sequences per call of the encoder.

    Raises:
        DataError: a protein is too long under `"error"`, or the encoder does not give one state per residue.
    """
    if overflow not in ("truncate", "window", "error"):
        raise DataError(f"`overflow` must be 'truncate', 'window' or 'error', was {overflow!r}.")
    if not 0 <= overlap < max_length:
        raise DataError(f"`overlap` must lie in 0..`max_length` - 1 ({max_length - 1}), was {overlap}.")
    known = EmbeddingStore(out, encoder.identity) if (Path(out).expanduser() / "index.json").is_file() else ()
    waiting = sorted((one for one in store if one.sequence not in known), key=lambda one: len(one.sequence))
    too_long = [one for one in waiting if len(one.sequence) > max_length]
    if too_long and overflow == "error":
        residues = len(too_long[-1].sequence)
        raise DataError(
            f"{too_long[-1].accession} has {residues} residues, more than `max_length` ({max_length}); "
            "pass `overflow='window'` or 'truncate'."
        )
    if too_long and overflow == "truncate":
        logger.warning("%d proteins are cut to their first %d residues.", len(too_long), max_length)
    step = max_length - overlap if overflow == "window" else 0
    entries = _encoded(waiting, encoder, max_length, step, batch_size)
    write_embeddings(out, encoder.identity, entries)
    return EmbeddingStore(out, encoder.identity)


def _encoded(
    proteins: Sequence[Protein], encoder: ProteinEncoder, max_length: int, step: int, batch_size: int
) -> Iterator[tuple[str, np.ndarray]]:
    for at in range(0, len(proteins), batch_size):
        sequences = [protein.sequence for protein in proteins[at : at + batch_size]]
        starts = [window_starts(len(sequence), max_length, step) for sequence in sequences]
        parts = [sequence[s : s + max_length] for sequence, own in zip(sequences, starts, strict=True) for s in own]
        states = iter(_checked_states(encoder, parts))
        for sequence, own in zip(sequences, starts, strict=True):
            yield sequence, merge_windows([next(states) for _ in own], own)


def window_starts(length: int, max_length: int, step: int) -> list[int]:
    """Where the windows of a protein begin: one at 0, and with `step` further ones, the last flush with the end."""
    if length <= max_length or not step:
        return [0]
    return [*range(0, length - max_length, step), length - max_length]


def merge_windows(windows: Sequence[np.ndarray], starts: Sequence[int]) -> np.ndarray:
    """Joins the states of windows into (R, P); residues of several windows get the mean."""
    total = np.zeros((starts[-1] + len(windows[-1]), windows[0].shape[1]), dtype=np.float32)
    counts = np.zeros((len(total), 1), dtype=np.float32)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + len(window)] += window
        counts[start : start + len(window)] += 1
    return total / counts


def _checked_states(encoder: ProteinEncoder, sequences: Sequence[str]) -> list[np.ndarray]:
    states = [np.asarray(one, dtype=np.float32) for one in encoder(sequences)]
    for sequence, one in zip(sequences, states, strict=True):
        if one.ndim != 2 or len(one) != len(sequence):
            raise DataError(
                f"The encoder must give one state per residue ({len(sequence)}), gave the shape {one.shape}; "
                "remove the states of its special tokens."
            )
    return states


class TransformersEncoder:
    """A protein language model of transformers (ESM, ProtBert, ProtAlbert, ...) as a `ProteinEncoder`.

    States of special tokens are removed. Tokenizers of words (BERT, ALBERT, T5) get the residues with blanks
    between them.

    Args:
        model: anything that returns `last_hidden_state` or `hidden_states`; it runs in eval mode, without gradients.
        tokenizer: its tokenizer.
        layer: index of the hidden state; -1 is the last, as the model returns it.
        revision: which weights, for the identity.
        dtype: in which the states are stored.
    """

    def __init__(
        self, model: Any, tokenizer: Any, layer: int = -1, revision: str = "", dtype: str = "float16"
    ) -> None:
        self.model, self.tokenizer, self.layer = model.eval(), tokenizer, layer
        self.identity = EncoderIdentity(model.config.name_or_path, revision, layer, dtype=dtype)
        self._blanks = len(tokenizer("MKV", add_special_tokens=False)["input_ids"]) != 3

    def __call__(self, sequences: Sequence[str]) -> list[np.ndarray]:
        texts = [" ".join(sequence) if self._blanks else sequence for sequence in sequences]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt", return_special_tokens_mask=True)
        # Padding counts as special, so what is left are the residues.
        is_residue = batch.pop("special_tokens_mask") == 0
        device = next(self.model.parameters()).device
        with torch.no_grad():
            output = self.model(**batch.to(device), output_hidden_states=self.layer != -1)
        states = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        return [one[keep].float().numpy() for one, keep in zip(states.cpu(), is_residue, strict=True)]


class ArrayFolder:
    """Ready arrays as a `ProteinEncoder`: `<accession>.npy` of shape (R, P), such as AlphaFold single representations.

    Args:
        folder: where the arrays lie; they are never unpickled.
        store: whose sequences they belong to.
        name: of the network that made them, for the identity.
        revision, dtype: as for `TransformersEncoder`.
    """

    def __init__(
        self, folder: str | PathLike[str], store: ProteinStore, name: str, revision: str = "", dtype: str = "float16"
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.identity = EncoderIdentity(name, revision, dtype=dtype)
        self._accession = {protein.sequence: protein.accession for protein in store}

    def __call__(self, sequences: Sequence[str]) -> list[np.ndarray]:
        return [self._load(self._accession[sequence]) for sequence in sequences]

    def _load(self, accession: str) -> np.ndarray:
        path = self.folder / f"{accession}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} must be a plain npy array (residues, width): {error}") from error


class FactorEmbeddings:
    """Factor name -> residue states of all its subunits, end to end; the protein side of `BindingCollator`.

    Args:
        store: which sequences a factor has.
        embeddings: their states.
        allow_partial: see `ProteinStore.complex`.
    """

    def __init__(self, store: ProteinStore, embeddings: EmbeddingStore, allow_partial: bool = False) -> None:
        self.store, self.embeddings, self.allow_partial = store, embeddings, allow_partial

    def __call__(self, factor: str, rng: np.random.Generator | None = None) -> FactorStates:
        subunits = self.store.complex(factor, self.allow_partial, rng).subunits
        return join_subunits([self.embeddings[protein.sequence] for protein in subunits])


class FactorResidues:
    """Factor name -> residue ids of all its subunits, for models that encode proteins themselves.

    Args:
        store, allow_partial: as for `FactorEmbeddings`.
    """

    def __init__(self, store: ProteinStore, allow_partial: bool = False) -> None:
        self.store, self.allow_partial = store, allow_partial

    def __call__(self, factor: str, rng: np.random.Generator | None = None) -> FactorStates:
        subunits = self.store.complex(factor, self.allow_partial, rng).subunits
        return join_subunits([residue_ids(protein.sequence) for protein in subunits])


def join_subunits(parts: Sequence[np.ndarray]) -> FactorStates:
    """Puts the states of subunits end to end and numbers the chains."""
    chains = np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts])
    return FactorStates(np.concatenate(parts), chains)
