"""The task classes of expression models without their configs: masked expression, classes of cells, edges.

A model's own classes inherit one of these and its base class; `base_model` is the model below the heads.

Shapes: B cells, r genes of a cell, E hidden size, C classes.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from genesplice_hf.errors import SequenceError
from genesplice_hf.heads.expression import (
    BatchDiscriminator,
    CellClassifier,
    EdgeHead,
    ExpressionDecoder,
    MVCDecoder,
    cell_embedding,
    contrastive_cells,
    counted,
    elastic_similarity,
    presence_loss,
    squared_error,
)
from genesplice_hf.heads.losses import weighted_cross_entropy
from genesplice_hf.heads.sequence import infer_problem_type, sequence_loss
from genesplice_hf.layers.expression import (
    BatchLabelEmbedding,
    demand_batch_labels,
    expression_mask,
    filled_values,
)

Count: TypeAlias = torch.Tensor | int | None


@dataclass
class MaskedExpressionOutput(ModelOutput):
    """Predicted values, and the parts of the loss.

    Attributes:
        loss: weighted sum of the parts below, with labels.
        logits: (B, r) predicted values, in the units of the labels.
        zero_logits, mvc_zero_logits: (B, r); sigmoid = probability that the value is above 0.
        cell_embedding: (B, E).
        mvc_logits: (B, r) values from the cell's vector. cls_logits, batch_logits: (B, classes).
        loss_mse, loss_zero, loss_mvc, loss_mvc_zero, loss_cls, loss_ecs, loss_cce, loss_dab, loss_link,
            loss_pathway: scalars, before their weights; None where the part is off.
        pair_states: (B, r, r, channels) z, where asked for.
        pathway_states, pathway_attention: of models with pathways.
        hidden_states, attentions: of the base model.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    zero_logits: torch.Tensor | None = None
    cell_embedding: torch.Tensor | None = None
    mvc_logits: torch.Tensor | None = None
    mvc_zero_logits: torch.Tensor | None = None
    cls_logits: torch.Tensor | None = None
    batch_logits: torch.Tensor | None = None
    loss_mse: torch.Tensor | None = None
    loss_zero: torch.Tensor | None = None
    loss_mvc: torch.Tensor | None = None
    loss_mvc_zero: torch.Tensor | None = None
    loss_cls: torch.Tensor | None = None
    loss_ecs: torch.Tensor | None = None
    loss_cce: torch.Tensor | None = None
    loss_dab: torch.Tensor | None = None
    loss_link: torch.Tensor | None = None
    loss_pathway: torch.Tensor | None = None
    pair_states: torch.Tensor | None = None
    pathway_states: torch.Tensor | None = None
    pathway_attention: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class EdgePredictionOutput(ModelOutput):
    """Logits (B, r, r) of an edge from gene i (row) to gene j; sigmoid = probability."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pair_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class _ExpressionTask:
    """What the tasks need of the class that they are mixed into."""

    config: Any
    base_model: Any
    training: bool

    def _run(self, inputs: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        return self.base_model(**inputs, **kwargs)

    def _cells(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The cells' vectors (B, E)."""
        real_Br = self._real(inputs)
        values = filled_values(self.config, inputs["values"], inputs["input_ids"], real_Br)
        return cell_embedding(outputs.last_hidden_state, values, real_Br, self.config.cell_emb_style)

    def _real(self, inputs: dict[str, Any]) -> torch.Tensor:
        return expression_mask(self.config, inputs["input_ids"], inputs.get("inputs_embeds"), inputs["attention_mask"])


