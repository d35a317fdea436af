"""Gene names, protein stores and stored embeddings, against tables by hand and arrays that are known."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from transformers import EsmConfig, EsmModel, EsmTokenizer

from genesplice_hf.data.embedding_store import EmbeddingStore, EncoderIdentity, write_embeddings
from genesplice_hf.data.gene_names import parse_factor
from genesplice_hf.data.protein_embeddings import (
    ArrayFolder,
    FactorEmbeddings,
    FactorResidues,
    TransformersEncoder,
    embed_proteins,
    merge_windows,
    window_starts,
)
from genesplice_hf.data.proteins import ProteinStore, clean_protein, residue_ids
from genesplice_hf.data.uniprot import download_proteins, query_address
from genesplice_hf.errors import DataError

MULTI_FASTA = """\
>sp|P49711|CTCF_HUMAN Transcriptional repressor CTCF OS=Homo sapiens OX=9606 GN=CTCF PE=1 SV=1
MEGDAVEAIV
EESETFIKGK
>sp|P49711-2|CTCF_HUMAN Isoform 2 of CTCF OS=Homo sapiens OX=9606 GN=CTCF
MEGDAVEAIVEESETFIKGKERKTYQRR
>tr|A0A000|A0A000_HUMAN Uncharacterized OS=Homo sapiens GN=CTCF
MEGDAVEAIVEESETFIKGKERKTYQRRRRRRRRRRRRR
>sp|Q61164|CTCF_MOUSE Transcriptional repressor CTCF OS=Mus musculus OX=10090 GN=Ctcf
MEGEAVEAIVEESETFIKGK
>sp|P61244|MAX_HUMAN Protein max GN=MAX
MSDNDDIEVE
>sp|P01106|MYC_HUMAN Myc GN=MYC
MPLNVSFTNR
>NKX2-2.O95096_HUMAN
MSLTNTKTGF
>HLA-DRA
MAISGVPVLG
>SPI1.Q8_MOUSE
MLQACKMEGF
"""


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fasta"
    path.write_text(MULTI_FASTA)
    return path


@pytest.fixture
def store(fasta):
    return ProteinStore(fasta)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("CTCF", ("CTCF",)),
        ("NKX2-1", ("NKX2-1",)),
        ("NKX2-5_phospho", ("NKX2-5",)),
        ("SMAD2-3", ("SMAD2", "SMAD3")),
        ("SMAD2-3-4_TGFb", ("SMAD2", "SMAD3", "SMAD4")),
        ("RXR", ("RXRA",)),
        ("RXR_atra", ("RXRA",)),
        ("RARA-RXR", ("RARA", "RXRA")),
        ("SS18-SSX", ("Q8IZH1",)),
        ("SS18-SSX_dox", ("Q8IZH1",)),
        ("ESR1_phospho", ("ESR1",)),
        ("MAX-MYC_x", ("MAX", "MYC")),
        ("A1-B1-C1", ("A1", "B1", "C1")),
    ],
)
def test_factor_names_without_a_store(name, parts):
    assert parse_factor(name) == parts


def test_names_that_the_store_knows_win_over_splitting(store):
    assert store.names("NKX2-2") == ("NKX2-2",)
    assert store.names("NKX2-2_HA") == ("NKX2-2",)
    assert store.names("HLA-DRA") == ("HLA-DRA",)
    assert parse_factor("NKX2-2") == ("NKX2-2"[:4], "NKX2")  # the rule alone would split it
    assert parse_factor("ABC-X1", whole=["ABC-X1"]) == ("ABC-X1",)
    assert parse_factor("RXR", known=lambda name: name == "RXR") == ("RXR",)


@pytest.mark.parametrize("name", ["", "_x", "MAX-", "-MYC", "A--B"])
def test_factor_names_with_an_empty_part_are_refused(name):
    with pytest.raises(DataError, match="empty part"):
        parse_factor(name)


def test_residues_are_cleaned():
    assert clean_protein("mkUZOBJx*") == "MKXXXXXX"
    assert residue_ids("ACYX").tolist() == [0, 1, 19, 21]
    for bad, place in (("MK*L", 3), ("MK-L", 3), ("MK1", 3), ("MK**", 3)):
        with pytest.raises(DataError, match=f"residue {place}"):
            clean_protein(bad, "P1")
    for empty in ("", "*", "  "):
        with pytest.raises(DataError, match="empty"):
            clean_protein(empty)


def test_lookup_by_gene_and_accession(store):
    assert len(store) == 9
    assert store.get("ctcf").accession == "P49711"
    assert store.get("Q61164").species == "mouse"
    assert store.get("P49711-2").sequence.endswith("RKTYQRR")
    assert store.get("SPI1") == store.get("Q8")
    assert not store.get("SPI1").reviewed and store.get("MAX").reviewed
    assert "MAX" in store and "max" in store and "NOPE" not in store and 3 not in store
    with pytest.raises(DataError, match="nearest gene is 'MYC'"):
        store.get("MYCX")


def test_which_of_several_entries(fasta):
    assert ProteinStore(fasta, choose="longest").get("CTCF").accession == "A0A000"
    assert ProteinStore(fasta, choose="first").get("CTCF").accession == "P49711"
    assert ProteinStore(fasta, species=("mouse", "human")).get("CTCF").accession == "Q61164"
    with pytest.raises(DataError, match="`choose`"):
        ProteinStore(fasta, choose="best")


def test_isoforms_are_drawn_only_when_asked_and_only_of_the_best_species(fasta):
    sampling = ProteinStore(fasta, sample_isoform=True)
    rng = np.random.default_rng(0)
    assert {sampling.get("CTCF", rng).accession for _ in range(60)} == {"P49711", "P49711-2", "A0A000"}
    assert {sampling.get("CTCF").accession for _ in range(5)} == {"P49711"}
    assert {ProteinStore(fasta).get("CTCF", rng).accession for _ in range(20)} == {"P49711"}


def test_complexes(store):
    found = store.complex("MAX-MYC_x")
    assert [protein.gene for protein in found.subunits] == ["MAX", "MYC"] and found.missing == ()
    assert store.has("MAX-MYC") and not store.has("MAX-JUN") and store.has("MAX-JUN", allow_partial=True)
    with pytest.raises(DataError, match="has no JUN"):
        store.complex("MAX-JUN")
    partial = store.complex("MAX-JUN", allow_partial=True)
    assert [protein.gene for protein in partial.subunits] == ["MAX"] and partial.missing == ("JUN",)
    with pytest.raises(DataError, match="has no JUN, FOS"):
        store.complex("JUN-FOS", allow_partial=True)


def test_a_folder_of_fasta_files(tmp_path):
    (tmp_path / "CTCF.P49711_HUMAN.fasta").write_text(">sp|P49711|CTCF_HUMAN x\nMEGDAVEAIV\n")
    (tmp_path / "HLA-A.P04439_HUMAN.fasta").write_text(">whatever\nMAVMAPRTLL*\n")
    (tmp_path / "SPI1.P17433_MOUSE.fa.gz").write_bytes(gzip.compress(b">x\nmlqackmegf\n"))
    (tmp_path / "notes.txt").write_text("no FASTA")
    store = ProteinStore(tmp_path)
    assert {one.gene: (one.accession, one.species, one.sequence) for one in store} == {
        "CTCF": ("P49711", "human", "MEGDAVEAIV"),
        "HLA-A": ("P04439", "human", "MAVMAPRTLL"),
        "SPI1": ("P17433", "mouse", "MLQACKMEGF"),
    }
    assert store.complex("HLA-A").subunits[0].accession == "P04439"


def test_damaged_protein_files(tmp_path):
    path = tmp_path / "p.fasta"
    with pytest.raises(DataError, match="existing file"):
        ProteinStore(path)
    path.write_text(">A\nMK*L\n")
    with pytest.raises(DataError, match=r"'A' holds '\*' at residue 3"):
        ProteinStore(path)
    path.write_text(">A.P1_HUMAN\nMKL\n>B.P1_HUMAN\nMKV\n")
    with pytest.raises(DataError, match="'P1' with two sequences"):
        ProteinStore(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no FASTA file"):
        ProteinStore(tmp_path / "empty")


class Counting:
    """States that name each residue's letter and its place in the window."""

    def __init__(self, name="count", dtype="float32"):
        self.identity = EncoderIdentity(name, dtype=dtype)
        self.seen = []

    def __call__(self, sequences):
        self.seen += sequences
        return [np.array([[ord(letter), at] for at, letter in enumerate(one)], dtype=np.float64) for one in sequences]


