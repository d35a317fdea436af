"""A small genome and peaks of several experiments on it, for the tests of binding data."""

import numpy as np

from genesplice_hf.data.fasta import Genome
from genesplice_hf.data.peaks import read_peaks

SIZES = {"chr1": 30_000, "chr2": 20_000, "chrX": 10_000}
DATASETS = [f"E{at}.{target}.{cell}" for at, (target, cell) in enumerate(
    [("CTCF", "K562"), ("SPI1", "K562"), ("CTCF", "HeLa"), ("MAX", "K562_drug"), ("MYC", "HeLa"), ("SPI1", "K562")]
)]  # fmt: skip


def make_genome(folder, seed=0):
    """Random bases whose share of G and C rises along each chromosome, with a run of N in chr2."""
    rng = np.random.default_rng(seed)
    lines = []
    for name, size in SIZES.items():
        strong = np.linspace(0.3, 0.7, size)
        letters = np.where(rng.random(size) < strong, rng.choice(list("GC"), size), rng.choice(list("ATat"), size))
        if name == "chr2":
            letters[5000:7000] = "N"
        lines += [f">{name}", "".join(letters)]
    path = folder / "genome.fa"
    path.write_text("\n".join(lines) + "\n")
    return Genome(path)


def make_peaks(folder, count=120, seed=0, datasets=DATASETS, name="peaks.bed"):
    """Peaks of 100 to 300 bp at random places, clustered so that data sets share some."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        chrom = str(rng.choice(list(SIZES)))
        middle = int(rng.integers(1, SIZES[chrom] // 1000)) * 1000 + int(rng.integers(-150, 150))
        start, end = max(0, middle - int(rng.integers(50, 150))), middle + int(rng.integers(50, 150))
        dataset = datasets[int(rng.integers(len(datasets)))]
        lines.append(f"{chrom}\t{start}\t{end}\t{dataset}\t{rng.integers(1000)}\t.\t{middle}\t{middle + 1}\t0")
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return read_peaks(path)


def overlap(one, two):
    """Brute force: do two (chrom, start, end) share a base?"""
    return one[0] == two[0] and one[1] < two[2] and two[1] < one[2]


def places(peaks, chosen=lambda dataset: True):
    """(chrom, start, end) of the rows whose data set is chosen."""
    return [
        (peaks.chrom(row), int(peaks.start[row]), int(peaks.end[row]))
        for row in range(len(peaks))
        if chosen(peaks.dataset(row))
    ]
