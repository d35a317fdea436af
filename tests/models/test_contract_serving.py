"""The contract of every head in use: transformers' stock pipelines, and for causal heads `generate()`."""

from pathlib import Path

import pytest
import torch
import transformers
from contract_cases import LENGTHS_BP, Batch, Case, cases, output, pad_id, padded, tokenizer_of
from transformers import GenerationConfig, Pipeline, PreTrainedModel, pipeline

SEQUENCES = ["ACGTTGCAACGGTTACG", "TTGAC"]
BASES = "ACGT"
NUM_NEW = 6


def only(auto_class: str):
    return lambda case: case.auto_class == auto_class


def sequences(case: Case) -> list[str]:
    """Of different lengths, which a batch pads; of one length where padding is a part of the window; or genes."""
    if case.reads_genes:
        return [case.text(17, 0), case.text(5, 1)]
    return [SEQUENCES[0], SEQUENCES[0][::-1]] if hasattr(case.config(), "num_bins") else SEQUENCES


def served(case: Case, task: str, folder: Path, **options: object) -> tuple[Pipeline, PreTrainedModel]:
    """The pipeline as users make it, from a folder, and the model that it must agree with.

    No id of the model is without a token, for a random model predicts such ids and they cannot be decoded.
    """
    model = case.model()
    model.resize_token_embeddings(len(tokenizer_of(case.row)))
    model.config.id2label = {0: "closed", 1: "open", 2: "bent"}
    model.config.label2id = {label: index for index, label in model.config.id2label.items()}
    model.save_pretrained(folder)
    tokenizer_of(case.row).save_pretrained(folder)
    return pipeline(task, model=str(folder), device="cpu", **options), model


def alone(case: Case, model: PreTrainedModel, sequence: str) -> torch.Tensor:
    return output(model, {"input_ids": tokenizer_of(case.row)(sequence, return_tensors="pt")["input_ids"]})[0]


@cases("test_fill_mask", only("AutoModelForMaskedLM"))
def test_fill_mask(case: Case, tmp_path: Path) -> None:
    serve, model = served(case, "fill-mask", tmp_path, top_k=4)
    masked = SEQUENCES[0][:6] + tokenizer_of(case.row).mask_token + SEQUENCES[0][7:]
    found = serve([masked, masked])
    ids = tokenizer_of(case.row)(masked)["input_ids"]
    place = ids.index(tokenizer_of(case.row).mask_token_id)
    expected = alone(case, model, masked)[place].softmax(-1).topk(4)
    for answers in found:
        assert [answer["token"] for answer in answers] == expected.indices.tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist(), abs=1e-6)


@cases("test_feature_extraction", only("AutoModel"))
def test_feature_extraction(case: Case, tmp_path: Path) -> None:
    serve, model = served(case, "feature-extraction", tmp_path, return_tensors=True)
    for sequence, found in zip(sequences(case), serve(sequences(case)), strict=True):
        torch.testing.assert_close(found[0], alone(case, model, sequence), atol=1e-5, rtol=1e-5)


@cases("test_text_classification", only("AutoModelForSequenceClassification"))
@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_classification(case: Case, batch_size: int, tmp_path: Path) -> None:
    serve, model = served(case, "text-classification", tmp_path, batch_size=batch_size)
    for sequence, answers in zip(sequences(case), serve(sequences(case), top_k=None), strict=True):
        expected = alone(case, model, sequence).softmax(-1).tolist()
        found = {answer["label"]: answer["score"] for answer in answers}
        assert [found[label] for label in ("closed", "open", "bent")] == pytest.approx(expected, abs=1e-5)


@cases("test_token_classification", only("AutoModelForTokenClassification"))
@pytest.mark.parametrize("batch_size", [1, 2])
def test_token_classification(case: Case, batch_size: int, tmp_path: Path) -> None:
    serve, model = served(case, "token-classification", tmp_path, batch_size=batch_size)
    for sequence, answers in zip(SEQUENCES, serve(SEQUENCES), strict=True):
        logits = alone(case, model, sequence)
        # The pipeline says nothing of [CLS] and its like.
        ids, special = tokenizer_of(case.row)(sequence)["input_ids"], tokenizer_of(case.row).all_special_ids
        places = [place for place, token in enumerate(ids) if token not in special]
        best = logits[places].softmax(-1).max(-1)
        labels = [model.config.id2label[index] for index in best.indices.tolist()]
        assert [answer["entity"] for answer in answers] == labels
        assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [answer["index"] for answer in answers] == places


@cases("test_text_generation", only("AutoModelForCausalLM"))
def test_text_generation(case: Case, tmp_path: Path) -> None:
    serve, model = served(case, "text-generation", tmp_path)
    tokenizer = tokenizer_of(case.row)
    bases = tokenizer.convert_tokens_to_ids(list(BASES))
    others = [token for token in range(model.config.vocab_size) if token not in bases]
    generation = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, suppress_tokens=others)
    found = serve(SEQUENCES[0], generation_config=generation)[0]["generated_text"]
    expected = SEQUENCES[0]
    for _ in range(NUM_NEW):
        expected += BASES[int(alone(case, model, expected)[-1][bases].argmax())]
    assert found == expected