def test_embeddings_are_written_once_and_read_back(store, tmp_path):
    encoder = Counting()
    embeddings = embed_proteins(store, encoder, tmp_path / "e", batch_size=4)
    assert len(encoder.seen) == len(embeddings) == 9 and embeddings.width == 2
    for protein in store:
        expected = encoder([protein.sequence])[0]
        np.testing.assert_array_equal(embeddings[protein.sequence], expected)
    again = Counting()
    embed_proteins(store, again, tmp_path / "e")
    assert again.seen == []
    with pytest.raises(DataError, match="name 'count', not 'other'"):
        embed_proteins(store, Counting("other"), tmp_path / "e")
    with pytest.raises(DataError, match="layer -1, not 5"):
        EmbeddingStore(tmp_path / "e", EncoderIdentity("count", layer=5, dtype="float32"))
    with pytest.raises(DataError, match="holds no embedding of 'MKV'"):
        embeddings["MKV"]
    assert (pickle.loads(pickle.dumps(embeddings))["MSDNDDIEVE"] == embeddings["MSDNDDIEVE"]).all()


def test_long_proteins_in_windows(tmp_path):
    (tmp_path / "p.fa").write_text(">L\n" + "ACDEFGHIKL" * 3 + "\n>S\nMKV\n")
    store, sequence = ProteinStore(tmp_path / "p.fa"), "ACDEFGHIKL" * 3
    encoder = Counting()
    got = embed_proteins(store, encoder, tmp_path / "w", max_length=12, overlap=4)[sequence]
    places = [[] for _ in sequence]
    for start in (0, 8, 16, 18):
        for at in range(start, start + 12):
            places[at].append(at - start)
    np.testing.assert_allclose(got[:, 1], [np.mean(place) for place in places], rtol=1e-6)
    np.testing.assert_allclose(got[:, 0], [ord(letter) for letter in sequence])
    cut = embed_proteins(store, encoder, tmp_path / "t", max_length=12, overflow="truncate", overlap=4)[sequence]
    assert len(cut) == 12
    with pytest.raises(DataError, match="L has 30 residues"):
        embed_proteins(store, encoder, tmp_path / "x", max_length=12, overflow="error", overlap=4)
    assert window_starts(30, 12, 0) == [0] and window_starts(12, 12, 8) == [0] and window_starts(13, 12, 8) == [0, 1]
    assert len(merge_windows([np.ones((12, 1))] * 2, [0, 1])) == 13


