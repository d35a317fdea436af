"""GeneSplice with the objectives of pretraining: masked (or next) bases, contrast of views, next segment.

The forward pass is that of `heads.pretraining`, the same for every encoder.
"""

from torch import nn

from genesplice_hf.heads.pretraining import PretrainingHead, PreTrainingMixin, PretrainingOptions
from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice_base import GeneSpliceModel, GeneSplicePreTrainedModel


class GeneSpliceForPreTraining(PreTrainingMixin, GeneSplicePreTrainedModel):
    """Sums the objectives whose weight in the config is above 0: `mlm_weight`, `contrastive_weight`,
    `next_segment_weight`; see `PreTrainingMixin.forward` for the batch.

    With a causal config the token objective is the next base. Keys: `genesplice.*`, `lm_head` (tied; absent with
    `mlm_weight=0`) and `pretraining_head.*`, of which an objective with weight 0 has none.
    """

    _tied_weights_keys: dict[str, str] | None = {"lm_head.weight": "genesplice.embeddings.weight"}

    def __init__(self, config: GeneSpliceConfig) -> None:
        config.validate()
        self._demand_base_states(config)
        super().__init__(config)
        self.pretraining_options = PretrainingOptions.of(config)
        self.genesplice = GeneSpliceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if config.mlm_weight > 0 else None
        if self.lm_head is None:
            self._tied_weights_keys = None
        self.pretraining_head = PretrainingHead(config.hidden_size, self.pretraining_options)
        self.post_init()

    @staticmethod
    def _demand_base_states(config: GeneSpliceConfig) -> None:
        if config.num_levels and not config.use_decoder and (config.mlm_weight or config.next_segment_weight):
            raise ValueError(
                "`mlm_weight` and `next_segment_weight` need one state per base; set `use_decoder=True`, or both to 0."
            )
