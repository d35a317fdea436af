"""`KmerTokenizer`: k bases per token, side by side (Nucleotide Transformer) or overlapping (DNABERT).

R sequences, N bases of a sequence, T tokens of the batch.
"""

import functools
from typing import Any

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.base import DnaTokenizer
from genesplice_hf.tokenization.batches import Batch, Tokens
from genesplice_hf.tokenization.kmer_codes import (
    complement_codes,
    kmers_at,
    pack_kmers,
    roll_kmers,
    touches,
)
from genesplice_hf.tokenization.kmer_decoding import KmerDecoder
from genesplice_hf.tokenization.kmer_runs import BY_LETTER, KMER, N_TOKEN, NOTHING, Roles, Scheme, plan_roles
from genesplice_hf.tokenization.kmer_text import join_kmer_text
from genesplice_hf.tokenization.normalizer import ILLEGAL, UNKNOWN
from genesplice_hf.tokenization.offsets import kmer_logits_to_base
from genesplice_hf.tokenization.special_text import (
    CODE_ILLEGAL,
    CODE_N,
    CODE_SPECIAL,
    CODE_UNKNOWN,
    FIRST_MARK,
    WrittenSpecials,
)
from genesplice_hf.tokenization.vocabularies import (
    KMER_PRESETS,
    MAX_K,
    Preset,
    Vocabulary,
    genesplice_vocabulary,
    roles_in,
)

_MODES = {
    "remainder": ("single", "pad_n", "drop", "unk"),
    "short": ("single", "pad_n", "drop", "unk", "error"),
    "kmer_with_n": ("restart", "unk"),
    "collapse_n": ("none", "kmer"),
}


