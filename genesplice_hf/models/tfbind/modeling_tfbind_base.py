"""TFBind without a head: windows of DNA and factors, how well they match bin by bin, and what the context makes of it.

After lucidrains' tf-bind-transformer: states of an Enformer (or of any encoder) and of a protein attend to each
other, are compared head by head (FILIP), and the context gates the projection of the result (hypergrid).

Shapes: B batch, T bins, R residues, H latent heads, E and P widths of DNA and protein states, C width of the context.
"""

from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.binding import TFBindModelOutput
from genesplice_hf.layers.conditioning import FiLM, HyperGrid, SqueezeExcite
from genesplice_hf.layers.cross_attention import (
    BothSides,
    ContextAttentionBlock,
    InducedJointBlock,
    JointAttentionBlock,
    SelfAttentionBlock,
    grown,
)
from genesplice_hf.layers.interaction import Interaction
from genesplice_hf.layers.recording import demand_recordable
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.tfbind.configuration_tfbind import MAX_CHAINS, NUM_RESIDUE_IDS, RESIDUE_PAD_ID, TFBindConfig
from genesplice_hf.models.tfbind.modeling_tfbind_encoders import Context, RowCache, Tokens, build_encoder
from genesplice_hf.models.tfbind.modeling_tfbind_inputs import TFBindInputs, chosen, paired

_ENCODERS = ("dna", "protein", "text")


