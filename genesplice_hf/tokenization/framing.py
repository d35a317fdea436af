"""The special tokens around sequences: which ones, where, and what the library's methods say about them."""

from typing import TYPE_CHECKING, Any

from genesplice_hf.errors import SequenceError
from genesplice_hf.tokenization.planning import Template


def special_list(choice: Any, default: tuple[str, ...], token: Any) -> list[str]:
    """Resolves `add_prefix` / `add_suffix`: None = preset, False = nothing, True = `token`, or named tokens."""
    if choice is None:
        return list(default)
    if choice is True:
        if token is None:
            raise SequenceError("`add_prefix` / `add_suffix` is True, but this vocabulary has no such special token.")
        return [str(token)]
    if choice is False:
        return []
    return [choice] if isinstance(choice, str) else [str(name) for name in choice]


class FramingMixin:
    """Adds the row template and the library's special-token methods to a tokenizer."""

    if TYPE_CHECKING:
        preset: str | None
        sep_token_id: int | None
        cls_token_id: int | None
        all_special_ids: list[int]
        _prefix_ids: list[int]
        _suffix_ids: list[int]

    def _template(self, paired: bool, add_special_tokens: bool = True) -> Template:
        if not add_special_tokens:
            return Template([], [], [])
        if not paired:
            return Template(self._prefix_ids, self._suffix_ids, [])
        if self.sep_token_id is None:
            raise SequenceError(
                f"`text_pair` needs a tokenizer with a separator token, preset {self.preset!r} has none; "
                "tokenize the sequences one by one."
            )
        separator = [self.sep_token_id]
        if self._prefix_ids or self._suffix_ids:
            return Template(self._prefix_ids, self._suffix_ids or separator, separator)
        return Template([] if self.cls_token_id is None else [self.cls_token_id], separator, separator)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts the special tokens around one sequence of ids, or around two."""
        template = self._template(token_ids_1 is not None)
        body = token_ids_0 if token_ids_1 is None else token_ids_0 + template.separator + token_ids_1
        return template.prefix + body + template.suffix

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Returns how many special tokens a row gets."""
        return self._template(pair).size

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns 0 for the first sequence and its special tokens, 1 for the second and the separator after it."""
        row = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        second = 0 if token_ids_1 is None else len(token_ids_1) + len(self._template(True).suffix)
        return [0] * (len(row) - second) + [1] * second

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Returns 1 for special tokens and 0 for sequence tokens."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(index in special) for index in token_ids_0]
        template = self._template(token_ids_1 is not None)
        body = [0] * len(token_ids_0)
        if token_ids_1 is not None:
            body += [1] * len(template.separator) + [0] * len(token_ids_1)
        return [1] * len(template.prefix) + body + [1] * len(template.suffix)