class KmerTokenizer(DnaTokenizer):
    """Tokenizes k-mers, non-overlapping (`stride=k`) or overlapping (`stride=1`).

    Non-overlapping: k-mers are cut from the left of every N-free run, the remainder becomes single bases, every N
    is its own token and the cutting restarts after it. Overlapping: one token per window of k bases, a window with
    N is unknown; k-mer text ("ACGTAC CGTACG ...") is accepted too.

    Args:
        k: bases per token, 2..12; default: as the preset or file, else 6.
        stride: bases from one token to the next, 1 or k; default: as the preset, else k.
        alphabet: order of the bases that defines ids, for new vocabularies ("ACGT"); presets have their own.
        preset: "nt_v1", "nt_v2", "nt_v2_3mer", "dnabert3" ... "dnabert6", or None: our own order (ten head tokens,
            then the k-mers).
        vocab_file, tokenizer_file: files that define the ids (line number = id), see `NucleotideTokenizer`.
        lowercase, iupac, rna, seed: see `SequenceNormalizer`.
        remainder: what the last r < k bases of a longer run become: "single" bases, "pad_n" (padded with N to one
            k-mer, which is one unknown token), "drop", or "unk" (one unknown token per base).
        short: the same for runs shorter than k, or "error".
        kmer_with_n: "restart" (N is its own token) or "unk" (k-mers may hold N and are then unknown).
        phase: number of bases emitted singly before the first k-mer (non-overlapping only).
        collapse_n: "none", or "kmer": k successive N, counted from the start of an N run, become one N token.
        max_piece: cut long sequences into pieces of that many tokens, each with its own special tokens (DNABERT).
        max_piece_compat: reproduce the reference, which appends an empty piece to n = 510, 1020, ... tokens.
        add_prefix, add_suffix, return_soft_mask, return_offsets, padding_side, unk_token, pad_token, cls_token,
        sep_token, mask_token, bos_token, eos_token, library: see `NucleotideTokenizer`.

    Raises:
        SequenceError: an option or a file that does not fit; on calls, letters or lengths that the rules refuse.

    Example:
        >>> KmerTokenizer(preset="nt_v1").tokenize("ACGTGTACNTG")
        ['ACGTGT', 'A', 'C', 'N', 'T', 'G']
    """

    preset_names = KMER_PRESETS

    def __init__(
        self,
        k: int | None = None,
        stride: int | None = None,
        alphabet: str | None = None,
        preset: str | None = None,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        lowercase: str = "upper",
        iupac: str = "N",
        rna: str = "U->T",
        seed: int = 0,
        remainder: str = "single",
        short: str | None = None,
        kmer_with_n: str | None = None,
        phase: int = 0,
        collapse_n: str = "none",
        max_piece: int | None = None,
        max_piece_compat: bool = False,
        add_prefix: bool | str | list[str] | None = None,
        add_suffix: bool | str | list[str] | None = None,
        return_soft_mask: bool = False,
        return_offsets: bool = False,
        padding_side: str = "right",
        unk_token: Any = None,
        pad_token: Any = None,
        cls_token: Any = None,
        sep_token: Any = None,
        mask_token: Any = None,
        bos_token: Any = None,
        eos_token: Any = None,
        **library: Any,
    ):
        self._wanted_stride = stride
        default = None if preset else _new_vocabulary(6 if k is None else k, alphabet or "ACGT")
        facts = self._choose_vocabulary(preset, vocab_file, tokenizer_file, default)
        self._check_agreement(facts, k, alphabet)
        k = int(facts.vocabulary.k or 0)
        stride = (facts.stride if self.preset else k) if stride is None else stride
        overlapping = stride < k
        options = {
            "k": k, "stride": stride, "alphabet": facts.vocabulary.alphabet, "preset": self.preset,
            "lowercase": lowercase, "iupac": iupac, "rna": rna, "seed": seed, "remainder": remainder,
            "short": short or ("pad_n" if overlapping else "single"),
            "kmer_with_n": kmer_with_n or ("unk" if overlapping else "restart"), "phase": phase,
            "collapse_n": collapse_n, "max_piece": max_piece, "max_piece_compat": max_piece_compat,
            "add_prefix": add_prefix, "add_suffix": add_suffix, "return_soft_mask": return_soft_mask,
            "return_offsets": return_offsets, "padding_side": padding_side, "unk_token": unk_token,
            "pad_token": pad_token, "cls_token": cls_token, "sep_token": sep_token, "mask_token": mask_token,
            "bos_token": bos_token, "eos_token": eos_token,
        }  # fmt: skip
        _check_options(options)
        self._set_up(facts, options, library)

    def _facts_of_file(self, listed: Vocabulary) -> Preset:
        roles, named = roles_in(listed), listed.named()
        stride = listed.k if self._wanted_stride is None else self._wanted_stride
        prefix = ("<cls>",) if "<cls>" in named else ("[CLS]",) if stride == 1 and "[CLS]" in named else ()
        suffix = ("[SEP]",) if stride == 1 and "[SEP]" in named else ()
        return Preset(listed, stride or 1, roles, prefix, suffix)

    def _check_agreement(self, facts: Preset, k: int | None, alphabet: str | None) -> None:
        found = facts.vocabulary
        if found.k is None:
            raise SequenceError("`vocab_file` holds no k-mers; use NucleotideTokenizer for single bases.")
        if k is not None and k != found.k:
            raise SequenceError(f"`k` is {k} but the preset or file has {found.k}-mers; leave one of them out.")
        if alphabet is not None and alphabet != found.alphabet:
            raise SequenceError(
                f"`alphabet` is {alphabet!r} but the preset or file orders k-mers as {found.alphabet!r}; "
                "leave one of them out."
            )

    def _prepare_tables(self) -> None:
        super()._prepare_tables()
        self._scheme = Scheme(
            self.k, self.stride, self.phase, self.remainder, self.short, self.kmer_with_n, self.collapse_n
        )
        answers = {base: code for code, base in enumerate(self.alphabet)}
        answers |= {"N": CODE_N, chr(UNKNOWN): CODE_UNKNOWN, chr(ILLEGAL): CODE_ILLEGAL}
        known = {ord(letter): code for letter, code in answers.items()}
        self._table = bytes(known[letter] for letter in self.normalizer.table)
        singles = [self._letter_id(base, self._unknown_id) for base in self.alphabet]
        self._id_type = np.uint16 if self.vocabulary.size <= 2**16 else np.uint32
        self._single_ids = np.array([*singles, self._n_id, self._unknown_id], dtype=np.int64)

    def _read(self, text: Any, text_pair: Any, is_split_into_words: bool) -> Batch:
        if is_split_into_words and self.stride < self.k:
            raise SequenceError(
                "`is_split_into_words` cannot say whether the pieces overlap; join k-mers with spaces instead."
            )
        batch = super()._read(text, text_pair, is_split_into_words)
        return join_kmer_text(batch, self.k) if self.stride < self.k and b" " in batch.buffer else batch

    def _segment(self, batch: Batch) -> Tokens:
        codes = np.frombuffer(batch.buffer.translate(self._table), dtype=np.uint8)
        highest = int(codes.max(initial=0))
        width = batch.width
        if highest < CODE_N and width is not None and width >= self.k:
            block = codes.reshape(-1, width)
            if self.stride < self.k:
                return self._overlapping_block(block)
            if self.remainder == "single":
                return self._side_by_side_block(block)
        return self._by_runs(codes, batch, highest)

    def _ids_of_codes(self, codes: np.ndarray) -> np.ndarray:
        """Turns k-mer codes into ids; `codes` is overwritten where its type allows."""
        table = self.vocabulary.kmer_ids
        if table is None:
            ids = codes.astype(self._id_type, copy=False)
            ids += self._id_type(self.vocabulary.kmer_offset)
            return ids
        ids = table[codes]
        return np.where(ids < 0, self._unknown_id, ids)

    def _side_by_side_block(self, block: np.ndarray) -> Tokens:
        rows, n_bases = block.shape
        phase, k = self.phase, self.k
        kmers = (n_bases - phase) // k
        end = phase + kmers * k
        packed = pack_kmers(block[:, phase:end].reshape(-1, k))
        ids = self._ids_of_codes(packed).reshape(rows, kmers)
        if phase or end < n_bases:
            ids = np.concatenate([self._single_ids[block[:, :phase]], ids, self._single_ids[block[:, end:]]], axis=1)
        count = ids.shape[1]
        spans = functools.partial(_block_spans, rows, n_bases, phase, end, k)
        return Tokens(ids.ravel(), np.full(rows, count), spans, count)

    def _overlapping_block(self, block: np.ndarray) -> Tokens:
        ids = self._ids_of_codes(roll_kmers(block, self.k))
        rows, count = ids.shape
        counts = np.full(rows, count)
        return Tokens(ids.ravel(), counts, lambda: _window_spans(counts, self.k), count)

    def _by_runs(self, codes: np.ndarray, batch: Batch, highest: int) -> Tokens:
        written = None
        if highest >= FIRST_MARK:
            codes = codes.copy()
            written = self._mark(codes, batch)
        plan = plan_roles(codes, batch, self._scheme)
        counts = plan.counts(batch)
        ids = self._ids_of_roles(plan.role, codes)
        if written is not None:
            ids[codes[plan.role != NOTHING] == CODE_SPECIAL] = written.ids
        width = int(counts[0]) if counts.size == 1 else None
        return Tokens(ids, counts, lambda: self._run_spans(plan, counts, batch, written), width)

    def _run_spans(
        self, plan: Roles, counts: np.ndarray, batch: Batch, written: WrittenSpecials | None
    ) -> tuple[np.ndarray, np.ndarray]:
        start, size = plan.spans(self.k)
        if written is not None:
            size[np.searchsorted(start, written.position)] = written.size
        start = start - np.repeat(batch.starts, counts)
        return start, start + size

    def _ids_of_roles(self, role: np.ndarray, codes: np.ndarray) -> np.ndarray:
        token = role != NOTHING
        kept = role[token]
        is_kmer = kept == KMER
        found = self._ids_of_kmers(role, codes) if codes.size >= self.k else np.zeros(0, dtype=self._id_type)
        if found.size == kept.size and len(self) <= self.vocabulary.size:
            return found
        ids = np.full(kept.size, self._unknown_id, dtype=np.uint16 if len(self) <= 2**16 else np.uint32)
        by_letter = kept == BY_LETTER
        ids[by_letter] = self._ids_of_letters(codes[token][by_letter])
        ids[kept == N_TOKEN] = self._n_id
        ids[is_kmer] = found
        return ids

    def _ids_of_letters(self, letters: np.ndarray) -> np.ndarray:
        # Six comparisons, not a lookup: numpy would widen every letter to an eight-byte index.
        ids = np.full(letters.size, self._unknown_id, dtype=self._id_type)
        for code, single in enumerate(self._single_ids.tolist()):
            ids[letters == code] = single
        return ids

    def _ids_of_kmers(self, role: np.ndarray, codes: np.ndarray) -> np.ndarray:
        begins = role[: codes.size - self.k + 1] == KMER
        if self.stride < self.k:
            found = self._ids_of_codes(roll_kmers(codes & 3, self.k)[begins])
        else:
            found = self._ids_of_codes(kmers_at(codes & 3, np.flatnonzero(begins), self.k))
        if self.kmer_with_n == "unk":
            found[touches(codes >= CODE_N, self.k)[begins]] = self._unknown_id
        return found

    def _decoder(self) -> KmerDecoder:
        # Made on first use: its tables have one entry per token, which construction must not pay for.
        if "_cached_decoder" not in self.__dict__:
            self._cached_decoder = KmerDecoder(self)
        return self._cached_decoder

    def _bases(self, ids: np.ndarray) -> str:
        self._check_ids(ids)
        return self._decoder().decode(ids)

    def _complement_ids(self) -> np.ndarray:
        if "_cached_complement" not in self.__dict__:
            self._cached_complement = self._build_complement()
        return self._cached_complement

    def _build_complement(self) -> np.ndarray:
        table = np.arange(len(self))
        table[: self.vocabulary.size] = np.arange(self.vocabulary.size)
        table[self.kmer_token_ids] = self._ids_of_codes(complement_codes(self.k, self.alphabet))
        for base, other in zip("ACGT", "TGCA", strict=True):
            if self.vocabulary.id_of(base) is not None:
                table[self.vocabulary.id_of(base)] = self._letter_id(other, self._unknown_id)
        return table

    def _check_reversible(self, body: np.ndarray) -> None:
        leftovers = body[np.isin(body, self._single_ids[:4]) & (body != self._unknown_id)]
        if self.stride == self.k and leftovers.size:
            raise SequenceError(
                f"`ids` hold {leftovers.size} single-base tokens: a run is no multiple of {self.k} bases and the "
                "other strand has another frame; tokenize the reverse complement of the text instead."
            )

    @property
    def kmer_token_ids(self) -> np.ndarray:
        """(4^k,) ids of all k-mers in the order of `alphabet`; unknown where a file lacks the k-mer."""
        return self._ids_of_codes(np.arange(4**self.k)).astype(np.int64)

    @property
    def nucleotide_token_ids(self) -> list[int] | None:
        """Ids of the single-base tokens A, C, G, T, in this order; None where the vocabulary has none."""
        found = [self.vocabulary.id_of(base) for base in "ACGT"]
        return None if None in found else found  # type: ignore[return-value]

    def kmer_logits_to_base(self, logits: Any, offset_in_token: int) -> Any:
        """Returns (..., 4) log-probabilities of A, C, G, T at `offset_in_token` from (..., vocabulary) logits.

        See `offsets.kmer_logits_to_base`; logits beyond the embedded tokens are not needed.
        """
        return kmer_logits_to_base(logits, offset_in_token, self.kmer_token_ids, self.alphabet)

    def rust_pattern(self) -> str | None:
        """Splits into k-mers and single letters; None for schemes that Rust cannot express."""
        rules = (self.remainder, self.short, self.kmer_with_n, self.collapse_n)
        if rules != ("single", "single", "restart", "none") or self.stride < self.k:
            return None
        return f"[ACGT]{{{self.k}}}|." if self.phase == 0 and self.iupac != "random" else None


