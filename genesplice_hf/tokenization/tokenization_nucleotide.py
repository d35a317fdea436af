"""One token per base: `NucleotideTokenizer` for sequences, `MSATokenizer` for rows of an alignment.

R sequences, T bases of the batch.
"""

from typing import Any

import numpy as np

from genesplice_hf.errors import SequenceError
from genesplice_hf.genome.alphabet import complement
from genesplice_hf.tokenization.base import DnaTokenizer
from genesplice_hf.tokenization.batches import Batch, Tokens
from genesplice_hf.tokenization.normalizer import ILLEGAL, UNKNOWN
from genesplice_hf.tokenization.special_text import CODE_ILLEGAL, CODE_SKIP, FIRST_MARK, WrittenSpecials
from genesplice_hf.tokenization.vocabularies import NUCLEOTIDE_PRESETS


class NucleotideTokenizer(DnaTokenizer):
    """Tokenizes single bases, in the id orders of the published models or of a vocabulary file.

    Every base is one token and position i of a row without prefix is base i. Lower case is folded, ambiguity
    codes become N (or the unknown token), any other letter raises with its position.

    Args:
        preset: "genesplice" (default), "hyenadna", "caduceus", "gpn", "plantcaduceus" or "enformer".
        vocab_file: vocab.txt whose line numbers are the ids; a `preset` given beside it must agree with it.
        tokenizer_file: tokenizer.json to read the tokens from when there is no `vocab_file`.
        lowercase, iupac, rna, seed: see `SequenceNormalizer`.
        add_prefix, add_suffix: special tokens around every sequence: None = as the preset, True = `cls_token` /
            `sep_token`, False = none, or a list of tokens.
        return_soft_mask, return_offsets: add `soft_mask` / `offset_mapping` to every result.
        padding_side: "right" or "left".
        unk_token, pad_token, cls_token, sep_token, mask_token, bos_token, eos_token: None = as the preset.
        library: keyword arguments of `PreTrainedTokenizer` (`model_max_length`, ...); others raise TypeError.

    Raises:
        SequenceError: an option or a file that does not fit; on calls, letters that the rules refuse.

    Example:
        >>> NucleotideTokenizer()("ACGTN")["input_ids"]
        [5, 6, 7, 8, 9]
    """

    preset_names: tuple[str, ...] = NUCLEOTIDE_PRESETS
    default_preset = "genesplice"

    def __init__(
        self,
        preset: str | None = None,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        lowercase: str = "upper",
        iupac: str = "N",
        rna: str = "U->T",
        seed: int = 0,
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
        if preset is None and vocab_file is None and tokenizer_file is None:
            preset = self.default_preset
        facts = self._choose_vocabulary(preset, vocab_file, tokenizer_file, None)
        if facts.vocabulary.k is not None or facts.vocabulary.size > FIRST_MARK:
            raise SequenceError(
                f"`vocab_file` holds k-mers or more than {FIRST_MARK} tokens; use KmerTokenizer, "
                "NucleotideTokenizer is for single bases."
            )
        options = {
            "preset": self.preset, "lowercase": lowercase, "iupac": iupac, "rna": rna, "seed": seed,
            "add_prefix": add_prefix, "add_suffix": add_suffix, "return_soft_mask": return_soft_mask,
            "return_offsets": return_offsets, "padding_side": padding_side, "unk_token": unk_token,
            "pad_token": pad_token, "cls_token": cls_token, "sep_token": sep_token, "mask_token": mask_token,
            "bos_token": bos_token, "eos_token": eos_token,
        }  # fmt: skip
        self._set_up(facts, options, library)

    def _prepare_tables(self) -> None:
        super()._prepare_tables()
        answers = {letter: self._letter_id(letter, self._unknown_id) for letter in "ACGT" + self.symbols}
        answers |= {"N": self._n_id, chr(UNKNOWN): self._unknown_id, chr(ILLEGAL): CODE_ILLEGAL}
        known = {ord(letter): index for letter, index in answers.items()}
        self._table = bytes(known.get(letter, self._unknown_id) for letter in self.normalizer.table)
        self._letters = self._letters_by_id()

    def _letters_by_id(self) -> np.ndarray:
        """(tokens,) S1: the letter that each id decodes to, empty for special tokens that stand for no base."""
        letters = np.full(max(self.vocabulary.size, 1), b"", dtype="S1")
        for token, index in self.vocabulary.named().items():
            if len(token) == 1:
                letters[index] = token.upper().encode("ascii")
        for special in (self.unk_token, self.mask_token):
            if special is not None and len(special) > 1 and special in self.vocabulary.named():
                letters[self.vocabulary.named()[special]] = b"N"
        return letters

    def _segment(self, batch: Batch) -> Tokens:
        narrow = np.frombuffer(batch.buffer.translate(self._table), dtype=np.uint8)
        if narrow.size and narrow.max() >= FIRST_MARK:
            return self._segment_with_specials(narrow.copy(), batch)
        return Tokens(narrow, batch.lengths, lambda: _unit_spans(batch.lengths), batch.width)

    def _segment_with_specials(self, codes: np.ndarray, batch: Batch) -> Tokens:
        written = self._mark(codes, batch)
        kept = codes != CODE_SKIP
        ids = codes.astype(np.int64)
        ids[written.position] = written.ids
        before = np.concatenate([[0], np.cumsum(kept)])
        counts = before[batch.starts + batch.lengths] - before[batch.starts]
        return Tokens(ids[kept], counts, lambda: _special_spans(kept, batch, written))

    def _bases(self, ids: np.ndarray) -> str:
        self._check_ids(ids)
        known = ids[ids < self._letters.size]
        return b"".join(self._letters[known].tolist()).decode("ascii")

    def _complement_ids(self) -> np.ndarray:
        table = np.arange(self.vocabulary.size)
        for token, index in self.vocabulary.named().items():
            if len(token) == 1 and token.isalpha():
                table[index] = self._letter_id(complement(token), index)
        return table

    @property
    def complement_map(self) -> dict[int, int]:
        """Id of the complementary base for every id; special tokens, N and gaps map to themselves."""
        return dict(enumerate(self._complement_ids().tolist()))

    @property
    def nucleotide_token_ids(self) -> list[int]:
        """Ids of A, C, G, T, in this order."""
        return [self._letter_id(base, self._unknown_id) for base in "ACGT"]

    def rust_pattern(self) -> str | None:
        """Splits into single letters; None where an option has no counterpart in Rust."""
        return "." if _plain_rules(self) else None


def _plain_rules(tokenizer: DnaTokenizer) -> bool:
    return tokenizer.iupac != "random"


def _unit_spans(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts, starts + 1


def _special_spans(kept: np.ndarray, batch: Batch, written: WrittenSpecials) -> tuple[np.ndarray, np.ndarray]:
    starts, ends = _unit_spans(batch.lengths)
    ends[written.position] += written.size - 1
    return starts[kept], ends[kept]


class MSATokenizer(NucleotideTokenizer):
    """Tokenizes rows of a multiple alignment in the id order of GPN-MSA (Benegas et al. 2023).

    `-` (id 0) is gap, unknown and pad, A, C, G, T are 1..4 and `?` (5) is the mask; N and ambiguity codes are
    unknown. Arguments as for `NucleotideTokenizer`; the only preset is "gpn_msa".
    """

    preset_names = ("gpn_msa",)
    default_preset = "gpn_msa"
    symbols = "-?"

    def encode_alignment(self, alignment: np.ndarray | list[str]) -> np.ndarray:
        """Returns the ids of an alignment with the shape of the input.

        Args:
            alignment: letters as an array of uint8 or S1 of any shape, for example (L, species), or a list of
                equally long rows of text.

        Returns:
            int64 array: the shape of `alignment`, (rows, L) for a list.

        Raises:
            SequenceError: a letter that is no base, IUPAC code, `-` or `?`, or rows of unequal length.
        """
        if isinstance(alignment, np.ndarray):
            return self([alignment.ravel()], return_tensors="np")["input_ids"].reshape(alignment.shape)
        if len(set(map(len, alignment))) > 1:
            raise SequenceError("`alignment` must have rows of one length; pad them with '-'.")
        return self(list(alignment), return_tensors="np")["input_ids"]
