"""Mutagenesis against answers worked out by hand, a slow twin and the laws it must obey."""

import csv

import numpy as np
import pytest
import torch
from interpretation.toy_sequence_models import (
    BASES,
    CountMotif,
    Linear,
    Smooth,
    ToyModel,
    single_base_tokenizer,
    three_mer_tokenizer,
    tiny_bert,
)
from peft import LoraConfig, get_peft_model

from genesplice_hf.errors import GeneSpliceError, SequenceError
from genesplice_hf.interpretation.encoding import IndexedMutants, TokenizedMutants, mutant_source
from genesplice_hf.interpretation.mutagenesis import (
    MutagenesisResult,
    in_silico_mutagenesis,
    reference_letters,
    strongest_windows,
    variant_rows,
    write_variant_table,
)
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer

SEQUENCE = "ACGTTGACCATGNACGTACCATGGA"


def count(text: str, motif: str) -> int:
    return sum(text.startswith(motif, i) for i in range(len(text)))


def spelled_mutants(sequence: str):
    """(position, column, mutant) of every substitution of an A, C, G or T."""
    for position, ref in enumerate(sequence):
        for column, alt in enumerate(BASES):
            if ref in BASES and alt != ref:
                yield position, column, sequence[:position] + alt + sequence[position + 1 :]


def slow_twin(model, tokenizer, sequence: str, index: int) -> np.ndarray:
    """One tokenizer call and one forward pass per mutant."""

    def logit(text: str) -> float:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0, index].item()

    table = np.full((len(sequence), 4), np.nan)
    for position, column, mutant in spelled_mutants(sequence):
        table[position, BASES.index(sequence[position])] = 0
        table[position, column] = logit(mutant) - logit(sequence)
    return table


def scan(model, tokenizer=None, sequence=SEQUENCE, **options) -> MutagenesisResult:
    return in_silico_mutagenesis(model, tokenizer or single_base_tokenizer(), sequence, progress=False, **options)


def test_motif_counter_gives_the_exact_change_of_the_count():
    result = scan(ToyModel(CountMotif("CCATG")))
    assert result.reference_score == 2
    for position, column, mutant in spelled_mutants(SEQUENCE):
        assert result.scores[position, column] == count(mutant, "CCATG") - 2
    # Every base of an occurrence matters fully: any of the three substitutions destroys it.
    assert result.position_importance[7:12].tolist() == [1, 1, 1, 1, 1]


def test_linear_model_gives_its_weights():
    weights = torch.randn(24, 4, 1, generator=torch.Generator().manual_seed(1))
    sequence = "ACGT" * 6
    table = weights[..., 0].numpy()
    reference = table[np.arange(24), [BASES.index(base) for base in sequence]]
    result = scan(ToyModel(Linear(weights)), sequence=sequence)
    np.testing.assert_allclose(result.scores, table - reference[:, None], atol=2e-6)
    np.testing.assert_allclose(result.position_importance, reference - (table.sum(1) - reference) / 3, atol=2e-6)


@pytest.mark.parametrize("batch_size", [None, 1, 7, 500])
@pytest.mark.parametrize(
    "tokenizer, source",
    [
        (single_base_tokenizer(), IndexedMutants),
        (single_base_tokenizer(with_ends=True), IndexedMutants),
        (three_mer_tokenizer(), TokenizedMutants),
    ],
)
def test_batches_equal_the_one_by_one_twin(tokenizer, source, batch_size):
    model = tiny_bert().double()
    assert isinstance(mutant_source(tokenizer, SEQUENCE, torch.device("cpu")), source)
    result = scan(model, tokenizer, target=1, batch_size=batch_size)
    np.testing.assert_allclose(result.scores, slow_twin(model, tokenizer, SEQUENCE, 1), atol=1e-6)
    assert np.nanmax(np.abs(result.scores)) > 0.01


@pytest.mark.parametrize("with_ends", [False, True])
def test_index_arithmetic_makes_the_ids_that_the_tokenizer_makes(with_ends):
    tokenizer = single_base_tokenizer(with_ends)
    source = mutant_source(tokenizer, SEQUENCE, torch.device("cpu"))
    positions, columns, mutants = zip(*spelled_mutants(SEQUENCE), strict=True)
    made = source.mutants(torch.tensor(positions), torch.tensor(columns))
    expected = tokenizer(list(mutants), return_tensors="pt")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


def test_a_vocabulary_with_one_longer_word_is_not_indexed():
    tokenizer = single_base_tokenizer()
    tokenizer.add_tokens(["GGC"])
    assert isinstance(mutant_source(tokenizer, "ACGTA", torch.device("cpu")), TokenizedMutants)