class MaskedExpressionTask(_ExpressionTask):
    """Predicts masked values from the states, and whatever else the config switches on."""

    def _build_heads(self, config: Any) -> None:
        size = config.hidden_size
        self.expression_head = ExpressionDecoder(config.decoder_size, size)
        self.expression_head[-1].starts_at = config.init_output_bias
        self.zero_head = ExpressionDecoder(config.decoder_size, size) if config.explicit_zero_prob else None
        self.mvc_head = MVCDecoder(config) if config.do_mvc else None
        self.batch_head = BatchDiscriminator(config) if config.do_dab else None
        self.batch_embedding = (
            BatchLabelEmbedding(config.num_batch_labels, size, config.layer_norm_eps)
            if config.use_batch_labels
            else None
        )
        self.classifier = (
            CellClassifier(size, config.num_labels, config.classifier_num_layers, config.layer_norm_eps)
            if config.do_cls
            else None
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        batch_labels: torch.LongTensor | None = None,
        cell_type_labels: torch.LongTensor | None = None,
        pair_values: torch.Tensor | None = None,
        group_ids: torch.LongTensor | None = None,
        generation_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: Count = None,
        **kwargs: Any,
    ) -> MaskedExpressionOutput:
        """Predicts the value of every gene.

        Args:
            labels: (B, r) float values, -100 where nothing is asked.
            cell_type_labels: (B,) classes for the `classifier` of `do_cls`, -100 = unknown.
            num_items_in_batch: labelled genes of the whole optimiser step.
            Others: as the base model takes them.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "values": values,
            "attention_mask": attention_mask,
            "batch_labels": batch_labels,
            "pair_values": pair_values,
            "group_ids": group_ids,
            "generation_mask": generation_mask,
            "inputs_embeds": inputs_embeds,
        }
        outputs = self._run(inputs, kwargs)
        found = self._predictions(outputs, inputs)
        if labels is not None:
            found |= self._losses(found, inputs, kwargs, labels, cell_type_labels, num_items_in_batch)
            more = self._auxiliary_losses(outputs, inputs)
            found |= {name: loss for name, (loss, _) in more.items()}
            found["loss"] = self._total(found, more, labels, num_items_in_batch)
        return MaskedExpressionOutput(
            **found,
            **self._further_outputs(outputs),
            pair_states=outputs.pair_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _further_outputs(self, outputs: Any) -> dict[str, Any]:
        """More fields of the output, of models that have them."""
        return {}

    def _auxiliary_losses(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, tuple[torch.Tensor, float]]:
        """name -> (loss, weight) of what a model learns beside the values."""
        return {}

    def _predictions(self, outputs: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        cell = self._cells(outputs, inputs)
        states, mvc_cell = outputs.last_hidden_state, cell
        if self.batch_embedding is not None:
            labels = demand_batch_labels(inputs["batch_labels"], self.config.num_batch_labels, "use_batch_labels")
            batch = self.batch_embedding(labels)
            states = torch.cat([states, batch[:, None].expand(-1, states.shape[1], -1)], dim=-1)
            mvc_cell = torch.cat([cell, batch], dim=-1)
        found: dict[str, Any] = {"logits": self.expression_head(states), "cell_embedding": cell}
        if self.zero_head is not None:
            found["zero_logits"] = self.zero_head(states)
        if self.mvc_head is not None:
            found["mvc_logits"], found["mvc_zero_logits"] = self.mvc_head(mvc_cell, outputs.gene_embedding)
        if self.classifier is not None:
            found["cls_logits"] = self.classifier(cell)
        if self.batch_head is not None:
            found["batch_logits"] = self.batch_head(cell)
        return found

    def _losses(
        self,
        found: dict[str, Any],
        inputs: dict[str, Any],
        kwargs: dict[str, Any],
        labels: torch.Tensor,
        cell_type_labels: torch.Tensor | None,
        num_items: Count,
    ) -> dict[str, torch.Tensor]:
        """Every part of the loss before its weight."""
        if labels.shape != found["logits"].shape:
            raise SequenceError(
                f"`labels` must be (cells, genes) = {tuple(found['logits'].shape)} with -100 where nothing is asked, "
                f"got {tuple(labels.shape)}."
            )
        config, cell = self.config, found["cell_embedding"]
        valid, number = counted(labels, num_items)
        losses = {"loss_mse": squared_error(found["logits"], labels, valid, number)}
        if config.explicit_zero_prob:
            losses["loss_zero"] = presence_loss(found["zero_logits"], labels, valid, number)
        if config.do_mvc:
            losses["loss_mvc"] = squared_error(found["mvc_logits"], labels, valid, number)
            if found["mvc_zero_logits"] is not None:
                losses["loss_mvc_zero"] = presence_loss(found["mvc_zero_logits"], labels, valid, number)
        if config.do_cls and cell_type_labels is not None:
            losses["loss_cls"] = weighted_cross_entropy(found["cls_logits"], cell_type_labels)
        if config.do_ecs:
            losses["loss_ecs"] = elastic_similarity(cell, config.ecs_threshold)
        if config.do_cce:
            losses["loss_cce"] = contrastive_cells(
                cell, self._second_cells(cell, inputs, kwargs), config.cce_temperature
            )
        if config.do_dab:
            batches = demand_batch_labels(inputs["batch_labels"], config.num_batch_labels, "do_dab")
            losses["loss_dab"] = weighted_cross_entropy(found["batch_logits"], batches)
        return losses

    def _second_cells(self, cell: torch.Tensor, inputs: dict[str, Any], kwargs: dict[str, Any]) -> torch.Tensor:
        """The cells' vectors under another draw of dropout; the same ones without dropout."""
        return self._cells(self._run(inputs, kwargs), inputs) if self.training else cell

    def _total(
        self,
        found: dict[str, Any],
        more: dict[str, tuple[torch.Tensor, float]],
        labels: torch.Tensor,
        num_items: Count,
    ) -> torch.Tensor:
        config = self.config
        per_gene = sum(found[name] for name in ("loss_mse", "loss_zero", "loss_mvc", "loss_mvc_zero") if name in found)
        weights = {"loss_cls": 1.0, "loss_ecs": config.ecs_weight, "loss_cce": config.cce_weight}
        weights |= {"loss_dab": config.dab_weight}
        per_batch = [weight * found[name] for name, weight in weights.items() if name in found]
        per_batch += [weight * loss for loss, weight in more.values()]
        if not per_batch:
            return per_gene
        # A mean over this batch counts as much as the genes of this batch do in the optimiser's step.
        share = 1.0 if num_items is None else (labels != -100).sum() / counted(labels, num_items)[1]
        return per_gene + share * sum(per_batch)


