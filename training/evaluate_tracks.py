"""Measure a track model on windows: `python -m training.evaluate_tracks --model FOLDER --windows FILE.npz
--targets targets.txt`.

Writes `tracks.json`, `tracks.tsv` (a line per track), `tracks.png`, `scatter.png` and `profiles.png` to `output_dir`.
With `--genes FILE.bed` (start, end, name and strand of each transcript) also `genes`: the correlation of expression
over genes, for every track.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer

import genesplice_hf  # noqa: F401, registers the models
from genesplice_hf.data.bed import BedTable, read_bed
from genesplice_hf.data.tracks import TrackDataset
from genesplice_hf.errors import DataError
from genesplice_hf.models.auto import AutoModelForTrackPrediction
from genesplice_hf.scoring.gene_expression import GeneExpressionCorrelation, tss_bins
from training import reports, track_reports
from training.command import run_command
from training.settings import parse_settings, use_bf16
from training.track_task import TrackDataSettings, bin_size, id_map_of, predict_batches, read_windows
from training.tracks import measure, write_measured

logger = logging.getLogger(__name__)


@dataclass
class EvaluateTracksSettings:
    """Which model, which windows, where to."""

    model: str = field(metadata={"help": "Folder of a model with a track head, or a Hub id."})
    windows: str = field(metadata={"help": "npz file with sequence (N, L) and target (N, bins, tracks)."})
    targets: str = field(metadata={"help": "Table of the tracks (targets.txt)."})
    output_dir: str = field(default="runs/evaluate_tracks", metadata={"help": "Folder for the result files."})
    context_bp: int | None = field(default=None, metadata={"help": "Bases around the centre that the model reads."})
    genes: str | None = field(default=None, metadata={"help": "BED of transcripts, with name and strand."})
    species: str | None = field(default=None, metadata={"help": "Head to ask, in models with a head per species."})
    batch_size: int = field(default=1, metadata={"help": "Windows per forward."})
    average_reverse_complement: bool = field(default=True, metadata={"help": "Mean of both strands."})
    precision: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata={"help": "As in finetune."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the settings and runs; returns the content of `tracks.json`."""
    return evaluate_tracks(*parse_settings([EvaluateTracksSettings], argv))


def evaluate_tracks(settings: EvaluateTracksSettings) -> dict[str, Any]:
    """Predicts every window and measures every track.

    Raises:
        DataError: files that do not fit each other or the model; genes without coordinates of the windows.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForTrackPrediction.from_pretrained(settings.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    bin_bp = bin_size(model.config)
    data = TrackDataSettings(bin_bp=bin_bp, context_bp=settings.context_bp)
    windows = read_windows(Path(settings.windows), Path(settings.targets), data)
    assert windows.targets is not None
    descriptions = [target.description or target.identifier for target in windows.targets.targets]
    genes = None if settings.genes is None else genes_of_windows(read_bed(settings.genes), windows, bin_bp)
    chosen = {} if settings.species is None else {"species": settings.species}
    options = (settings.batch_size, settings.average_reverse_complement, use_bf16(settings.precision), chosen)
    pairs = list(predict_batches(model, windows, id_map_of(tokenizer), *options))
    report = measure(iter(pairs), descriptions)
    predictions, targets = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    folder = Path(settings.output_dir)
    write_measured(folder, report, predictions, targets, bin_bp)
    content = report.as_dict()
    if genes is not None:
        content["genes"] = gene_expression(predictions, targets, genes, descriptions)
        reports.write_json(folder / "tracks.json", content)
    for metric in ("pearson", "poisson"):
        track_reports.print_assays(settings.windows, {settings.model: content["by_assay"]}, metric)
    return content


def genes_of_windows(bed: BedTable, windows: TrackDataset, bin_bp: int) -> list[dict[str, list[int]]]:
    """Gene -> bins around its starts, for every window.

    A row of `bed` is a transcript: its start is that of its strand, its gene the fourth column.

    Raises:
        DataError: windows without coordinates, rows without a name.
    """
    if windows.source.intervals is None:
        raise DataError(f"`genes` need the places of the windows, which {windows.source.name} does not hold.")
    starts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for interval, name in zip(bed.intervals, bed.column(4), strict=True):
        starts[interval.chrom].append((interval.end - 1 if interval.strand == "-" else interval.start, name))
    found = []
    for interval in windows.source.intervals:
        first = interval.start + (interval.length_bp - windows.num_bins * bin_bp) // 2
        bins: dict[str, list[int]] = defaultdict(list)
        for tss_bp, name in starts[interval.chrom]:
            bins[name] += tss_bins(tss_bp, first, bin_bp, windows.num_bins)
        found.append({name: numbers for name, numbers in bins.items() if numbers})
    return found


def gene_expression(
    predictions: np.ndarray, targets: np.ndarray, genes: Sequence[dict[str, list[int]]], descriptions: Sequence[str]
) -> dict[str, Any]:
    """Correlation over genes, per track and mean; counts of genes."""
    metric = GeneExpressionCorrelation(predictions.shape[-1])
    for predicted, measured, bins in zip(predictions, targets, genes, strict=True):
        metric.update(predicted, measured, bins)
    tracks = dict(zip(descriptions, metric.compute().tolist(), strict=False))
    return {"genes": metric.num_genes, "pearson": metric.mean(), "undefined": metric.undefined, "tracks": tracks}


if __name__ == "__main__":
    run_command(main)
