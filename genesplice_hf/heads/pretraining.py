"""Pretraining with several objectives at once, on any encoder: masked (or next) tokens, contrast, next segment.

The batch comes from the collators of `objectives` (masked, causal, contrastive, next_segment, mixed). All rows of a
step, the windows, their second views and the pairs of segments, run through the encoder together, so that each
parameter is used once per step, as gradient checkpointing under DDP demands.

Shapes: B examples, L tokens, W tokens of the second view, S tokens of a pair of segments, R rows of all these
together, E hidden size, P size of an embedding, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from genesplice_hf.heads.contrast import info_nce, mean_over_processes
from genesplice_hf.heads.losses import IGNORED, shift_left, weighted_cross_entropy
from genesplice_hf.heads.pretraining_head import PretrainingHead, PretrainingOptions, next_segment_loss
from genesplice_hf.layers.padding import demand_one_input
from genesplice_hf.layers.reverse_complement import strand_mean
from genesplice_hf.layers.strict_loading import StrictPreTrainedModel


@dataclass
class PreTrainingOutput(ModelOutput):
    """What one pretraining step gives.

    Attributes:
        loss: scalar, the weighted sum of the losses below.
        logits: (B, L, V); in training with labels only those of the labelled positions, in row order.
        mlm_loss, contrastive_loss, next_segment_loss: scalars, as far as the batch asks for them.
        embeddings: (B, P) of `input_ids`, of length 1. view_embeddings: (B, P) of the second views.
        next_segment_logits: (B,) log odds that B follows A.
        hidden_states, attentions: as the encoder gives them, for all R rows.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    next_segment_loss: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    view_embeddings: torch.Tensor | None = None
    next_segment_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Rows(NamedTuple):
    """A block of rows.

    Attributes:
        tokens: (B, L) ids, or (B, L, E) embeddings. mask: (B, L) 1 = real, or None for all.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None


class States(NamedTuple):
    """What the encoder says of a block of rows.

    Attributes:
        strands: (B, L, E), or (B, M, E) of an encoder without a way back to tokens; a second one of an encoder that
            reads both strands, for the other strand, read backwards.
        mask: (B, L) or (B, M) bool, True = real.
    """

    strands: Sequence[torch.Tensor]
    mask: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """The mean over the strands."""
        return strand_mean(self.strands)


def _cut(outputs: Any, rows: Rows, blocks: Sequence[Rows]) -> Iterator[States]:
    """Yields the states of each block of rows, without the padding that stacking added."""
    reverse, state = getattr(outputs, "reverse", None), outputs.last_hidden_state
    strands = [state] if reverse is None else [state, reverse.last_hidden_state]
    per_token = state.shape[1] == rows.tokens.shape[1]
    mask = rows.mask if per_token else outputs.bin_mask
    mask = state.new_ones(state.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    start = 0
    for block in blocks:
        place = (slice(start, start + len(block.tokens)), slice(block.tokens.shape[1] if per_token else None))
        yield States([strand[place] for strand in strands], mask[place])
        start += len(block.tokens)


def stack_rows(blocks: Sequence[Rows], pad_token_id: int) -> Rows:
    """All rows below each other, padded on the right to one width; a single block stays as it is."""
    if len(blocks) == 1:
        return blocks[0]
    width = max(block.tokens.shape[1] for block in blocks)
    tokens = [_widened(block.tokens, width, 0 if block.tokens.dim() == 3 else pad_token_id) for block in blocks]
    masks = [
        block.tokens.new_ones(block.tokens.shape[:2], dtype=torch.int64) if block.mask is None else block.mask
        for block in blocks
    ]
    return Rows(torch.cat(tokens), torch.cat([_widened(mask.to(torch.int64), width, 0) for mask in masks]))


def _widened(x: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    padding = (0, width - x.shape[1])
    return nn.functional.pad(x, padding if x.dim() == 2 else (0, 0, *padding), value=fill)


class PreTrainingMixin:
    """The forward pass of a pretraining model: a `PreTrainedModel` with a base model, `lm_head` (or None),
    `pretraining_head` and `pretraining_options`."""

    # No per-token mean: Trainer then divides by the number of accumulated batches itself.
    accepts_loss_kwargs = False

    if TYPE_CHECKING:
        config: PreTrainedConfig
        base_model: nn.Module
        lm_head: nn.Linear | None
        pretraining_head: PretrainingHead
        pretraining_options: PretrainingOptions
        training: bool

        def get_input_embeddings(self) -> nn.Module: ...

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weight: torch.Tensor | None = None,
        view_input_ids: torch.LongTensor | None = None,
        view_attention_mask: torch.Tensor | None = None,
        segment_input_ids: torch.LongTensor | None = None,
        segment_attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        # Not named after a label: Trainer evaluates only batches that hold every argument with `label` in its name.
        follows: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> PreTrainingOutput:
        """Runs all rows of the batch and sums the losses of the objectives that it holds.

        In training, every objective with a weight above 0 must be in the batch, and the losses are means over the
        batches of all processes, which must then all take part. In evaluation nothing is communicated, and what the
        batch does not hold is left out of the sum.

        Args:
            input_ids, attention_mask: (B, L) windows, which are also the first views.
            inputs_embeds: (B, L, E) instead of `input_ids`.
            labels: (B, L) true ids at masked positions, -100 elsewhere; the ids themselves for a causal encoder
                (`is_decoder` in its config), which are shifted here.
            loss_weight: (B, L) weight of each label.
            view_input_ids, view_attention_mask: (B, W) second views.
            segment_input_ids, segment_attention_mask: (B, S) pairs of segments; None when `input_ids` are these.
            segment_ids: (B, S) 0 = first segment, 1 = second, -1 = neither.
            follows: (B,) 1 if the second segment follows the first in the genome, 0 if not, -100 = not asked.

        Raises:
            ValueError: an objective without its part of the batch, or a part without its objective.
        """
        demand_one_input(input_ids, inputs_embeds)
        if follows is not None and segment_ids is None:
            raise ValueError("`follows` needs `segment_ids`, which say where the segments lie; give both or neither.")
        self._check_parts(labels=labels, view_input_ids=view_input_ids, segment_ids=segment_ids, follows=follows)
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        blocks = [Rows(tokens, attention_mask)]
        for ids, mask in ((view_input_ids, view_attention_mask), (segment_input_ids, segment_attention_mask)):
            if ids is not None:
                blocks.append(Rows(ids if inputs_embeds is None else self.get_input_embeddings()(ids), mask))
        outputs, states = self._encode(blocks, kwargs)
        parts = self._predict_tokens(states[0], labels, loss_weight)
        parts |= self._contrast(states, input_ids, view_input_ids)
        if segment_ids is not None:
            parts |= self._judge_pairs(states[0 if segment_input_ids is None else -1].mean, segment_ids, follows)
        recorded = {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions")}
        return PreTrainingOutput(loss=self._sum(parts, outputs), **parts, **recorded)

    def _check_parts(self, **given: torch.Tensor | None) -> None:
        """Each objective has its part of the batch, and each part its objective."""
        options = self.pretraining_options
        owners = {"labels": "mlm", "view_input_ids": "contrastive", "segment_ids": "next_segment"}
        for part, objective in (*owners.items(), ("follows", "next_segment")):
            weight, is_given = getattr(options, f"{objective}_weight"), given[part] is not None
            if is_given and weight == 0:
                raise ValueError(
                    f"the batch holds `{part}`, but `{objective}_weight` is 0 and the model has no head for it; set "
                    "the weight in the config, or leave that objective out of the collator."
                )
            if self.training and weight > 0 and not is_given:
                raise ValueError(
                    f"`{objective}_weight` is {weight}, but the batch holds no `{part}`; set the weight to 0, or use "
                    "a collator with that objective (`objectives.mixed`)."
                )

    def _encode(self, blocks: Sequence[Rows], kwargs: dict[str, Any]) -> tuple[Any, list[States]]:
        """The encoder's output for all rows, and the states of each block."""
        named = sorted(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        if named and len(blocks) > 1:
            raise ValueError(f"{named} hold values for `input_ids` alone, the batch has further rows; leave them out.")
        rows = stack_rows(blocks, self.config.pad_token_id or 0)
        name = "input_ids" if rows.tokens.dim() == 2 else "inputs_embeds"
        outputs = self.base_model(attention_mask=rows.mask, **{name: rows.tokens}, **kwargs)
        return outputs, list(_cut(outputs, rows, blocks))

    def _predict_tokens(
        self, states: States, labels: torch.Tensor | None, loss_weight: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if self.lm_head is None:
            return {}
        if labels is None:
            return {"logits": self._token_logits(states.strands)}
        if labels.shape != states.mask.shape:
            raise ValueError(
                f"`labels` {tuple(labels.shape)} need one state per token, the encoder gives "
                f"{tuple(states.mask.shape)}; set `mlm_weight` to 0, or use an encoder with a way back to tokens."
            )
        if getattr(self.config, "is_decoder", False):
            labels = shift_left(labels, IGNORED)
            loss_weight = None if loss_weight is None else shift_left(loss_weight, 0.0)
        # In training the vocabulary is asked at labelled positions alone.
        at = labels != IGNORED if self.training else torch.ones_like(labels).bool()
        logits = self._token_logits([strand[at] for strand in states.strands])
        weight = (labels != IGNORED).to(torch.float32) if loss_weight is None else loss_weight * (labels != IGNORED)
        total = weighted_cross_entropy(logits, labels[at], weight[at], num_items_in_batch=1)
        logits = logits if self.training else logits.view(*labels.shape, -1)
        return {"logits": logits, "mlm_loss": mean_over_processes(total, weight.sum(), self.training)}

    def _token_logits(self, strands: Sequence[torch.Tensor]) -> torch.Tensor:
        """(..., E) of each strand -> (..., V), their mean where the encoder reads both."""
        assert self.lm_head is not None
        return strand_mean([self.lm_head(strand) for strand in strands], getattr(self.config, "complement_map", None))

    def _contrast(
        self, states: Sequence[States], input_ids: torch.Tensor | None, view_input_ids: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if self.pretraining_head.projection is None:
            return {}
        first = self._embed(states[0], input_ids)
        if view_input_ids is None:
            return {"embeddings": first}
        second = self._embed(states[1], view_input_ids)
        loss = info_nce(first, second, self.pretraining_options.contrastive_temperature, self.training)
        return {"contrastive_loss": loss, "embeddings": first, "view_embeddings": second}

    def _embed(self, states: States, ids: torch.Tensor | None) -> torch.Tensor:
        special, real = list(self.pretraining_options.special_token_ids), states.mask
        if special and ids is not None and ids.shape == real.shape:
            real = real & ~torch.isin(ids, torch.tensor(special, device=ids.device))
        return self.pretraining_head.embed(states.mean, real)

    def _judge_pairs(
        self, state: torch.Tensor, segment_ids: torch.Tensor, follows: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if segment_ids.shape != state.shape[:2]:
            raise ValueError(
                f"`segment_ids` {tuple(segment_ids.shape)} need one state per token, the encoder gives "
                f"{tuple(state.shape)}; give them for the same rows, or set `next_segment_weight` to 0."
            )
        logits = self.pretraining_head.judge(state, segment_ids)
        if follows is None:
            return {"next_segment_logits": logits}
        return {
            "next_segment_loss": next_segment_loss(logits, follows, self.training),
            "next_segment_logits": logits,
        }

    def _sum(self, parts: dict[str, torch.Tensor], outputs: ModelOutput) -> torch.Tensor | None:
        names = ("mlm", "contrastive", "next_segment")
        weighted = [
            getattr(self.pretraining_options, f"{name}_weight") * parts[f"{name}_loss"]
            for name in names
            if f"{name}_loss" in parts
        ]
        if not weighted:
            return None
        loss = torch.stack(weighted).sum()
        # An encoder with experts adds what keeps its routers balanced.
        with_router_losses = getattr(self.base_model, "with_router_losses", None)
        return loss if with_router_losses is None else with_router_losses(loss, outputs)


class EncoderForPreTraining(PreTrainingMixin, StrictPreTrainedModel):
    """Any base model with the heads of pretraining, saved so that its own classes load the file.

    The base model lies under its own `base_model_prefix`: a checkpoint of this class is one of the base model's
    family, which `AutoModel` or a task head loads without conversion, and `save_encoder` writes the base model alone.
    The token head is tied to the input embeddings where sizes and the config's `tie_word_embeddings` allow it.

    Args:
        encoder: a base model, or a model with a head, of which the base model is taken; its config is copied, never
            changed. A config makes a base model with fresh weights.
        options: what is learned; None = what the config says; the copied config keeps them under
            `pretraining_options`. `special_token_ids` left empty means the ids of the
            config's `bos`, `cls`, `sep` and `eos` tokens.

    Raises:
        ValueError: options out of range, or no objective; an encoder without a vocabulary.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, encoder: PreTrainedModel | PreTrainedConfig, options: PretrainingOptions | None = None) -> None:
        fresh = isinstance(encoder, PreTrainedConfig)
        if getattr(encoder if fresh else encoder.config, "vocab_size", None) is None:
            raise ValueError(f"`encoder` must read tokens of a vocabulary, which {type(encoder).__name__} does not.")
        base: Any = AutoModel.from_config(encoder) if fresh else encoder.base_model
        options = PretrainingOptions.of(base.config) if options is None else options
        config = copy.deepcopy(base.config)
        special = list(options.special_token_ids) or _framing_ids(config)
        config.pretraining_options = asdict(options) | {"special_token_ids": special}
        super().__init__(config)
        self.pretraining_options = PretrainingOptions.of(config)
        self.base_model_prefix = base.base_model_prefix or "encoder"
        setattr(self, self.base_model_prefix, base)
        size = config.hidden_size
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False) if options.mlm_weight > 0 else None
        self.pretraining_head = PretrainingHead(size, options)
        self._tied_weights_keys = self._tie()
        if not fresh:
            # A resized embedding has lost transformers' mark and would be drawn anew.
            for module in base.modules():
                module._is_hf_initialized = True
        self.post_init()

    def _tie(self) -> dict[str, str] | None:
        # Models that read one-hot vectors have no table to tie to.
        embedding = getattr(self.get_input_embeddings(), "weight", None)
        if self.lm_head is None or embedding is None or embedding.shape != self.lm_head.weight.shape:
            return None
        name = next(name for name, parameter in self.encoder.named_parameters() if parameter is embedding)
        return {"lm_head.weight": f"{self.base_model_prefix}.{name}"}

    @property
    def encoder(self) -> PreTrainedModel:
        """The base model."""
        return getattr(self, self.base_model_prefix)

    def save_encoder(self, folder: str | PathLike, **options: Any) -> None:
        """Writes the base model alone, with its own config: a checkpoint like any other of its type."""
        self.encoder.save_pretrained(folder, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint of this class, or a base model's (whose heads are then fresh); strict as all are."""
        config = kwargs.pop("config", None)
        if config is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)


def _framing_ids(config: PreTrainedConfig) -> list[int]:
    ids = [getattr(config, f"{name}_token_id", None) for name in ("bos", "cls", "sep", "eos")]
    return sorted({token for token in ids if isinstance(token, int)})
