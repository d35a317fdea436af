"""One token per gene: a JSON vocabulary of names, with the specials and the name matching of expression models."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizer

from genesplice_hf.errors import DataError
from genesplice_hf.tokenization.gene_names import GeneMatch, GeneNames, read_pairs, write_pairs

_ALIAS_COLUMNS = ("alias", "name")
_ENSEMBL_COLUMNS = ("symbol", "ensembl")


class GeneTokenizer(PreTrainedTokenizer):
    """Genes as tokens; a cell is a list of gene names, and its values travel beside the ids.

    The vocabulary is a plain JSON map name -> id (scGPT's `vocab.json` as it stands). Specials that it lacks are
    appended in the order `<pad>`, `<cls>`, `<eoc>`; ids that are there are kept. An unknown name becomes the id of
    `<pad>` in text, as in scGPT; `convert_genes` says which names those are.

    Args:
        vocab_file: path of the JSON map.
        genes: names, or name -> id, instead of a file. A list keeps its order (`order="given"`, names once) or is
            sorted by frequency, most frequent first, ties by name (`order="upstream"`, scGPT's way).
        alias_file: table old name TAB present name.
        ensembl_file: table symbol TAB Ensembl id, used in both directions.
        order: see `genes`.
        specials_first: with a list of genes, specials get the first ids rather than the last.
        add_cls: text begins with `<cls>`.
        pad_token, cls_token, eoc_token, mask_token: names; None leaves one out (`<pad>` must be there).
        library: keyword arguments of `PreTrainedTokenizer`.

    Raises:
        DataError: no vocabulary, ids that are not 0..n - 1, or names that are empty or hold white space.

    Example:
        >>> tokenizer = GeneTokenizer(genes=["TP53", "MYC"])
        >>> tokenizer("MYC TP53")["input_ids"]
        [3, 1, 0]
    """

    vocab_files_names = {
        "vocab_file": "vocab.json",
        "alias_file": "gene_aliases.tsv",
        "ensembl_file": "gene_ensembl.tsv",
    }
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        genes: Mapping[str, int] | Sequence[str] | None = None,
        alias_file: str | os.PathLike | None = None,
        ensembl_file: str | os.PathLike | None = None,
        order: Literal["given", "upstream"] = "given",
        specials_first: bool = False,
        add_cls: bool = True,
        pad_token: Any = "<pad>",
        cls_token: Any = "<cls>",
        eoc_token: str | None = "<eoc>",
        mask_token: Any = None,
        **library: Any,
    ) -> None:
        if (vocab_file is None) == (genes is None):
            raise DataError("pass one of `vocab_file` (a JSON map of names to ids) and `genes`, not none or both.")
        if pad_token is None:
            raise DataError("`pad_token` must be a name, got None; cells of different size cannot be stacked without.")
        specials = [str(token) for token in (pad_token, cls_token, eoc_token, mask_token) if token is not None]
        given = _read_vocabulary(vocab_file) if genes is None else genes
        if not isinstance(given, Mapping):
            given = _ordered(given, order, specials if specials_first else [])
        self._vocabulary = _with_specials(given, specials)
        self._names_by_id = {index: name for name, index in self._vocabulary.items()}
        self.add_cls, self.eoc_token = add_cls, eoc_token
        self._aliases = {} if alias_file is None else read_pairs(alias_file, _ALIAS_COLUMNS)
        self._ensembl = {} if ensembl_file is None else read_pairs(ensembl_file, _ENSEMBL_COLUMNS)
        if eoc_token is not None:
            extra = list(library.pop("extra_special_tokens", None) or [])
            library["extra_special_tokens"] = extra if eoc_token in map(str, extra) else [*extra, eoc_token]
        super().__init__(
            add_cls=add_cls,
            pad_token=pad_token,
            cls_token=cls_token,
            eoc_token=eoc_token,
            mask_token=mask_token,
            **library,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, genes added by `add_genes` included."""
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """{name: id} of all tokens."""
        return {**self._vocabulary, **self._added_tokens_encoder}

    @property
    def genes(self) -> list[str]:
        """The names that are no specials, by id."""
        special = set(self.all_special_tokens)
        return [
            self._names_by_id[index] for index in sorted(self._names_by_id) if self._names_by_id[index] not in special
        ]

    @property
    def names(self) -> GeneNames:
        """The matcher of names."""
        special = set(self.all_special_tokens)
        tokens = {name: index for name, index in self._vocabulary.items() if name not in special}
        return GeneNames(tokens, self._aliases, self._ensembl)

    def convert_genes(self, names: Sequence[str], min_match: float = 0.0) -> GeneMatch:
        """Ids of gene names, with a report; never refuses because some are unknown.

        Args:
            names: symbols or Ensembl ids (versions are ignored); aliases and the other system are tried in turn.
            min_match: smallest share of names that must be found.

        Returns:
            Ids (-1 = unknown), unmatched names, names found under another name, and names that mean the same gene.

        Raises:
            DataError: no name is found, or fewer than `min_match`. Warns (`GeneMatchWarning`) below one half.
        """
        if isinstance(names, str):
            raise DataError("`names` must be a list of gene names, got one string; wrap it in a list.")
        match = self.names.match(list(names))
        match.check(min_match)
        return match

    def add_aliases(self, aliases: Mapping[str, str]) -> None:
        """Takes old name -> present name; saved with the tokenizer."""
        self._aliases |= aliases

    def add_ensembl(self, ensembl: Mapping[str, str]) -> None:
        """Takes symbol -> Ensembl id; saved with the tokenizer."""
        self._ensembl |= ensembl

    def add_genes(self, names: Iterable[str]) -> int:
        """Appends genes that the vocabulary lacks and returns how many; then resize the model's embeddings.

        `model.resize_token_embeddings(len(tokenizer))` keeps the old genes' rows.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._vocabulary]
        _check_names(new)
        for name in new:
            self._vocabulary[name] = len(self._vocabulary)
            self._names_by_id[self._vocabulary[name]] = name
        self._update_total_vocab_size()
        return len(new)

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return text.split()

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """Splits at white space, nothing else: a gene's name may hold whatever looks like a special token."""
        return self._tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocabulary.get(token, self._vocabulary[str(self.pad_token)])

    def _convert_id_to_token(self, index: int) -> str:
        if index not in self._names_by_id:
            raise DataError(f"`ids` must lie in 0..{len(self) - 1}, got {index}.")
        return self._names_by_id[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The names, with spaces between."""
        return " ".join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`<cls>` and the genes; a cell has no second part."""
        if token_ids_1 is not None:
            raise DataError("`text_pair` must be None: a cell has one list of genes.")
        start = [self.cls_token_id] if self.add_cls and self.cls_token is not None else []
        return [*start, *token_ids_0]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for a special token, 0 for a gene."""
        ids = token_ids_0 if already_has_special_tokens else self.build_inputs_with_special_tokens(token_ids_0)
        special = set(self.all_special_ids)
        return [int(index in special) for index in ids]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def save_vocabulary(
        self, save_directory: str | os.PathLike, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes vocab.json, and the tables of aliases and Ensembl ids where there are any."""
        folder, prefix = Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""
        files = {name: folder / f"{prefix}{file}" for name, file in self.vocab_files_names.items()}
        by_id = dict(sorted(self._vocabulary.items(), key=lambda item: item[1]))
        files["vocab_file"].write_text(json.dumps(by_id, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        written = [files["vocab_file"]]
        for name, columns, pairs in (
            ("alias_file", _ALIAS_COLUMNS, self._aliases),
            ("ensembl_file", _ENSEMBL_COLUMNS, self._ensembl),
        ):
            if pairs:
                write_pairs(files[name], columns, pairs)
                written.append(files[name])
        return tuple(map(str, written))


def _read_vocabulary(path: str | os.PathLike | None) -> dict[str, int]:
    try:
        found = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"`vocab_file` ({path}) must be a JSON map of names to ids: {error}.") from error
    if not isinstance(found, dict) or not all(type(index) is int for index in found.values()):
        raise DataError(f"`vocab_file` ({path}) must be a JSON map of names to whole numbers.")
    return found


def _ordered(genes: Sequence[str], order: str, first: list[str]) -> dict[str, int]:
    """Ids of a list of names: first the specials asked for, then names once each."""
    if order not in ("given", "upstream"):
        raise DataError(f"`order` must be 'given' or 'upstream', got {order!r}.")
    if isinstance(genes, str):
        raise DataError("`genes` must be a list of names or a map of names to ids, got one string.")
    counts = Counter(genes)
    names = sorted(counts, key=lambda name: (-counts[name], name)) if order == "upstream" else list(counts)
    return {name: index for index, name in enumerate(dict.fromkeys([*first, *names]))}


def _with_specials(given: Mapping[str, int], specials: list[str]) -> dict[str, int]:
    vocabulary = dict(given)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise DataError(
            f"the ids of `genes` must be 0..{len(vocabulary) - 1}, each once; got {len(set(vocabulary.values()))} "
            f"different ids up to {max(vocabulary.values(), default=-1)} for {len(vocabulary)} names."
        )
    _check_names(vocabulary)
    for token in specials:
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary


def _check_names(names: Iterable[str]) -> None:
    bad = next((name for name in names if not isinstance(name, str) or not name or name.split() != [name]), None)
    if bad is not None:
        raise DataError(f"`genes` must be names without white space, got {bad!r}; rename or drop it.")
