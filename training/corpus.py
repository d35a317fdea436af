"""Which bases a pretraining run sees: the settings, the windows of every stage, the held-out windows, fingerprints."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import concatenate_datasets

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.windows import windows_dataset
from genesplice_hf.errors import DataError
from genesplice_hf.genome.interval import Interval
from training.heldout import Corpus
from training.reports import write_json
from training.streaming import Source, StreamedWindows, without

MAX_N_FRACTION = 0.1
_STAGE_KEYS = ("window_bp", "until_step", "step_bp", "batch_size")


@dataclass
class CorpusSettings:
    """Which bases are trained on, and which are only measured."""

    data_dir: str = field(default=".", metadata={"help": "Folder that the genome files lie in."})
    genomes: list[str] = field(default_factory=list, metadata={"help": "FASTA files, plain, gzip or bgzip."})
    held_out: list[str] = field(
        default_factory=list, metadata={"help": "Contigs, or regions as chrom:first-last, kept out of training."}
    )
    window_bp: int = field(default=256, metadata={"help": "Bases per example."})
    step_bp: int | None = field(
        default=None, metadata={"help": "Distance between the starts of training windows; by default a quarter."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read windows when they are needed instead of holding all in memory."}
    )
    length_curriculum: list[dict] = field(
        default_factory=list,
        metadata={"help": "Stages {window_bp, until_step, [step_bp], [batch_size]} instead of one window_bp."},
    )
    heldout_window_bp: int | None = field(
        default=None, metadata={"help": "Bases per held-out window; by default those of the (last) training window."}
    )
    max_heldout_windows: int = field(default=4000, metadata={"help": "Held-out windows that are measured, at most."})
    max_markov_order: int = field(
        default=11,
        metadata={"help": "Longest Markov chain beside the model; -1: none. Memory is 43 bytes * 4**order."},
    )


class Length(NamedTuple):
    """One stage of the length curriculum as it was asked for; None = by default, or to the end."""

    window_bp: int
    until_step: int | None = None
    step_bp: int | None = None
    batch_size: int | None = None

    @property
    def cut(self) -> tuple[int, int]:
        """Length of a window, and distance of two starts."""
        return self.window_bp, self.step_bp or max(1, self.window_bp // 4)


def lengths(settings: CorpusSettings) -> list[Length]:
    """The stages of the run; a single one without a curriculum.

    Raises:
        DataError: a stage lacks `window_bp`, has an unknown key, or does not end after the one before it.
    """
    if not settings.length_curriculum:
        return [Length(settings.window_bp, step_bp=settings.step_bp)]
    stages = [_length(stage) for stage in settings.length_curriculum]
    ends = [0, *(math.inf if stage.until_step is None else stage.until_step for stage in stages)]
    if ends != sorted(set(ends)):
        raise DataError(
            "`length_curriculum` must give every stage an `until_step` (the last one may leave it out), each larger "
            f"than the one before, got {[stage.until_step for stage in stages]}."
        )
    return stages


def build_corpus(settings: CorpusSettings) -> Corpus:
    """Windows of all genomes outside the held-out regions, and the held-out windows by genome.

    Raises:
        DataError: no genome, a held-out region that no genome has or that is shorter than a held-out window, nothing
            left to train on, or windows that fit nowhere.
    """
    if not settings.genomes:
        raise DataError("`genomes` must name at least one FASTA file; give it in the config or by `--genomes`.")
    stages = lengths(settings)
    heldout_bp = settings.heldout_window_bp or stages[-1].window_bp
    train: list[tuple[Source, list[Interval]]] = []
    held_out: dict[str, list[dict[str, Any]]] = {}
    missing = set(settings.held_out)
    for name in settings.genomes:
        genome = Genome(Path(settings.data_dir) / name)
        # Every genome that has the region keeps it out, or two files of one genome would leak into each other.
        regions = {text: region for text in settings.held_out if (region := region_of(genome, text)) is not None}
        missing -= set(regions)
        label = name.split(".")[0]
        if stretches := _outside(genome, list(regions.values())):
            train.append((Source(genome, label, stretches), list(regions.values())))
        if regions:
            rows = held_out_windows(Source(genome, label, list(regions.values())), heldout_bp, settings)
            held_out.setdefault(label, []).extend(rows)
    if missing:
        raise DataError(f"`held_out` names {sorted(missing)}, which no genome in `genomes` has; correct the names.")
    if not train:
        raise DataError("`held_out` names every contig of `genomes`; leave some to train on.")
    windows = {cut: _windows(train, *cut, settings.streaming) for cut in {stage.cut for stage in stages}}
    by_stage = [windows[stage.cut] for stage in stages]
    return Corpus(windows[min(windows)], held_out, by_stage)


def held_out_windows(source: Source, window_bp: int, settings: CorpusSettings) -> list[dict[str, Any]]:
    """Rows of the held-out regions of a genome, end to end; every n-th, so that there are not too many."""
    for region in source.stretches:
        if region.length_bp < window_bp:
            raise DataError(
                f"The held-out region {region} has {region.length_bp} bp, less than one held-out window "
                f"({window_bp} bp); lower `heldout_window_bp`."
            )
    windows = StreamedWindows([source], window_bp, window_bp, MAX_N_FRACTION)
    every = max(1, math.ceil(len(windows) / settings.max_heldout_windows))
    return [windows[number] for number in range(0, len(windows), every)]


def region_of(genome: Genome, text: str) -> Interval | None:
    """The contig or region that `text` names in this genome, or None when the genome does not have it."""
    if text in genome.contigs:
        return Interval(text, 0, genome.contigs[text])
    if ":" not in text:
        return None
    region = Interval.parse(text)
    if region.chrom not in genome.contigs:
        return None
    genome.locate(region.chrom, region.start, region.end)
    return region


def check_unchanged(folder: Path, settings: CorpusSettings) -> None:
    """Keeps size and SHA-256 of every genome file in `folder`, and refuses files that a run did not begin with.

    Raises:
        DataError: a file is not the one whose windows the checkpoints have seen.
    """
    path = folder / "corpus.json"
    now = {name: fingerprint(Path(settings.data_dir) / name) for name in settings.genomes}
    if not path.is_file():
        write_json(path, now)
        return
    for name, stored in json.loads(path.read_text(encoding="utf-8")).items():
        if stored != now.get(name):
            raise DataError(
                f"{Path(settings.data_dir) / name} changed since the run in {folder} began: it was {stored}, it is "
                f"{now.get(name)}; put the file back, or begin anew with `--overwrite true`."
            )


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, read a megabyte at a time.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"`genomes` names {path}, which is not a file; correct `genomes` or `data_dir`.")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _length(stage: dict[str, Any]) -> Length:
    unknown = sorted(set(stage) - set(_STAGE_KEYS))
    if unknown or "window_bp" not in stage:
        raise DataError(f"A stage of `length_curriculum` has `window_bp` and may have {_STAGE_KEYS[1:]}, got {stage}.")
    for key, value in stage.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(
                f"`{key}` of a stage of `length_curriculum` must be a whole number above 0, got {value!r}."
            )
    return Length(**stage)


def _outside(genome: Genome, held_out: Sequence[Interval]) -> list[Interval]:
    """What of the genome is not held out, contig by contig."""
    contigs = [Interval(chrom, 0, length) for chrom, length in genome.contigs.items()]
    return [stretch for contig in contigs for stretch in without(contig, held_out)]


def _windows(train: Sequence[tuple[Source, list[Interval]]], window_bp: int, step_bp: int, streaming: bool) -> Any:
    """All training windows of one length, by number."""
    if streaming:
        return StreamedWindows([source for source, _ in train], window_bp, step_bp, MAX_N_FRACTION)
    cut: dict[str, Any] = {
        "window_bp": window_bp,
        "step_bp": step_bp,
        "max_n_fraction": MAX_N_FRACTION,
        "last": "drop",
    }
    parts = [windows_dataset(source.genome, exclude=held_out, name=source.label, **cut) for source, held_out in train]
    windows = concatenate_datasets(parts)
    if not len(windows):
        raise DataError(f"All windows of `genomes` hold more than {MAX_N_FRACTION:.0%} N; there is nothing to learn.")
    return windows
