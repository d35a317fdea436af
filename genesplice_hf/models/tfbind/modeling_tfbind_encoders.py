"""Runs the encoders inside a TFBind model: windows of DNA, residues of proteins, words of contexts.

A frozen encoder runs without gradients (unless an adapter in it trains, or the input wants a gradient). Its results
can be kept per row by the object that holds the model, so that no other model ever sees them.

Shapes: B batch, L tokens of DNA, T bins, R residues, N tokens of text, E, P, C widths, W windows of proteins.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel

from genesplice_hf.errors import SequenceError
from genesplice_hf.models.tfbind.configuration_tfbind import (
    NUM_RESIDUE_IDS,
    RESIDUE_PAD_ID,
    WINDOW_OVERLAP,
    TFBindConfig,
)

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """A set of states (B, L, E), and which are real, (B, L) bool; None = all."""

    states: torch.Tensor
    mask: torch.Tensor | None

    def at(self, index: torch.Tensor) -> "Tokens":
        """The rows `index`; a batch of 1 stays."""
        if len(self.states) == 1:
            return self
        return Tokens(self.states[index], None if self.mask is None else self.mask[index])


class Context(NamedTuple):
    """What is known of the cell and the assay: a vector (B, C), and tokens (B, N, C) with their mask."""

    vector: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def at(self, index: torch.Tensor) -> "Context":
        """The rows `index`; a batch of 1 stays."""
        return Context(*(x if x is None or len(x) == 1 else x[index] for x in self))

    @property
    def batch(self) -> int:
        return 1 if self.vector is None else len(self.vector)


class RowCache:
    """Keeps what a frozen encoder said of single rows, as long as its weights stay the same.

    Rows are known by the bytes of all their inputs, weights by their storage and version: results of another model, of
    changed weights or of another precision are never returned. The least recently used rows go first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: OrderedDict[tuple, dict[str, torch.Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __deepcopy__(self, memo: dict) -> "RowCache":
        return RowCache(self.size)

    def clear(self) -> None:
        self._rows.clear()

    def run(
        self,
        encoder: nn.Module,
        inputs: dict[str, torch.Tensor],
        compute: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
        tag: Any = None,
    ) -> dict[str, torch.Tensor]:
        """`compute(inputs)`, of rows that are not known yet alone; `tag` is what else the result depends on."""
        owner = (id(encoder), tag, *((t.data_ptr(), t._version, t.dtype) for t in tensors_of(encoder)))
        keys = [(owner, *(key for row in rows for key in _bytes(row))) for rows in zip(*inputs.values(), strict=True)]
        new = [row for row, key in enumerate(keys) if key not in self._rows]
        # The same row twice in a batch is computed once.
        new = list({keys[row]: row for row in new}.values())
        held = {key: self._rows[key] for key in keys if key in self._rows}
        if new:
            found = compute({name: tensor[new] for name, tensor in inputs.items()})
            held |= {
                keys[row]: {name: tensor[place].detach().clone() for name, tensor in found.items()}
                for place, row in enumerate(new)
            }
        for key in keys:
            self._rows[key] = held[key]
            self._rows.move_to_end(key)
        while len(self._rows) > self.size:
            self._rows.popitem(last=False)
        return {name: torch.stack([held[key][name] for key in keys]) for name in held[keys[0]]}


def _bytes(row: torch.Tensor) -> tuple[Any, ...]:
    return str(row.dtype), tuple(row.shape), row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without a head; of an encoder-decoder its encoder."""
    auto_class = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    return auto_class.from_config(config)


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def run_encoder(
    encoder: PreTrainedModel,
    inputs: dict[str, torch.Tensor | None],
    select: Callable[[Any], dict[str, torch.Tensor]],
    cache: RowCache | None = None,
    tag: Any = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """`select(outputs)` of an encoder, from its cache where there is one and nothing needs a gradient."""
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    wants_gradient = torch.is_grad_enabled() and (
        trains(encoder) or any(tensor.requires_grad for tensor in given.values())
    )

    def compute(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return select(encoder(**rows, **options))

    with torch.set_grad_enabled(wants_gradient):
        if cache is None or cache.size == 0 or wants_gradient or encoder.training:
            return compute(given)
        return cache.run(encoder, given, compute, tag)


def encode_residues(
    encoder: PreTrainedModel,
    config: TFBindConfig,
    ids_BR: torch.Tensor,
    mask_BR: torch.Tensor,
    chains_BR: torch.Tensor | None,
    cache: RowCache | None = None,
) -> Tokens:
    """States (B, R, P) of residues by a protein encoder, every subunit by itself, without its special tokens.

    Residues beyond the encoder's limit are hidden, or seen in overlapping windows whose states are averaged.

    Raises:
        SequenceError: a subunit is too long and `protein_overflow` is "error".
    """
    windows = _windows(config, mask_BR, chains_BR)
    assert config.protein_token_ids is not None  # `validate` has seen it
    table = ids_BR.new_tensor(config.protein_token_ids)
    before, after = (ids_BR.new_tensor(list(ids)) for ids in (config.protein_prefix_ids, config.protein_suffix_ids))
    rows = [torch.cat([before, table[ids_BR[row, places]], after]) for row, places in windows]
    # Where a window stands in its padded row of tokens, and which residue each of its states is.
    width = max(len(row) for row in rows)
    tokens = ids_BR.new_full((len(rows), width), config.protein_token_ids[RESIDUE_PAD_ID])
    token_mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        token_mask[number, : len(row)] = 1
    layer = config.protein_layer
    states_WNP = run_encoder(
        encoder,
        {"input_ids": tokens, "attention_mask": token_mask},
        lambda outputs: {"states": outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]},
        cache,
        ("protein", layer),
        **({} if layer == -1 else {"output_hidden_states": True}),
    )["states"]
    start = len(before)
    found = torch.cat([states_WNP[number, start : start + len(places)] for number, (_, places) in enumerate(windows)])
    length = ids_BR.shape[1]
    index = torch.cat([row * length + places for row, places in windows])
    states = found.new_zeros(ids_BR.numel(), found.shape[-1]).index_add(0, index, found)
    count = found.new_zeros(ids_BR.numel()).index_add(0, index, found.new_ones(len(index)))
    states = (states / count.clamp(min=1)[:, None]).unflatten(0, ids_BR.shape)
    return Tokens(states, (count > 0).unflatten(0, ids_BR.shape))


def _windows(
    config: TFBindConfig, mask_BR: torch.Tensor, chains_BR: torch.Tensor | None
) -> list[tuple[int, torch.Tensor]]:
    """(row, positions of its residues) of everything that the encoder sees at once."""
    found = []
    for row in range(len(mask_BR)):
        places = mask_BR[row].nonzero()[:, 0]
        chains = places.new_zeros(len(places)) if chains_BR is None else chains_BR[row, places]
        for chain in chains.unique().tolist():
            found += [(row, part) for part in _cut(config, places[chains == chain], row)]
    return found


def _cut(config: TFBindConfig, places: torch.Tensor, row: int) -> list[torch.Tensor]:
    limit = config.max_protein_length
    if len(places) <= limit:
        return [places]
    if config.protein_overflow == "error":
        raise SequenceError(
            f"`protein_input_ids` hold a protein of {len(places)} residues in row {row}, and `max_protein_length` is "
            f"{limit}; shorten it, or set `protein_overflow` to 'window' or 'truncate'."
        )
    if config.protein_overflow == "truncate":
        logger.warning(
            "a protein of %d residues is cut to the first %d (`protein_overflow`='truncate')", len(places), limit
        )
        return [places[:limit]]
    starts = [*range(0, len(places) - limit, limit - WINDOW_OVERLAP), len(places) - limit]
    return [places[start : start + limit] for start in starts]


def encode_text(
    encoder: PreTrainedModel,
    config: TFBindConfig,
    ids_BN: torch.Tensor,
    mask_BN: torch.Tensor | None,
    cache: RowCache | None = None,
) -> Context:
    """The pooled state of each text; in mode "tokens" the states of its tokens as well.

    Raises:
        SequenceError: a mask of another shape, or one that hides a whole text.
    """
    mask = torch.ones_like(ids_BN).bool() if mask_BN is None else mask_BN.bool()
    if mask.shape != ids_BN.shape:
        raise SequenceError(f"`context_mask` must be {tuple(ids_BN.shape)}, got {tuple(mask.shape)}.")
    demand_something(mask, "context_mask", "token")
    # Padding to another width must not change what is stored.
    ids_BN = ids_BN[:, : config.text_max_length]
    mask = mask[:, : config.text_max_length]
    states = run_encoder(
        encoder,
        {"input_ids": ids_BN, "attention_mask": mask.long()},
        lambda outputs: {"states": outputs.last_hidden_state},
        cache,
        "text",
    )["states"]
    vector = pool_text(states, mask, ids_BN, config)
    if config.context_mode == "tokens":
        return Context(vector, states, mask)
    return Context(vector, vector[:, None], None)


def pool_text(
    states_BNC: torch.Tensor, mask_BN: torch.Tensor, ids_BN: torch.Tensor, config: TFBindConfig
) -> torch.Tensor:
    """(B, C) by `config.text_pooling`; a text of special tokens alone gives the mean over them."""
    places = torch.arange(mask_BN.shape[1], device=mask_BN.device)
    first = mask_BN.int().argmax(1)
    last = (places * mask_BN).amax(1)
    rows = torch.arange(len(states_BNC), device=states_BNC.device)
    if config.text_pooling == "cls":
        return states_BNC[rows, first]
    if config.text_pooling == "last":
        return states_BNC[rows, last]
    if config.text_special_token_ids is None:
        special = (places == first[:, None]) | (places == last[:, None])
    else:
        special = torch.isin(ids_BN, ids_BN.new_tensor(list(config.text_special_token_ids)))
    words = mask_BN & ~special
    words = torch.where(words.any(1, keepdim=True), words, mask_BN)
    weight = words[..., None].to(states_BNC.dtype)
    return (states_BNC * weight).sum(1) / weight.sum(1)


def demand_residue_ids(ids_BR: torch.Tensor, mask_BR: torch.Tensor) -> None:
    """Raises unless real residues have ids of amino acids.

    Raises:
        SequenceError: an id beyond our numbering, or padding among the real residues.
    """
    bad = (ids_BR < 0) | (ids_BR >= NUM_RESIDUE_IDS) | (mask_BR & (ids_BR == RESIDUE_PAD_ID))
    if bool(bad.any()):
        row, place = bad.nonzero()[0].tolist()
        raise SequenceError(
            f"`protein_input_ids` must be 0..19 = ACDEFGHIKLMNPQRSTVWY, {RESIDUE_PAD_ID} = padding (masked), 21 = X; "
            f"got {int(ids_BR[row, place])} at residue {place} of row {row}. `TFBindProcessor` makes them."
        )


def demand_something(mask: torch.Tensor, name: str, unit: str) -> None:
    """Raises where a mask hides everything.

    Raises:
        SequenceError: names the row.
    """
    if torch.compiler.is_compiling():
        return
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise SequenceError(
            f"`{name}` hides every {unit} of row {int(empty.int().argmax())}; 1 or True is real, and each row needs "
            f"at least one {unit}."
        )


def sinusoids(places_BR: torch.Tensor, size: int) -> torch.Tensor:
    """(B, R, P) sines and cosines of positions (Vaswani et al. 2017, section 3.5)."""
    half = -(-size // 2)
    rates = 10_000.0 ** (-torch.arange(half, device=places_BR.device) / half)
    angles = places_BR[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :size]
