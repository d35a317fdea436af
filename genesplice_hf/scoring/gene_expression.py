"""Expression of genes read off CAGE tracks: what is predicted around transcription starts against what is measured.

A gene's expression in a track is the sum over the bins at its transcription start sites and their neighbours; genes
are compared after log(1 + x) (Avsec et al. 2021, "CAGE gene expression").

Shapes: M bins, T tracks, G genes.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from genesplice_hf.errors import DataError
from genesplice_hf.scoring.streaming import Array, Moments, StreamingMetric


def tss_bins(tss_bp: int, window_start_bp: int, bin_bp: int, num_bins: int, flank_bins: int = 1) -> list[int]:
    """The bins of a window at a transcription start and `flank_bins` on either side of it.

    Args:
        tss_bp: position of the start, 0-based, on the window's chromosome.
        window_start_bp: position of the first base of bin 0.
        bin_bp, num_bins: bases per bin, and bins of the window.
        flank_bins: 1 makes the three bins of the published figure.

    Returns:
        Bin numbers; empty where any of them lies outside the window, for a part of the sum would be another quantity.
    """
    centre = (tss_bp - window_start_bp) // bin_bp
    first, last = centre - flank_bins, centre + flank_bins
    return list(range(first, last + 1)) if first >= 0 and last < num_bins else []


class GeneExpressionCorrelation(StreamingMetric):
    """Pearson correlation over genes of log(1 + sum of bins), for every track.

    Starts of one gene add up, also when they come in different windows; a bin that two of its starts share in one
    window counts once. A gene whose measured sum is NaN in a track is left out there.

    Args:
        num_tracks: T.

    Example:
        >>> metric = GeneExpressionCorrelation(num_tracks=638)
        >>> metric.update(predictions, targets, {"MYC": tss_bins(tss, start, 128, 896)})
    """

    def __init__(self, num_tracks: int) -> None:
        super().__init__(num_tracks)
        self._restart()

    def update(
        self, predictions: Array, targets: Array, bins_of_genes: Mapping[str, Sequence[int]]
    ) -> "GeneExpressionCorrelation":
        """Adds one window.

        Args:
            predictions, targets: (M, T).
            bins_of_genes: gene -> its bins in this window; a gene without a bin does not count.

        Raises:
            DataError: shapes that do not fit, a bin outside the window, or the complaints of
                `StreamingPearson.update`.
        """
        x_BMT, y_BMT = self._pairs(predictions, targets)
        if len(x_BMT) != 1:
            raise DataError(f"`predictions` must be one window (bins, tracks), got {len(x_BMT)} windows.")
        for gene, bins in bins_of_genes.items():
            if any(not 0 <= number < x_BMT.shape[1] for number in bins):
                raise DataError(
                    f"`bins_of_genes` must hold numbers in 0..{x_BMT.shape[1] - 1}; {gene!r} has {list(bins)}."
                )
            if bins:
                index = torch.as_tensor(sorted(set(bins)), device=x_BMT.device)
                self._add(gene, x_BMT[0, index].double().sum(0).cpu(), y_BMT[0, index].double().sum(0).cpu())
        return self

    @property
    def num_genes(self) -> int:
        """Genes with a bin in some window."""
        return len(self.sums)

    def compute(self) -> torch.Tensor:
        """(T,) float64; NaN where all genes are predicted, or measured, alike."""
        if not self.sums:
            return torch.full((self.num_tracks,), torch.nan, dtype=torch.float64)
        x_GT, y_GT = (torch.stack(values).log1p() for values in zip(*self.sums.values(), strict=True))
        return Moments.of(x_GT, y_GT, [0]).pearson()

    def _add(self, gene: str, x_T: torch.Tensor, y_T: torch.Tensor) -> None:
        known = self.sums.get(gene)
        self.sums[gene] = (x_T, y_T) if known is None else (known[0] + x_T, known[1] + y_T)

    def _join(self, others: Iterable) -> None:
        for other in others:
            for gene, (x_T, y_T) in other.sums.items():
                self._add(gene, x_T, y_T)

    def _restart(self) -> None:
        self.sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
