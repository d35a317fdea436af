"""Configuration of scGPT, a transformer over the genes of a cell and their expression."""

from typing import Any

from huggingface_hub.dataclasses import strict

from genesplice_hf.layers.expression_config import ExpressionConfig


@strict
class ScGPTConfig(ExpressionConfig):
    """Shape and behaviour of an scGPT; the fields, with the published defaults, are those of `ExpressionConfig`."""

    model_type = "genesplice_scgpt"

    @classmethod
    def seed_baseline(cls, hidden_size: int, **fields: Any) -> "ScGPTConfig":
        """The baseline of the first BioFormer: a feed-forward network of four times the width."""
        return cls(**({"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size} | fields))