def test_encoders_must_give_one_finite_state_per_residue(store, tmp_path):
    class WithSpecials(Counting):
        def __call__(self, sequences):
            return [np.zeros((len(one) + 2, 2)) for one in sequences]

    with pytest.raises(DataError, match="special tokens"):
        embed_proteins(store, WithSpecials(), tmp_path / "s")

    class Huge(Counting):
        def __call__(self, sequences):
            return [np.full((len(one), 2), 1e6) for one in sequences]

    with pytest.raises(DataError, match="float32"):
        embed_proteins(store, Huge(dtype="float16"), tmp_path / "h")
    with pytest.raises(DataError, match="no"):
        EmbeddingStore(tmp_path / "nowhere")
    with pytest.raises(DataError, match="shape"):
        write_embeddings(tmp_path / "z", EncoderIdentity("z"), [("A", np.zeros((2, 3))), ("B", np.zeros((2, 4)))])


def test_shards_and_their_index(tmp_path):
    identity = EncoderIdentity("many", dtype="float32")
    arrays = {f"p{at}": np.full((at + 1, 4), at, dtype=np.float32) for at in range(20)}
    assert write_embeddings(tmp_path, identity, arrays.items(), shard_bytes=256) == 20
    assert write_embeddings(tmp_path, identity, arrays.items()) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    store = EmbeddingStore(tmp_path, identity)
    assert all((store[name] == array).all() and len(store[name]) == len(array) for name, array in arrays.items())
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not an index"):
        EmbeddingStore(tmp_path)


