"""The original implementations of DNA language models, imported from checkouts of theirs: they are no part of ours.

What the checkouts import and a forward pass in evaluation mode does not need is stood in for while they are imported,
unless it is installed: stochastic depth of torchvision, and the einops patterns that they use, as the views that
einops makes of them. The attention of DNABERT-2 takes its path in plain torch, whether triton is installed or not.

Shapes: B batch, L tokens, E hidden size.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers.models.bert.modeling_bert
import transformers.tokenization_utils  # noqa: F401
from torch import nn

# Folder of the checkout -> what it is looked for by.
HYENADNA, GPN, DNABERT2 = "hyena-dna", "gpn", "DNABERT_S"
NEEDED = {
    HYENADNA: "standalone_hyenadna.py",
    GPN: "gpn/legacy.py",
    DNABERT2: "evaluate/model_codes/bert_layers.py",
}


class Original(NamedTuple):
    """A reference with fresh weights.

    Attributes:
        source: of `from_original`.
        task: that its output belongs to.
        config: its config, under its names.
        model: in evaluation mode.
        forward: (B, L) ids to its output.
    """

    source: str
    task: str
    config: dict[str, Any]
    model: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]


def absence(checkout: str, originals: Path | None) -> str | None:
    """Why this checkout cannot be imported; None where it can."""
    if originals is None:
        return f"absent: pass --originals with {checkout}/ below it"
    found = (originals / checkout / NEEDED[checkout]).is_file()
    return None if found else f"absent: no {checkout}/{NEEDED[checkout]} below --originals"


def hyenadna(originals: Path, layers: int, width: int, tokens: int) -> Original:
    """The standalone HyenaDNA with the published options, made for inputs of `tokens`; hidden states (B, L, E)."""
    layer = {
        "_name_": "hyena", "emb_dim": 5, "filter_order": 64, "local_order": 3, "l_max": tokens, "modulate": True,
        "w": 10, "lr": 6e-4, "wd": 0.0, "lr_pos_emb": 0.0,
    }  # fmt: skip
    config = {
        "d_model": width, "n_layer": layers, "d_inner": 4 * width, "vocab_size": 12, "resid_dropout": 0.0,
        "embed_dropout": 0.1, "pad_vocab_size_multiple": 8, "layer": layer,
    }  # fmt: skip
    with standing_in("torchvision", "torchvision.ops", "einops"):
        module = import_file("standalone_hyenadna", originals / HYENADNA / NEEDED[HYENADNA])
    # The class writes into `layer`.
    model = module.HyenaDNAModel(**config | {"layer": dict(layer)}).eval()
    return Original("hyenadna", "base", config, model, model)


def gpn(originals: Path, legacy: bool, layers: int, width: int) -> Original:
    """The legacy ConvNet, or GPN with its convnet encoder; logits."""
    with importable(originals / GPN):
        module = importlib.import_module("gpn.legacy" if legacy else "gpn.model")
    if legacy:
        source, made = "gpn_convnet", module.ConvNetConfig(n_layers=layers, hidden_size=width)
        model = module.ConvNetForMaskedLM(made)
    else:
        source, made = (
            "gpn",
            module.GPNConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width),
        )
        model = module.GPNForMaskedLM(made)
    return Original(source, "masked_lm", made.to_dict(), model.eval(), lambda ids: model(input_ids=ids).logits)


def dnabert2(originals: Path, layers: int, width: int) -> Original:
    """The MosaicBERT of DNABERT-2 and DNABERT-S, heads of 64, attention in plain torch; hidden states (B, L, E)."""
    with standing_in("einops"), importable(originals / DNABERT2 / "evaluate"):
        configuration = importlib.import_module("model_codes.configuration_bert")
        module = importlib.import_module("model_codes.bert_layers")
    module.flash_attn_qkvpacked_func = None
    config = {
        "vocab_size": 4096, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width, "layer_norm_eps": 1e-12, "alibi_starting_size": 512,
    }  # fmt: skip
    model = module.BertModel(configuration.BertConfig(**config), add_pooling_layer=False).eval()
    return Original("dnabert2", "base", config, model, lambda ids: model(ids)[0])


def import_file(name: str, path: Path) -> ModuleType:
    """The module in a file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """What lies in the folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def standing_in(*names: str) -> Iterator[None]:
    """Stand-ins of those modules that are not installed can be imported; afterwards they are gone again."""
    absent = [name for name in names if not _is_installed(name)]
    sys.modules.update({name: _stand_in(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(_CONTENTS[name])
    return module


class StochasticDepth(nn.Module):
    """Drops rows in training only, and here nothing trains."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def rearrange(x: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """einops' `rearrange` for the patterns that are used."""
    return _REARRANGED[pattern](x, **sizes)


def repeat(x: torch.Tensor, pattern: str, d: int) -> torch.Tensor:
    """einops' `repeat` for the one pattern that is used."""
    assert pattern == "z -> z d"
    return x[:, None].expand(-1, d)


_REARRANGED: dict[str, Callable[..., torch.Tensor]] = {
    "b l d -> b d l": lambda x: x.transpose(1, 2),
    "b d l -> b l d": lambda x: x.transpose(1, 2),
    "l (o d) -> o d l": lambda x, o: x.unflatten(1, (o, -1)).permute(1, 2, 0),
    "(o d) -> o d": lambda x, o: x.unflatten(0, (o, -1)),
    "b s (t h d) -> b s t h d": lambda x, t, h: x.unflatten(2, (t, h, -1)),
    "nnz h d -> nnz (h d)": lambda x: x.flatten(1),
    "b ... -> b (...)": lambda x: x.flatten(1),
    "b s ... -> (b s) ...": lambda x: x.flatten(0, 1),
    "(b s) ... -> b s ...": lambda x, b: x.unflatten(0, (b, -1)),
}
_CONTENTS: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "torchvision.ops": {"StochasticDepth": StochasticDepth},
    "einops": {"rearrange": rearrange, "repeat": repeat},
}
