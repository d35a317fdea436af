"""The heads of pretraining on every language model of the registry, and on a model of transformers itself."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining_pairs import whole_batch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedModel, Trainer, TrainingArguments

import genesplice_hf  # noqa: F401, registers the models
from genesplice_hf.errors import CheckpointError
from genesplice_hf.heads.pretraining import EncoderForPreTraining, PretrainingOptions
from genesplice_hf.models.registry import REGISTRY

ALL = PretrainingOptions(contrastive_dim=12, next_segment_weight=0.5)
CLS, SEP = 2, 3


def bert() -> BertModel:
    """A model that frames its sequences: [CLS] ... [SEP]."""
    config = BertConfig(
        vocab_size=16, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.cls_token_id, config.sep_token_id = CLS, SEP
    return BertModel(config)


# The toy batches speak the vocabulary of GeneSplice, which some models' own is too small for.
SIZE = {"vocab_size": 16}
ENCODERS = {
    name: lambda entry=entry: entry.auto_classes["AutoModel"](entry.tiny_config(**SIZE))
    for name, entry in REGISTRY.items()
    if entry.is_language_model
}
ENCODERS |= {
    f"{name}-causal": lambda entry=entry: entry.auto_classes["AutoModel"](
        entry.tiny_config(**SIZE, **entry.causal_overrides)
    )
    for name, entry in REGISTRY.items()
    if entry.causal_overrides
}
ENCODERS["bert"] = bert
every = pytest.mark.parametrize("name", ENCODERS)


def encoder_of(name: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return ENCODERS[name]().eval()


def wrapped(name: str, options: PretrainingOptions = ALL, seed: int = 0) -> EncoderForPreTraining:
    return EncoderForPreTraining(encoder_of(name, seed), options).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, values in expected.items() if not torch.equal(found[name], values)] == []


@every
def test_the_encoder_and_its_config_stay_as_they_are(name):
    encoder = encoder_of(name)
    before, config = weights(encoder), copy.deepcopy(encoder.config.to_dict())
    model = EncoderForPreTraining(encoder, ALL)
    assert model.encoder is encoder
    assert_equal(encoder.state_dict(), before)
    assert encoder.config.to_dict() == config


def test_an_encoder_without_a_vocabulary_is_advice():
    entry = REGISTRY["genesplice_enformer"]
    with pytest.raises(ValueError, match="vocabulary"):
        EncoderForPreTraining(entry.tiny_config(), ALL)


def test_a_resized_embedding_is_not_drawn_anew():
    encoder = encoder_of("genesplice")
    encoder.resize_token_embeddings(20)
    before = weights(encoder)
    assert_equal(EncoderForPreTraining(encoder, ALL).encoder.state_dict(), before)


@every
def test_every_parameter_learns(name):
    model, batch = wrapped(name).train(), whole_batch()
    outputs = model(**batch)
    outputs.loss.backward()
    # The pooler of BERT reads [CLS], which no objective asks for.
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert [key for key in idle if "pooler" not in key] == []
    losses = (outputs.mlm_loss, outputs.contrastive_loss, outputs.next_segment_loss)
    expected = sum(w * loss for w, loss in zip((1.0, 0.1, 0.5), losses, strict=True))
    torch.testing.assert_close(outputs.loss, expected)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        model(**batch).loss.backward()
    assert model(**batch).loss < 0.9 * outputs.loss


@every
def test_rows_do_not_see_each_other(name):
    """A row alone, without the padding that its neighbours bring, has the same embedding and answers."""
    model, batch = wrapped(name), whole_batch()
    together = model(**batch)
    for row in range(6):
        alone = {key: values[row : row + 1] for key, values in batch.items() if key not in ("labels", "follows")}
        for prefix in ("", "view_", "segment_"):
            real = alone[f"{prefix}attention_mask"][0].bool()
            alone[f"{prefix}input_ids"] = alone[f"{prefix}input_ids"][:, real]
            alone[f"{prefix}attention_mask"] = alone[f"{prefix}attention_mask"][:, real]
        found = model(**alone)
        for key in ("embeddings", "view_embeddings", "next_segment_logits"):
            torch.testing.assert_close(found[key], together[key][row : row + 1], atol=1e-5, rtol=1e-4)


@every
def test_saved_and_loaded(name, tmp_path):
    """As a whole, as the encoder alone, and by the encoder's own Auto class from either."""
    model, batch = wrapped(name), whole_batch()
    model.save_pretrained(tmp_path / "whole")
    model.save_encoder(tmp_path / "encoder")
    loaded = EncoderForPreTraining.from_pretrained(tmp_path / "whole")
    assert_equal(loaded.state_dict(), model.state_dict())
    assert loaded.pretraining_options == model.pretraining_options
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    for folder in ("whole", "encoder"):
        encoder = AutoModel.from_pretrained(tmp_path / folder)
        assert type(encoder) is type(model.encoder)
        assert_equal(encoder.state_dict(), model.encoder.state_dict())
    assert AutoConfig.from_pretrained(tmp_path / "encoder").to_dict().get("pretraining_options") is None
    assert not [key for key in load_file(tmp_path / "encoder/model.safetensors") if "head" in key]


