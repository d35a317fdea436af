"""In-silico mutagenesis: how much a model's score changes when one base is replaced by another.

Every base of a sequence is changed into the three others, one at a time, and the model scores each mutant
(the computational form of saturation mutagenesis; Zhou and Troyanskaya, Nature Methods 12:931, 2015).

Shapes: B mutants, L bases; columns of (L, 4) stand for A, C, G, T.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.genome.alphabet import BASES, reverse_complement
from genesplice_hf.interpretation.encoding import mutant_source
from genesplice_hf.interpretation.targets import (
    Score,
    ScoreFunction,
    check_length,
    check_sequence,
    evaluation_mode,
    resolve_score,
    sequence_score,
)

logger = logging.getLogger(__name__)

# What a forward pass holds when the caller names no batch size. On a CPU large batches only cost memory traffic
# (1,000 bases, hidden size 128, one thread: 64 mutants a pass took twice as long per mutant as one); other devices
# need many tokens to be busy.
TOKENS_PER_BATCH = {"cpu": 1024, "other": 65536}


@dataclass(frozen=True, eq=False)
class MutagenesisResult:
    """The effect of every single substitution, in coordinates of the sequence that was passed.

    Attributes:
        sequence: the whole sequence, upper case.
        scores: (L, 4) float32, score(mutant) - score(reference): negative where the change lowers the score,
            0 at the reference base, NaN outside [start, end) and where the sequence has N (no base to change
            from).
        reference_score: score of the sequence as it stands.
        start, end: the scanned region, 0-based and half-open.
        target_label: the label that was scored.
        score_name: ``logit``, ``logit_difference`` or the name of the callable.
    """

    sequence: str
    scores: np.ndarray
    reference_score: float
    start: int
    end: int
    target_label: str
    score_name: str

    @property
    def position_importance(self) -> np.ndarray:
        """(L,) minus the mean effect of the three substitutions; NaN where `scores` is.

        Positive where the reference base supports the score (changing it lowers the score), negative where it
        works against it.
        """
        # The reference column is 0, so the sum over four columns is the sum over the three substitutions.
        return -self.scores.sum(axis=1) / 3


class VariantRow(NamedTuple):
    """One substitution: 1-based `position`, `delta` = score(alt) - score(ref)."""

    chrom: str
    position: int
    ref: str
    alt: str
    delta: float


class Window(NamedTuple):
    """A stretch of a sequence, 0-based and half-open, with its summed importance."""

    start: int
    end: int
    importance: float


def in_silico_mutagenesis(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequence: str,
    *,
    target: int | str | None = None,
    score: Literal["logit", "logit_difference"] | ScoreFunction = "logit",
    strands: Literal["+", "both"] = "+",
    batch_size: int | None = None,
    start: int = 0,
    end: int | None = None,
    progress: bool = True,
) -> MutagenesisResult:
    """Scores every single-base substitution of `sequence` in [start, end).

    The model runs where it lies and in its own precision, in evaluation mode (each module's mode is
    restored); scores are taken from float32 logits. For single-base tokenizers the mutants' ids are written
    by index; other tokenizers are called once per batch.

    Args:
        model: a sequence classifier or regressor (any model, with a callable `score`).
        tokenizer: the model's tokenizer.
        sequence: A, C, G, T and N in either case; scored in upper case.
        target: label index or name; None means the only label, or the second of two.
        score: ``"logit"``, ``"logit_difference"`` (log-odds of the target against the others) or a callable
            from float32 logits to one number a sequence, (B,).
        strands: ``"both"`` averages the score of each mutant and of its reverse complement.
        batch_size: mutants per forward pass; None fits them to the device (`TOKENS_PER_BATCH`).
        start, end: the region to change, 0-based and half-open; the rest stays as context.
        progress: show a progress bar.

    Raises:
        SequenceError: the sequence is empty, holds other letters, is too long for the model, or the region is
            outside it or holds no A, C, G or T.
        GeneSpliceError: `target`, `score`, `strands` or `batch_size` cannot be used.
    """
    sequence = check_sequence(sequence)
    end = _check_region(sequence, start, end)
    _check_options(strands, batch_size)
    resolved = resolve_score(model.config, target, score)
    positions, bases = _substitutions(sequence, start, end)
    scan = _Scan(model, tokenizer, resolved, batch_size, progress)
    with evaluation_mode(model), torch.inference_mode():
        scored = [scan.strand(sequence, positions, bases, strand) for strand in _strand_names(strands)]
    references, deltas = zip(*scored, strict=True)
    scores = _delta_table(sequence, positions, bases, np.mean(deltas, axis=0))
    return MutagenesisResult(
        sequence, scores, float(np.mean(references)), start, end, resolved.target_label, resolved.name
    )


def reference_letters(sequence: str, values: np.ndarray) -> np.ndarray:
    """Puts one value per base, (L,), at the letter that the sequence has: (L, 4), zero elsewhere, for a logo.

    N and positions whose value is NaN become rows of NaN.
    """
    if len(sequence) != len(values):
        raise GeneSpliceError(f"`values` must hold one number per base ({len(sequence)}), was {len(values)}")
    letters = np.zeros((len(sequence), 4), dtype=np.float32)
    for row, base, value in zip(letters, sequence.upper(), values, strict=True):
        if base not in BASES or math.isnan(value):
            row[:] = np.nan
        else:
            row[BASES.index(base)] = value
    return letters


def variant_rows(result: MutagenesisResult, chrom: str | None = None, start_bp: int | None = None) -> list[VariantRow]:
    """Lists the scored substitutions by position and then by alternative base (three rows a base).

    Args:
        result: what `in_silico_mutagenesis` returned.
        chrom: name of the contig; None writes ``sequence``.
        start_bp: 0-based place of the sequence's first base on the contig, as in BED; None means 0. The
            `position` of a row is 1-based, as in VCF.
    """
    offset = (start_bp or 0) + 1
    return [
        VariantRow(chrom or "sequence", offset + index, ref, alt, float(result.scores[index, column]))
        for index, ref in enumerate(result.sequence)
        for column, alt in enumerate(BASES)
        if alt != ref and not math.isnan(result.scores[index, column])
    ]


def write_variant_table(
    result: MutagenesisResult, path: str | Path, chrom: str | None = None, start_bp: int | None = None
) -> Path:
    """Writes `variant_rows` as tab-separated text; lines that begin with # say units, sign and gaps."""
    path = Path(path)
    lines = [f"# {comment}" for comment in _table_comments(result)]
    lines.append("\t".join(VariantRow._fields))
    lines += ["\t".join(_format_row(row)) for row in variant_rows(result, chrom, start_bp)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def strongest_windows(result: MutagenesisResult, width: int, n: int) -> list[Window]:
    """Picks the `n` non-overlapping windows with the largest summed importance, strongest first.

    Greedy: the best window is taken, then the best of those that do not touch it, and so on; of equals the
    leftmost wins. Windows that hold an unscored base (N, or outside the scanned region) take no part. Fewer
    than `n` come back where no further window fits.

    Raises:
        GeneSpliceError: `width` or `n` is below 1, or `width` exceeds the sequence.
    """
    importance = result.position_importance.astype(np.float64)
    if not 1 <= width <= len(importance):
        raise GeneSpliceError(f"`width` must be 1 to the sequence's {len(importance)} bases, was {width}")
    if n < 1:
        raise GeneSpliceError(f"`n` must be at least 1, was {n}")
    sums = np.lib.stride_tricks.sliding_window_view(importance, width).sum(axis=1)
    free = np.where(np.isnan(sums), -np.inf, sums)
    windows: list[Window] = []
    while len(windows) < n and np.isfinite(free).any():
        best = int(free.argmax())
        windows.append(Window(best, best + width, float(sums[best])))
        free[max(0, best - width + 1) : best + width] = -np.inf
    return windows


class _Scan:
    """Scores substitutions in batches, strand by strand."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        score: Score,
        batch_size: int | None,
        progress: bool,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._score = score
        self._batch_size = batch_size
        self._progress = progress
        self._device = next(model.parameters()).device

    def strand(self, sequence: str, positions: np.ndarray, bases: np.ndarray, strand: str) -> tuple[float, np.ndarray]:
        """Returns the reference's score and (number of substitutions,) differences, read on `strand`."""
        if strand == "-":
            sequence = reverse_complement(sequence)
            # In A, C, G, T order the complement of base i is base 3 - i.
            positions, bases = len(sequence) - 1 - positions, 3 - bases
        source = mutant_source(self._tokenizer, sequence, self._device)
        num_tokens = source.reference["input_ids"].shape[1]
        check_length(self._model, num_tokens)
        size = self._batch_size or _fitting_batch(num_tokens, self._device)
        reference = sequence_score(self._model, self._score, source.reference).item()
        pairs = zip(self._batches(positions, size, strand), self._batches(bases, size), strict=True)
        scores = [self._run(source.mutants(p, b)) for p, b in pairs]
        return reference, np.concatenate(scores) - reference

    def _run(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        return sequence_score(self._model, self._score, inputs).double().cpu().numpy()

    def _batches(self, values: np.ndarray, size: int, bar: str | None = None):
        chunks = torch.from_numpy(values.copy()).split(size)
        return hf_logging.tqdm(chunks, desc=f"mutagenesis ({bar})") if bar and self._progress else chunks


def _fitting_batch(num_tokens: int, device: torch.device) -> int:
    return max(1, TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "other"] // num_tokens)


def _strand_names(strands: str) -> tuple[str, ...]:
    return ("+", "-") if strands == "both" else ("+",)


def _check_region(sequence: str, start: int, end: int | None) -> int:
    end = len(sequence) if end is None else end
    if not 0 <= start < end <= len(sequence):
        raise SequenceError(
            f"`start` ({start}) and `end` ({end}) must satisfy 0 <= start < end <= {len(sequence)}, "
            "the sequence's length"
        )
    if not set(sequence[start:end]) & set(BASES):
        raise SequenceError(f"`sequence` holds no A, C, G or T in [{start}, {end}); nothing can be substituted")
    return end


def _check_options(strands: str, batch_size: int | None) -> None:
    if strands not in ("+", "both"):
        raise GeneSpliceError(f"`strands` must be '+' or 'both', was {strands!r}")
    if batch_size is not None and batch_size < 1:
        raise GeneSpliceError(f"`batch_size` must be at least 1, was {batch_size}")


def _substitutions(sequence: str, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists (position, new base) of every substitution, each an int64 array."""
    pairs = [
        (position, base)
        for position in range(start, end)
        for base in range(4)
        if sequence[position] in BASES and sequence[position] != BASES[base]
    ]
    positions, bases = np.array(pairs, dtype=np.int64).T
    unknown = end - start - len(pairs) // 3
    if unknown:
        logger.warning("%d positions hold N and are not scored: their rows are NaN", unknown)
    return positions, bases


def _delta_table(sequence: str, positions: np.ndarray, bases: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    scores = np.full((len(sequence), 4), np.nan, dtype=np.float32)
    scores[positions] = 0.0
    scores[positions, bases] = deltas
    return scores


def _table_comments(result: MutagenesisResult) -> list[str]:
    unscored = int(np.isnan(result.scores[result.start : result.end, 0]).sum())
    return [
        "in-silico mutagenesis: one row per single-base substitution",
        f"score: {result.score_name} of {result.target_label}",
        f"score of the reference sequence: {result.reference_score:.6g}",
        "delta: score(alt) - score(ref), in the score's unit; negative = the substitution lowers the score",
        "position: 1-based",
        f"scanned: bases {result.start + 1} to {result.end} of {len(result.sequence)}",
        f"bases without rows, because the sequence has N there: {unscored}",
    ]


def _format_row(row: VariantRow) -> list[str]:
    return [row.chrom, str(row.position), row.ref, row.alt, f"{row.delta:.6g}"]
