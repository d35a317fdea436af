"""Training the SLiM Performer in chunks is training it in one piece: gradients, `Trainer`, adapters, processes.

The twin is the same model with `slim_chunk_size=-1`, whose gradient is autograd's own.

Shapes: B batch, L tokens, C tokens of a chunk.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from performer_torchrun import IGNORED, rows_of_bases, tiny_model, train
from safetensors.torch import load_model
from transformers import PreTrainedModel

from genesplice_hf.layers.feature_maps import FEATURE_MAPS
from genesplice_hf.models.performer.configuration_performer import PerformerConfig
from genesplice_hf.models.performer.modeling_performer import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}
# Name -> fields of the config.
MODES: dict[str, dict[str, Any]] = {
    "causal-store": {"is_decoder": True, "slim_states": "store"},
    "causal-reverse": {"is_decoder": True, "slim_states": "reverse"},
    "bidirectional-sublinear": {"is_decoder": False, "bidirectional_strategy": "sublinear"},
    "bidirectional-checkpoint": {"is_decoder": False, "bidirectional_strategy": "checkpoint"},
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def language_model(mode: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    """A masked or causal LM of two layers in training mode."""
    torch.manual_seed(0)
    config = PerformerConfig(**(SIZES | {"num_hidden_layers": 2} | MODES[mode] | fields))
    model_class = PerformerForCausalLM if config.is_decoder else PerformerForMaskedLM
    return model_class(config).to(dtype).train()


def gradients(model: PreTrainedModel, chunk_size: int, **batch: Any) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss = model(**batch, slim_chunk_size=chunk_size).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], relative: float = 1e-12) -> None:
    """Every tensor differs by at most `relative` of the largest entry of all gradients, or is missing in both."""
    largest = max(value.abs().max() for name, value in expected.items() if value is not None and name != "loss")
    assert largest > 1e-3, "gradients of zero show nothing"
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert (found[name] - value).abs().max() <= relative * largest, name


@EVERY_MODE
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_feature_map(mode: str, feature_map: str) -> None:
    model, batch = language_model(mode, feature_map=feature_map), rows_of_bases(4, 70)
    expected = gradients(model, -1, **batch)
    for chunk_size in (7, 64):
        assert_same(gradients(model, chunk_size, **batch), expected)


@EVERY_MODE
@pytest.mark.parametrize("chunk_size", [1, 69, 70, 100])
def test_every_chunk_size(mode: str, chunk_size: int) -> None:
    """Of the published architecture, whose positions are concatenated; with weights and a given number of labels."""
    fields = {"norm_placement": "branch", "position_scheme": "concat", "output_projection": False, "final_norm": False}
    model = language_model(mode, feature_map="sqr", attention_block_size=5, **fields)
    batch = rows_of_bases(4, 70)
    batch |= {"loss_weight": torch.rand(4, 70, dtype=torch.float64), "num_items_in_batch": torch.tensor(123)}
    assert_same(gradients(model, chunk_size, **batch), gradients(model, -1, **batch))


def test_the_number_of_labels_divides_the_loss() -> None:
    """Twice the number gives half the loss, and without a number the mean."""
    model, batch = language_model("causal-store"), rows_of_bases(4, 70)
    labels = int((batch["labels"][:, 1:] != IGNORED).sum())
    mean, same, half = (
        model(**batch, **given, slim_chunk_size=16).loss
        for given in ({}, {"num_items_in_batch": labels}, {"num_items_in_batch": 2 * labels})
    )
    torch.testing.assert_close(torch.stack([same, 2 * half]), torch.stack([mean, mean]))


@EVERY_MODE
@pytest.mark.parametrize("kind", ["tokens", "sequence"])
def test_classifiers(mode: str, kind: str) -> None:
    """A sequence's label reaches the tokens through their mean."""
    torch.manual_seed(0)
    model_class = {"tokens": PerformerForTokenClassification, "sequence": PerformerForSequenceClassification}[kind]
    config = PerformerConfig(**(SIZES | {"num_hidden_layers": 2, "num_labels": 3} | MODES[mode]))
    model, batch = model_class(config).double().train(), rows_of_bases(4, 70)
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, IGNORED)
    batch["labels"] = labels if kind == "tokens" else torch.arange(4) % 3
    assert_same(gradients(model, 16, **batch), gradients(model, -1, **batch))


@EVERY_MODE
def test_lora_trains_the_adapters_alone(mode: str) -> None:
    model, batch = language_model(mode), rows_of_bases(4, 70)
    adapted = get_peft_model(model, LoraConfig(target_modules=model.config.lora_targets, init_lora_weights=False))
    adapted.double().train()
    expected = gradients(adapted, -1, **batch)
    assert {"lora" in name for name, value in expected.items() if value is not None and name != "loss"} == {True}
    assert_same(gradients(adapted, 16, **batch), expected)


