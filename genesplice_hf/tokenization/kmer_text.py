"""Reads k-mer text ("ACGTAC CGTACG GTACGT"), the input format of DNABERT, back into the sequence."""

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.batches import Batch


def join_kmer_text(batch: Batch, k: int) -> Batch:
    """Replaces every row that holds spaces by the sequence whose consecutive windows it lists.

    Raises:
        SequenceError: the words are no consecutive windows of k bases.
    """
    rows = [_join(row, number, k) if b" " in row else row for number, row in enumerate(batch.slices())]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return Batch(b"".join(rows), lengths, batch.is_batched, batch.is_paired)


def _join(text: bytes, row: int, k: int) -> bytes:
    words = text.split()
    for number, word in enumerate(words):
        follows = number == 0 or word[:-1] == words[number - 1][1:]
        if len(word) != k or not follows:
            raise SequenceError(
                f"`sequence` {row} holds spaces but word {number} ({word.decode('ascii')!r}) is not the next window "
                f"of {k} bases; pass the sequence itself or consecutive {k}-mers separated by spaces."
            )
    return b"".join([*words[:1], *(word[-1:] for word in words[1:])])