def _new_vocabulary(k: int, alphabet: str) -> Vocabulary:
    if not isinstance(k, int) or not 2 <= k <= MAX_K:
        raise SequenceError(f"`k` must be a whole number 2..{MAX_K}, it was {k}; for k=1 use NucleotideTokenizer.")
    if sorted(alphabet) != list("ACGT"):
        raise SequenceError(f"`alphabet` must hold A, C, G and T once each, it was {alphabet!r}.")
    return genesplice_vocabulary(k, alphabet)


def _check_options(options: dict[str, Any]) -> None:
    k, stride = options["k"], options["stride"]
    if stride not in (1, k):
        raise SequenceError(f"`stride` must be 1 or k ({k}), it was {stride}.")
    for name, allowed in _MODES.items():
        if options[name] not in allowed:
            raise SequenceError(f"`{name}` must be one of {allowed}, it was {options[name]!r}.")
    if not isinstance(options["phase"], int) or not 0 <= options["phase"] < k:
        raise SequenceError(f"`phase` must be 0..{k - 1}, it was {options['phase']!r}.")
    if stride == 1 and (options["phase"] or options["remainder"] != "single"):
        raise SequenceError("`phase` and `remainder` have no meaning for overlapping k-mers (`stride=1`); leave them.")
    if options["max_piece"] is not None and (stride != 1 or options["max_piece"] < 1):
        raise SequenceError("`max_piece` must be at least 1 and is for overlapping k-mers (`stride=1`) only.")
    if options["max_piece_compat"] and options["max_piece"] is None:
        raise SequenceError("`max_piece_compat` needs `max_piece`; the reference uses 510.")


def _block_spans(rows: int, n_bases: int, phase: int, end: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.concatenate([np.arange(phase), np.arange(phase, end, k), np.arange(end, n_bases)])
    ends = np.append(starts[1:], n_bases)
    return np.tile(starts, rows), np.tile(ends, rows)


def _window_spans(counts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts, starts + k
