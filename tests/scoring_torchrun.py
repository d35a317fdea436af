"""Run by torchrun: every process feeds its windows into the streaming metrics and saves what all of them make.

Argument: a folder with `pairs.safetensors` (predictions and targets); `rank-<r>.json` is written next to it.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from genesplice_hf.scoring.gene_expression import GeneExpressionCorrelation
from genesplice_hf.scoring.streaming import StreamingMetric, StreamingPearson, StreamingPoisson, StreamingR2
from genesplice_hf.scoring.streaming_ranks import StreamingSpearman
from genesplice_hf.scoring.track_report import TrackReport
from training.command import run_command

WORLD_SIZE = 2
GENES = {"one": [0, 1, 2], "two": [5], "three": [9, 10]}


def metrics(num_tracks: int) -> dict[str, StreamingMetric]:
    return {
        "pearson": StreamingPearson(num_tracks),
        "pearson per bin": StreamingPearson(num_tracks, over=("batch",)),
        "r2": StreamingR2(num_tracks),
        "poisson": StreamingPoisson(num_tracks),
        "spearman": StreamingSpearman(num_tracks),
        "genes": GeneExpressionCorrelation(num_tracks),
    }


def feed(metric: StreamingMetric, x: torch.Tensor, y: torch.Tensor, first: int = 0) -> StreamingMetric:
    """Window by window; window w calls its genes by its number."""
    for window in range(len(x)):
        if isinstance(metric, GeneExpressionCorrelation):
            genes = {f"{name}-{(first + window) % 3}": bins for name, bins in GENES.items()}
            metric.update(x[window], y[window], genes)
        else:
            metric.update(x[window : window + 1], y[window : window + 1])
    return metric


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == WORLD_SIZE
    pairs = load_file(folder / "pairs.safetensors")
    # Uneven parts: the second process has one window.
    first, last = ((0, len(pairs["x"]) - 1), (len(pairs["x"]) - 1, len(pairs["x"])))[rank]
    x, y = pairs["x"][first:last], pairs["y"][first:last]
    found = {}
    for name, metric in metrics(x.shape[-1]).items():
        total = feed(metric, x, y, first).all_reduce().compute()
        assert torch.equal(metric.all_reduce().compute().nan_to_num(), total.nan_to_num())
        found[name] = total.nan_to_num(nan=-9.0).tolist()
    report = TrackReport([f"CAGE:{track}" for track in range(x.shape[-1])]).update(x, y).all_reduce().all_reduce()
    found["windows"] = report.windows
    found["report"] = report.as_dict()["by_assay"]["all"]["pearson"]
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_command(partial(main, Path(sys.argv[1])))
