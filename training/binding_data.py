"""Tasks for TF-binding models: peaks of factors against each other, and motifs planted in random DNA.

A row is a window with some factors and, for each, whether it binds there; `BindingCollator` makes pairs of them.
Shapes: N windows, L bases, F factors of a row, W positions of a matrix, P width of a factor's vector.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genesplice_hf.data.fasta import iter_fasta
from genesplice_hf.data.files import open_binary
from genesplice_hf.data.peak_formats import chromosome_key
from genesplice_hf.data.protein_embeddings import FactorStates
from genesplice_hf.errors import DataError
from genesplice_hf.genome.alphabet import reverse_complement
from training.baselines import LabelledSequences

logger = logging.getLogger(__name__)

_BASES = np.frombuffer(b"ACGT", dtype=np.uint8)
# Counts added to each cell of a matrix.
_PSEUDOCOUNT = 0.5
Row = dict[str, Any]


class BindingTask(NamedTuple):
    """Rows to learn from, to choose by and to report on; the vectors of all factors; what was left out.

    `test` holds named parts, such as windows of held-out factors. `classes` are sequences and classes of train and
    test where the task can also be put without proteins, for the baselines.
    """

    train: list[Row]
    dev: list[Row]
    test: dict[str, list[Row]]
    factors: Mapping[str, FactorStates]
    classes: tuple[LabelledSequences, LabelledSequences] | None
    report: dict[str, Any]


class PeakSet(NamedTuple):
    """A factor, and the sequences of its peaks with their chromosomes."""

    factor: str
    sequences: list[str]
    chroms: list[str]


def read_peak_set(factor: str, path: str | Path) -> PeakSet:
    """Reads peaks from a FASTA whose headers are `chrom:start-end`.

    Raises:
        DataError: no such file, or a header of another form.
    """
    sequences, chroms = [], []
    for record in iter_fasta(path):
        chrom, colon, _ = record.id.partition(":")
        if not colon:
            raise DataError(f"{path}: headers must be `chrom:start-end`, was {record.id!r}.")
        sequences.append(record.sequence.upper())
        chroms.append(chrom)
    return PeakSet(factor, sequences, chroms)


def peak_set_task(
    sets: Sequence[PeakSet],
    dev_chromosomes: Sequence[object],
    test_chromosomes: Sequence[object],
    residues: int = 4,
    width: int = 32,
    seed: int = 0,
    max_rows: int | None = None,
) -> BindingTask:
    """Does this factor have a peak here? Each window is asked for every factor.

    Sequences that stand in several sets are left out, repeats within one too. Factors are described by fixed
    random vectors (residues, width), so that only their identity can be learned.

    Args:
        sets: two factors or more.
        dev_chromosomes, test_chromosomes: held out, as numbers or names.
        residues, width: of the random vectors.
        seed: of these vectors, and of the rows that `max_rows` picks.
        max_rows: windows of train at most.

    Raises:
        DataError: fewer than two sets, a chromosome held out twice, or an empty part.
    """
    if len(sets) < 2:
        raise DataError(f"`peak_fastas` must name at least two factors, got {[one.factor for one in sets]}.")
    homes = {
        "dev": {chromosome_key(one) for one in dev_chromosomes},
        "test": {chromosome_key(one) for one in test_chromosomes},
    }
    if both := homes["dev"] & homes["test"]:
        raise DataError(f"`dev_chromosomes` and `test_chromosomes` share {sorted(both)}.")
    names = [one.factor for one in sets]
    # How many factors have the sequence; repeats within a set do not count.
    shared = Counter(sequence for one in sets for sequence in dict.fromkeys(one.sequences))
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    removed = Counter[str]()
    for one in sets:
        first: dict[str, str] = {}
        for sequence, chrom in zip(one.sequences, one.chroms, strict=True):
            first.setdefault(sequence, chrom)
        for sequence, chrom in first.items():
            if shared[sequence] > 1:
                removed["in several sets"] += 1
                continue
            home = next((name for name, chroms in homes.items() if chromosome_key(chrom) in chroms), "train")
            labels = np.array([name == one.factor for name in names], dtype=np.float32)
            parts[home].append({"sequence": sequence, "factors": names, "cells": [""] * len(names), "label": labels})
        removed["repeated"] += len(one.sequences) - len(set(one.sequences))
    for name, rows in parts.items():
        if not rows:
            raise DataError(f"The part {name!r} is empty; choose other chromosomes.")
    rng = np.random.default_rng(seed)
    parts["train"] = _pick(parts["train"], max_rows, rng)
    vectors = {name: random_factor(rng, residues, width) for name in names}
    counts = {name: dict(Counter(names[int(row["label"].argmax())] for row in rows)) for name, rows in parts.items()}
    classes = (_classes(parts["train"]), _classes(parts["test"]))
    report = {
        "windows": counts,
        "removed": dict(removed),
        "sequences_in_several_sets": sum(n > 1 for n in shared.values()),
    }
    return BindingTask(parts["train"], parts["dev"], {"test": parts["test"]}, vectors, classes, report)


def random_factor(rng: np.random.Generator, residues: int, width: int) -> FactorStates:
    """Random vectors in the place of a protein's states."""
    states = rng.standard_normal((residues, width)).astype(np.float32)
    return FactorStates(states, np.zeros(residues, dtype=np.int64))


