"""Predictions of tracks, averaged over strands and small shifts.

Shapes: B batch, L bases, M bins, T tracks.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from genesplice_hf.data.track_augment import augment, undo_augment
from genesplice_hf.errors import DataError

StrandPairs = Sequence[int] | Mapping[str, Sequence[int] | None]


@torch.no_grad()
def predict_ensemble(
    model: Callable[..., Any],
    ids: torch.Tensor,
    rc: bool = True,
    shifts: Sequence[int] = (0, -1, 1),
    strand_pair: StrandPairs | None = None,
    id_map: Sequence[int] | None = None,
    model_inputs: Mapping[str, Any] | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What does a model predict on average over both strands and shifted windows (Kelley et al. 2018)?

    The model runs once per strand and shift in eval mode, and is left in the mode it was in. Each prediction is turned
    back (bins flipped, paired tracks swapped) before the mean, which is taken in float32. So the result for the
    reverse complement is the turned result, whatever the model, if `shifts` are symmetric.

    Args:
        model: returns an output with `logits` (B, M, T), or with `predictions` (species -> (B, M, T)); all other
            fields are left alone.
        ids: (B, L), ids of the Enformer vocabulary. A shift fills with N.
        rc: also predict the reverse complement.
        shifts: bases by which the window is moved.
        strand_pair: the partner of each *predicted* track on the other strand (or species -> table); None = itself.
        id_map: the model's ids for A, C, G, T, N and padding, where it has another vocabulary.
        model_inputs: further arguments of the model, such as `species` or `track_indices`.

    Returns:
        float32 (B, M, T), or species -> such.

    Raises:
        DataError: ids that are no batch, no shift, or pairs that do not fit the tracks.
    """
    if ids.dim() != 2:
        raise DataError(f"`ids` must be (batch, length), was {tuple(ids.shape)}; add a batch axis with `ids[None]`.")
    if not len(shifts):
        raise DataError("`shifts` must hold at least one number; pass (0,) for the window as it is.")
    table = None if id_map is None else torch.tensor(id_map, dtype=torch.int64, device=ids.device)
    variants = list(itertools.product((False, True) if rc else (False,), shifts))
    total: dict[str | None, torch.Tensor] = {}
    with _eval_mode(model):
        for flip, shift in variants:
            view = augment(ids, rc=flip, shift=shift).input_ids
            output = model(input_ids=view if table is None else table[view.long()], **(model_inputs or {}))
            for species, predicted in _by_species(output).items():
                turned = undo_augment(predicted.float(), flip, _pairs_of(strand_pair, species))
                total[species] = total[species] + turned if species in total else turned
    means = {species: sum_BMT / len(variants) for species, sum_BMT in total.items()}
    return means[None] if None in means else {str(species): mean for species, mean in means.items()}


def _by_species(output: Any) -> dict[str | None, torch.Tensor]:
    """The predictions of one forward by species; None where there is one only."""
    predictions = getattr(output, "predictions", None)
    if predictions is not None:
        return dict(predictions)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise DataError(
            f"`model` must return `logits` (batch, bins, tracks) or `predictions`, returned {type(output).__name__}; "
            "pass a model with a track head."
        )
    return {None: logits}


def _pairs_of(strand_pair: StrandPairs | None, species: str | None) -> Sequence[int] | None:
    if not isinstance(strand_pair, Mapping):
        return strand_pair
    if species is None or species not in strand_pair:
        raise DataError(f"`strand_pair` has entries for {sorted(strand_pair)}, but the model predicts {species!r}.")
    return strand_pair[species]


def _eval_mode(model: Any) -> Any:
    return _evaluating(model) if isinstance(model, torch.nn.Module) else nullcontext()


@contextmanager
def _evaluating(model: torch.nn.Module):
    """Puts every module into eval mode and back into the mode it had, frozen batch norms included."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
