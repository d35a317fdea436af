"""Byte-pair encoding of DNA: loads DNABERT-2's tokenizer, and learns new ones from FASTA or from strings.

A thin shell around the tokenizers library: what it adds are checked letters, case and IUPAC folding, and a
decoder that gives the bases back. All of the folding also stands in tokenizer.json, so that the file alone,
loaded without this package, gives the same ids.
"""

import gzip
import inspect
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from genesplice_hf.errors import DataError, GeneSpliceError, SequenceError
from genesplice_hf.genome.alphabet import IUPAC
from genesplice_hf.tokenization.normalizer import SequenceNormalizer, letter_error, sequence_bytes

logger = logging.getLogger(__name__)

_SPECIAL_TOKENS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
_LETTERS = "ACGTN"
_GZIP_MAGIC = b"\x1f\x8b"
_AMBIGUOUS = "".join(code for code in IUPAC if code not in "ACGT")
_CALL_OPTIONS = set(inspect.signature(PreTrainedTokenizerFast._encode_plus).parameters)


class BPEDnaTokenizer(PreTrainedTokenizerFast):
    """Cuts DNA into tokens of variable length by learned merges; `[CLS] x [SEP]` around each sequence.

    Tokens depend on their context: one changed base can move borders far from it, so read positions from
    `return_offsets_mapping=True` and never score a variant by swapping a token. Lower case is folded, U becomes
    T, IUPAC codes become N; N is a token of its own (or `[UNK]` where the vocabulary lacks it, as one per base).

    `BPEDnaTokenizer.from_pretrained(folder)` loads a folder with a tokenizer.json (DNABERT-2, GENA-LM, or one
    written by `save_pretrained`), `BPEDnaTokenizer.train` learns one. Reference: Zhou et al., DNABERT-2, ICLR
    2024, section 3.1.

    Args:
        tokenizer_file: path of a tokenizer.json with a BPE model. Parts that it lacks (normalizer, decoder,
            post-processor) are filled in; what it has stays.
        tokenizer_object: the same as a `tokenizers.Tokenizer`.
        unk_token, cls_token, sep_token, pad_token, mask_token: names of the special tokens.
        library: keyword arguments of `PreTrainedTokenizerFast` (`model_max_length`, `padding_side`, ...).

    Raises:
        SequenceError: on calls, for letters that are no IUPAC code (with the position), and for sequences
            longer than `model_max_length` when `truncation` is off.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}

    def __init__(
        self,
        tokenizer_file: str | os.PathLike | None = None,
        tokenizer_object: Tokenizer | None = None,
        unk_token: Any = "[UNK]",
        cls_token: Any = "[CLS]",
        sep_token: Any = "[SEP]",
        pad_token: Any = "[PAD]",
        mask_token: Any = "[MASK]",
        **library: Any,
    ):
        if tokenizer_object is None:
            tokenizer_object = _read_backend(tokenizer_file)
        _fill_in(tokenizer_object, str(cls_token), str(sep_token))
        library.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            tokenizer_object=tokenizer_object,
            unk_token=unk_token,
            cls_token=cls_token,
            sep_token=sep_token,
            pad_token=pad_token,
            mask_token=mask_token,
            **library,
        )
        self._table = SequenceNormalizer().table

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        # The library would take tokenizer.json apart and lose normalizer and decoder; `__init__` reads it whole.
        return kwargs

    @classmethod
    def train(
        cls,
        source: str | os.PathLike | Iterable[str],
        vocab_size: int = 4096,
        min_frequency: int = 2,
        max_token_length: int | None = None,
        chunk_bases: int = 1000,
        model_max_length: int | None = None,
    ) -> "BPEDnaTokenizer":
        """Learns the merges from sequences.

        Args:
            source: path of a FASTA file (plain, gzip or bgzip, known by its content), or an iterable of
                sequences.
            vocab_size: tokens in all, with 5 special tokens and A, C, G, N, T.
            min_frequency: a pair of tokens must occur this often to be merged.
            max_token_length: longest token in bases, 2 or more; None sets no limit.
            chunk_bases: sequences are cut to this many bases for counting; no token can span a cut.
            model_max_length: longest row in tokens that the model takes; None sets no limit.

        Raises:
            SequenceError: a letter that is no IUPAC code, with its position.
            DataError: a file that is no FASTA, is truncated, or a source without a base.
        """
        _check_training(vocab_size, min_frequency, max_token_length, chunk_bases)
        backend = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=False))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("N"), "isolated")
        # The trainer wants tokens shorter than its limit.
        limit: dict[str, Any] = {} if max_token_length is None else {"max_token_length": max_token_length + 1}
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=_SPECIAL_TOKENS,
            initial_alphabet=list(_LETTERS),
            show_progress=False,
            **limit,
        )
        backend.train_from_iterator(_chunks(source, chunk_bases), trainer)
        if backend.get_vocab_size() < vocab_size:
            logger.warning(
                "the sequences gave %d tokens, `vocab_size` asked for %d; give more sequence or lower it",
                backend.get_vocab_size(),
                vocab_size,
            )
        library: dict[str, Any] = {} if model_max_length is None else {"model_max_length": model_max_length}
        return cls(tokenizer_object=backend, **library)

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        unknown = sorted(set(options) - _CALL_OPTIONS)
        if unknown:
            raise TypeError(f"BPEDnaTokenizer takes no argument `{unknown[0]}`")
        if options.get("is_split_into_words"):
            raise GeneSpliceError("`is_split_into_words` must be False: DNA has no words; give whole sequences")
        specials = None if options.get("split_special_tokens") else self._written_specials()
        text = self._fold_all(text, specials)
        text_pair = None if text_pair is None else self._fold_all(text_pair, specials)
        return super()._encode_plus(text, text_pair, **options)

    def _written_specials(self) -> re.Pattern[bytes]:
        """Special tokens may be written out in a sequence (`ACGT[MASK]ACGT`)."""
        names = sorted(self.added_tokens_encoder, key=len, reverse=True)
        return re.compile(b"|".join(re.escape(name.encode()) for name in names))

    def _fold_all(self, texts: Any, specials: re.Pattern[bytes] | None) -> Any:
        if not isinstance(texts, (list, tuple)):
            return self._fold(texts, specials, None)
        return [
            tuple(self._fold(part, specials, row) for part in text) if isinstance(text, (list, tuple))
            else self._fold(text, specials, row)
            for row, text in enumerate(texts)
        ]  # fmt: skip

    def _fold(self, text: Any, specials: re.Pattern[bytes] | None, row: int | None) -> str:
        """Checks and folds one sequence; every character keeps its place, so offsets stay true."""
        raw = sequence_bytes(text)
        written = list(specials.finditer(raw)) if specials else []
        blanked = bytearray(raw)
        for match in written:
            blanked[match.start() : match.end()] = b"N" * len(match.group())
        letters = blanked.translate(self._table)
        position = letters.find(b"\0")
        if position >= 0:
            raise letter_error(chr(raw[position]), position, row)
        for match in written:
            letters = letters[: match.start()] + match.group() + letters[match.end() :]
        return letters.decode("ascii")

    def _eventual_warn_about_too_long_sequence(self, ids: list[int], max_length: int | None, verbose: bool) -> None:
        if max_length is None and len(ids) > self.model_max_length:
            bases = sum(map(len, self._spell(ids)))
            raise SequenceError(
                f"a sequence of {bases} bp gives {len(ids)} tokens, the model takes {self.model_max_length} (about "
                f"{bases * self.model_max_length // len(ids)} bp of it); pass `truncation=True` or cut it into windows"
            )

    def _spell(self, ids: Iterable[int]) -> list[str]:
        """Bases of each id: none for special tokens, N for an unknown or masked base."""
        special = dict.fromkeys(self.all_special_ids, "") | {self.unk_token_id: "N", self.mask_token_id: "N"}
        return [special[i] if i in special else self._token_text(i) for i in ids]

    def _token_text(self, index: int) -> str:
        token = self._tokenizer.id_to_token(index) if index >= 0 else None
        if token is None:
            raise GeneSpliceError(f"`token_ids` holds {index}, the vocabulary has ids 0 to {len(self) - 1}")
        return token

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> str:
        # The answer is always the base string: no spaces, no special tokens, N where a base is not known.
        return "".join(self._spell(np.atleast_1d(np.asarray(token_ids, dtype=np.int64)).tolist()))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the bases that `tokens` spell."""
        return self._decode(self.convert_tokens_to_ids(tokens))


