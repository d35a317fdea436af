"""Cut rows into folds and parts without ever putting one group (a chromosome, a locus) on both sides."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

from genesplice_hf.errors import DataError

Fold = tuple[np.ndarray, np.ndarray]


def make_folds(
    labels: np.ndarray, groups: np.ndarray | None, num_folds: int, seed: int, is_classification: bool
) -> list[Fold]:
    """Shuffled cross-validation folds; with groups, no group straddles one, and classes are kept balanced.

    Args:
        labels: (N,) classes, or values of shape (N,) or (N, T).
        groups: (N,) group names or None.
        num_folds: At least 2, at most the number of groups (of rows, without groups).
        seed: Seed of the shuffling.
        is_classification: Whether `labels` are classes.

    Returns:
        One (training rows, held-out rows) pair of index arrays per fold.

    Raises:
        DataError: Too few groups or rows, or a fold that lacks a class.
    """
    available = len(labels) if groups is None else len(np.unique(groups))
    if not 2 <= num_folds <= available:
        unit = "rows" if groups is None else "groups"
        raise DataError(f"`num_folds` must lie between 2 and the number of {unit} ({available}), got {num_folds}.")
    if not is_classification:
        return _value_folds(len(labels), groups, num_folds, seed)
    _check_class_sizes(labels, num_folds)
    cutter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        n_splits=num_folds, shuffle=True, random_state=seed
    )
    folds = list(cutter.split(np.zeros(len(labels)), labels, groups))
    for number, fold in enumerate(folds):
        for rows in fold:
            check_classes(labels[rows], np.unique(labels), f"Fold {number} of {num_folds}")
    return folds


def draw_part(labels: np.ndarray, groups: np.ndarray | None, fraction: float, seed: int, stratify: bool) -> np.ndarray:
    """A random share of the rows, whole groups at a time; without groups, the same share of every class.

    Returns:
        (N,) booleans, True for the rows drawn: at least one group (row) and never all of them.
    """
    generator = np.random.default_rng(seed)
    if groups is not None:
        return np.isin(groups, _draw(np.unique(groups), fraction, generator))
    strata = labels if stratify else np.zeros(len(labels))
    drawn = np.zeros(len(labels), dtype=bool)
    for stratum in np.unique(strata):
        drawn[_draw(np.flatnonzero(strata == stratum), fraction, generator)] = True
    return drawn


def check_groups_apart(parts: np.ndarray, groups: np.ndarray) -> None:
    """Every group lies in one part only.

    Raises:
        DataError: Groups with rows in several parts; the message lists them.
    """
    pairs = {(str(group), str(part)) for group, part in zip(groups, parts, strict=True)}
    counts = Counter(group for group, _ in pairs)
    straddling = sorted(group for group, count in counts.items() if count > 1)
    if straddling:
        raise DataError(
            f"`groups` must not straddle the parts of `split`: {', '.join(straddling)}. Move each to one part."
        )


def check_classes(labels: np.ndarray, classes: np.ndarray | Sequence, where: str) -> None:
    """Every class occurs in `labels`.

    Raises:
        DataError: Some do not; the message names them and `where`.
    """
    missing = sorted(set(np.asarray(classes).tolist()) - set(labels.tolist()))
    if missing:
        raise DataError(f"{where} holds no row of class {missing}: use fewer folds, or other groups or parts.")


def _check_class_sizes(labels: np.ndarray, num_folds: int) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"`labels` must hold at least two classes, got {classes.tolist()}.")
    if counts.min() < num_folds:
        rarest = classes[counts.argmin()]
        raise DataError(
            f"Class {rarest!r} has {counts.min()} rows, fewer than `num_folds` ({num_folds}): use fewer folds."
        )


def _value_folds(num_rows: int, groups: np.ndarray | None, num_folds: int, seed: int) -> list[Fold]:
    if groups is None:
        return list(KFold(num_folds, shuffle=True, random_state=seed).split(np.zeros(num_rows)))
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    held_out = (np.isin(groups, part) for part in np.array_split(names, num_folds))
    return [(np.flatnonzero(~rows), np.flatnonzero(rows)) for rows in held_out]


def _draw(items: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    if len(items) < 2:
        raise DataError(f"Drawing a share of {items.tolist()} needs at least two groups (or rows of a class).")
    count = min(max(round(fraction * len(items)), 1), len(items) - 1)
    return generator.choice(items, size=count, replace=False)