class CellClassificationTask(_ExpressionTask):
    """Classes of cells, or values per cell, from the cell's vector."""

    def _build_heads(self, config: Any) -> None:
        self.classifier = CellClassifier(
            config.hidden_size, config.num_labels, config.classifier_num_layers, config.layer_norm_eps
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        batch_labels: torch.LongTensor | None = None,
        pair_values: torch.Tensor | None = None,
        group_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: Count = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classifies cells.

        Args:
            labels: as `heads.sequence.sequence_loss` takes them. Others: as the base model takes them.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "values": values,
            "attention_mask": attention_mask,
            "batch_labels": batch_labels,
            "pair_values": pair_values,
            "group_ids": group_ids,
            "inputs_embeds": inputs_embeds,
        }
        outputs = self._run(inputs, kwargs)
        logits = self.classifier(self._cells(outputs, inputs))
        loss = None
        if labels is not None:
            problem = infer_problem_type(self.config.problem_type, self.config.num_labels, labels)
            loss = sequence_loss(logits, labels, problem, num_items_in_batch)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class EdgePredictionTask(_ExpressionTask):
    """Which genes of a cell regulate which."""

    def _build_heads(self, config: Any) -> None:
        self.classifier = EdgeHead(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        batch_labels: torch.LongTensor | None = None,
        pair_values: torch.Tensor | None = None,
        group_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_pair_states: bool | None = None,
        num_items_in_batch: Count = None,
        **kwargs: Any,
    ) -> EdgePredictionOutput:
        """Predicts edges.

        Args:
            labels: (B, r, r) 1 where gene i (row) acts on gene j, 0 where not, -100 where nothing is asked.
            num_items_in_batch: labelled pairs of the whole optimiser step. Others: as the base model takes them.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "values": values,
            "attention_mask": attention_mask,
            "batch_labels": batch_labels,
            "pair_values": pair_values,
            "group_ids": group_ids,
            "inputs_embeds": inputs_embeds,
        }
        asked = output_pair_states
        outputs = self._run(inputs, kwargs | {"output_pair_states": True if self.classifier.reads_z else asked})
        logits = self.classifier(outputs.last_hidden_state, outputs.pair_states, self._real(inputs))
        loss = None
        if labels is not None:
            if labels.shape != logits.shape:
                raise SequenceError(
                    f"`labels` must be (cells, genes, genes) = {tuple(logits.shape)}, got {tuple(labels.shape)}."
                )
            loss = presence_loss(logits, labels, *counted(labels, num_items_in_batch))
        shown = asked if asked is not None else getattr(self.config, "output_pair_states", False)
        pair_states = outputs.pair_states if shown else None
        return EdgePredictionOutput(loss, logits, pair_states, outputs.hidden_states, outputs.attentions)


def attach(model: nn.Module, config: Any, base: nn.Module) -> None:
    """Builds a task class: the base below its own prefix, then the heads."""
    setattr(model, model.base_model_prefix, base)
    model._build_heads(config)
    model.post_init()