def _read_backend(tokenizer_file: str | os.PathLike | None) -> Tokenizer:
    if tokenizer_file is None or not os.path.isfile(tokenizer_file):
        raise DataError(
            f"`tokenizer_file` ({tokenizer_file}) must be an existing tokenizer.json; load a folder that holds one "
            "with `from_pretrained`, or learn a new tokenizer with `BPEDnaTokenizer.train`"
        )
    backend = Tokenizer.from_file(os.fspath(tokenizer_file))
    if not isinstance(backend.model, models.BPE):
        raise DataError(
            f"`tokenizer_file` ({tokenizer_file}) holds a {type(backend.model).__name__} model, not BPE; load it "
            "with `AutoTokenizer`"
        )
    return backend


def _fill_in(backend: Tokenizer, cls_token: str, sep_token: str) -> None:
    """Adds the parts that `backend` lacks: letter folding, the decoder, `[CLS] x [SEP]`."""
    if backend.normalizer is None:
        backend.normalizer = _letter_folding()
    if backend.decoder is None:
        backend.decoder = decoders.Fuse()
    ids = [(token, backend.token_to_id(token)) for token in (cls_token, sep_token)]
    if backend.post_processor is None and all(index is not None for _, index in ids):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls_token} $A {sep_token}",
            pair=f"{cls_token} $A {sep_token} $B:1 {sep_token}:1",
            special_tokens=ids,
        )