def _classes(rows: Sequence[Row]) -> LabelledSequences:
    """Which factor has the peak: class 1 is the first one, so that its scores need no sign."""
    first = np.array([int(row["label"][0] == 1) for row in rows], dtype=np.int64)
    return LabelledSequences([row["sequence"] for row in rows], first)


def _pick(rows: list[Row], count: int | None, rng: np.random.Generator) -> list[Row]:
    if count is None or count >= len(rows):
        return rows
    return [rows[at] for at in np.sort(rng.permutation(len(rows))[:count]).tolist()]


class Motif(NamedTuple):
    """A factor and its base probabilities (W, 4), columns A, C, G, T."""

    factor: str
    probabilities: np.ndarray


def read_motifs(path: str | Path) -> list[Motif]:
    """Reads count matrices: `>name`, then a line of four numbers (A C G T) per position; `#` lines are passed over.

    The name is what follows the last `_` of the header, or all of it.

    Raises:
        DataError: a line that is no four numbers, or no matrix.
    """
    found: dict[str, list[list[float]]] = {}
    name = None
    with open_binary(path) as stream:
        for number, line in enumerate(stream.read().decode("utf-8").splitlines(), start=1):
            if line.startswith(">"):
                name = line[1:].split()[0].rpartition("_")[2]
                found[name] = []
            elif line.strip() and not line.startswith("#"):
                if name is None:
                    raise DataError(f"{path}, line {number}: a header `>name` must come first.")
                found[name].append(_four(line, f"{path}, line {number}"))
    if not found:
        raise DataError(f"{path} holds no matrix.")
    counts = {name: np.array(rows) + _PSEUDOCOUNT for name, rows in found.items() if rows}
    return [Motif(name, rows / rows.sum(axis=1, keepdims=True)) for name, rows in counts.items()]


def _four(line: str, where: str) -> list[float]:
    try:
        values = [float(field) for field in line.split()]
    except ValueError as error:
        raise DataError(f"{where}: four numbers must stand here, was {line!r}.") from error
    if len(values) != 4 or min(values) < 0:
        raise DataError(f"{where}: four numbers of 0 or more must stand here, was {line!r}.")
    return values


def information(probabilities: np.ndarray) -> np.ndarray:
    """(W,) bits of each position against equal bases."""
    return 2 + (probabilities * np.log2(probabilities)).sum(axis=1)


def core(probabilities: np.ndarray, width: int) -> np.ndarray:
    """The `width` positions with most bits, (width, 4); shorter matrices get equal bases on their right."""
    if len(probabilities) < width:
        return np.vstack([probabilities, np.full((width - len(probabilities), 4), 0.25)])
    sums = np.convolve(information(probabilities), np.ones(width), mode="valid")
    start = int(sums.argmax())
    return probabilities[start : start + width]


