"""The tokenizer base class: Hugging Face's interface around whole-batch numpy tokenization.

A call reads all sequences into one byte buffer (`batches.py`), the scheme turns the buffer into token ids at once
(`_segment` of the subclasses), a plan says which tokens share a row (`planning.py`) and a canvas places them
(`canvas.py`). R rows, T tokens of the batch, W row width.
"""

import difflib
import os
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import LARGE_INTEGER

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.alignment import AlignmentMixin
from genesplice_hf.tokenization.batches import Batch, Tokens, read_batch
from genesplice_hf.tokenization.canvas import BlockCanvas, Canvas, Padding, RaggedCanvas
from genesplice_hf.tokenization.encoding import add_bookkeeping, lower_share, to_encoding
from genesplice_hf.tokenization.export import read_vocabulary, write_tokenizer_files
from genesplice_hf.tokenization.framing import FramingMixin, special_list
from genesplice_hf.tokenization.normalizer import SequenceNormalizer, letter_error
from genesplice_hf.tokenization.planning import Cut, Template, plan_pairs, plan_pieces, plan_single
from genesplice_hf.tokenization.special_text import CODE_ILLEGAL, WrittenSpecials, mark_specials
from genesplice_hf.tokenization.vocabularies import Preset, Vocabulary, find_preset, get_preset, roles_in
from genesplice_hf.version import __version__

_ROLE_NAMES = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
_LIBRARY_KEYWORDS = {
    "added_tokens_decoder", "auto_map", "backend", "chat_template", "clean_up_tokenization_spaces",
    "extra_special_tokens", "additional_special_tokens", "model_input_names", "model_max_length", "max_len",
    "processor_class", "split_special_tokens", "truncation_side", "verbose", "name_or_path", "is_local",
    "local_files_only", "files_loaded", "package_version", "model_specific_special_tokens", "trust_remote_code",
}  # fmt: skip
_NEVER_KEPT = ("do_lower_case", "package_version", "tokenizer_file", "is_local", "local_files_only")