def _letter_folding() -> normalizers.Normalizer:
    replacements = [normalizers.Replace(base.lower(), base) for base in "ACG"]
    replacements.append(normalizers.Replace(Regex("[tuU]"), "T"))
    ambiguous = (_AMBIGUOUS + _AMBIGUOUS.lower()).replace("N", "")
    replacements.append(normalizers.Replace(Regex(f"[{ambiguous}]"), "N"))
    return normalizers.Sequence(replacements)


def _check_training(vocab_size: int, min_frequency: int, max_token_length: int | None, chunk_bases: int) -> None:
    smallest = len(_SPECIAL_TOKENS) + len(_LETTERS)
    if vocab_size < smallest:
        raise GeneSpliceError(
            f"`vocab_size` must be at least {smallest} (special tokens and letters), it is {vocab_size}"
        )
    for name, value in (
        ("min_frequency", min_frequency),
        ("max_token_length", max_token_length),
        ("chunk_bases", chunk_bases),
    ):
        least = 1 if name == "min_frequency" else 2
        if value is not None and value < least:
            raise GeneSpliceError(f"`{name}` must be {least} or more, it is {value}")


def _chunks(source: str | os.PathLike | Iterable[str], chunk_bases: int) -> Iterator[str]:
    """Folded pieces of at most `chunk_bases` bases; no piece spans two sequences."""
    parts: Iterable[tuple[str, str | bytes]]
    if isinstance(source, (str, os.PathLike)):
        parts = _fasta_lines(source)
    else:
        parts = ((f"sequence {i}", sequence) for i, sequence in enumerate(source))
    found = False
    for piece in _joined(parts, chunk_bases):
        found = True
        yield piece
    if not found:
        raise DataError("`source` holds no base; nothing can be learned from it")


def _joined(named_parts: Iterable[tuple[str, str | bytes]], chunk_bases: int) -> Iterator[str]:
    """Joins the parts of each sequence and cuts it anew; parts of one sequence follow each other."""
    table = SequenceNormalizer().table
    current, buffered, position = None, b"", 0
    for name, part in named_parts:
        if name != current:
            if buffered:
                yield buffered.decode("ascii")
            current, buffered, position = name, b"", 0
        buffered += _fold_part(sequence_bytes(part), table, name, position)
        position += len(part)
        whole = len(buffered) // chunk_bases * chunk_bases
        for start in range(0, whole, chunk_bases):
            yield buffered[start : start + chunk_bases].decode("ascii")
        buffered = buffered[whole:]
    if buffered:
        yield buffered.decode("ascii")


def _fold_part(raw: bytes, table: bytes, name: str, position: int) -> bytes:
    letters = raw.translate(table)
    illegal = letters.find(b"\0")
    if illegal >= 0:
        error = letter_error(chr(raw[illegal]), position + illegal)
        raise SequenceError(f"{name}: {error}")
    return letters


def _fasta_lines(path: str | os.PathLike) -> Iterator[tuple[str, bytes]]:
    """(record, line of its sequence) of a FASTA file, plain or gzipped whatever its name says."""
    if not os.path.isfile(path):
        raise DataError(f"`source` ({path}) is no file; give the path of a FASTA file or a list of sequences")
    with open(path, "rb") as probe:
        opener = gzip.open if probe.read(2) == _GZIP_MAGIC else open
    record, number = "", 0
    try:
        with opener(path, "rb") as lines:
            for line in map(bytes.strip, lines):
                if line.startswith(b">"):
                    number += 1
                    record = f"record {number} ({line[1:61].decode('ascii', 'replace')})"
                elif line and not record:
                    raise DataError(f"`source` ({path}) is no FASTA file: it must begin with '>'")
                elif line:
                    yield record, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"`source` ({path}) is a damaged gzip file ({error}); copy or download it again") from error
