"""Configuration of BioFormer, a transformer over the genes of a cell with a representation of their pairs."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from genesplice_hf.layers.expression_config import PairExpressionConfig

State = Literal["2024-09-05", "2024-09-11", "head"]


@strict
class BioFormerConfig(PairExpressionConfig):
    """Shape and behaviour of a BioFormer; the fields not listed here are those of `PairExpressionConfig`.

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the last published state.
        norm_first, attention_bias: norms before each branch, queries, keys and values without biases.
        hidden_dropout_prob, attention_probs_dropout_prob: 0 as published; 0.1 is advised for training.
        use_pair_bias, use_opm: the pair representation is on.
    """

    model_type = "genesplice_bioformer"

    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    norm_first: bool = True
    attention_bias: bool = False
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    explicit_zero_prob: bool = True
    use_pair_bias: bool = True
    use_opm: bool = True

    @classmethod
    def seed(cls, state: State, **fields: Any) -> "BioFormerConfig":
        """The architecture at one of the published states; `fields` give sizes and override anything else.

        Args:
            state: "2024-09-05" (heads of full width, gates, z passed in), "2024-09-11" (heads of d / H, a scalar per
                pair) or "head" (the last one); the first two divide logits by the root of `hidden_size`.

        Raises:
            ValueError: an unknown state.
        """
        if state not in ("2024-09-05", "2024-09-11", "head"):
            raise ValueError(f"`state` must be '2024-09-05', '2024-09-11' or 'head', got {state!r}.")
        width = fields.get("hidden_size", cls.hidden_size)
        published: dict[str, Any] = {"pair_init": "scalar_mlp", "intermediate_size": 4 * width}
        if state != "head":
            published |= {"attention_scaling": "hidden_size", "pair_hidden_size": width, "opm_hidden_size": width}
        if state == "2024-09-05":
            published |= {"attention_head_dim": width, "use_gating": True, "pair_init": "zeros"}
        return cls(**(published | {"update_pair_in_last_block": True} | fields))
