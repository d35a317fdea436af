"""Which model a checkpoint is, told from made-up headers of every family."""

import pytest

from genesplice_hf.errors import CheckpointError, UnknownCheckpointError
from genesplice_hf.models.detection import detect_dna_lm

E, F = 8, 16
ESM = {
    "esm.embeddings.word_embeddings.weight": (4105, E),
    "esm.encoder.layer.0.attention.self.query.weight": (E, E),
    "esm.encoder.layer.0.intermediate.dense.weight": (F, E),
    "esm.encoder.emb_layer_norm_after.weight": (E,),
}
BERT = {
    "bert.embeddings.word_embeddings.weight": (4101, E),
    "bert.encoder.layer.0.attention.self.query.weight": (E, E),
}
MOSAIC = {
    "bert.embeddings.word_embeddings.weight": (4096, E),
    "bert.encoder.layer.0.attention.self.Wqkv.weight": (3 * E, E),
    "bert.encoder.layer.0.mlp.gated_layers.weight": (2 * F, E),
}
ROFORMER = {
    "model.encoder.embed_positions.weight": (32, E),
    "model.encoder.layer.0.attention.self.query.weight": (E, E),
}
HEADERS = {
    "dnabert2 that says bert": ("dnabert2", {"model_type": "bert"}, MOSAIC),
    "dnabert-s, a base": ("dnabert2", {"model_type": "bert"}, {k.removeprefix("bert."): v for k, v in MOSAIC.items()}),
    "caduceus-ph": ("caduceus", {}, {"caduceus.backbone.layers.0.mixer.mamba_fwd.in_proj.weight": (F, E)}),
    "caduceus-ps": (
        "caduceus",
        {"model_type": "caduceus"},
        {"caduceus.backbone.layers.0.mixer.submodule.mamba_fwd.A_log": (F, 4)},
    ),
    "hyenadna": ("hyenadna", {}, {"hyena.backbone.layers.0.mixer.filter_fn.implicit_filter.0.weight": (F, 5)}),
    "hyenadna, trained with checkpointing": (
        "hyenadna",
        {},
        {"model.backbone.layers.0.mixer.layer.filter_fn.implicit_filter.0.weight": (F, 5)},
    ),
    "legacy gpn": ("gpn_convnet", {}, {"model.encoder.0.conv.1.weight": (E, E, 9)}),
    "gpn convnet": ("gpn", {"model_type": "GPN"}, {"model.encoder.layer.0.conv.2.weight": (E, E, 9)}),
    "gpn roformer": ("gpn", {}, ROFORMER | {"model.ln_f.weight": (E,), "cls.decoder.weight": (7, E)}),
    "gpn-msa": ("gpn_msa", {}, ROFORMER | {"cls.predictions.bias": (6,)}),
    "nt_v2 without a type": ("nt_v2", {"intermediate_size": F}, ESM | {
        "esm.encoder.layer.0.intermediate.dense.weight": (2 * F, E),
    }),
    "nt_v2 by its config": ("nt_v2", {"add_bias_fnn": False, "model_type": "esm"}, ESM),
    "nt_v1": ("nt_v1", {"model_type": "esm", "intermediate_size": F}, ESM),
    "nt_v1, a base": ("nt_v1", {"intermediate_size": F}, {k.removeprefix("esm."): v for k, v in ESM.items()}),
    "dnabert1": ("dnabert1", {"model_type": "bert", "vocab_size": 4101}, BERT),
    "dnabert1, a base": ("dnabert1", {}, {k.removeprefix("bert."): v for k, v in BERT.items()}),
    "by the type alone: ConvNet": ("gpn_convnet", {"model_type": "ConvNet"}, {}),
    "by the type alone: GPNRoFormer": ("gpn_msa", {"model_type": "GPNRoFormer"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_every_family_is_told(name: str) -> None:
    source, config, shapes = HEADERS[name]
    assert detect_dna_lm(config, shapes) == source


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        ({"model_type": "bert"}, BERT | {"bert.embeddings.word_embeddings.weight": (30522, E)}),
        ({"model_type": "llama"}, {f"model.layers.{layer}.mlp.weight": (E, E) for layer in range(30)}),
        ({}, {}),
    ],
    ids=["english bert", "llama", "nothing"],
)
def test_what_is_unknown_is_said_with_its_first_keys(config: dict, shapes: dict) -> None:
    with pytest.raises(UnknownCheckpointError) as error:
        detect_dna_lm(config, shapes)
    assert isinstance(error.value, CheckpointError)
    keys = list(shapes)
    assert all(key in str(error.value) for key in keys[:20])
    assert not any(key in str(error.value) for key in keys[20:])
    assert ("and 10 more" in str(error.value)) == (len(keys) == 30)
