"""GeneSplice under several objectives: each loss is what the other classes and slow twins give, two processes are one,
and what is planted is learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretraining_pairs import whole_batch, windows
from pretraining_torchrun import CASES, LOSSES, WORLD_SIZE
from safetensors.torch import load_file, save_file
from tiny_genesplice import FORMS, tiny
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from genesplice_hf.heads.contrast import info_nce
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForCausalLM, GeneSpliceForMaskedLM
from genesplice_hf.models.genesplice.modeling_genesplice_pretraining import GeneSpliceForPreTraining
from genesplice_hf.objectives.contrastive import ContrastiveCollator
from genesplice_hf.objectives.masked import DnaMLMCollator
from genesplice_hf.objectives.mixed import MultiObjectiveCollator
from genesplice_hf.objectives.next_segment import NextSegmentCollator
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"mlm_weight": 0.7, "contrastive_weight": 0.2, "next_segment_weight": 0.5}
both_forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def tokenizer() -> NucleotideTokenizer:
    return NucleotideTokenizer(preset="genesplice")


def model(form: str = "flat", **fields: Any) -> PreTrainedModel:
    return tiny(GeneSpliceForPreTraining, form, **(WEIGHTS | {"contrastive_dim": 12} | fields))


def gradients(network: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    network.zero_grad()
    outputs = network(**batch)
    outputs.loss.backward()
    losses = {name: outputs[name].detach() for name in LOSSES}
    return losses | {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@both_forms
def test_each_loss_is_that_of_its_rows_alone(form):
    """Masked bases by the masked LM of the same weights; the others row by row, from the base model's states."""
    network, batch = model(form), whole_batch()
    found = network(**batch)
    masked_lm = tiny(GeneSpliceForMaskedLM, form)
    masked_lm.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("pretraining_head")})
    expected = masked_lm(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    torch.testing.assert_close(found.mlm_loss, expected.loss)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)

    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return network.genesplice(ids[mask.bool()][None]).last_hidden_state[0]

    head = network.pretraining_head
    for name, prefix in (("embeddings", ""), ("view_embeddings", "view_")):
        rows = zip(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], strict=True)
        vectors = torch.stack([nn.functional.normalize(head.projection(states(*row).mean(0)), dim=0) for row in rows])
        torch.testing.assert_close(found[name], vectors, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.contrastive_loss, info_nce(found.embeddings, found.view_embeddings, 0.07))
    scores = []
    for row in zip(batch["segment_input_ids"], batch["segment_attention_mask"], strict=True):
        first, second = states(*row)[:8].mean(0), states(*row)[8:].mean(0)
        scores.append(head.next_segment(torch.cat([first, second, first * second, (first - second).abs()])))
    scores = torch.cat(scores)
    torch.testing.assert_close(found.next_segment_logits, scores, atol=1e-5, rtol=1e-5)
    asked = [0, 1, 2, 3, 5]
    expected = nn.functional.binary_cross_entropy_with_logits(scores[asked], batch["follows"][asked].float())
    torch.testing.assert_close(found.next_segment_loss, expected)
    total = 0.7 * found.mlm_loss + 0.2 * found.contrastive_loss + 0.5 * found.next_segment_loss
    torch.testing.assert_close(found.loss, total)


@both_forms
def test_the_gradient_is_that_of_finite_differences(form):
    """Along a random direction, in float64, through all objectives at once."""
    network, batch = model(form).double().train(), whole_batch()
    found = gradients(network, batch)
    parameters = list(network.parameters())
    step = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) for p in parameters]
    slope = sum((found[name] * d).sum() for (name, _), d in zip(network.named_parameters(), step, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, step, strict=True):
                parameter += sign * 1e-5 * direction
            values.append(network(**batch).loss.item())
            for parameter, direction in zip(parameters, step, strict=True):
                parameter -= sign * 1e-5 * direction
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope.item(), rel=1e-5)


@both_forms
def test_training_gives_the_losses_of_evaluation_and_logits_of_the_labels_alone(form):
    network, batch = model(form), whole_batch()
    assert_same(gradients(network.train(), batch), gradients(network.eval(), batch), atol=1e-6)
    labelled = batch["labels"] != -100
    assert torch.equal(network.train()(**batch).logits.argmax(-1), network.eval()(**batch).logits[labelled].argmax(-1))


def test_a_causal_config_predicts_the_next_base():
    network, batch = model(is_decoder=True), whole_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["loss_weight"] = torch.rand(batch["labels"].shape)
    causal = tiny(GeneSpliceForCausalLM, "flat", is_decoder=True)
    causal.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("pretraining_head")})
    names = ("input_ids", "attention_mask", "labels", "loss_weight")
    expected = causal(**{name: batch[name] for name in names}).loss
    torch.testing.assert_close(network(**batch).mlm_loss, expected)
    torch.testing.assert_close(network.train()(**batch).mlm_loss, expected)


