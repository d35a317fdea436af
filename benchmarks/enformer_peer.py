"""The cells of `benchmarks.enformer` that run the package enformer-pytorch, in an environment where it is installed.

Started by `benchmarks.enformer --peer PYTHON`; it imports nothing of ours but the measuring.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from enformer_pytorch import Enformer

from benchmarks.enformer_cells import SEED, SIZES, SPECIES, forward, off_initial, train_step


def weights(size: str, path: str) -> dict[str, Any]:
    """Writes a model with random weights: its arguments and its state dict."""
    torch.manual_seed(SEED)
    model = Enformer.from_hparams(**SIZES[size])
    with torch.no_grad():
        off_initial(model)
    torch.save({"arguments": SIZES[size], "state_dict": model.state_dict()}, path)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def load(path: str) -> Enformer:
    """What `weights` wrote."""
    written = torch.load(path, weights_only=True, mmap=True)
    model = Enformer.from_hparams(**written["arguments"])
    model.load_state_dict(written["state_dict"])
    return model.eval()


def predict(path: str, length: int, repeats: int, output: str) -> dict[str, Any]:
    """A forward pass in float32 with every bin and the human head."""
    model = load(path)
    return forward(lambda ids: model(ids, head=SPECIES, target_length=-1), length, repeats, output)


def train(path: str, length: int) -> dict[str, Any]:
    """A training step."""
    model = load(path)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        tracks = model._heads[SPECIES][0].out_features
        target = torch.ones(1, ids.shape[1] // 2**model.config.num_downsamples, tracks)
        return model(ids, head=SPECIES, target=target, target_length=-1)

    return train_step(model, loss_of, length)


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (weights, predict, train)
}


def main() -> None:
    """Runs one cell and prints its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", choices=sorted(KINDS), required=True)
    parser.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(KINDS[arguments.cell](**arguments.options)))


if __name__ == "__main__":
    main()
