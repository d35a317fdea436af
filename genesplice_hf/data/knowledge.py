"""Gene-gene knowledge: edge lists in the usual styles, edges as ids of a vocabulary, and shuffled controls.

E edges, each from a source (a regulator, say) to a target.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from genesplice_hf.data.files import open_binary
from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.tokenization_gene import GeneTokenizer

OnDuplicate = Literal["max", "sum", "drop", "error"]
_SOURCES = ("source", "source_genesymbol", "tf", "gene1", "protein1", "regulator", "from")
_TARGETS = ("target", "target_genesymbol", "gene2", "protein2", "to")
_SIGNS = ("mor", "weight", "sign", "mode")
_SCORES = ("importance", "combined_score", "score")
_TRRUST = {"Activation": (1.0, 0.0), "Repression": (0.0, 1.0), "Unknown": (0.0, 0.0)}
_LEVELS = {"A": 1.0, "B": 0.8, "C": 0.6, "D": 0.4, "E": 0.2}
_SWAPS_PER_EDGE = 10


@dataclass(frozen=True)
class Edges:
    """Directed edges between named genes.

    Attributes:
        source, target: (E,) names.
        stimulation, inhibition: (E,) strength of either effect, 0 or more; both 0 = the sign is not known.
        confidence: (E,) in [0, 1]; 1 where the source does not say.
    """

    source: np.ndarray
    target: np.ndarray
    stimulation: np.ndarray
    inhibition: np.ndarray
    confidence: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def take(self, places: np.ndarray) -> "Edges":
        """Some of the edges: places or a bool mask."""
        return Edges(*(getattr(self, name)[places] for name in _COLUMNS))

    def merged(self, on_duplicate: OnDuplicate = "max") -> "Edges":
        """One edge per pair, in the order of their first appearance.

        Args:
            on_duplicate: of repeated pairs take the largest of each column ("max"), add effects up ("sum"), leave
                the pair out ("drop"), or raise ("error").

        Raises:
            DataError: a pair stands twice, with "error"; an unknown rule.
        """
        if on_duplicate not in ("max", "sum", "drop", "error"):
            raise DataError(f"`on_duplicate` must be 'max', 'sum', 'drop' or 'error', got {on_duplicate!r}.")
        frame = pd.DataFrame({name: getattr(self, name) for name in _COLUMNS})
        is_repeated = frame.duplicated(["source", "target"], keep=False)
        if on_duplicate == "error" and is_repeated.any():
            row = frame[is_repeated].iloc[0]
            raise DataError(
                f"`edges` name {row['source']} -> {row['target']} more than once; merge them, or pass 'max'."
            )
        if on_duplicate == "drop":
            return self.take(np.flatnonzero(~is_repeated))
        effect = "sum" if on_duplicate == "sum" else "max"
        rules = {"stimulation": effect, "inhibition": effect, "confidence": "max"}
        grouped = frame.groupby(["source", "target"], sort=False, as_index=False).agg(rules)
        return Edges(*(grouped[name].to_numpy() for name in _COLUMNS))


_COLUMNS = tuple(Edges.__dataclass_fields__)


@dataclass(frozen=True)
class GraphTable:
    """Edges between ids of a vocabulary, sorted by target and then source.

    Attributes:
        edge_index: (2, E) int64: sources, targets.
        features: (E, 2) float32: stimulation, inhibition.
        confidence: (E,) float32.
        unknown: names that the vocabulary lacks, of all edges.
        num_dropped: edges that name one of them.
    """

    edge_index: np.ndarray
    features: np.ndarray
    confidence: np.ndarray
    unknown: list[str] = field(default_factory=list)
    num_dropped: int = 0


def read_edges(source: str | PathLike[str] | pd.DataFrame) -> Edges:
    """Reads an edge list; its style is known by its columns.

    | style | columns |
    |---|---|
    | CollecTRI, decoupler | source, target, weight |
    | DoRothEA | tf, confidence (A..E), target, mor |
    | OmniPath | source_genesymbol, target_genesymbol (or source, target), is_stimulation, is_inhibition |
    | TRRUST | no header: TF, target, Activation / Repression / Unknown, references |
    | GEARS, BEELINE, STRING | source, target, importance; Gene1, Gene2; protein1 protein2 combined_score |

    Args:
        source: a file split by tabs, commas or spaces (plain or gzip), or a table with these columns.

    Returns:
        Every row as an edge, repeated ones too; see `Edges.merged`. A weight below 0 is an inhibition; scores without
        a sign become confidence, divided by the largest.

    Raises:
        DataError: no column for sources or targets, an empty name, a number that is none.
    """
    frame = source if isinstance(source, pd.DataFrame) else _read(source)
    if not len(frame):
        raise DataError("`source` must hold edges, got none.")
    columns = {str(name).strip().lower(): name for name in frame.columns}
    ends = [_names(frame, columns, choices, kind) for choices, kind in ((_SOURCES, "source"), (_TARGETS, "target"))]
    stimulation, inhibition = _effects(frame, columns)
    return Edges(ends[0], ends[1], stimulation, inhibition, _confidence(frame, columns))


def to_graph(edges: Edges, tokenizer: GeneTokenizer, on_duplicate: OnDuplicate = "max") -> GraphTable:
    """Edges as ids of a vocabulary; edges to unknown genes are dropped and reported.

    Raises:
        DataError: no edge has both genes in the vocabulary.
    """
    names = tokenizer.names
    ends = [names.match(list(column)) for column in (edges.source, edges.target)]
    is_known = ends[0].is_matched & ends[1].is_matched
    unknown = list(dict.fromkeys([*ends[0].unmatched, *ends[1].unmatched]))
    if not is_known.any():
        raise DataError(
            f"`edges` must join genes of the vocabulary, but none of {len(edges)} does (unknown are {unknown[:5]}, "
            "...); check that both use symbols, or give the tokenizer a map."
        )
    ids = [np.array([str(index) for index in end.ids[is_known]]) for end in ends]
    known = replace(edges.take(np.flatnonzero(is_known)), source=ids[0], target=ids[1]).merged(on_duplicate)
    index = np.stack([known.source.astype(np.int64), known.target.astype(np.int64)])
    order = np.lexsort((index[0], index[1]))
    features = np.stack([known.stimulation, known.inhibition], axis=1).astype(np.float32)
    confidence = known.confidence.astype(np.float32)
    return GraphTable(index[:, order], features[order], confidence[order], unknown, int((~is_known).sum()))


def shuffle_graph(edges: Edges, seed: int) -> Edges:
    """A control with the same degrees: pairs of edges exchange their targets, again and again.

    Edges swap only with edges of the same signs, so that every gene keeps its number of stimulating, inhibiting and
    unsigned edges in both directions; no edge is repeated and no new self-interaction made. (Maslov and Sneppen,
    Science 296:910, 2002.)

    Args:
        edges: each pair once.
        seed: the same seed gives the same graph.

    Raises:
        DataError: a pair stands twice.
    """
    edges = edges.merged("error")
    source, target = edges.source.astype(object).copy(), edges.target.astype(object).copy()
    taken = set(zip(source.tolist(), target.tolist(), strict=True))
    random = np.random.default_rng(seed)
    signs = (edges.stimulation > 0) + 2 * (edges.inhibition > 0)
    for sign in np.unique(signs):
        places = np.flatnonzero(signs == sign)
        draws = random.integers(len(places), size=(_SWAPS_PER_EDGE * len(places), 2))
        for one, other in places[draws].tolist():
            _swap(source, target, taken, one, other)
    return replace(edges, target=target)


def coexpression_edges(expression: np.ndarray, genes: Sequence[str], top_k: int = 20, threshold: float = 0.4) -> Edges:
    """Edges from correlated genes, after GEARS (Roohani et al., Nature Biotechnology 2024): per target the `top_k`
    genes with the largest absolute Pearson correlation, of at least `threshold`.

    Args:
        expression: (cells, genes) of training cells only, or the graph knows the test cells.
        genes: names of the columns.

    Returns:
        Positive correlations as stimulation, negative as inhibition, their size as strength and confidence.

    Raises:
        DataError: another number of names than columns, or no edge reaches the threshold.
    """
    values = np.asarray(expression, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(genes):
        raise DataError(f"`expression` must be (cells, {len(genes)} genes), got shape {values.shape}.")
    centred = values - values.mean(0)
    norms = np.linalg.norm(centred, axis=0)
    centred /= np.where(norms > 0, norms, 1.0)
    sources, targets, strengths = [], [], []
    for target in range(len(genes)):
        found = centred.T @ centred[:, target]
        found[target] = 0.0
        best = np.argsort(-np.abs(found), kind="stable")[:top_k]
        best = best[np.abs(found[best]) >= threshold]
        sources.append(best)
        targets.append(np.full(len(best), target))
        strengths.append(found[best])
    strength, names = np.concatenate(strengths), np.asarray(genes, dtype=object)
    if not len(strength):
        raise DataError(f"`threshold` ({threshold}) leaves no edge; lower it.")
    ends = [names[np.concatenate(column)] for column in (sources, targets)]
    return Edges(ends[0], ends[1], np.maximum(strength, 0), np.maximum(-strength, 0), np.minimum(np.abs(strength), 1))


def _swap(source: np.ndarray, target: np.ndarray, taken: set[tuple[Any, Any]], one: int, other: int) -> None:
    old = (source[one], target[one]), (source[other], target[other])
    new = (source[one], target[other]), (source[other], target[one])
    if new[0] in taken or new[1] in taken or source[one] == target[other] or source[other] == target[one]:
        return
    taken.difference_update(old)
    taken.update(new)
    target[one], target[other] = target[other], target[one]


def _read(path: str | PathLike[str]) -> pd.DataFrame:
    with open_binary(path) as stream:
        text = stream.read().decode("utf-8-sig")
    first = text.split("\n", 1)[0].rstrip("\r")
    if not first.strip():
        raise DataError(f"`source` ({Path(path).name}) is empty; an edge list has one edge a line.")
    delimiter = "\t" if "\t" in first else "," if "," in first else " "
    cells = next(csv.reader([first], delimiter=delimiter))
    is_trrust = len(cells) >= 3 and cells[2] in _TRRUST
    names = ["source", "target", "regulation", "references"][: len(cells)] if is_trrust else None
    try:
        return pd.read_csv(
            io.StringIO(text), sep=delimiter, header=None if is_trrust else 0, names=names, dtype=str,
            keep_default_na=False,
        )  # fmt: skip
    except (pd.errors.ParserError, ValueError) as error:
        raise DataError(f"`source` ({Path(path).name}) is not a table of edges: {error}.") from error


def _found(columns: dict[str, Any], choices: Sequence[str]) -> Any:
    return next((columns[name] for name in choices if name in columns), None)


def _names(frame: pd.DataFrame, columns: dict[str, Any], choices: Sequence[str], kind: str) -> np.ndarray:
    # OmniPath's `source` holds UniProt ids beside the column of symbols.
    found = _found(columns, [name for name in choices if name.endswith("genesymbol")] + list(choices))
    if found is None:
        raise DataError(
            f"`source` must have a column of {kind} genes ({', '.join(choices)}), but has {list(frame.columns)}."
        )
    names = frame[found].astype(str).str.strip()
    empty = (names == "") | frame[found].isna()
    if empty.any():
        raise DataError(f"column {found!r} of `source` is empty in row {int(empty.to_numpy().argmax()) + 1}; drop it.")
    return names.to_numpy(dtype=object)


def _numbers(frame: pd.DataFrame, name: Any) -> np.ndarray:
    if frame[name].astype(str).str.lower().isin(["true", "false"]).all():
        return (frame[name].astype(str).str.lower() == "true").to_numpy(dtype=np.float64)
    values = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"column {name!r} of `source` must hold numbers, row {row + 1} is {frame[name].iloc[row]!r}.")
    return values


def _effects(frame: pd.DataFrame, columns: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    if "is_stimulation" in columns and "is_inhibition" in columns:
        return _numbers(frame, columns["is_stimulation"]), _numbers(frame, columns["is_inhibition"])
    if "regulation" in columns:
        kinds = frame[columns["regulation"]]
        unknown = sorted(set(kinds) - set(_TRRUST))
        if unknown:
            raise DataError(f"column 'regulation' of `source` must be one of {list(_TRRUST)}, got {unknown[:3]}.")
        pairs = np.array([_TRRUST[kind] for kind in kinds])
        return pairs[:, 0], pairs[:, 1]
    name = _found(columns, _SIGNS)
    if name is None:
        return np.zeros(len(frame)), np.zeros(len(frame))
    weights = _numbers(frame, name)
    return np.maximum(weights, 0.0), np.maximum(-weights, 0.0)


def _confidence(frame: pd.DataFrame, columns: dict[str, Any]) -> np.ndarray:
    level = _found(columns, ["confidence"])
    if level is not None and set(frame[level].astype(str)) <= set(_LEVELS):
        return frame[level].astype(str).map(_LEVELS).to_numpy(dtype=np.float64)
    name = level if level is not None else _found(columns, _SCORES)
    if name is None:
        return np.ones(len(frame))
    scores = np.abs(_numbers(frame, name))
    return scores / max(scores.max(initial=0.0), 1.0 if level is not None else 1e-300)
