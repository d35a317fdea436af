"""Caduceus without a head: Caduceus-Ph, and the reverse-complement equivariant Caduceus-PS (`rcps`).

    x = embedding(ids), r = 0;  each block: r = x + r, x = mixer(norm(r));  out = norm_f(x + r)

With `rcps` both strands run through the same modules, and the state of position i is [a_i | b_i]: a is what the given
strand says, b what the other one says of the same position, its width read backwards. The reverse complement of a
sequence therefore has the states of the sequence read backwards in length and width.

Shapes: B batch, L tokens, E width of one strand (`d_model`).
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from genesplice_hf.errors import SequenceError
from genesplice_hf.layers.padding import demand_one_input, real_positions, zero_padding
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel
from genesplice_hf.models.caduceus.configuration_caduceus import CaduceusConfig
from genesplice_hf.models.caduceus.modeling_caduceus_layer import CaduceusBlock, StateSpace, make_norm


class CaduceusPreTrainedModel(StrictPreTrainedModel):
    """Loading, initialisation and the declared abilities of every Caduceus class."""

    config: CaduceusConfig
    config_class = CaduceusConfig
    base_model_prefix = "caduceus"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CaduceusBlock"]
    # There is no attention: the mechanism is the model's own under either stock name.
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_cfg["initializer_range"])
        if isinstance(module, StateSpace):
            self._init_state_space(module)
        # The layer itself is asked, for a module without parameters of its own, as the mixer is, never comes here.
        if shares := getattr(module, "shares", None):
            bound = 1 / math.sqrt(module.in_features * shares)
            init.uniform_(module.weight, -bound, bound)

    def _init_state_space(self, module: StateSpace) -> None:
        """Decay rates 1 .. N, and step sizes spread evenly over the orders from `dt_min` to `dt_max`."""
        options = self.config.ssm_cfg
        init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
        if module.conv1d.bias is not None:
            bound = 1 / math.sqrt(options["d_conv"])
            init.uniform_(module.conv1d.bias, -bound, bound)
        init.kaiming_uniform_(module.x_proj.weight, a=math.sqrt(5))
        bound = module.rank**-0.5 * options["dt_scale"]
        if options["dt_init"] == "constant":
            init.constant_(module.dt_proj.weight, bound)
        else:
            init.uniform_(module.dt_proj.weight, -bound, bound)
        low, high = math.log(options["dt_min"]), math.log(options["dt_max"])
        steps = torch.exp(torch.rand_like(module.D) * (high - low) + low).clamp(min=options["dt_init_floor"])
        # The inverse of softplus.
        init.copy_(module.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))
        rates = torch.arange(1, module.num_states + 1, dtype=torch.float32, device=module.A_log.device)
        init.copy_(module.A_log, rates.log().expand_as(module.A_log))
        init.ones_(module.D)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; added tokens are their own complement.

        Raises:
            ValueError: fewer tokens than the complement map needs to stay an involution.
        """
        mapping = self.config.complement_map or []
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if size < max((own + 1 for own, other in enumerate(mapping) if other != own), default=0):
            raise ValueError(f"`new_num_tokens` ({size}) would drop a base of `complement_map` {mapping}.")
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        size = embeddings.num_embeddings
        self.config.complement_map = mapping[:size] + list(range(len(mapping), size))
        return embeddings

    def complement(self, device: torch.device) -> torch.Tensor:
        """(V,) id of the complement of every id."""
        return torch.tensor(self.config.complement_map, device=device)


class CaduceusModel(CaduceusPreTrainedModel):
    """Bidirectional encoder without a head; see the module's docstring for the network."""

    def __init__(self, config: CaduceusConfig) -> None:
        config.validate()
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(CaduceusBlock(config) for _ in range(config.n_layer))
        self.norm_f = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the network.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L), 1 = real; None = all. Real positions are contiguous; padding may stand on either
                side.
            inputs_embeds: (B, L, E) instead of `input_ids`; with `rcps` (B, L, 2E), as `hidden_states[0]` is.

        Returns:
            `last_hidden_state` (B, L, E), or (B, L, 2E) with `rcps`, zero at padding. `hidden_states`: the embedding,
            what enters every further block beside the residual stream, and `last_hidden_state`.

        Raises:
            SequenceError: both or none of ids and embeddings, an empty sequence, a mask with holes, embeddings of one
                strand.
            ValueError: attentions are wanted.
        """
        if output_attentions:
            raise ValueError("`output_attentions` must be False: a state-space model has no attention weights.")
        demand_one_input(input_ids, inputs_embeds)
        mask = real_positions(attention_mask)
        x, residual, states = self._embed(input_ids, inputs_embeds), None, []
        if mask is not None and self.config.rcps:
            mask = torch.cat([mask, mask.flip(1)])
        for layer in self.layers:
            if output_hidden_states:
                states.append(self._beside(x))
            x, residual = layer(x, residual, mask)
        state = self._beside(zero_padding(self.norm_f((x + residual).to(x.dtype)), mask))
        return BaseModelOutput(state, hidden_states=(*states, state) if output_hidden_states else None)

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """(B, L, E), or the strands as (2B, L, E); exactly one of the two is given."""
        if not self.config.rcps:
            return self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if input_ids is not None:
            other = self.complement(input_ids.device)[input_ids].flip(1)
            return self.embeddings(torch.cat([input_ids, other]))
        assert inputs_embeds is not None  # checked at the door
        if inputs_embeds.shape[-1] != self.config.hidden_size:
            raise SequenceError(
                f"`inputs_embeds` must hold both strands ({self.config.hidden_size} wide) with `rcps`, got "
                f"{inputs_embeds.shape[-1]}: one strand's embeddings have no complement. Pass `input_ids`, or "
                "embeddings like `hidden_states[0]`."
            )
        given, other = inputs_embeds.chunk(2, dim=-1)
        return torch.cat([given, other.flip(1, 2)])

    def _beside(self, x: torch.Tensor) -> torch.Tensor:
        """The strands of (2B, L, E) beside each other, (B, L, 2E); (B, L, E) as it is without `rcps`."""
        if not self.config.rcps:
            return x
        given, other = x.chunk(2)
        return torch.cat([given, other.flip(1, 2)], dim=-1)