def test_segments_may_be_the_input_itself():
    network, batch = model(mlm_weight=0, contrastive_weight=0), whole_batch()
    pair = {name: batch[f"segment_{name}"] for name in ("input_ids", "attention_mask")}
    pair |= {name: batch[name] for name in ("segment_ids", "follows")}
    found = network.train()(**pair)
    expected = network.pretraining_head.judge(
        network.genesplice(pair["input_ids"]).last_hidden_state, batch["segment_ids"]
    )
    torch.testing.assert_close(found.next_segment_logits, expected)
    assert found.logits is None and found.embeddings is None
    assert [name for name, p in network.named_parameters() if name.startswith("lm_head")] == []


def test_bins_can_be_contrasted():
    fields = {"use_decoder": False, "mlm_weight": 0, "next_segment_weight": 0}
    network = model("hierarchical", **fields)
    ids = torch.randint(5, 9, (3, 300))
    mask = (torch.arange(300) < torch.tensor([[300], [130], [128]])).long()
    found = network(input_ids=ids, attention_mask=mask, view_input_ids=ids[:, :140])
    assert found.contrastive_loss.isfinite()
    for row, length in enumerate((300, 130, 128)):
        alone = network(input_ids=ids[row : row + 1, :length]).embeddings
        torch.testing.assert_close(found.embeddings[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one state per base"):
        model("hierarchical", use_decoder=False)


@both_forms
def test_an_equivariant_model_embeds_both_strands_alike(form):
    network = model(form, rc_equivariant=True)
    complement = torch.tensor(network.config.complement_map)
    ids = torch.randint(5, 10, (3, 37))
    one, other = network(input_ids=ids), network(input_ids=complement[ids.flip(1)])
    torch.testing.assert_close(one.embeddings, other.embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.logits, other.logits.flip(1)[..., complement], atol=1e-4, rtol=0)
    assert (one.embeddings[0] - one.embeddings[1]).abs().max() > 1e-3


def test_routers_are_balanced_too():
    fields = {"moe_num_experts": 3, "moe_layers": "all", "moe_aux_weight": 2.0, "moe_z_weight": 3.0}
    network, batch = model(**fields), whole_batch()
    found = network(**batch)
    plain = 0.7 * found.mlm_loss + 0.2 * found.contrastive_loss + 0.5 * found.next_segment_loss
    base = network.genesplice
    rows = [(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]) for prefix in ("", "view_", "segment_")]
    padded = [[nn.functional.pad(part, (0, 20 - part.shape[1])) for part in row] for row in rows]
    outputs = base(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
    torch.testing.assert_close(found.loss, base.with_router_losses(plain, outputs))
    assert found.loss > plain + 1


def test_embeddings_instead_of_ids():
    network, batch = model(), whole_batch()
    expected = network(**batch)
    batch["inputs_embeds"] = network.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(network(**batch).loss, expected.loss)


def test_the_keys_of_a_checkpoint(tmp_path):
    network = model()
    network.save_pretrained(tmp_path)
    heads = {key for key in load_file(tmp_path / "model.safetensors") if not key.startswith("genesplice.")}
    layers = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    assert heads == {f"pretraining_head.{part}.{name}" for part in ("projection", "next_segment") for name in layers}
    assert network.lm_head.weight is network.genesplice.embeddings.weight
    loaded = GeneSpliceForPreTraining.from_pretrained(tmp_path)
    assert_same({"loss": loaded(**whole_batch()).loss}, {"loss": network(**whole_batch()).loss}, atol=0)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("labels", "`mlm_weight` is 0.7, but the batch holds no `labels`"),
        ("view_input_ids", "`contrastive_weight` is 0.2, but the batch holds no `view_input_ids`"),
        ("follows", "`next_segment_weight` is 0.5, but the batch holds no `follows`"),
        ("segment_ids", "`follows` needs `segment_ids`"),
    ],
)
def test_an_objective_without_its_part_of_the_batch_is_refused(missing, message):
    """In training; in evaluation it is left out of the sum."""
    batch = whole_batch()
    del batch[missing]
    with pytest.raises(ValueError, match=message):
        model().train()(**batch)
    if missing in ("labels", "view_input_ids"):
        found = model()(**batch)
        losses = [(found.mlm_loss, 0.7), (found.contrastive_loss, 0.2), (found.next_segment_loss, 0.5)]
        torch.testing.assert_close(found.loss, sum(loss * weight for loss, weight in losses if loss is not None))


@pytest.mark.parametrize(
    ("weight", "part"),
    [("mlm_weight", "labels"), ("contrastive_weight", "view_input_ids"), ("next_segment_weight", "segment_ids")],
)
def test_a_part_of_the_batch_without_its_objective_is_refused(weight, part):
    with pytest.raises(ValueError, match=f"holds `{part}`, but `{weight}` is 0"):
        model(**{weight: 0})(**whole_batch())