@pytest.fixture
def esm(tmp_path):
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        pad_token_id=1, mask_token_id=32, max_position_embeddings=64, position_embedding_type="rotary",
        token_dropout=False,
    )  # fmt: skip
    return EsmModel(config, add_pooling_layer=False), EsmTokenizer(str(tmp_path / "vocab.txt"))


def test_esm_states_without_special_tokens_whatever_the_batch(esm, store, tmp_path):
    model, tokenizer = esm
    encoder = TransformersEncoder(model, tokenizer, revision="tiny", dtype="float32")
    embeddings = embed_proteins(store, encoder, tmp_path / "esm", batch_size=3)
    for protein in store:
        with torch.no_grad():
            states = model(**tokenizer(protein.sequence, return_tensors="pt")).last_hidden_state[0, 1:-1]
        assert embeddings[protein.sequence].shape == (len(protein.sequence), 16)
        np.testing.assert_allclose(embeddings[protein.sequence], states.numpy(), atol=2e-6)
    factor = FactorEmbeddings(store, embeddings)("MAX-MYC")
    assert factor.states.shape == (20, 16) and factor.chain_ids.tolist() == [0] * 10 + [1] * 10
    ids = FactorResidues(store)("MAX-MYC").states
    assert ids.tolist() == [*residue_ids("MSDNDDIEVE"), *residue_ids("MPLNVSFTNR")]


def test_ready_arrays_are_read_and_never_unpickled(tmp_path):
    (tmp_path / "p.fa").write_text(">P1\nMKV\n")
    store = ProteinStore(tmp_path / "p.fa")
    np.save(tmp_path / "P1.npy", np.arange(9.0).reshape(3, 3))
    got = embed_proteins(store, ArrayFolder(tmp_path, store, "af2"), tmp_path / "e")
    np.testing.assert_array_equal(got["MKV"], np.arange(9.0).reshape(3, 3))
    np.save(tmp_path / "P1.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match="plain npy"):
        embed_proteins(store, ArrayFolder(tmp_path, store, "af2", revision="2"), tmp_path / "f")


def test_download_asks_in_parts_and_writes_one_fasta(tmp_path):
    asked = []

    def fetch(address):
        asked.append(address)
        return b">sp|P49711|CTCF_HUMAN GN=CTCF\nMEGD\n>sp|P61244|MAX_HUMAN GN=MAX\nMSDN\n" if len(asked) == 1 else b""

    out = tmp_path / "p.fasta"
    assert download_proteins([f"G{at}" for at in range(60)], out, fetch=fetch) == 2
    assert len(asked) == 2 and len(ProteinStore(out)) == 2
    assert "organism_id%3A10090" in query_address(["Ctcf"], 10090) and "reviewed" not in query_address(["A"], 1, False)
    with pytest.raises(DataError, match="new file"):
        download_proteins(["CTCF"], out, fetch=fetch)
    with pytest.raises(DataError, match="no sequence"):
        download_proteins(["NOPE"], tmp_path / "q.fasta", fetch=lambda address: b"")