def test_lower_case_vocabularies_are_indexed_too():
    tokenizer = NucleotideTokenizer(preset="gpn")
    source = mutant_source(tokenizer, "GATTACA", torch.device("cpu"))
    assert isinstance(source, IndexedMutants)
    made = source.mutants(torch.tensor([0, 6]), torch.tensor([3, 1]))["input_ids"]
    assert made.tolist() == tokenizer(["TATTACA", "GATTACC"])["input_ids"]


def test_an_adapter_scores_as_the_merged_model_does():
    model = get_peft_model(tiny_bert(), LoraConfig(init_lora_weights=False, target_modules=["query", "value"]))
    adapted = scan(model, sequence="ACGTACGTT")
    merged = scan(model.merge_and_unload(), sequence="ACGTACGTT")
    np.testing.assert_allclose(adapted.scores, merged.scores, atol=1e-5)
    assert np.abs(adapted.scores - scan(tiny_bert(), sequence="ACGTACGTT").scores).max() > 0.01


def test_both_strands_of_the_reverse_complement_are_the_mirror_image():
    model = ToyModel(Smooth()).eval()
    complement = SEQUENCE.translate(str.maketrans("ACGT", "TGCA"))[::-1]
    forward = scan(model, strands="both")
    mirrored = scan(model, sequence=complement, strands="both")
    np.testing.assert_allclose(mirrored.scores[::-1, ::-1], forward.scores, atol=1e-6)
    assert mirrored.reference_score == pytest.approx(forward.reference_score, abs=1e-6)
    assert not np.allclose(scan(model).scores, forward.scores, atol=1e-3, equal_nan=True)


def test_both_strands_is_the_mean_of_the_two_readings():
    sequence = "CCATGAAACATGG"
    result = scan(ToyModel(CountMotif("CCATG")), sequence=sequence, strands="both")
    assert result.reference_score == 1  # the motif once on either strand
    assert result.position_importance[:5].tolist() == [0.5] * 5
    assert result.position_importance[-5:].tolist() == [0.5] * 5


def test_region_limits_the_scan_and_keeps_the_coordinates():
    model = ToyModel(Smooth()).eval()
    whole, part = scan(model), scan(model, start=5, end=9)
    np.testing.assert_allclose(part.scores[5:9], whole.scores[5:9], atol=1e-6)
    assert np.isnan(part.scores[:5]).all() and np.isnan(part.scores[9:]).all()


def test_unknown_reference_base_is_a_row_of_nan(caplog):
    result = scan(ToyModel(CountMotif("CCATG")))
    assert np.isnan(result.scores[SEQUENCE.index("N")]).all()
    assert np.isnan(result.scores).sum() == 4
    assert "1 positions hold N" in caplog.text


def test_reference_base_scores_zero_and_case_is_ignored():
    model = ToyModel(Smooth()).eval()
    result = scan(model, sequence="acGT")
    assert result.sequence == "ACGT"
    assert result.scores.dtype == np.float32
    assert result.scores[range(4), range(4)].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("num_labels", [2, 3])
def test_logit_difference_is_the_log_odds(num_labels):
    model = tiny_bert(num_labels)
    result = scan(model, target=1, score="logit_difference", sequence="ACGTACG")
    with torch.no_grad():
        p = model(**single_base_tokenizer()("ACGTACG", return_tensors="pt")).logits.softmax(-1)[0, 1].item()
    assert result.reference_score == pytest.approx(np.log(p / (1 - p)), abs=1e-5)


def test_callable_score_and_label_names():
    model = tiny_bert(2, id2label={0: "off", 1: "on"}, label2id={"off": 0, "on": 1})

    def margin(logits):
        return logits[:, 1] - logits[:, 0]

    own = scan(model, score=margin, sequence="ACGTACG")
    named = scan(model, target="on", score="logit_difference", sequence="ACGTACG")
    np.testing.assert_allclose(own.scores, named.scores, atol=1e-6)
    assert (own.score_name, named.target_label) == ("margin", "on")
    assert scan(model, sequence="ACGT").target_label == "on"


def test_modes_are_restored_module_by_module_even_after_an_error():
    model = ToyModel(Smooth()).train()
    model.body.conv.eval()
    before = [module.training for module in model.modules()]
    first, second = scan(model), scan(model)
    np.testing.assert_array_equal(first.scores, second.scores)  # dropout is off

    def broken(logits):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        scan(model, score=broken)
    assert [module.training for module in model.modules()] == before
    assert 0 < sum(before) < len(before)