def test_nothing_is_warned_of_on_the_way(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="genesplice_hf"):
        wrapped("genesplice").save_pretrained(tmp_path)
        EncoderForPreTraining.from_pretrained(tmp_path)
        AutoModel.from_pretrained(tmp_path)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("genesplice_hf")] == []


def test_an_encoders_checkpoint_gets_fresh_heads(tmp_path):
    encoder = encoder_of("genesplice")
    encoder.save_pretrained(tmp_path)
    model = EncoderForPreTraining.from_pretrained(tmp_path)
    assert_equal(model.encoder.state_dict(), encoder.state_dict())
    assert model.pretraining_options == PretrainingOptions()
    assert model(**{k: v for k, v in whole_batch().items() if k in ("input_ids", "labels")}).loss.isfinite()


def test_loading_is_strict(tmp_path):
    wrapped("genesplice").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.pretraining_options = config.pretraining_options | {"contrastive_dim": 5}
    with pytest.raises(CheckpointError, match=r"mis-shaped: pretraining_head\.projection\.out_proj"):
        EncoderForPreTraining.from_pretrained(tmp_path, config=config)


def test_a_config_makes_a_fresh_encoder():
    config = REGISTRY["genesplice"].tiny_config()
    model = EncoderForPreTraining(config)
    assert type(model.encoder) is REGISTRY["genesplice"].auto_classes["AutoModel"]
    options = model.pretraining_options
    assert (options.mlm_weight, options.contrastive_weight, options.next_segment_weight) == (1.0, 0.1, 0.0)


def test_a_model_with_a_head_gives_its_base():
    entry = REGISTRY["genesplice"]
    masked_lm = entry.auto_classes["AutoModelForMaskedLM"](entry.tiny_config())
    assert EncoderForPreTraining(masked_lm, ALL).encoder is masked_lm.base_model


def test_the_token_head_is_tied_where_it_can_be():
    tied = wrapped("genesplice")
    assert tied.lm_head.weight is tied.encoder.get_input_embeddings().weight
    tied.resize_token_embeddings(20, mean_resizing=False)
    assert tied.lm_head.weight is tied.encoder.get_input_embeddings().weight and len(tied.lm_head.weight) == 20
    entry = REGISTRY["genesplice_performer"]
    half = entry.auto_classes["AutoModel"](entry.tiny_config(position_scheme="concat"))
    model = EncoderForPreTraining(half, ALL)
    assert model.lm_head.weight.shape == (16, 32) and model.encoder.get_input_embeddings().weight.shape == (16, 16)
    assert model.all_tied_weights_keys == {} and model(**whole_batch()).loss.isfinite()
    assert wrapped("genesplice", PretrainingOptions(mlm_weight=0)).lm_head is None


def test_special_tokens_stay_out_of_the_mean():
    """By the ids that the config names, or those that the options do."""
    model = wrapped("bert")
    assert model.pretraining_options.special_token_ids == (CLS, SEP)
    ids = torch.tensor([[CLS, 5, 6, 7, SEP, 0], [CLS, 5, 6, 7, 8, SEP]])
    mask = (ids != 0).long()
    found = model(input_ids=ids, attention_mask=mask).embeddings
    state = model.encoder(ids, mask).last_hidden_state
    expected = torch.stack([state[0, 1:4].mean(0), state[1, 1:5].mean(0)])
    expected = nn.functional.normalize(model.pretraining_head.projection(expected), dim=-1)
    torch.testing.assert_close(found, expected)
    named = EncoderForPreTraining(encoder_of("genesplice"), PretrainingOptions(special_token_ids=(5,)))
    assert named.pretraining_options.special_token_ids == (5,)


@every
def test_under_trainer_and_resumed(name, tmp_path):
    """Two steps, of which the second starts from the checkpoint of the first, are two steps in one go."""
    batch = {key: values for key, values in whole_batch().items() if key != "loss_weight"}
    rows = [{key: values[row] for key, values in batch.items()} for row in range(6)]

    def run(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=2, per_device_train_batch_size=6, save_steps=1, learning_rate=0.01,
            report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, seed=0,
        )  # fmt: skip
        trainer = Trainer(wrapped(name), arguments, train_dataset=rows)
        trainer.train(**options)
        return trainer.model.state_dict()

    at_once = run(tmp_path)
    assert_equal(run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1")), at_once)
    saved = EncoderForPreTraining.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(saved.state_dict(), at_once)


def test_labels_need_one_state_per_token():
    entry = REGISTRY["genesplice"]
    fields = {
        "hidden_sizes": [16, 24], "pool_sizes": [4], "num_attention_heads": [2, 2], "num_key_value_heads": [2, 2],
        "head_dims": [8, 8], "intermediate_sizes": [24, 24], "num_encoder_layers": [1], "num_tower_layers": 1,
        "num_decoder_layers": [1], "local_windows": [4], "tower_window": None, "tower_layer_types": None,
        "use_decoder": False,
    }  # fmt: skip
    model = EncoderForPreTraining(entry.auto_classes["AutoModel"](entry.tiny_config(**fields)), ALL).eval()
    batch = whole_batch()
    with pytest.raises(ValueError, match=r"`labels` .* need one state per token"):
        model(**batch)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"`segment_ids` .* need one state per token"):
        model(**batch)
