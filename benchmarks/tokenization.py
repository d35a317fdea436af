"""Times our DNA tokenizers against what users have, side by side in one run, one thread, identical ids asserted.

Peers: transformers' `EsmTokenizer` (used by Nucleotide Transformer) on our vocab.txt, `BertTokenizer` behind k-mer
text (the DNABERT path), a Rust WordLevel + Split tokenizer, and a slow character tokenizer. Every case repeats
"peer, ours, peer, ours, ..." and reports the ratio of the medians.

Run: `python -m benchmarks.tokenization [--rounds 7]`; writes benchmarks/results/tokenization.json.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import BertTokenizer, EsmTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from benchmarks.surroundings import environment
from genesplice_hf.tokenization.tokenization_kmer import KmerTokenizer
from genesplice_hf.tokenization.tokenization_nucleotide import NucleotideTokenizer
from genesplice_hf.tokenization.vocabularies import KMER_PRESETS, NUCLEOTIDE_PRESETS

SEED = 7
RESULTS = Path(__file__).parent / "results" / "tokenization.json"


class Case(NamedTuple):
    """One comparison: two functions that return the same ids, the bases they read, and the demanded ratio."""

    name: str
    peer: Callable[[], Any]
    ours: Callable[[], Any]
    n_bases: int
    demanded: float


class CharacterTokenizer(PreTrainedTokenizer):
    """A plain slow character tokenizer of the kind that HyenaDNA and Caduceus ship; written for this comparison."""

    def __init__(self, vocab: dict[str, int], **keywords: Any):
        self.ids = vocab
        super().__init__(**keywords)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return self.ids

    def _tokenize(self, text: str, **_keywords: Any) -> list[str]:
        return list(text.upper())

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.ids["[UNK]"])

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.ids)[index]

    def build_inputs_with_special_tokens(self, token_ids_0: list, token_ids_1: list | None = None) -> list:
        return [*token_ids_0, self.ids["[SEP]"]]


def random_dna(generator: np.random.Generator, n: int, length: int) -> list[str]:
    """Returns `n` random sequences of `length` bases."""
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[generator.integers(0, 4, size=(n, length))]
    return [row.tobytes().decode("ascii") for row in letters]


def saved_vocab(tokenizer: Any) -> str:
    """Writes the tokenizer's vocab.txt to a temporary folder and returns its path."""
    folder = tempfile.mkdtemp()
    tokenizer.save_vocabulary(folder)
    return os.path.join(folder, "vocab.txt")


def word_level(tokenizer: KmerTokenizer) -> PreTrainedTokenizerFast:
    """Builds the fastest Rust tokenizer of the same scheme: WordLevel behind a Split, nothing else."""
    rust = Tokenizer(WordLevel(tokenizer.get_vocab(), unk_token=tokenizer.unk_token))
    rust.pre_tokenizer = Split(Regex(tokenizer.rust_pattern()), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=rust, unk_token=tokenizer.unk_token)


def same_ids(first: Any, second: Any) -> bool:
    """Compares ids given as lists, arrays or tensors."""
    return np.array_equal(np.asarray(first), np.asarray(second))


def kmer_text(sequence: str, k: int) -> str:
    """Writes the overlapping k-mers of a sequence with spaces, as DNABERT's scripts do."""
    return " ".join(sequence[i : i + k] for i in range(len(sequence) - k + 1))


def non_overlapping_cases(generator: np.random.Generator) -> list[Case]:
    """Nucleotide Transformer's scheme against the slow library tokenizer and against Rust."""
    ours = KmerTokenizer(preset="nt_v1")
    esm = EsmTokenizer(saved_vocab(ours), unk_token="<unk>", pad_token="<pad>", eos_token=None)
    long, short = random_dna(generator, 16, 6000), random_dna(generator, 256, 250)
    rust = word_level(ours)

    def call(tokenizer: Any, texts: list[str], **options: Any) -> Callable[[], Any]:
        return lambda: tokenizer(texts, **options)["input_ids"]

    def one_by_one(tokenizer: Any, texts: list[str], **options: Any) -> Callable[[], Any]:
        return lambda: [tokenizer(text, **options)["input_ids"] for text in texts]

    bare = functools.partial(rust.backend_tokenizer.encode_batch_fast, add_special_tokens=False)
    plain = {"add_special_tokens": False}
    tensors = {"return_tensors": "pt"}
    return [
        Case("6 kb, batch of 16, tensors, vs EsmTokenizer", call(esm, long, **tensors), call(ours, long, **tensors),
             96_000, 60),
        Case("6 kb, one by one, tensors, vs EsmTokenizer", one_by_one(esm, long, **tensors),
             one_by_one(ours, long, **tensors), 96_000, 60),
        Case("6 kb, batch of 16, lists, vs EsmTokenizer", call(esm, long), call(ours, long), 96_000, 15),
        Case("250 bp, batch of 256, tensors, vs EsmTokenizer", call(esm, short, **tensors),
             call(ours, short, **tensors), 64_000, 50),
        Case("250 bp, batch of 64, tensors, vs EsmTokenizer", call(esm, short[:64], **tensors),
             call(ours, short[:64], **tensors), 16_000, 50),
        Case("6 kb, batch of 16, tensors, vs Rust WordLevel + Split", call(rust, long, **plain, **tensors),
             call(ours, long, **plain, **tensors), 96_000, 5),
        Case("6 kb, batch of 16, lists, vs Rust encode_batch_fast", lambda: [row.ids for row in bare(long)],
             call(ours, long, **plain), 96_000, 5),
        Case("6 kb, one by one, tensors, vs Rust WordLevel + Split", one_by_one(rust, long, **plain, **tensors),
             one_by_one(ours, long, **plain, **tensors), 96_000, 5),
    ]  # fmt: skip


