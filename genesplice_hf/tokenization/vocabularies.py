"""Vocabularies as arithmetic: which id a token has, for the published orders and for files.

A vocabulary is `head` tokens, then (for k-mers) all 4^k k-mers in the order of `alphabet`, then `tail` tokens.
A k-mer's id is `len(head) + sum_j code(b_j) * 4^(k-1-j)`, so nothing is enumerated until someone asks for it.
Orders of the presets: Dalla-Torre et al. 2023 (Nucleotide Transformer), Ji et al. 2021 (DNABERT), Nguyen et al.
2023 (HyenaDNA), Schiff et al. 2024 (Caduceus), Benegas et al. 2023 (GPN), Avsec et al. 2021 (Enformer).
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from genesplice_hf.errors import SequenceError

_BASE_TOKEN = re.compile(r"[ACGT]+")
_ROLES = {
    "PAD": "pad_token", "UNK": "unk_token", "CLS": "cls_token", "SEP": "sep_token",
    "MASK": "mask_token", "BOS": "bos_token", "EOS": "eos_token",
}  # fmt: skip
MAX_K = 12


class Vocabulary:
    """Token <-> id for `head`, the k-mer block and `tail`.

    Attributes:
        k: bases per k-mer, or None when there is no k-mer block.
        alphabet: the four bases in the order that defines k-mer codes 0..3.
        kmer_offset: id of the first k-mer.
        kmer_ids: None when the block is arithmetic, otherwise (4^k,) ids by code (-1: the file lacks the k-mer).
        size: number of tokens.
    """

    kmer_ids: np.ndarray | None = None

    def __init__(
        self,
        head: tuple[str, ...],
        tail: tuple[str, ...] = (),
        k: int | None = None,
        alphabet: str = "ACGT",
    ):
        self.head, self.tail, self.k, self.alphabet = head, tail, k, alphabet
        self.kmer_offset = len(head)
        self.n_kmers = 4**k if k else 0
        self.size = len(head) + self.n_kmers + len(tail)
        tail_start = self.kmer_offset + self.n_kmers
        self._plain = dict(zip((*head, *tail), (*range(len(head)), *range(tail_start, self.size)), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and list(self.tokens()) == list(other.tokens())

    __hash__ = None  # type: ignore[assignment]

    def named(self) -> dict[str, int]:
        """Returns every token outside the k-mer block with its id."""
        return self._plain

    def id_of(self, token: str) -> int | None:
        """Returns the id of `token`, or None when the vocabulary lacks it."""
        index = self._plain.get(token)
        if index is None and self.k and len(token) == self.k and set(token) <= set(self.alphabet):
            code = functools.reduce(lambda total, base: total * 4 + self.alphabet.index(base), token, 0)
            index = self._kmer_id(code)
        return index

    def _kmer_id(self, code: int) -> int | None:
        if self.kmer_ids is None:
            return self.kmer_offset + code
        index = int(self.kmer_ids[code])
        return None if index < 0 else index

    def token_of(self, index: int) -> str:
        """Returns the token with id `index`; raises IndexError outside 0..size-1."""
        if not 0 <= index < self.size:
            raise IndexError(f"id {index} is outside the vocabulary of {self.size} tokens")
        if index < self.kmer_offset:
            return self.head[index]
        code = index - self.kmer_offset
        if code >= self.n_kmers:
            return self.tail[code - self.n_kmers]
        assert self.k is not None
        return "".join(self.alphabet[code >> 2 * (self.k - 1 - j) & 3] for j in range(self.k))

    def tokens(self) -> Iterator[str]:
        """Iterates over all tokens in id order."""
        yield from self.head
        if self.k:
            yield from map("".join, itertools.product(self.alphabet, repeat=self.k))
        yield from self.tail

    def to_dict(self) -> dict[str, int]:
        """Returns {token: id}; 4^k entries, made on every call."""
        return {token: index for index, token in enumerate(self.tokens())}

    def codes_by_id(self) -> np.ndarray:
        """Returns (size,) int64: the k-mer code of every id, -1 for tokens that are no k-mer."""
        codes = np.full(self.size, -1, dtype=np.int64)
        if self.kmer_ids is None:
            codes[self.kmer_offset : self.kmer_offset + self.n_kmers] = np.arange(self.n_kmers)
        else:
            known = self.kmer_ids >= 0
            codes[self.kmer_ids[known]] = np.flatnonzero(known)
        return codes


class ListedVocabulary(Vocabulary):
    """A vocabulary from a file whose k-mers stand in no arithmetic order: looked up, not computed."""

    def __init__(self, listed: tuple[str, ...], k: int | None):
        super().__init__(head=listed, alphabet="ACGT")
        self.k = k
        if k:
            kmers = map("".join, itertools.product(self.alphabet, repeat=k))
            self.kmer_ids = np.array([self._plain.get(kmer, -1) for kmer in kmers], dtype=np.int64)

    def named(self) -> dict[str, int]:
        return {t: i for t, i in self._plain.items() if not (len(t) == self.k and _BASE_TOKEN.fullmatch(t))}

    def tokens(self) -> Iterator[str]:
        yield from self.head


def vocabulary_from_tokens(tokens: list[str]) -> Vocabulary:
    """Builds the vocabulary whose ids are the positions in `tokens`, arithmetic when the order allows it.

    Raises:
        SequenceError: a token that stands twice, or none at all.
    """
    if not tokens or len(set(tokens)) != len(tokens):
        raise SequenceError("`vocab_file` must list every token once, one per line; it is empty or repeats a token.")
    k = max((len(token) for token in tokens if _BASE_TOKEN.fullmatch(token)), default=1)
    if k == 1:
        return Vocabulary(head=tuple(tokens))
    first = next(i for i, token in enumerate(tokens) if len(token) == k and _BASE_TOKEN.fullmatch(token))
    alphabet = "".join(token[-1] for token in tokens[first : first + 4])
    if sorted(alphabet) == list("ACGT"):
        regular = Vocabulary(tuple(tokens[:first]), tuple(tokens[first + 4**k :]), k, alphabet)
        if list(regular.tokens()) == tokens:
            return regular
    return ListedVocabulary(tuple(tokens), k)


@dataclass(frozen=True)
class Preset:
    """The facts of one published tokenizer.

    Attributes:
        vocabulary: the token order.
        stride: bases from one token to the next (equals k unless k-mers overlap).
        roles: special tokens by their Hugging Face name (`pad_token`, ...).
        prefix, suffix: special tokens put before and after every sequence.
        model_max_length: tokens that every published model of this kind accepts, None where models differ.
        token_types: whether the models read `token_type_ids`.
    """

    vocabulary: Vocabulary
    stride: int
    roles: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    model_max_length: int | None = None
    token_types: bool = False


def _roles(*tokens: str) -> dict[str, str]:
    return {_ROLES[token.strip("[]<>").upper()]: token for token in tokens}


_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_GENESPLICE_HEAD = (*_BERT_SPECIALS, "A", "C", "G", "T", "N")


def genesplice_vocabulary(k: int | None = None, alphabet: str = "ACGT") -> Vocabulary:
    """Our own order: five special tokens, A, C, G, T, N, then the k-mers if there are any."""
    return Vocabulary(_GENESPLICE_HEAD, k=k, alphabet=alphabet)


def _genesplice() -> Preset:
    return Preset(genesplice_vocabulary(), 1, _roles(*_BERT_SPECIALS))


def _nt_v1() -> Preset:
    head = ("<unk>", "<pad>", "<mask>", "<cls>")
    vocabulary = Vocabulary(head, (*"ATCGN", "<eos>", "<bos>"), 6, "ATCG")
    return Preset(vocabulary, 6, _roles(*head), prefix=("<cls>",))


def _nt_v2(k: int) -> Preset:
    head = ("<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>")
    return Preset(Vocabulary(head, tuple("ATCGN"), k, "ATCG"), k, _roles(*head[:4]), prefix=("<cls>",))


def _dnabert(k: int) -> Preset:
    vocabulary = Vocabulary(_BERT_SPECIALS, k=k, alphabet="ATCG")
    return Preset(vocabulary, 1, _roles(*_BERT_SPECIALS), ("[CLS]",), ("[SEP]",), 512, token_types=True)


def _hyenadna() -> Preset:
    specials = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
    roles = _roles("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[UNK]")
    return Preset(Vocabulary((*specials, *"ACGTN")), 1, roles, suffix=("[SEP]",))


def _gpn() -> Preset:
    specials = ("[PAD]", "[MASK]", "[UNK]")
    return Preset(Vocabulary((*specials, *"acgt")), 1, _roles(*specials))


def _gpn_msa() -> Preset:
    return Preset(Vocabulary(tuple("-ACGT?")), 1, {"pad_token": "-", "unk_token": "-", "mask_token": "?"})


def _enformer() -> Preset:
    return Preset(Vocabulary((*"ACGTN", "[PAD]")), 1, _roles("[PAD]"))


_BUILDERS: dict[str, Callable[[], Preset]] = {
    "genesplice": _genesplice,
    "hyenadna": _hyenadna,
    "caduceus": _hyenadna,
    "gpn": _gpn,
    "plantcaduceus": _gpn,
    "enformer": _enformer,
    "gpn_msa": _gpn_msa,
    "nt_v1": _nt_v1,
    "nt_v2": functools.partial(_nt_v2, 6),
    "nt_v2_3mer": functools.partial(_nt_v2, 3),
    **{f"dnabert{k}": functools.partial(_dnabert, k) for k in (3, 4, 5, 6)},
}
NUCLEOTIDE_PRESETS = ("genesplice", "hyenadna", "caduceus", "gpn", "plantcaduceus", "enformer")
KMER_PRESETS = ("nt_v1", "nt_v2", "nt_v2_3mer", "dnabert3", "dnabert4", "dnabert5", "dnabert6")


def get_preset(name: str, allowed: tuple[str, ...]) -> Preset:
    """Returns the preset `name`; raises SequenceError when this tokenizer class does not offer it."""
    if name not in allowed:
        raise SequenceError(f"`preset` must be one of {allowed}, it was {name!r}.")
    return _BUILDERS[name]()


def find_preset(vocabulary: Vocabulary, allowed: tuple[str, ...]) -> str | None:
    """Returns the first preset of `allowed` whose tokens equal `vocabulary`, or None."""
    for name in allowed:
        candidate = _BUILDERS[name]().vocabulary
        if candidate.size == vocabulary.size and candidate == vocabulary:
            return name
    return None


def roles_in(vocabulary: Vocabulary) -> dict[str, str]:
    """Recognises special tokens by their spelling (`[CLS]`, `<cls>`, ...) in a vocabulary from a file."""
    bracketed = (token for token in vocabulary.named() if token[0] + token[-1] in ("[]", "<>"))
    return {_ROLES[token[1:-1].upper()]: token for token in bracketed if token[1:-1].upper() in _ROLES}
