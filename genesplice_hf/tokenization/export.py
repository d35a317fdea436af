"""Reads vocab.txt and tokenizer.json, and writes the files of a saved tokenizer.

The written tokenizer.json is plain Rust (`tokenizers`): a WordLevel model behind a Split on a regular expression,
so that `AutoTokenizer` without this package gives the same ids. `tokenizer` is a `DnaTokenizer` everywhere.
"""

import json
import os
from pathlib import Path
from typing import Any

from genesplice_hf.tokenization.vocabularies import Vocabulary, vocabulary_from_tokens

_AMBIGUOUS = "RYSWKMBDHV"


def read_vocabulary(vocab_file: str | None, tokenizer_file: str | None) -> tuple[str, Vocabulary | None]:
    """Returns where the tokens came from ("vocab.txt", "tokenizer.json", "preset") and the tokens, if any."""
    if vocab_file is not None:
        lines = Path(vocab_file).read_text(encoding="utf-8").split("\n")
        return "vocab.txt", vocabulary_from_tokens([line.rstrip("\r") for line in lines if line.strip()])
    if tokenizer_file is not None:
        described = json.loads(Path(tokenizer_file).read_text(encoding="utf-8"))
        ids = dict(described["model"]["vocab"])
        ids.update({token["content"]: token["id"] for token in described.get("added_tokens", ())})
        return "tokenizer.json", vocabulary_from_tokens(sorted(ids, key=ids.__getitem__))
    return "preset", None


def write_tokenizer_files(
    tokenizer: Any, save_directory: str | os.PathLike, filename_prefix: str | None
) -> tuple[str, ...]:
    """Writes vocab.txt, special_tokens_map.json and tokenizer.json (where expressible); returns their paths."""
    folder, prefix = Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""
    written = [folder / f"{prefix}vocab.txt", folder / f"{prefix}special_tokens_map.json"]
    with open(written[0], "w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(f"{token}\n" for token in tokenizer.vocabulary.tokens())
    written[1].write_text(json.dumps(tokenizer.special_tokens_map, indent=2) + "\n", encoding="utf-8")
    rust = rust_tokenizer(tokenizer)
    if rust is not None:
        written.append(folder / f"{prefix}tokenizer.json")
        written[2].write_text(json.dumps(rust, indent=1) + "\n", encoding="utf-8")
    return tuple(str(path) for path in written)


def rust_tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    """Describes `tokenizer` in the format of tokenizer.json, or returns None when Rust cannot express it."""
    pattern = tokenizer.rust_pattern()
    if pattern is None:
        return None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, token) for index, token in sorted(tokenizer.added_tokens_decoder.items())],
        "normalizer": _normalizer(tokenizer),
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": _template(tokenizer),
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": tokenizer.vocabulary.to_dict(),
            "unk_token": tokenizer.unk_token or "N",
        },
    }  # fmt: skip


def _added(index: int, token: Any) -> dict[str, Any]:
    return {
        "id": index, "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
        "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special,
    }  # fmt: skip


def _normalizer(tokenizer: Any) -> dict[str, Any] | None:
    lower_tokens, folds = tokenizer.vocabulary.id_of("a") is not None, tokenizer.lowercase in ("upper", "keep")
    steps: list[tuple[dict[str, str], str]] = []
    if tokenizer.rna == "U->T":
        steps.append(({"String": "U"}, "T"))
        steps += [({"String": "u"}, "T")] if folds else []
    if tokenizer.iupac == "N" and not tokenizer.symbols:
        steps.append(({"Regex": f"[{_AMBIGUOUS}{_AMBIGUOUS.lower() if folds else ''}]"}, "N"))
    if folds and not lower_tokens:
        steps += [({"String": base.lower()}, base) for base in "ACGTN"]
    replacements: list[dict[str, Any]] = [{"type": "Replace", "pattern": p, "content": c} for p, c in steps]
    replacements += [{"type": "Lowercase"}] if lower_tokens else []
    return {"type": "Sequence", "normalizers": replacements} if replacements else None


def _template(tokenizer: Any) -> dict[str, Any] | None:
    specials = [*tokenizer.add_prefix, *tokenizer.add_suffix]
    if not specials:
        return None

    def special(token: str, kind: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    start = [special(token) for token in tokenizer.add_prefix]
    separators = [] if tokenizer.sep_token is None else [tokenizer.sep_token]
    between = [special(token) for token in separators]
    end = [special(token, 1) for token in tokenizer.add_suffix or separators]
    known = sorted({*specials, *separators})
    return {
        "type": "TemplateProcessing",
        "single": [*start, first, *(special(token) for token in tokenizer.add_suffix)],
        "pair": [*start, first, *between, second, *end],
        "special_tokens": {
            token: {"id": token, "ids": [tokenizer.convert_tokens_to_ids(token)], "tokens": [token]} for token in known
        },
    }
