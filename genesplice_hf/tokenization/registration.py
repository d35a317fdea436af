"""Makes our tokenizers known to `AutoTokenizer` by class name."""

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


def register_tokenizer(tokenizer_class: type[PreTrainedTokenizerBase]) -> None:
    """Registers `tokenizer_class` under its own name, as `tokenizer_config.json` states it.

    transformers ties a tokenizer to a config class, and for a config class that is tied it prefers a repository's
    remote code as soon as `trust_remote_code=True`. A config class of its own, which no model has, leaves only the
    name: the reviewed class of the installed package then always wins.
    """
    placeholder = type(f"{tokenizer_class.__name__}Registration", (PreTrainedConfig,), {})
    AutoTokenizer.register(placeholder, tokenizer_class=tokenizer_class)