@EVERY_MODE
def test_bf16_autocast(mode: str) -> None:
    """The forward pass runs under autocast, the backward pass outside, as in `Trainer`."""
    model, batch = language_model(mode, torch.float32), rows_of_bases(4, 70)
    expected = gradients(model, -1, **batch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, slim_chunk_size=16).loss
    loss.backward()
    difference = sum((p.grad - expected[name]).square().sum() for name, p in model.named_parameters())
    assert difference.sqrt() < 2e-2 * sum(p.square().sum() for p in expected.values() if p.dim()).sqrt()


def assert_same_parameters(found: PreTrainedModel, expected: PreTrainedModel, tolerance: float = 1e-5) -> None:
    moved = 0.0
    for (name, parameter), before in zip(expected.named_parameters(), tiny_model().parameters(), strict=True):
        torch.testing.assert_close(found.get_parameter(name), parameter, atol=tolerance, rtol=0, msg=name)
        moved = max(moved, float((parameter - before).detach().abs().max()))
    assert moved > 1e-3, "the twin has not learnt anything"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The twin after four steps of `Trainer`: whole sequences, ordinary backpropagation."""
    return train(tiny_model(slim_chunk_size=-1), tmp_path_factory.mktemp("whole"), batch_size=2).model


@pytest.mark.parametrize("states", ["store", "reverse"])
def test_trainer_with_chunks_is_trainer_without(states: str, whole: PreTrainedModel, tmp_path: Path) -> None:
    trainer = train(tiny_model(slim_chunk_size=64, slim_states=states), tmp_path, batch_size=2)
    assert trainer.state.global_step == 4
    assert_same_parameters(trainer.model, whole)


def test_the_logged_loss_is_the_mean_over_the_labels(tmp_path: Path) -> None:
    """Accumulation does not multiply it: the first logged loss is that of the model on the first step's rows."""
    losses = []
    for chunk_size, batch_size, accumulation in ((64, 2, 2), (-1, 4, 1)):
        model, folder = tiny_model(slim_chunk_size=chunk_size), tmp_path / str(chunk_size)
        trainer = train(model, folder, batch_size, gradient_accumulation_steps=accumulation, max_steps=1)
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_processes_are_one(run_python: Callable[..., str], whole: PreTrainedModel, tmp_path: Path) -> None:
    """The script asserts the world size, and that an unused parameter fares as it should."""
    tiny_model(slim_chunk_size=64).save_pretrained(tmp_path / "model")
    script = str(ROOT / "tests/performer_torchrun.py")
    arguments = ["--standalone", "--nproc_per_node", "2", script, str(tmp_path)]
    code = f"from torch.distributed.run import main; main({arguments!r})"
    run_python(code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    found = tiny_model()
    load_model(found, tmp_path / "trained.safetensors")
    assert_same_parameters(found, whole)


SHARDED = """
import pytest
from performer_torchrun import rows_of_bases, tiny_model
from torch import distributed
from torch.distributed.fsdp import fully_shard

from genesplice_hf.errors import GeneSpliceError

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
model = tiny_model(slim_chunk_size=64).train()
for layer in model.performer.layers:
    fully_shard(layer)
fully_shard(model)
with pytest.raises(GeneSpliceError, match="FSDP"):
    model(**rows_of_bases(2))
"""


def test_a_sharded_model_is_refused(run_python: Callable[..., str]) -> None:
    """Alone in its process: torch keeps the mesh of `fully_shard`, and so the group's threads, until the very end.

    A thread that then still holds the work of another process's gradients aborts the interpreter.
    """
    run_python(SHARDED, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    """Random features included, which are drawn anew on the way: the checkpoint holds them and their count."""
    fields = {"feature_map": "favor+", "feature_redraw": "interval", "feature_redraw_interval": 3}
    straight = train(tiny_model(slim_chunk_size=64, **fields), tmp_path / "straight", batch_size=2)
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tiny_model(slim_chunk_size=64, **fields), tmp_path / "cut", 2, **saving)
    (tmp_path / "cut/checkpoint-4").rename(tmp_path / "unused")
    resumed = train(tiny_model(7, slim_chunk_size=64, **fields), tmp_path / "cut", 2, resume=True, **saving)
    assert resumed.state.global_step == 4
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=0, rtol=0, msg=name)


def copy_task(rows: int, bases: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, 11) of random bases, a mark, and the same bases again; only the second half is asked for."""
    first = torch.randint(5, 9, (rows, bases))
    ids = torch.cat([first, torch.full((rows, 1), 4), first], dim=1)
    return ids, ids.masked_fill(torch.arange(2 * bases + 1) <= bases, IGNORED)


def test_it_learns_to_copy_across_chunks() -> None:
    """A base stands 6 positions before its copy, in an earlier chunk of 4: only the sums bring its gradient there."""
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "position_base": 30}
    model = tiny_model(slim_chunk_size=4, feature_map="sqr", position_scheme="concat", **fields).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        ids, labels = copy_task(64)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    ids, labels = copy_task(64)
    with torch.no_grad():
        predicted = model.eval()(ids).logits.argmax(-1)[:, :-1]
    asked = labels[:, 1:] != IGNORED
    assert (predicted == ids[:, 1:])[asked].double().mean() > 0.99
