"""From what a caller passes to the states that a TFBind model compares; and the care for the encoders inside it.

Shapes: B batch, L tokens of DNA, T bins, R residues, N tokens of text, E, P, C widths, F factors.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel

from genesplice_hf.errors import CheckpointError, SequenceError
from genesplice_hf.layers.padding import real_positions
from genesplice_hf.models.tfbind.configuration_tfbind import TFBindConfig
from genesplice_hf.models.tfbind.modeling_tfbind_encoders import (
    Context,
    RowCache,
    Tokens,
    demand_residue_ids,
    demand_something,
    encode_residues,
    encode_text,
    run_encoder,
    sinusoids,
)


class TFBindInputs:
    """Mixed into `TFBindModel`: its encoders and what surrounds them."""

    config: TFBindConfig
    dna_encoder: PreTrainedModel
    protein_encoder: PreTrainedModel | None
    text_encoder: PreTrainedModel | None
    norm_dna: nn.LayerNorm
    dtype: torch.dtype
    dna_proj: nn.Linear | None
    protein_proj: nn.Linear | None
    protein_embedding: nn.Embedding | None
    chains: nn.Module | None
    context_embeddings: nn.ModuleList | None
    genome_layers: nn.ModuleList
    _cache: RowCache

    def encode_dna(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        dna_embeds: torch.Tensor | None = None,
    ) -> Tokens:
        """Windows (B, T, E) after the encoder, its norm, the projection, the crop and self attention.

        Raises:
            SequenceError: not exactly one input; an empty one; a mask with holes, of another shape, or that hides a
                row; fewer bins than `target_length`.
        """
        given = [x for x in (input_ids, inputs_embeds, dna_embeds) if x is not None]
        if len(given) != 1:
            raise SequenceError("pass exactly one of `input_ids`, `inputs_embeds` and `dna_embeds`.")
        if given[0].dim() < 2 or given[0].shape[1] < 1:
            raise SequenceError(
                f"windows must be (batch, length, ...) and hold at least one base, got {tuple(given[0].shape)}."
            )
        mask = real_positions(attention_mask)
        if attention_mask is not None and attention_mask.shape != given[0].shape[:2]:
            raise SequenceError(
                f"`attention_mask` must be {tuple(given[0].shape[:2])}, as the windows are, got "
                f"{tuple(attention_mask.shape)}."
            )
        if mask is not None:
            demand_something(mask, "attention_mask", "base")
        if dna_embeds is None:
            states, mask = self._run_dna(input_ids, attention_mask, inputs_embeds, mask)
        else:
            states = dna_embeds
        if states.shape[-1] != self.config.dna_width:
            raise SequenceError(
                f"the states of DNA must be {self.config.dna_width} wide, got {tuple(states.shape)}; check "
                "`dna_embeds`, or `dna_dim` of the config."
            )
        states, mask = self._crop(states, mask)
        states = self.norm_dna(states.to(self.dtype))
        states = states if self.dna_proj is None else self.dna_proj(states)
        for layer in self.genome_layers:
            states = layer(states, mask)
        return Tokens(states, mask)

    def _run_dna(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States, and which are real, as far as the encoder says."""

        def select(outputs: Any) -> dict[str, torch.Tensor]:
            found = {"states": outputs.last_hidden_state}
            bins = getattr(outputs, "bin_mask", None)
            is_binned = bins is not None and bins.shape == outputs.last_hidden_state.shape[:2]
            return found | ({"mask": bins} if is_binned else {})

        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        found = run_encoder(self.dna_encoder, inputs, select, self._cache, "dna")
        states = found["states"]
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and states.shape[1] == given.shape[1]:
            return states, mask
        # An encoder of bins that says nothing of them, as Enformer, has no padding among its bins.
        return states, None if mask is None else found.get("mask")

    def _crop(self, states: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The `target_length` bins in the middle of the real ones; of an odd surplus one more is cut from the end."""
        wanted = self.config.target_length
        if wanted is None:
            return states, mask
        real = states.new_full((len(states),), states.shape[1], dtype=torch.long) if mask is None else mask.sum(1)
        if int(real.min()) < wanted:
            raise SequenceError(
                f"`target_length` ({wanted}) is larger than the {int(real.min())} bins of row {int(real.argmin())}; "
                "pass longer windows, or set it to None."
            )
        if mask is None:
            start = (states.shape[1] - wanted) // 2
            return states[:, start : start + wanted], None
        start = mask.int().argmax(1) + (real - wanted).div(2, rounding_mode="floor")
        index = start[:, None] + torch.arange(wanted, device=states.device)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1])), None

    def encode_proteins(
        self,
        protein_embeds: torch.Tensor | None = None,
        protein_mask: torch.Tensor | None = None,
        protein_input_ids: torch.Tensor | None = None,
        protein_chain_ids: torch.Tensor | None = None,
    ) -> Tokens:
        """Residues (B, R, P), zero at padding.

        Raises:
            SequenceError: not the input that `protein_input` names; another width; masks or chains of another shape; a
                row without a residue.
        """
        wanted = "protein_embeds" if self.config.protein_input == "embeds" else "protein_input_ids"
        if protein_embeds is not None and protein_input_ids is not None:
            raise SequenceError("pass one of `protein_embeds` and `protein_input_ids`, not both.")
        given = protein_embeds if protein_input_ids is None else protein_input_ids
        # States computed before are welcome in every mode.
        if given is None or (wanted == "protein_embeds" and protein_embeds is None):
            raise SequenceError(
                f"`{wanted}` is missing: with protein_input={self.config.protein_input!r} every call needs it."
            )
        rows = tuple(given.shape[:2])
        for name, tensor in (("protein_mask", protein_mask), ("protein_chain_ids", protein_chain_ids)):
            if tensor is not None and tuple(tensor.shape) != rows:
                raise SequenceError(f"`{name}` must be (batch, residues) = {rows}, got {tuple(tensor.shape)}.")
        mask = None if protein_mask is None else protein_mask.bool()
        demand_something(given.new_ones(rows, dtype=torch.bool) if mask is None else mask, "protein_mask", "residue")
        if protein_embeds is not None:
            states = protein_embeds
        else:
            states, mask = self._embed_residues(given, mask, protein_chain_ids)
        if states.dim() != 3 or states.shape[-1] != self.config.protein_dim:
            raise SequenceError(
                f"`protein_embeds` must be (batch, residues, {self.config.protein_dim}), got {tuple(states.shape)}."
            )
        states = states.to(self.dtype)
        if mask is not None:
            # Not a product, for padding may hold anything, NaN too.
            states = states.masked_fill(~mask[..., None], 0.0)
        states = states if self.protein_proj is None else self.protein_proj(states)
        states = states if self.chains is None else self.chains(states, protein_chain_ids)
        return Tokens(states, mask)

    def _embed_residues(
        self, ids_BR: torch.Tensor, mask_BR: torch.Tensor | None, chains_BR: torch.Tensor | None
    ) -> Tokens:
        mask = ids_BR != 20 if mask_BR is None else mask_BR
        demand_something(mask, "protein_input_ids", "residue")
        demand_residue_ids(ids_BR, mask)
        if self.protein_encoder is not None:
            return encode_residues(self.protein_encoder, self.config, ids_BR, mask, chains_BR, self._cache)
        assert self.protein_embedding is not None
        chains = torch.zeros_like(ids_BR) if chains_BR is None else chains_BR
        # Positions count the real residues of each subunit.
        same = (chains[:, :, None] == chains[:, None, :]) & mask[:, None, :]
        places = (same & torch.ones_like(same).tril(-1)).sum(-1)
        states = self.protein_embedding(ids_BR)
        return Tokens(states + sinusoids(places, states.shape[-1]).to(states.dtype), mask)

    def encode_context(
        self,
        context: torch.Tensor | None = None,
        context_input_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> Context:
        """The context's vector and tokens; empty where nothing uses them.

        Raises:
            SequenceError: a context that is needed is missing, or has another shape or kind than `context_mode` says.
        """
        mode = self.config.context_mode
        if not self.config.uses_context:
            return Context()
        if mode in ("text", "tokens"):
            if context_input_ids is None or context is not None:
                raise SequenceError(f"context_mode={mode!r} needs `context_input_ids` (and no `context`).")
            assert self.text_encoder is not None
            found = encode_text(self.text_encoder, self.config, context_input_ids, context_mask, self._cache)
            vector, tokens = (None if x is None else x.to(self.dtype) for x in found[:2])
            return Context(vector, tokens, found.mask)
        if context is None:
            raise SequenceError(f"`context` is missing: `conditioning` {list(self.config.conditioning)} needs it.")
        vector = self._embed_fields(context) if mode == "ids" else context.to(self.dtype)
        if vector.dim() != 2 or vector.shape[-1] != self.config.context_dim:
            raise SequenceError(f"`context` must be (batch, {self.config.context_dim}), got {tuple(vector.shape)}.")
        return Context(vector, vector[:, None], None)

    def _embed_fields(self, context: torch.Tensor) -> torch.Tensor:
        assert self.context_embeddings is not None
        sizes = torch.tensor([table.num_embeddings for table in self.context_embeddings], device=context.device)
        if context.is_floating_point() or context.dim() != 2 or context.shape[1] != len(sizes):
            raise SequenceError(
                f"`context` must be ids (batch, {len(sizes)}) with context_mode='ids', got {context.dtype} "
                f"{tuple(context.shape)}."
            )
        if bool((context < 0).any()) or bool((context >= sizes).any()):
            raise SequenceError(f"`context` must hold ids from 0 to below {sizes.tolist()}, one field a column.")
        return torch.stack([table(context[:, field]) for field, table in enumerate(self.context_embeddings)]).sum(0)

    def frozen_encoders(self) -> dict[str, PreTrainedModel]:
        """Which encoders the config freezes: "dna", "protein", "text" -> model."""
        return {name: encoder for name, encoder in self.encoders().items() if getattr(self.config, f"freeze_{name}")}

    def encoders(self) -> dict[str, PreTrainedModel]:
        found = {"dna": self.dna_encoder, "protein": self.protein_encoder, "text": self.text_encoder}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def freeze_encoders(self) -> None:
        """Parameters of frozen encoders want no gradient, and they stay in evaluation mode."""
        for encoder in self.frozen_encoders().values():
            encoder.requires_grad_(False).eval()

    def load_encoders(self, **sources: str | PreTrainedModel) -> None:
        """Copies the weights of trained encoders; `dna`, `protein`, `text` = a folder, Hub id or model.

        Raises:
            CheckpointError: no such encoder here, or its tensors do not fit; all that do not are listed.
        """
        for name, source in sources.items():
            own = self.encoders().get(name)
            if own is None:
                raise CheckpointError(f"this model has no {name!r} encoder, only {list(self.encoders())}.")
            auto_class = AutoModelForTextEncoding if own.config.is_encoder_decoder else AutoModel
            model = auto_class.from_pretrained(source) if isinstance(source, str) else source
            found, needed = model.state_dict(), own.state_dict()
            bad = sorted(
                key
                for key in needed.keys() | found.keys()
                if key not in found or key not in needed or found[key].shape != needed[key].shape
            )
            if bad:
                raise CheckpointError(
                    f"the {name} encoder is another than `{name}_config` says; misfits: {', '.join(bad[:20])}."
                )
            own.load_state_dict(found)
            own.name_or_path = own.config.name_or_path = model.name_or_path
        self._cache.clear()

    def load_absent_encoders(self) -> None:
        """Loads the encoders whose names the config gives in place of their weights."""
        names = {name: getattr(self.config, f"{name}_name_or_path") for name in self.encoders()}
        self.load_encoders(**{name: source for name, source in names.items() if source is not None})
        for name in names:
            # From here on the weights are this model's, and are saved with it unless one says otherwise.
            setattr(self.config, f"{name}_name_or_path", None)

    def names_of_frozen_encoders(self) -> dict[str, str]:
        """Config field -> name of each frozen encoder.

        Raises:
            CheckpointError: one was not loaded from anywhere.
        """
        names = {f"{name}_name_or_path": encoder.name_or_path for name, encoder in self.frozen_encoders().items()}
        unknown = [field for field, name in names.items() if not name]
        if unknown:
            raise CheckpointError(
                f"`save_frozen_encoders`=False needs to know where frozen encoders are: {unknown}; call "
                "`load_encoders`, or save them."
            )
        return names


def chosen(config: PreTrainedConfig, kwargs: dict[str, Any], name: str) -> bool:
    """Whether a call, or else the config, asks for an output."""
    asked = kwargs.get(name)
    return bool(getattr(config, name, False) if asked is None else asked)


def paired(
    dna: Tokens, proteins: Tokens, context: Context, pairs: torch.Tensor | None
) -> tuple[Tokens, Tokens, Context]:
    """The three with the batch of the comparison: rows of `pairs`, or one size (a batch of 1 serves all).

    Raises:
        SequenceError: batches that do not fit, rows that are not there, or a tensor of another shape.
    """
    sizes = {"windows": len(dna.states), "factors": len(proteins.states), "contexts": context.batch}
    if pairs is None:
        if len({size for size in sizes.values() if size > 1}) > 1:
            raise SequenceError(
                f"batches must be equal or 1, got {sizes}; pass `pairs` (P, 2) to compare some windows with some "
                "factors."
            )
        return dna, proteins, context
    if pairs.dim() != 2 or pairs.shape[1] not in (2, 3) or pairs.is_floating_point() or not len(pairs):
        raise SequenceError(f"`pairs` must be ids (P, 2) or (P, 3), got {pairs.dtype} {tuple(pairs.shape)}.")
    columns = pairs.to(dna.states.device).unbind(1)
    if len(columns) == 2:
        columns = (*columns, _context_rows(columns, sizes))
    for column, (name, size) in zip(columns, sizes.items(), strict=True):
        if bool((column < 0).any()) or bool((column >= size).any()):
            raise SequenceError(f"`pairs` name row {int(column.max())} of {size} {name}; rows count from 0.")
    return dna.at(columns[0]), proteins.at(columns[1]), context.at(columns[2])


def _context_rows(columns: tuple[torch.Tensor, ...], sizes: dict[str, int]) -> torch.Tensor:
    """Which context each pair has: the only one, its own, or its factor's."""
    if sizes["contexts"] == 1:
        return torch.zeros_like(columns[0])
    if sizes["contexts"] == len(columns[0]):
        return torch.arange(len(columns[0]), device=columns[0].device)
    if sizes["contexts"] == sizes["factors"]:
        return columns[1]
    raise SequenceError(
        f"`pairs` without a third column need one context, one per pair ({len(columns[0])}) or one per factor "
        f"({sizes['factors']}), got {sizes['contexts']}."
    )