def prompts(case: Case, lengths_bp: tuple[int, ...] = LENGTHS_BP) -> tuple[list[torch.Tensor], Batch]:
    """Rows of ids, and the same rows padded on the left."""
    rows = [case.ids(length, seed) for seed, length in enumerate(lengths_bp)]
    return rows, padded(rows, pad_id(case.row), left=None)


def generate(model: PreTrainedModel, batch: Batch, **options: object) -> torch.Tensor:
    """The new tokens, (B, N)."""
    settings = GenerationConfig(
        **({"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False} | options),
        pad_token_id=model.config.pad_token_id,
    )
    return model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]


def greedy(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The slow twin: the whole sequence again for every token."""
    start = len(ids)
    for _ in range(NUM_NEW):
        ids = torch.cat([ids, output(model, {"input_ids": ids[None]})[0, -1].argmax()[None]])
    return ids[start:]


@cases("test_greedy_search_is_repeated_argmax", only("AutoModelForCausalLM"))
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_search_is_repeated_argmax(case: Case, use_cache: bool) -> None:
    model = case.model()
    rows, batch = prompts(case)
    expected = torch.stack([greedy(model, ids) for ids in rows])
    assert torch.equal(generate(model, batch, use_cache=use_cache), expected)


@cases("test_sampling_follows_the_seed", only("AutoModelForCausalLM"))
def test_sampling_follows_the_seed(case: Case) -> None:
    model, (_, batch) = case.model(), prompts(case)

    def sample(seed: int, use_cache: bool) -> torch.Tensor:
        torch.manual_seed(seed)
        return generate(model, batch, do_sample=True, top_k=0, temperature=2.0, use_cache=use_cache)

    assert torch.equal(sample(1, True), sample(1, True))
    assert torch.equal(sample(1, True), sample(1, False))
    assert not torch.equal(sample(1, True), sample(2, True))


@cases("test_beam_search_is_as_good_as_it_says", only("AutoModelForCausalLM"))
def test_beam_search_is_as_good_as_it_says(case: Case) -> None:
    """Cached beams (which are reordered at every step) are the uncached ones; a full beam is exhaustive search."""
    model, (_, batch) = case.model(), prompts(case)
    many = {"num_beams": 8, "num_return_sequences": 8, "max_new_tokens": 12, "min_new_tokens": 12}
    one, other = (generate(model, batch, use_cache=use_cache, **many) for use_cache in (True, False))
    assert torch.equal(one, other)
    vocabulary, (rows, short) = model.config.vocab_size, prompts(case, (5,))
    two = {"max_new_tokens": 2, "min_new_tokens": 2}
    found = generate(model, short, num_beams=vocabulary, **two)[0]
    first, second = torch.meshgrid(torch.arange(vocabulary), torch.arange(vocabulary), indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten()], dim=1)
    logits = output(model, {"input_ids": torch.cat([rows[0].expand(len(pairs), -1), pairs], dim=1)})
    scores = logits[:, -3:-1].log_softmax(-1).gather(2, pairs[..., None]).sum((1, 2))
    assert torch.equal(found, pairs[scores.argmax()])


@cases("test_step_by_step_with_a_cache_is_at_once_without", only("AutoModelForCausalLM"))
@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("prefix", [1, 9])
@pytest.mark.parametrize("chunk", [1, 4])
def test_step_by_step_with_a_cache_is_at_once_without(case: Case, prefix: int, chunk: int, name: str) -> None:
    """Left-padded rows against each row alone; `prefix` and then `chunk` tokens a call."""
    model = case.model(attn_implementation=name)
    rows, batch = prompts(case)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    steps, cache, start = [], None, 0
    while start < ids.shape[1]:
        stop = start + (chunk if start else prefix)
        with torch.no_grad():
            outputs = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        steps.append(outputs.logits)
        cache, start = outputs.past_key_values, stop
    found = torch.cat(steps, dim=1)
    for row, alone_ids in enumerate(rows):
        expected = output(model, {"input_ids": alone_ids[None]})[0]
        torch.testing.assert_close(found[row, -len(alone_ids) :], expected, atol=1e-5, rtol=0)


@cases("test_nothing_leaks_from_the_future", only("AutoModelForCausalLM"))
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_nothing_leaks_from_the_future(case: Case, name: str) -> None:
    """Another token at t leaves the logits before t bit for bit, and the gradient there is exactly 0."""
    model, ids = case.model(attn_implementation=name), case.ids(40)[None]
    expected = output(model, {"input_ids": ids})
    for place in (1, 4, 5, 20, 39):
        other = ids.clone()
        other[0, place:] = other[0, place:].flip(0).roll(1)
        other[0, place] = ids[0, place] % 4 + 5
        assert other[0, place] != ids[0, place]
        found = output(model, {"input_ids": other})
        assert torch.equal(found[0, :place], expected[0, :place])
        assert not torch.equal(found[0, place], expected[0, place])
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds).logits[0, :place].sum().backward()
        assert not embeds.grad[0, place:].any()
        assert embeds.grad[0, :place].any(-1).all()


@cases("test_causal_heads_generate_through_transformers_auto_class", only("AutoModelForCausalLM"))
def test_causal_heads_generate_through_transformers_auto_class(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.can_generate()
    assert generate(loaded, prompts(case)[1]).shape == (len(LENGTHS_BP), NUM_NEW)
