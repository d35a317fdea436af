"""From text to what TFBind reads: windows of DNA, proteins or complexes of them, and words on cell and assay.

The tokenizers are handed in. Residues get the model's own ids; `encoder_fields` finds, by name, what they are in the
vocabulary of a protein encoder.

Shapes: B batch, R residues of the longest protein, N tokens of the longest text.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, ProcessorMixin

from genesplice_hf.errors import SequenceError
from genesplice_hf.models.tfbind.configuration_tfbind import MAX_CHAINS, RESIDUE_PAD_ID, RESIDUE_UNKNOWN_ID

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
UNKNOWN = "X"
# Legal letters that stand for rare, ambiguous or no single amino acids.
_AS_UNKNOWN = "UZOBJ"
_IDS = {letter: index for index, letter in enumerate(AMINO_ACIDS)} | dict.fromkeys(
    UNKNOWN + _AS_UNKNOWN, RESIDUE_UNKNOWN_ID
)
# How a vocabulary may write a residue: alone, or as the beginning of a word (SentencePiece).
_SPELLINGS = ("{}", "▁{}")
_PROCESSOR_FILE = "processor_config.json"

Protein = str | Sequence[str]


class TFBindProcessor(ProcessorMixin):
    """Makes the inputs of a TFBind model.

    Args:
        tokenizer: of the DNA encoder.
        protein_tokenizer: of the protein encoder, where the model has one; read by `encoder_fields` alone.
        text_tokenizer: of the text encoder, where the model has one.
        text_max_length: tokens of a text; longer ones are cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        protein_tokenizer: PreTrainedTokenizerBase | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        text_max_length: int = 256,
    ) -> None:
        self.chat_template = None
        self.text_max_length = text_max_length
        given = {"tokenizer": tokenizer, "protein_tokenizer": protein_tokenizer, "text_tokenizer": text_tokenizer}
        for name, value in given.items():
            if value is not None or name == "tokenizer":
                self.check_argument_for_proper_class(name, value)
            setattr(self, name, value)

    def __call__(
        self,
        dna: str | Sequence[str] | None = None,
        proteins: Protein | Sequence[Protein] | None = None,
        contexts: str | Sequence[str] | None = None,
    ) -> BatchEncoding:
        """Tensors for `forward`, padded to the longest of each kind.

        Args:
            dna: one window or several. contexts: one text or several.
            proteins: one sequence or several; a complex is a tuple or list of its subunits, so that
                [("MKT", "GSA")] is one complex and ["MKT", "GSA"] are two proteins.

        Returns:
            `input_ids` and what else the DNA tokenizer makes; `protein_input_ids`, `protein_mask` and
            `protein_chain_ids` (B, R); `context_input_ids` and `context_mask` (B, N).

        Raises:
            SequenceError: nothing to do, a text without its tokenizer, a protein that is empty or holds a letter that
                stands for no residue.
        """
        if dna is None and proteins is None and contexts is None:
            raise SequenceError("pass at least one of `dna`, `proteins` and `contexts`.")
        data: dict[str, Any] = {}
        if dna is not None:
            windows = [dna] if isinstance(dna, str) else list(dna)
            pads = len({len(window) for window in windows}) > 1
            data |= self.tokenizer(windows, padding=pads, return_tensors="pt")
            data.pop("token_type_ids", None)
        if proteins is not None:
            data |= encode_proteins([proteins] if isinstance(proteins, str) else proteins)
        if contexts is not None:
            data |= self._texts([contexts] if isinstance(contexts, str) else list(contexts))
        return BatchEncoding(data)

    def _texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        if self.text_tokenizer is None:
            raise SequenceError("`contexts` need a `text_tokenizer`; make the processor with one.")
        found = self.text_tokenizer(
            texts, padding=True, truncation=True, max_length=self.text_max_length, return_tensors="pt"
        )
        return {"context_input_ids": found["input_ids"], "context_mask": found["attention_mask"]}

    def encoder_fields(self) -> dict[str, Any]:
        """Fields of `TFBindConfig` that the tokenizers of protein and text decide.

        Raises:
            SequenceError: the protein vocabulary has no token for an amino acid.
        """
        fields: dict[str, Any] = {}
        if self.protein_tokenizer is not None:
            fields |= residue_fields(self.protein_tokenizer)
        if self.text_tokenizer is not None:
            fields["text_special_token_ids"] = sorted(set(self.text_tokenizer.all_special_ids))
        return fields

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Writes the DNA tokenizer into the folder, the others into folders of their names."""
        if push_to_hub or kwargs:
            raise SequenceError(f"call `push_to_hub`; `save_pretrained` takes a folder alone, not {sorted(kwargs)}.")
        os.makedirs(save_directory, exist_ok=True)
        for name in self._present():
            getattr(self, name).save_pretrained(_folder_of(save_directory, name))
        path = os.path.join(save_directory, _PROCESSOR_FILE)
        content = {
            "processor_class": type(self).__name__,
            "tokenizers": self._present(),
            "text_max_length": self.text_max_length,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        return [path]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "TFBindProcessor":  # type: ignore[override]
        """From a folder or Hub id that `save_pretrained` wrote; keyword arguments as `AutoTokenizer` takes them."""
        content, kwargs = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("subfolder", None)
        loaded = {
            name: AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, **kwargs, **({} if name == "tokenizer" else {"subfolder": name})
            )
            for name in content.get("tokenizers", ["tokenizer"])
        }
        return cls(**loaded, text_max_length=content.get("text_max_length", 256))

    def _present(self) -> list[str]:
        names = ("tokenizer", "protein_tokenizer", "text_tokenizer")
        return [name for name in names if getattr(self, name) is not None]


def encode_proteins(proteins: Sequence[Protein]) -> dict[str, torch.Tensor]:
    """`protein_input_ids`, `protein_mask` (bool) and `protein_chain_ids` (B, R), padded to the longest.

    Raises:
        SequenceError: no protein, an empty one, too many subunits, or a letter that stands for no residue.
    """
    if not proteins:
        raise SequenceError("`proteins` must hold at least one protein.")
    rows = [_residues(protein, row) for row, protein in enumerate(proteins)]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), RESIDUE_PAD_ID)
    chains, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (residues, chain_ids) in enumerate(rows):
        ids[row, : len(residues)] = torch.tensor(residues)
        chains[row, : len(residues)] = torch.tensor(chain_ids)
        mask[row, : len(residues)] = True
    return {"protein_input_ids": ids, "protein_mask": mask, "protein_chain_ids": chains}


def residue_ids(sequence: str, name: str = "protein") -> list[int]:
    """Our ids of a sequence: any case, one `*` at the end removed, U, Z, O, B and J as X.

    Raises:
        SequenceError: it is empty, or holds another letter; the position counts from 1.
    """
    text = sequence.strip().upper().removesuffix("*")
    if not text:
        raise SequenceError(f"{name} has no residues; leave it out.")
    for place, letter in enumerate(text, 1):
        if letter not in _IDS:
            raise SequenceError(
                f"{name} holds {letter!r} at residue {place}; use {AMINO_ACIDS}, X for unknown ones ({_AS_UNKNOWN} "
                "become X), and no gaps or inner stops."
            )
    return [_IDS[letter] for letter in text]


def residue_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """What our residue ids are in a tokenizer's vocabulary, found by name, and what it puts around a sequence.

    Raises:
        SequenceError: it has no token for an amino acid, or none for padding.
    """
    vocabulary = tokenizer.get_vocab()
    ids = []
    for letter in AMINO_ACIDS + UNKNOWN:
        found = next(
            (vocabulary[form.format(letter)] for form in _SPELLINGS if form.format(letter) in vocabulary), None
        )
        if found is None and letter == UNKNOWN:
            found = tokenizer.unk_token_id
        if found is None:
            raise SequenceError(f"`protein_tokenizer` has no token for {letter!r}; it is none of single residues.")
        ids.append(found)
    if tokenizer.pad_token_id is None:
        raise SequenceError("`protein_tokenizer` has no padding token.")
    framed = tokenizer(AMINO_ACIDS[0], return_special_tokens_mask=True)
    added = [bool(flag) for flag in framed["special_tokens_mask"]]
    first, last = added.index(False), len(added) - added[::-1].index(False)
    return {
        "protein_token_ids": [*ids[:RESIDUE_PAD_ID], tokenizer.pad_token_id, ids[-1]],
        "protein_prefix_ids": list(framed["input_ids"][:first]),
        "protein_suffix_ids": list(framed["input_ids"][last:]),
    }


def _residues(protein: Protein, row: int) -> tuple[list[int], list[int]]:
    """Ids of all subunits in a row, and the number of the subunit of each."""
    subunits = [protein] if isinstance(protein, str) else list(protein)
    if not 1 <= len(subunits) <= MAX_CHAINS:
        raise SequenceError(f"protein {row} must have 1 to {MAX_CHAINS} subunits, got {len(subunits)}.")
    encoded = [residue_ids(text, f"subunit {chain} of protein {row}") for chain, text in enumerate(subunits)]
    chains = [chain for chain, ids in enumerate(encoded) for _ in ids]
    return [index for ids in encoded for index in ids], chains


def _folder_of(folder: str | os.PathLike, name: str) -> str:
    return os.fspath(folder) if name == "tokenizer" else os.path.join(folder, name)
