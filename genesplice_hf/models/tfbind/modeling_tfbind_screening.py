"""Screening: every window against every factor, each encoded once.

Without joint blocks a factor's latents do not depend on the window (nor, unless the context changes the bins, a
window's on the factor): a pair then costs one product and its reduction, in chunks of residues.

Shapes: B windows, F factors, T bins, R residues, S tracks, C labels or width of the context.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.binding import TFBindModelOutput
from genesplice_hf.models.tfbind.configuration_tfbind import RESIDUE_PAD_ID
from genesplice_hf.models.tfbind.modeling_tfbind_encoders import Context, Tokens

Inputs = Mapping[str, torch.Tensor | None]


class ScreensFactors:
    """Gives a model with a head `score`."""

    base_model: Any

    def logits_of(self, outputs: TFBindModelOutput) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def score(
        self,
        windows: Inputs,
        proteins: Inputs | Sequence[torch.Tensor],
        context: Inputs | torch.Tensor | None = None,
        factors_at_once: int = 16,
        residues_at_once: int = 128,
    ) -> torch.Tensor:
        """The logits of every window with every factor, without gradients; call it in evaluation mode.

        Args:
            windows: what `TFBindModel.encode_dna` takes: `input_ids` (B, L), `attention_mask`, or `dna_embeds`.
            proteins: what `TFBindModel.encode_proteins` takes, a row per factor; or a list of factors of any lengths,
                states (R, P) or residue ids (R,).
            context: the `context` of a call, or a mapping of what `TFBindModel.encode_context` takes; 1 or F rows.
            factors_at_once: factors that are encoded and compared together.
            residues_at_once: residues whose similarities exist at a time.

        Returns:
            (B, F, T[, S]) tracks, or (B, F, C) logits.

        Raises:
            SequenceError: contexts of another number than 1 or F, or an input that the model cannot take.
        """
        if factors_at_once < 1 or residues_at_once < 1:
            raise SequenceError(
                f"`factors_at_once` and `residues_at_once` must be at least 1, got {factors_at_once} and "
                f"{residues_at_once}."
            )
        base = self.base_model
        dna = base.encode_dna(**windows)
        given = context if isinstance(context, Mapping) or context is None else {"context": context}
        contexts = base.encode_context(**(given or {}))
        num_factors = len(proteins) if isinstance(proteins, Sequence) else len(next(iter(_given(proteins).values())))
        if contexts.batch not in (1, num_factors):
            raise SequenceError(f"`context` must have 1 row or one per factor ({num_factors}), got {contexts.batch}.")
        screen = Screen(base, dna, contexts, residues_at_once)
        columns = []
        for start in range(0, num_factors, factors_at_once):
            part = slice(start, start + factors_at_once)
            residues = base.encode_proteins(**_factors(proteins, part))
            own = Context(*(x if x is None or len(x) == 1 else x[part] for x in contexts))
            columns.append(torch.stack([self.logits_of(found) for found in screen.compare(residues, own)]))
        return torch.cat(columns, dim=1)


class Screen:
    """Windows that are ready to be compared with one set of factors after the other.

    Args:
        base: a `TFBindModel`.
        dna: B windows after the encoder. contexts: all of them, to see whether bins depend on them.
        chunk_size: residues at a time.
    """

    def __init__(self, base: Any, dna: Tokens, contexts: Context, chunk_size: int) -> None:
        self.base, self.dna, self.chunk_size = base, dna, chunk_size
        self.mixes = bool(base.joint_layers) or base.isab is not None
        modules = (base.film, base.squeeze_excite)
        changed = base.context_attention is not None or any(m is not None and "dna" in m for m in modules)
        self.bins = None
        if not self.mixes and (contexts.batch == 1 or not changed):
            states = base.condition_side("dna", dna, contexts)
            self.bins = base.interaction.bin_latents(states.states)

    def compare(self, proteins: Tokens, context: Context) -> Iterator[TFBindModelOutput]:
        """Per window the output for all these factors, (F, T, H)."""
        base, size = self.base, len(proteins.states)
        residues, others = None, None
        if not self.mixes:
            residues = base.with_context_tokens(base.condition_side("protein", proteins, context), context)
            others = base.interaction.residue_latents(residues.states)
        for row in range(len(self.dna.states)):
            window = Tokens(*(None if x is None else x[row : row + 1] for x in self.dna))
            if residues is None:
                found = base.compare(window, proteins, context, chunk_size=self.chunk_size)
            else:
                if self.bins is None:
                    bins = base.interaction.bin_latents(base.condition_side("dna", window, context).states)
                else:
                    bins = self.bins._replace(keys=self.bins.keys[row : row + 1])
                interactions = base.interaction(bins, others, residues.mask, window.mask, self.chunk_size)
                found = base.read_out(interactions, window.mask, context)
            # A context of many rows beside one factor, or one of everything, still gives a row per factor.
            found.last_hidden_state = found.last_hidden_state.expand(size, -1, -1)
            yield found


def _given(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def _factors(proteins: Inputs | Sequence[torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    """Some rows of the factors, as `encode_proteins` takes them."""
    if isinstance(proteins, Mapping):
        return {name: tensor[part] for name, tensor in _given(proteins).items()}
    chosen = proteins[part]
    is_states = chosen[0].dim() == 2
    padded = torch.nn.utils.rnn.pad_sequence(
        list(chosen), batch_first=True, padding_value=0.0 if is_states else RESIDUE_PAD_ID
    )
    lengths = torch.tensor([len(protein) for protein in chosen], device=padded.device)
    mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return {"protein_embeds" if is_states else "protein_input_ids": padded, "protein_mask": mask}