def describe(motif: Motif, width: int, noise: float, rng: np.random.Generator) -> FactorStates:
    """A factor by vectors of its matrix: the core as it reads on either strand, (2, 4 * width), plus Gaussian noise.

    Probabilities are centred and each vector has unit length before `noise` (its length relative to that) comes on.
    """
    forward = core(motif.probabilities, width) - 0.25
    vectors = np.stack([forward.ravel(), forward[::-1, ::-1].ravel()])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors += noise * rng.standard_normal(vectors.shape) / math.sqrt(vectors.shape[1])
    # Entries of about unit size, as those of protein language models.
    states = (vectors * math.sqrt(vectors.shape[1])).astype(np.float32)
    return FactorStates(states, np.zeros(len(states), dtype=np.int64))


def similarity(one: np.ndarray, other: np.ndarray, least_overlap: int = 6) -> float:
    """Best cosine of two cores (W, 4) over all offsets and both strands; 1 for the same motif."""
    best = 0.0
    for turned in (other - 0.25, (other - 0.25)[::-1, ::-1]):
        for offset in range(least_overlap - len(one), len(one) - least_overlap + 1):
            a = (one - 0.25)[max(0, offset) : len(one) + min(0, offset)]
            b = turned[max(0, -offset) : len(one) - max(0, offset)]
            scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
            best = max(best, float((a * b).sum()) / scale if scale else 0.0)
    return best


def clusters(cores: Sequence[np.ndarray], limit: float) -> list[int]:
    """Number of the cluster of each core; a core joins all clusters that hold one as similar as `limit`."""
    home = list(range(len(cores)))

    def root(at: int) -> int:
        while home[at] != at:
            at = home[at]
        return at

    for at, one in enumerate(cores):
        for other in range(at):
            if root(at) != root(other) and similarity(one, cores[other]) >= limit:
                home[root(at)] = root(other)
    return [root(at) for at in range(len(cores))]


class PlantedOptions(NamedTuple):
    """How `planted_task` makes its windows.

    Attributes:
        window_bp: length of a window.
        windows: per factor and part.
        negatives: other factors that each window is asked for.
        core_bp: positions of a matrix that describe its factor.
        noise: length of the noise on a factor's vector, relative to the vector.
        least_bits: of a core; weaker motifs are left out.
        held_out: share of the factors that are held out at most, as whole clusters of similar motifs.
        similar: cosine from which on two motifs are of one cluster.
        far: held-out factors without a known motif as similar as this are also measured apart.
        seed: of everything.
    """

    window_bp: int = 64
    windows: int = 100
    negatives: int = 3
    core_bp: int = 8
    noise: float = 0.3
    least_bits: float = 9.0
    held_out: float = 0.15
    similar: float = 0.9
    far: float = 0.75
    seed: int = 0