class DnaTokenizer(FramingMixin, AlignmentMixin, PreTrainedTokenizer):
    """What all DNA tokenizers share. Not used directly: see `NucleotideTokenizer`, `KmerTokenizer`, `MSATokenizer`.

    Attributes:
        vocabulary: token order.
        vocab_source: where the ids came from: "vocab.txt", "tokenizer.json" or "preset".
        preset: name of the published tokenizer that this one equals, or None.
        k, stride: bases per full token and bases from one token to the next.
    """

    vocab_files_names = {"vocab_file": "vocab.txt"}
    model_input_names = ["input_ids", "attention_mask"]
    preset_names: tuple[str, ...] = ()
    symbols = ""
    k = 1
    stride = 1
    max_piece: int | None = None
    max_piece_compat = False

    def _choose_vocabulary(
        self, preset: str | None, vocab_file: str | None, tokenizer_file: str | None, default: Vocabulary | None
    ) -> Preset:
        """Sets `vocabulary`, `preset` and `vocab_source`, and returns the facts that go with them."""
        self.vocab_source, listed = read_vocabulary(vocab_file, tokenizer_file)
        if listed is None:
            listed, self.preset = default, preset
            facts = Preset(default, 1, roles_in(default)) if default else get_preset(str(preset), self.preset_names)
        elif preset:
            self.preset, facts = preset, get_preset(preset, self.preset_names)
            self._check_listed(listed, facts.vocabulary)
        else:
            self.preset = find_preset(listed, self.preset_names)
            facts = get_preset(self.preset, self.preset_names) if self.preset else self._facts_of_file(listed)
        self.vocabulary = facts.vocabulary
        return facts

    def _facts_of_file(self, listed: Vocabulary) -> Preset:
        return Preset(listed, 1, roles_in(listed))

    def _check_listed(self, listed: Vocabulary, expected: Vocabulary) -> None:
        for index, (ours, theirs) in enumerate(zip(expected.tokens(), listed.tokens(), strict=False)):
            if ours != theirs:
                raise SequenceError(
                    f"`vocab_file` has {theirs!r} as id {index} where preset {self.preset!r} has {ours!r}; "
                    "leave `preset` out to use the ids of the file."
                )
        if listed.size != expected.size:
            raise SequenceError(
                f"`vocab_file` has {listed.size} tokens where preset {self.preset!r} has {expected.size}; "
                "leave `preset` out to use the ids of the file."
            )

    def _set_up(self, facts: Preset, options: dict[str, Any], library: dict[str, Any]) -> None:
        """Finishes construction: normaliser, special tokens, then the library's own set-up.

        Args:
            facts: defaults of the preset or file.
            options: our constructor arguments by name; all of them are saved in tokenizer_config.json.
            library: keyword arguments that transformers understands.
        """
        self._check_keywords(library, options)
        roles = {name: options.pop(name) for name in _ROLE_NAMES}
        for name, value in options.items():
            setattr(self, name, value)
        self.normalizer = SequenceNormalizer(self.lowercase, self.iupac, self.rna, self.symbols, self.seed)
        roles = {name: facts.roles.get(name) if value is None else value for name, value in roles.items()}
        self.add_prefix = special_list(options["add_prefix"], facts.prefix, roles["cls_token"])
        self.add_suffix = special_list(options["add_suffix"], facts.suffix, roles["sep_token"])
        options |= {"add_prefix": self.add_prefix, "add_suffix": self.add_suffix}
        library = {name: value for name, value in library.items() if name not in _NEVER_KEPT}
        if library.get("model_max_length") is None and "max_len" not in library:
            library["model_max_length"] = facts.model_max_length
        if facts.token_types:
            library.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
        super().__init__(**options, **roles, **library, package_version=__version__)
        self._prepare_tables()

    def _check_keywords(self, library: dict[str, Any], options: dict[str, Any]) -> None:
        # A folder's tokenizer_config.json may hold keys of other tools; code that calls the class may not.
        unknown = [] if "name_or_path" in library else sorted(set(library) - _LIBRARY_KEYWORDS)
        if unknown:
            close = difflib.get_close_matches(unknown[0], [*options, *_LIBRARY_KEYWORDS], n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise TypeError(f"{type(self).__name__} has no argument `{unknown[0]}`{hint}")

    def _prepare_tables(self) -> None:
        """Builds the lookup tables of the scheme; runs once the special tokens are known."""
        unknown = self.unk_token or "N"
        index = self.vocabulary.id_of(unknown)
        if index is None:
            raise SequenceError(f"the vocabulary lacks {unknown!r} for unknown bases; name its token as `unk_token`.")
        self._unknown_id = index
        self._n_id = self._letter_id("N", index)
        self._prefix_ids = [self.convert_tokens_to_ids(token) for token in self.add_prefix]
        self._suffix_ids = [self.convert_tokens_to_ids(token) for token in self.add_suffix]

    def _letter_id(self, letter: str, default: int) -> int:
        found = self.vocabulary.id_of(letter)
        if found is None:
            found = self.vocabulary.id_of(letter.lower())
        return default if found is None else found

    @property
    def vocab_size(self) -> int:
        """Number of tokens without those added later."""
        return self.vocabulary.size

    def __len__(self) -> int:
        return self.vocabulary.size + sum(index >= self.vocabulary.size for index in self._added_tokens_decoder)

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = len(self)

    def get_vocab(self) -> dict[str, int]:
        """Returns {token: id} of all tokens; makes 4^k entries, so keep it if you need it twice."""
        return {**self.vocabulary.to_dict(), **self._added_tokens_encoder}

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        added = 0
        for token in new_tokens or []:
            if not str(token) or str(token) in self._added_tokens_encoder:
                continue
            index = self.vocabulary.id_of(str(token))
            if index is None:
                self._refuse_base_text(str(token))
                index, added = len(self), added + 1
            self._register(token, index, special_tokens or str(token) in self.all_special_tokens)
        self._update_total_vocab_size()
        return added

    def _refuse_base_text(self, token: str) -> None:
        if token.isascii() and all(self.normalizer.table[ord(letter)] for letter in token):
            raise SequenceError(
                f"the added token {token!r} is written in bases and could not be told from sequence; "
                f"use brackets, for example '[{token}]'."
            )

    def _register(self, token: str | AddedToken, index: int, special: bool) -> None:
        content = str(token)
        record = AddedToken(content, normalized=not special, special=special) if isinstance(token, str) else token
        if special and content not in self.all_special_tokens:
            self._extra_special_tokens.append(record)
        self._added_tokens_decoder[index] = record
        self._added_tokens_encoder[content] = index

    def _convert_token_to_id(self, token: str) -> int:
        index = self.vocabulary.id_of(token)
        return self._unknown_id if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        return self.vocabulary.token_of(index)

    def _written_specials(self) -> dict[str, int]:
        named = {t: i for t, i in self.vocabulary.named().items() if t[0] + t[-1] in ("[]", "<>")}
        return named | {t: i for t, i in self._added_tokens_encoder.items() if len(t) > 1 and not t.isalpha()}

    def _segment(self, batch: Batch) -> Tokens:
        raise NotImplementedError

    def _read(self, text: Any, text_pair: Any, is_split_into_words: bool) -> Batch:
        batch = read_batch(text, text_pair, is_split_into_words=is_split_into_words)
        resolved = self.normalizer.resolve(batch.buffer, batch.lengths)
        if resolved is batch.buffer:
            return batch
        return Batch(resolved, batch.lengths, batch.is_batched, batch.is_paired)

    def _mark(self, codes: np.ndarray, batch: Batch) -> WrittenSpecials:
        """Marks written special tokens in `codes`; whatever is illegal beside them raises with its position."""
        specials = {} if batch.is_literal else self._written_specials()
        written = mark_specials(codes, batch, specials)
        illegal = codes == CODE_ILLEGAL
        if illegal.any():
            position = int(np.argmax(illegal))
            row, within = batch.locate(position)
            byte = batch.buffer[position]
            raise letter_error(chr(byte), within, row if batch.is_batched else None, self.normalizer.reason(byte))
        return written

    def tokenize(self, text: Any, pair: Any = None, add_special_tokens: bool = False) -> list[str]:
        """Returns the raw tokens of one sequence (or pair) as strings."""
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens=add_special_tokens))

    def _tokenize(self, text: Any) -> list[str]:
        return self.tokenize(text)

    def _canvas(self, tokens: Tokens, paired: bool, template: Template, cut: Cut, padding: Padding) -> Canvas:
        counts = tokens.counts
        if self.max_piece is not None and not paired:
            plan = plan_pieces(counts, template, self.max_piece, self.max_piece_compat)
            return RaggedCanvas(plan, padding.widths(plan.length), padding.left)
        block = tokens.width
        if block is not None and not paired and (cut.budget is None or block <= cut.budget):
            width = padding.width(block + template.size)
            return BlockCanvas(counts.size, block, template.prefix, template.suffix, width, padding.left)
        plan = (plan_pairs if paired else plan_single)(counts, template, cut)
        return RaggedCanvas(plan, padding.widths(plan.length), padding.left)

    def _cut(self, strategy: Any, max_length: int | None, stride: int, overflow: bool, template: Template) -> Cut:
        name = getattr(strategy, "value", strategy)
        if name == "do_not_truncate" or max_length is None:
            return Cut()
        if self.max_piece is not None:
            raise SequenceError("`truncation` and `max_piece` exclude each other: pieces keep every token of a row.")
        if max_length < template.size:
            raise SequenceError(f"`max_length` ({max_length}) must hold the {template.size} special tokens of a row.")
        return Cut(max_length - template.size, name, stride, overflow, self.truncation_side == "left")

    def _check_limit(self, canvas: Canvas, add_special_tokens: bool) -> None:
        limit = self.model_max_length
        if limit > LARGE_INTEGER or self.max_piece is not None or not add_special_tokens:
            return
        lengths = canvas.plan.length if isinstance(canvas, RaggedCanvas) else np.array([canvas.content])
        if lengths.size and int(lengths.max()) > limit:
            row = int(np.argmax(lengths))
            raise SequenceError(
                f"`sequence` {row} makes {int(lengths[row])} tokens, the model takes {limit} (at most {self.max_bp} "
                "bp of A, C, G, T); pass `truncation=True` or cut it into windows."
            )

    @property
    def max_bp(self) -> int | None:
        """Longest N-free sequence in bp that fits the model, None when no limit is known."""
        if self.model_max_length > LARGE_INTEGER:
            return None
        tokens = self.model_max_length - len(self._prefix_ids) - len(self._suffix_ids)
        return tokens * self.stride + self.k - self.stride

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding_strategy: Any = "do_not_pad",
        truncation_strategy: Any = "do_not_truncate",
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        return_soft_mask: bool | None = None,
        return_token_phase: bool = False,
    ) -> BatchEncoding:
        batch = self._read(text, text_pair, is_split_into_words)
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            batch = replace(batch, is_literal=True)
        tokens = self._segment(batch)
        template = self._template(batch.is_paired, add_special_tokens)
        cut = self._cut(truncation_strategy, max_length, stride, return_overflowing_tokens, template)
        side = (padding_side or self.padding_side) == "left"
        padding = Padding(getattr(padding_strategy, "value", padding_strategy), max_length, pad_to_multiple_of, side)
        canvas = self._canvas(tokens, batch.is_paired, template, cut, padding)
        if cut.budget is None:
            self._check_limit(canvas, add_special_tokens)
        names = self.model_input_names
        wanted = {
            "token_type_ids": "token_type_ids" in names if return_token_type_ids is None else return_token_type_ids,
            "attention_mask": "attention_mask" in names if return_attention_mask is None else return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping or self.return_offsets,
            "soft_mask": self._wants_soft_mask if return_soft_mask is None else return_soft_mask,
            "token_phase": return_token_phase,
        }
        data = self._paint(canvas, tokens, batch, wanted)
        single = not batch.is_batched and not return_overflowing_tokens
        encoding = to_encoding(data, canvas, getattr(return_tensors, "value", return_tensors), single)
        add_bookkeeping(encoding, canvas, batch, return_overflowing_tokens, return_length, return_tensors)
        return encoding

    def _switch_to_input_mode(self) -> None:
        # The library looks this name up on every call; a missing attribute costs more than tokenizing 1 kb.
        pass

    @property
    def _wants_soft_mask(self) -> bool:
        return self.return_soft_mask or self.lowercase == "keep"

    def _paint(self, canvas: Canvas, tokens: Tokens, batch: Batch, wanted: dict[str, bool]) -> dict[str, np.ndarray]:
        data = {"input_ids": canvas.ids(tokens.ids, self.pad_token_id if canvas.needs_pads() else 0)}
        painters = {
            "token_type_ids": canvas.token_types,
            "attention_mask": canvas.attention_mask,
            "special_tokens_mask": lambda: canvas.paint(np.zeros(tokens.ids.size, dtype=np.int64), 1),
            "offset_mapping": lambda: canvas.paint(np.stack(tokens.spans(), axis=-1), 0),
            "soft_mask": lambda: canvas.paint(lower_share(tokens, batch), 0.0),
            "token_phase": lambda: canvas.paint(tokens.spans()[0] % self.k, -1),
        }
        data.update({name: painter() for name, painter in painters.items() if wanted[name]})
        return data

    def _bases(self, ids: np.ndarray) -> str:
        raise NotImplementedError

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> str:
        # The answer is always the base string: no spaces, no special tokens, N where a base is not known.
        return self._bases(np.atleast_1d(np.asarray(token_ids, dtype=np.int64)))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Returns the bases that `tokens` spell."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def save_vocabulary(
        self, save_directory: str | os.PathLike, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes vocab.txt, special_tokens_map.json and, for schemes that Rust can express, tokenizer.json."""
        return write_tokenizer_files(self, save_directory, filename_prefix)

    def rust_pattern(self) -> str | None:
        """Returns the regular expression that splits as this tokenizer does, None where there is none."""
        return None