def test_model_precision_is_kept_and_gradients_still_work_afterwards():
    model = ToyModel(CountMotif("CCATG")).to(torch.bfloat16)
    assert scan(model).position_importance[7] == 1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    bert = tiny_bert()
    scan(bert)
    bert(**single_base_tokenizer()("ACGT", return_tensors="pt")).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in bert.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sequence": ""}, "`sequence` is empty"),
        ({"sequence": "ACGR"}, "'R' at position 4"),
        ({"sequence": "ACGU"}, "'U' at position 4"),
        ({"sequence": ["ACGT"]}, "one string"),
        ({"sequence": "NNN"}, "nothing can be substituted"),
        ({"sequence": "ACGT" * 17}, "makes 68 tokens, the model takes 64"),
        ({"start": 5, "end": 5}, "0 <= start < end <= 25"),
        ({"end": 26}, "0 <= start < end <= 25"),
    ],
)
def test_bad_sequences_are_refused(options, message):
    with pytest.raises(SequenceError, match=message):
        scan(tiny_bert(), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": 3}, "index below 3, was 3"),
        ({"target": -1}, "index below 3, was -1"),
        ({"target": True}, "was True"),
        ({"target": "promoter"}, "was 'promoter'"),
        ({}, "index below 3, was None"),
        ({"target": 0, "score": "probability"}, "`score` must be one of"),
        ({"target": 0, "score": lambda logits: logits[:, 0]}, "no meaning beside a callable"),
        ({"score": lambda logits: logits}, "one number per sequence"),
        ({"target": 0, "strands": "-"}, "`strands` must be"),
        ({"target": 0, "batch_size": 0}, "`batch_size` must be"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(GeneSpliceError, match=message):
        scan(tiny_bert(3), **options)


def test_logit_difference_needs_exclusive_labels():
    with pytest.raises(GeneSpliceError, match="exclude each other"):
        scan(tiny_bert(1), score="logit_difference")
    with pytest.raises(GeneSpliceError, match="exclude each other"):
        scan(tiny_bert(3, problem_type="multi_label_classification"), target=0, score="logit_difference")


def test_models_without_a_sequence_head_are_refused_with_advice():
    with pytest.raises(GeneSpliceError, match="returns no `logits`"):
        scan(tiny_bert().bert, target=0)
    with pytest.raises(GeneSpliceError, match="pass a callable `score`"):
        scan(ToyModel(torch.nn.Identity()))


def test_variant_rows_count_from_one_on_the_contig():
    result = scan(ToyModel(CountMotif("CCATG")))
    rows = variant_rows(result, chrom="chrIV", start_bp=1000)
    assert len(rows) == 3 * 24
    assert rows[0][:4] == ("chrIV", 1001, "A", "C")
    assert [row.delta for row in rows if row.position == 1008] == [-1, -1, -1]
    assert variant_rows(result)[0][:2] == ("sequence", 1)


def test_variant_table_says_units_and_reads_back(tmp_path):
    result = scan(ToyModel(CountMotif("CCATG")), start=2, end=20)
    path = write_variant_table(result, tmp_path / "variants.tsv", chrom="chrI", start_bp=9)
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    text = "\n".join(comments)
    assert "score(alt) - score(ref)" in text and "1-based" in text and "bases 3 to 20 of 25" in text
    assert "N there: 1" in text
    read = list(csv.DictReader(lines[len(comments) :], delimiter="\t"))
    rows = variant_rows(result, "chrI", 9)
    assert [(r["chrom"], int(r["position"]), r["ref"], r["alt"], float(r["delta"])) for r in read] == rows
    assert len(read) == 3 * 17


def fake_result(importance: list[float]) -> MutagenesisResult:
    scores = np.zeros((len(importance), 4), dtype=np.float32)
    scores[:, 1] = -3 * np.array(importance)
    return MutagenesisResult("A" * len(importance), scores, 0.0, 0, len(importance), "x", "logit")


def test_strongest_windows_are_greedy_and_disjoint():
    windows = strongest_windows(fake_result([0, 3, 3, 0, 1, 1, 5, 0]), width=2, n=3)
    assert [(w.start, w.end, w.importance) for w in windows] == [(1, 3, 6), (5, 7, 6), (3, 5, 1)]


def test_strongest_windows_leave_unscored_bases_out_and_may_be_fewer():
    windows = strongest_windows(fake_result([9, float("nan"), 1, 2, float("nan")]), width=2, n=3)
    assert [(w.start, w.end) for w in windows] == [(2, 4)]


@pytest.mark.parametrize("width, n", [(0, 1), (9, 1), (2, 0)])
def test_strongest_windows_refuse_impossible_demands(width, n):
    with pytest.raises(GeneSpliceError, match="must be"):
        strongest_windows(fake_result([1.0] * 8), width, n)


def test_reference_letters_place_values_at_the_sequence():
    letters = reference_letters("ATN", np.array([2.0, -1.0, 4.0]))
    assert letters[:2].tolist() == [[2, 0, 0, 0], [0, 0, 0, -1]]
    assert np.isnan(letters[2]).all()
    with pytest.raises(GeneSpliceError, match="one number per base"):
        reference_letters("AT", np.zeros(3))