class TFBindPreTrainedModel(StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every TFBind class."""

    config: TFBindConfig
    config_class = TFBindConfig
    base_model_prefix = "tfbind"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SelfAttentionBlock", "JointAttentionBlock", "InducedJointBlock", "ContextAttentionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif hasattr(module, "initialize"):
            module.initialize()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As `StrictPreTrainedModel.from_pretrained`; encoders that the checkpoint does not hold come from where its
        config says (`dna_name_or_path`, ...), and frozen ones are frozen."""
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model.base_model.load_absent_encoders()
        model.base_model.freeze_encoders()
        return found

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', and:

        Args:
            save_frozen_encoders: False leaves frozen encoders out of the file and writes their names into the config;
                each must have been loaded by `load_encoders`, or have a `name_or_path`.
        """
        if kwargs.pop("save_frozen_encoders", True):
            return super().save_pretrained(save_directory, *args, **kwargs)
        names = self.base_model.names_of_frozen_encoders()
        before = {field: getattr(self.config, field) for field in names}
        state = kwargs.pop("state_dict", None) or self.state_dict()
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        left_out = tuple(f"{prefix}{field.removesuffix('_name_or_path')}_encoder." for field in names)
        kwargs["state_dict"] = {key: tensor for key, tensor in state.items() if not key.startswith(left_out)}
        try:
            for field, name in names.items():
                setattr(self.config, field, name)
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            for field, name in before.items():
                setattr(self.config, field, name)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.dna_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.dna_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Resizes the table of the DNA encoder."""
        encoder = self.base_model.dna_encoder
        table = encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        setattr(self.config.dna_config, "vocab_size", encoder.config.vocab_size)  # noqa: B010, a config or a dict
        return table


class TFBindModel(TFBindInputs, TFBindPreTrainedModel):
    """TFBind without a head."""

    def __init__(self, config: TFBindConfig) -> None:
        config.validate()
        super().__init__(config)
        self.dna_encoder = build_encoder(config.dna_config)
        is_encoded = config.protein_input == "encoder"
        self.protein_encoder = build_encoder(config.protein_config) if is_encoded else None
        is_text = config.context_mode in ("text", "tokens")
        self.text_encoder = build_encoder(config.text_config) if is_text else None
        self._cache = RowCache(config.encoder_cache_size)
        self._keys_to_ignore_on_load_missing = [
            rf"(^|\.){name}_encoder\." for name in _ENCODERS if getattr(config, f"{name}_name_or_path") is not None
        ]
        self._build_sides(config)
        self._build_blocks(config)
        self.post_init()
        self.freeze_encoders()

    def _build_sides(self, config: TFBindConfig) -> None:
        width, hidden = config.dna_width, config.hidden_dim
        self.norm_dna = nn.LayerNorm(width)
        self.dna_proj = None if hidden is None else nn.Linear(width, hidden)
        self.protein_proj = None if hidden is None else nn.Linear(config.protein_dim, hidden)
        self.protein_embedding = None
        if config.protein_input == "tokens":
            self.protein_embedding = nn.Embedding(NUM_RESIDUE_IDS, config.protein_dim, padding_idx=RESIDUE_PAD_ID)
        assert config.protein_dim is not None  # `validate` has seen it
        self.widths = {"dna": hidden or width, "protein": hidden or config.protein_dim}
        self.chains = ChainEmbedding(MAX_CHAINS, self.widths["protein"]) if config.chain_embedding else None
        self.context_embeddings = None
        if config.context_mode == "ids" and config.context_dim is not None:
            sizes = config.context_vocab_sizes or ()
            self.context_embeddings = nn.ModuleList(nn.Embedding(size, config.context_dim) for size in sizes)

    def _build_blocks(self, config: TFBindConfig) -> None:
        # No way that needs a context comes without its width.
        E, P, C = self.widths["dna"], self.widths["protein"], config.context_dim or 0
        ways, sides = set(config.conditioning), tuple(config.conditioning_targets)
        self.genome_layers = nn.ModuleList(SelfAttentionBlock(config, E) for _ in range(config.genome_self_attn_depth))
        self.film: nn.ModuleDict | None = None
        self.squeeze_excite: nn.ModuleDict | None = None
        self.context_attention: nn.ModuleDict | None = None
        if "film" in ways:
            self.film = nn.ModuleDict({side: FiLM(self.widths[side], C, config.film_residual) for side in sides})
        if "squeeze_excite" in ways:
            self.squeeze_excite = nn.ModuleDict(
                {side: SqueezeExcite(self.widths[side], C, config.se_scale) for side in sides}
            )
        if "context_cross_attention" in ways:
            self.context_attention = nn.ModuleDict(
                {side: ContextAttentionBlock(config, width, C) for side, width in self.widths.items()}
            )
        self.context_token = nn.Linear(C, P) if "concat_token" in ways else None
        modulated = C if "adaln" in ways else None
        self.joint_layers = nn.ModuleList(
            JointAttentionBlock(config, E, P, modulated, sides) for _ in range(config.joint_cross_attn_depth)
        )
        self.isab = None
        if "isab" in ways:
            condition = C if config.has_context else None
            self.isab = nn.ModuleList(
                InducedJointBlock(config, E, P, config.isab_latents, condition) for _ in range(config.isab_depth)
            )
        self.interaction = Interaction(config, E, P)
        self.hypergrid: Any = None
        self.to_logits: nn.Linear | None = None
        if "hypergrid" in ways:
            self.hypergrid = HyperGrid(config.latent_heads, config.latent_heads, C, config.hypergrid_rank)
        else:
            self.to_logits = nn.Linear(config.latent_heads, config.latent_heads)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        protein_embeds: torch.Tensor | None = None,
        protein_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        dna_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        protein_input_ids: torch.LongTensor | None = None,
        protein_chain_ids: torch.LongTensor | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_mask: torch.Tensor | None = None,
        pairs: torch.LongTensor | None = None,
        output_residue_scores: bool = False,
        output_states: bool = False,
        **kwargs: Any,
    ) -> TFBindModelOutput:
        """Compares windows with factors.

        Windows, factors and contexts have one batch size, or a batch of 1 that is used for all rows of the others.

        Args:
            input_ids, inputs_embeds: windows, as the DNA encoder takes them; or dna_embeds (B, T, E): its states.
            attention_mask: (B, L), of the encoder; (B, T) beside `dna_embeds`. 1 = real.
            protein_embeds: (B, R, `protein_dim`) states of residues, or protein_input_ids (B, R): 0..19 =
                ACDEFGHIKLMNPQRSTVWY, 20 = padding, 21 = X.
            protein_mask: (B, R), 1 or True = real residue; None = all.
            protein_chain_ids: (B, R) 0, 1, ...: the subunit of each residue; None = one subunit.
            context: (B, C) vector, or (B, fields) ids with context_mode="ids".
            context_input_ids, context_mask: (B, N) of the text encoder, 1 = real.
            pairs: (P, 2) rows of windows and of factors that are compared; the encoders then run once per window and
                per factor. Contexts are one, one per pair, or one per factor (where these are not as many as
                pairs); a third column names their rows.
            output_residue_scores, output_states: fill these fields of the output.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            SequenceError: an input is missing, given twice, or has another shape than the others ask for; a mask hides
                everything.
        """
        dna = self.encode_dna(input_ids, attention_mask, inputs_embeds, dna_embeds)
        proteins = self.encode_proteins(protein_embeds, protein_mask, protein_input_ids, protein_chain_ids)
        found = self.encode_context(context, context_input_ids, context_mask)
        dna, proteins, found = paired(dna, proteins, found, pairs)
        outputs = self.compare(dna, proteins, found, output_residue_scores, output_states, **kwargs)
        if output_states:
            outputs.context_embed = found.vector
        return outputs

    def compare(
        self,
        dna: Tokens,
        proteins: Tokens,
        context: Context,
        output_residue_scores: bool = False,
        output_states: bool = False,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> TFBindModelOutput:
        """What `forward` does after the encoders; `chunk_size` residues at a time, None = as the config says."""
        wants_weights = demand_recordable(self.config, kwargs)
        recorded = [dna.states]
        dna = self.condition_side("dna", dna, context)
        proteins = self.condition_side("protein", proteins, context)
        recorded.append(dna.states)
        dna, residues, weights = self._mix(dna, proteins, context, recorded)
        bins, others = self.interaction.bin_latents(dna.states), self.interaction.residue_latents(residues.states)
        interactions = self.interaction(bins, others, residues.mask, dna.mask, chunk_size)
        outputs = self.read_out(interactions, dna.mask, context)
        if output_residue_scores:
            scores = self.interaction.scores(bins, others, residues.mask)
            outputs.residue_scores = scores[..., : proteins.states.shape[1]]
        if output_states:
            outputs.dna_states, outputs.protein_states = dna.states, residues.states
        if chosen(self.config, kwargs, "output_hidden_states"):
            outputs.hidden_states = tuple(recorded)
        if wants_weights:
            outputs.attentions = tuple(weights)
        return outputs

    def condition_side(self, side: str, tokens: Tokens, context: Context) -> Tokens:
        """One side after film, squeeze_excite and context attention, in the order of the config."""
        states, mask = tokens
        for way in self.config.conditioning:
            if way == "film" and self.film is not None and side in self.film:
                states = self.film[side](states, context.vector)
            elif way == "squeeze_excite" and self.squeeze_excite is not None and side in self.squeeze_excite:
                states = self.squeeze_excite[side](states, context.vector, mask)
            elif way == "context_cross_attention" and self.context_attention is not None:
                states = self.context_attention[side](states, context.tokens, context.mask)
        return Tokens(states, mask)

    def _mix(
        self, dna: Tokens, proteins: Tokens, context: Context, recorded: list[torch.Tensor]
    ) -> tuple[Tokens, Tokens, list[torch.Tensor | None]]:
        """Both sides after context tokens, joint blocks and latents; the weights of the joint blocks."""
        proteins = self.with_context_tokens(proteins, context)
        blocks = [*self.joint_layers, *(self.isab or [])]
        if not blocks:
            return dna, proteins, []
        batch = max(len(dna.states), len(proteins.states), context.batch if self.config.uses_context else 1)
        (x, mask_x), (p, mask_p) = (
            (grown(states, batch), None if mask is None else grown(mask, batch)) for states, mask in (dna, proteins)
        )
        vector = context.vector if self.config.uses_context else None
        weights = []
        for block in blocks:
            x, p, seen = BothSides(*block(x, p, mask_x, mask_p, vector))
            recorded.append(x)
            if isinstance(block, JointAttentionBlock):
                weights.append(seen)
        return Tokens(x, mask_x), Tokens(p, mask_p), weights

    def with_context_tokens(self, proteins: Tokens, context: Context) -> Tokens:
        """The residues, and after them the context's tokens where the config says so."""
        if self.context_token is None:
            return proteins
        assert context.tokens is not None
        tokens, seen = self.context_token(context.tokens), context.mask
        batch = max(len(proteins.states), len(tokens))
        states = torch.cat([grown(proteins.states, batch), grown(tokens, batch)], dim=1)
        parts = [
            grown(torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask, batch)
            for x, mask in ((proteins.states, proteins.mask), (tokens, seen))
        ]
        return Tokens(states, torch.cat(parts, dim=1))

    def read_out(
        self, interactions_BTH: torch.Tensor, mask_BT: torch.Tensor | None, context: Context
    ) -> TFBindModelOutput:
        """The context's projection of the interactions; both are zero at padding."""
        x = interactions_BTH.to(self.dtype)
        project = self.to_logits
        y = self.hypergrid(x, context.vector) if project is None else project(x)
        if mask_BT is not None:
            x, y = (z * mask_BT[..., None].to(z.dtype) for z in (x, y))
        return TFBindModelOutput(last_hidden_state=y, interactions=x, bin_mask=mask_BT)

    def train(self, mode: bool = True) -> "TFBindModel":
        """As torch's; frozen encoders stay in evaluation mode."""
        super().train(mode)
        for encoder in self.frozen_encoders().values():
            encoder.eval()
        return self


class ChainEmbedding(nn.Module):
    """A learned vector per subunit, added to its residues; zero at first."""

    def __init__(self, num_chains: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_chains, size))

    def initialize(self) -> None:
        """No subunit differs from another."""
        init.zeros_(self.weight)

    def forward(self, p_BRP: torch.Tensor, chains_BR: torch.Tensor | None) -> torch.Tensor:
        """(B, R, P).

        Raises:
            SequenceError: more subunits than the table has.
        """
        if chains_BR is None:
            return p_BRP + self.weight[0]
        if bool((chains_BR < 0).any()) or bool((chains_BR >= len(self.weight)).any()):
            raise SequenceError(
                f"`protein_chain_ids` must be 0 to {len(self.weight) - 1}, got {int(chains_BR.min())} to "
                f"{int(chains_BR.max())}."
            )
        return p_BRP + self.weight[chains_BR]