def overlapping_cases(generator: np.random.Generator) -> list[Case]:
    """DNABERT's scheme against k-mer text and the library's BertTokenizer."""
    ours = KmerTokenizer(preset="dnabert6", model_max_length=10_000)
    bert = BertTokenizer(saved_vocab(ours), do_lower_case=False)
    texts = random_dna(generator, 16, 6000)
    small = random_dna(generator, 64, 500)
    ragged = [text[: int(end)] for text, end in zip(texts, generator.integers(3000, 6000, 16), strict=True)]
    padded = {"return_tensors": "pt", "padding": True}

    def peer(sequences: list[str], **options: Any) -> Callable[[], Any]:
        return lambda: bert([kmer_text(text, 6) for text in sequences], **options)["input_ids"]

    def mine(sequences: list[str], **options: Any) -> Callable[[], Any]:
        return lambda: ours(sequences, **options)["input_ids"]

    return [
        Case("6 kb, overlapping 6-mers, tensors, vs k-mer text + BertTokenizer", peer(texts, return_tensors="pt"),
             mine(texts, return_tensors="pt"), 96_000, 100),
        Case("500 bp, overlapping 6-mers, tensors, vs k-mer text + BertTokenizer", peer(small, return_tensors="pt"),
             mine(small, return_tensors="pt"), 32_000, 100),
        Case("3-6 kb ragged, overlapping 6-mers, vs k-mer text + BertTokenizer", peer(ragged, **padded),
             mine(ragged, **padded), sum(map(len, ragged)), 100),
    ]  # fmt: skip


def character_cases(generator: np.random.Generator) -> list[Case]:
    """Single bases against a slow character tokenizer."""
    ours = NucleotideTokenizer(preset="caduceus")
    slow = CharacterTokenizer(ours.get_vocab(), **ours.special_tokens_map)
    texts = random_dna(generator, 16, 6000)
    return [
        Case("6 kb, single bases, tensors, vs slow character tokenizer",
             lambda: slow(texts, return_tensors="pt")["input_ids"],
             lambda: ours(texts, return_tensors="pt")["input_ids"], 96_000, 40),
    ]  # fmt: skip


def seconds(function: Callable[[], Any], least: float = 0.02) -> float:
    """Returns the time of one call, from as many calls as fill `least` seconds."""
    calls, started = 0, time.perf_counter()
    while True:
        function()
        calls += 1
        passed = time.perf_counter() - started
        if passed >= least:
            return passed / calls


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Asserts equal ids, then times both sides in turn."""
    assert same_ids(case.peer(), case.ours()), case.name
    times = [(seconds(case.peer), seconds(case.ours)) for _ in range(rounds)]
    peer, ours = (statistics.median(side) for side in zip(*times, strict=True))
    return {
        "case": case.name,
        "peer_mbp_per_s": round(case.n_bases / peer / 1e6, 3),
        "ours_mbp_per_s": round(case.n_bases / ours / 1e6, 3),
        "ratio": round(peer / ours, 1),
        "demanded": case.demanded,
        "passed": peer / ours >= case.demanded,
    }


def construction(rounds: int) -> list[dict[str, Any]]:
    """Times the construction of every preset; at most 10 ms are allowed."""
    rows = []
    presets = [(KmerTokenizer, name) for name in KMER_PRESETS] + [(NucleotideTokenizer, n) for n in NUCLEOTIDE_PRESETS]
    for build, name in presets:
        taken = statistics.median(seconds(lambda b=build, n=name: b(preset=n), 0.0) for _ in range(rounds))
        milliseconds = round(taken * 1e3, 3)
        rows.append({"preset": name, "milliseconds": milliseconds, "demanded": 10, "passed": milliseconds < 10})
    return rows


def main() -> None:
    """Runs all cases, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions of every case")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    generator = np.random.default_rng(SEED)
    rows = []
    for case in [*non_overlapping_cases(generator), *overlapping_cases(generator), *character_cases(generator)]:
        rows.append(measure(case, arguments.rounds))
        print(
            "{case:<72}{peer_mbp_per_s:>8} {ours_mbp_per_s:>8} Mbp/s  x{ratio:<6} (>= {demanded})".format(**rows[-1])
        )
    built = construction(arguments.rounds)
    slowest = max(built, key=lambda row: row["milliseconds"])
    print(f"slowest construction: {slowest['preset']} {slowest['milliseconds']} ms (< 10)")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(SEED, threads=1), "cases": rows, "construction": built}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    missed = [row["case"] for row in rows if not row["passed"]]
    print("all ratios met" if not missed else f"missed: {missed}")
    if missed or any(not row["passed"] for row in built):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
