"""Toy models and tokenizers of the interpretation tests: their answers can be worked out by hand.

Shapes: B batch, T tokens, L bases, C labels; one-hot columns are A, C, G, T.
"""

import itertools

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

BASES = "ACGT"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class ToyConfig(PreTrainedConfig):
    model_type = "toy_sequence"


class ToyModel(PreTrainedModel):
    """One-hot embeddings of single-base tokens (anything else is a zero vector), then `body`: (B, T, 4) -> (B, C)."""

    config_class = ToyConfig

    def __init__(self, body: nn.Module, num_labels: int = 1, **config):
        super().__init__(ToyConfig(num_labels=num_labels, **config))
        self.embed = nn.Embedding(len(SPECIALS) + 5, 4)
        self.body = body
        with torch.no_grad():
            self.embed.weight.zero_()
            self.embed.weight[len(SPECIALS) : len(SPECIALS) + 4] = torch.eye(4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **_):
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return SequenceClassifierOutput(logits=self.body(hidden))


class CountMotif(nn.Module):
    """Logit = number of exact occurrences of `motif`: a convolution that reaches its length only at a match."""

    def __init__(self, motif: str):
        super().__init__()
        one_hot = torch.tensor([[float(base == letter) for base in motif] for letter in BASES])
        self.filter = nn.Parameter(one_hot[None])

    def forward(self, hidden):
        match = nn.functional.conv1d(hidden.mT, self.filter.to(hidden.dtype)) - (self.filter.shape[-1] - 1)
        return match.relu().sum(dim=-1)


class Linear(nn.Module):
    """Logit c = sum over positions of the weight (L, 4, C) of the base that stands there."""

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, hidden):
        return torch.einsum("blx,lxc->bc", hidden, self.weights)


class Smooth(nn.Module):
    """A smooth non-linear body with dropout, so that forgetting evaluation mode shows."""

    def __init__(self, num_labels: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 5, padding=2)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(8, num_labels)

    def forward(self, hidden):
        return self.out(self.dropout(torch.tanh(self.conv(hidden.mT)).mean(dim=-1)))


def single_base_tokenizer(with_ends: bool = False) -> PreTrainedTokenizerFast:
    """One token per letter, built from the tokenizers library; `with_ends` adds [CLS] and [SEP]."""
    return _word_level(list(BASES + "N"), ".", with_ends)


def three_mer_tokenizer() -> PreTrainedTokenizerFast:
    """Non-overlapping 3-mers; what does not fit becomes single letters."""
    words = ["".join(letters) for letters in itertools.product(BASES, repeat=3)]
    return _word_level([*words, *BASES, "N"], "[ACGT]{3}|.", with_ends=True)


def tiny_bert(num_labels: int = 2, vocab_size: int = 80, **options) -> BertForSequenceClassification:
    """A random BERT with large weights, so that substitutions change the logits visibly."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=num_labels,
        initializer_range=0.4,
        **options,
    )
    return BertForSequenceClassification(config).eval()


def _word_level(words: list[str], pattern: str, with_ends: bool) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(SPECIALS + words)}
    backend = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = Split(Regex(pattern), "isolated")
    if with_ends:
        ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
        backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {f"{token.strip('[]').lower()}_token": token for token in SPECIALS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)