def planted_task(motifs: Sequence[Motif], options: PlantedOptions) -> BindingTask:
    """Sites of many factors in random DNA, and factors that were never trained on.

    A window of equal bases gets one site, drawn from the matrix of a factor, anywhere, on either strand. It is asked
    for that factor (yes) and for `negatives` factors of other clusters (no). Held-out factors are whole clusters of
    similar motifs; of them only the vectors are given, at the test.

    Raises:
        DataError: too few motifs or clusters.
    """
    rng = np.random.default_rng(options.seed)
    cores = [core(motif.probabilities, options.core_bp) for motif in motifs]
    fitting = [
        at
        for at, motif in enumerate(motifs)
        if information(cores[at]).sum() >= options.least_bits and len(motif.probabilities) <= options.window_bp
    ]
    motifs, cores = [motifs[at] for at in fitting], [cores[at] for at in fitting]
    homes = clusters(cores, options.similar)
    held_out = _held_out(homes, options.held_out, rng)
    known = [at for at, home in enumerate(homes) if home not in held_out]
    new = [at for at, home in enumerate(homes) if home in held_out]
    if len({homes[at] for at in known}) < 2 or len({homes[at] for at in new}) < 2:
        raise DataError(
            f"{len(motifs)} motifs in {len(set(homes))} clusters are too few to hold {options.held_out:.0%} out; "
            "lower `least_bits`, or raise `similar` or `held_out`."
        )
    nearest = {at: max(similarity(cores[at], cores[other]) for other in known) for at in new}
    far = {motifs[at].factor for at in new if nearest[at] < options.far}
    few = max(1, options.windows // 10)
    rows = {
        "train": _planted(motifs, homes, known, options.windows, options, rng),
        "dev": _planted(motifs, homes, known, few, options, rng),
        "known factors": _planted(motifs, homes, known, few, options, rng),
        "held-out factors": _planted(motifs, homes, new, options.windows, options, rng),
    }
    vectors = {motif.factor: describe(motif, options.core_bp, options.noise, rng) for motif in motifs}
    report = {
        "motifs": len(motifs),
        "clusters": len(set(homes)),
        "held_out_factors": sorted(motifs[at].factor for at in new),
        "known_factors": len(known),
        "far_factors": sorted(far),
        "median_similarity_to_nearest_known": float(np.median(list(nearest.values()))),
        "windows": {name: len(part) for name, part in rows.items()},
    }
    test = {name: rows[name] for name in ("known factors", "held-out factors")}
    if far_rows := [row for row in rows["held-out factors"] if row["factors"][0] in far]:
        test["held-out factors far from known ones"] = far_rows
    return BindingTask(rows["train"], rows["dev"], test, vectors, None, report)


def _held_out(homes: Sequence[int], share: float, rng: np.random.Generator) -> set[int]:
    """Random clusters with at most `share` of all factors together."""
    sizes, chosen, room = Counter(homes), set[int](), int(share * len(homes))
    for home in rng.permutation(sorted(sizes)).tolist():
        if sizes[home] <= room:
            chosen.add(home)
            room -= sizes[home]
    return chosen


def _planted(
    motifs: Sequence[Motif],
    homes: Sequence[int],
    chosen: Sequence[int],
    windows: int,
    options: PlantedOptions,
    rng: np.random.Generator,
) -> list[Row]:
    rows = []
    for at in chosen:
        others = [other for other in chosen if homes[other] != homes[at]]
        for _ in range(windows):
            no = rng.choice(others, size=min(options.negatives, len(others)), replace=False).tolist()
            rows.append(_planted_row([motifs[which] for which in (at, *no)], options.window_bp, rng))
    return rows


def _planted_row(asked: Sequence[Motif], window_bp: int, rng: np.random.Generator) -> Row:
    """A window with a site of the first motif, asked for all."""
    letters = _BASES[rng.integers(4, size=window_bp)]
    site = draw_site(asked[0].probabilities, rng)
    start = int(rng.integers(window_bp - len(site) + 1))
    letters[start : start + len(site)] = np.frombuffer(site.encode("ascii"), dtype=np.uint8)
    factors = [motif.factor for motif in asked]
    label = np.array([1.0] + [0.0] * (len(asked) - 1), dtype=np.float32)
    return {
        "sequence": letters.tobytes().decode("ascii"),
        "factors": factors,
        "cells": [""] * len(asked),
        "label": label,
    }


def draw_site(probabilities: np.ndarray, rng: np.random.Generator) -> str:
    """A site of a matrix (W, 4), on a random strand."""
    choices = (rng.random((len(probabilities), 1)) > probabilities.cumsum(axis=1)[:, :3]).sum(axis=1)
    site = _BASES[choices].tobytes().decode("ascii")
    return site if rng.random() < 0.5 else reverse_complement(site)


def best_site_scores(rows: Sequence[Row], motifs: Mapping[str, Motif]) -> np.ndarray:
    """Log-odds of the best site of each asked factor, one per pair: what the matrix itself can tell."""
    scores = []
    for row in rows:
        codes = np.searchsorted(_BASES, np.frombuffer(row["sequence"].encode("ascii"), dtype=np.uint8))
        for factor in row["factors"]:
            weights = np.log2(motifs[factor].probabilities / 0.25)
            both = (weights, weights[::-1, ::-1])
            scores.append(max(_best(codes, strand) for strand in both))
    return np.array(scores)


def _best(codes: np.ndarray, weights: np.ndarray) -> float:
    places = np.lib.stride_tricks.sliding_window_view(codes, len(weights))
    return float(weights[np.arange(len(weights)), places].sum(axis=1).max())