def test_parts_that_do_not_fit_are_refused():
    batch = whole_batch()
    with pytest.raises(ValueError, match="`segment_ids`"):
        model()(**(batch | {"segment_ids": batch["segment_ids"][:, :9]}))
    with pytest.raises(ValueError, match="`labels`"):
        model()(**(batch | {"labels": batch["labels"][:, :9]}))
    with pytest.raises(ValueError, match=r"\['track_values'\] hold values for `input_ids` alone"):
        model()(**batch, track_values=torch.ones(6, 20, 1))


# Two processes


@pytest.fixture(scope="module")
def two_processes(run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One torchrun of two processes, which itself asserts the world size."""
    folder = tmp_path_factory.mktemp("pretraining")
    model().save_pretrained(folder / "model")
    save_file(whole_batch(), folder / "batch.safetensors")
    arguments = ["--standalone", "--nproc_per_node", str(WORLD_SIZE), str(ROOT / "tests/pretraining_torchrun.py")]
    code = f"from torch.distributed.run import main; main({[*arguments, str(folder)]!r})"
    run_python(code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_whole_batch(case, two_processes):
    """Losses in every process, and gradients after DDP's average; however the rows are spread."""
    expected = gradients(model().train(), whole_batch())
    assert max(values.abs().max() for values in expected.values()) > 1e-2
    for rank in range(WORLD_SIZE):
        assert_same(load_file(two_processes / f"{case}-{rank}.safetensors"), expected)


def test_the_contrast_of_two_processes_is_that_of_one(two_processes):
    found = [load_file(two_processes / f"contrast-{rank}.safetensors") for rank in range(WORLD_SIZE)]
    pairs = found[0]["pairs"].clone().requires_grad_()
    loss = info_nce(pairs[:, 0], pairs[:, 1], temperature=0.2)
    loss.backward()
    # Every process asks for the whole loss; their average, which DDP takes, is over the two.
    together = torch.cat([part["gradient"] for part in found]) / WORLD_SIZE
    torch.testing.assert_close(together, pairs.grad, atol=1e-12, rtol=0)
    for part in found:
        torch.testing.assert_close(part["loss"], loss.detach(), atol=1e-12, rtol=0)


# Learning


def train(network: PreTrainedModel, collator: Any, rows: list[dict], steps: int, spoil: Callable = dict) -> None:
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(steps):
        collator.set_epoch(step)
        start = step * 48 % len(rows)
        optimizer.zero_grad()
        network(**spoil(collator(rows[start : start + 48]))).loss.backward()
        optimizer.step()


def shuffled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"follows": batch["follows"][torch.randperm(len(batch["follows"]))]}


@pytest.mark.parametrize("spoil", [dict, shuffled])
def test_next_segments_are_learned_unless_the_answers_are_shuffled(tokenizer, spoil):
    """Halves of one contig share their favourite base: 7 in 8 can be told apart on contigs never seen."""
    rows, unseen = windows(), windows(100)
    made = [NextSegmentCollator(tokenizer, part, min_distance_bp=1000, seed=0) for part in (rows, unseen)]
    network = model(mlm_weight=0, contrastive_weight=0)
    train(network, made[0], rows, steps=40, spoil=spoil)
    with torch.no_grad():
        batch = made[1](unseen)
        right = (network.eval()(**batch).next_segment_logits > 0) == (batch["follows"] == 1)
    chance = 3 * np.sqrt(0.25 / len(unseen))
    accuracy = right.float().mean().item()
    assert accuracy > 0.75 if spoil is dict else abs(accuracy - 0.5) < chance


def test_both_strands_find_each_other_after_training(tokenizer):
    """Each among 48 windows never seen, a few bases changed; a fresh model cannot know which ones belong together."""
    rows, unseen = windows(rich=0.4), windows(100, rich=0.4)[::5]
    collator = ContrastiveCollator(tokenizer, second=("reverse_complement", "mutation"), seed=0)
    network = model(mlm_weight=0, next_segment_weight=0, contrastive_temperature=0.2)

    def share_found() -> float:
        with torch.no_grad():
            found = network.eval()(**collator(unseen))
        nearest = (found.embeddings @ found.view_embeddings.T).argmax(1)
        return (nearest == torch.arange(len(unseen))).float().mean().item()

    before = share_found()
    train(network, collator, rows, steps=40)
    # Chance is 1 in 48.
    assert before < 0.07 and share_found() > 0.15


def test_under_trainer(tokenizer, tmp_path):
    """With the mixed collator of raw windows; accumulation averages; the loss of evaluation is logged."""
    rows = windows()[:32]
    collator = MultiObjectiveCollator(
        DnaMLMCollator(tokenizer, seed=0),
        ContrastiveCollator(tokenizer, seed=0),
        NextSegmentCollator(tokenizer, windows(), min_distance_bp=1000, seed=0),
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, prediction_loss_only=True,
        remove_unused_columns=False, learning_rate=0.0,
    )  # fmt: skip
    trainer = Trainer(model(), arguments, collator, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    whole = trainer.evaluate()["eval_loss"]
    assert len(logged) == 2 and all(loss == pytest.approx(whole, rel=0.2) for loss in logged)
