"""The cells of `benchmarks.dna_models`: each measures one thing in a fresh process and returns its numbers.

A model and its original have the same weights and the same input, take turns, and are timed only where their outputs
agree. All run in float32, in evaluation and inference mode.

Shapes: B batch, L tokens, E hidden size, H heads, D channels of a scan, N states per channel.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import EsmConfig, EsmForMaskedLM, PreTrainedModel

from benchmarks import dna_models_originals as originals_of
from benchmarks.dna_models_originals import Original
from benchmarks.measuring import fastest, measure
from genesplice_hf.layers.selective_scan import selective_scan
from genesplice_hf.models.dnabert2.configuration_dnabert2 import DNABERT2Config
from genesplice_hf.models.dnabert2.modeling_dnabert2_base import DNABERT2Model
from genesplice_hf.models.nucleotide_transformer_v2.configuration_nucleotide_transformer_v2 import (
    NucleotideTransformerV2Config,
)
from genesplice_hf.models.nucleotide_transformer_v2.modeling_nucleotide_transformer_v2 import (
    NucleotideTransformerV2ForMaskedLM,
)
from genesplice_hf.models.original import from_original

# Outputs are of order 1.
TOLERANCE = 1e-3
REPEATS = 3
# Milliseconds beside seconds.
SCAN_REPEATS = 7
DNABERT2_HEAD_SIZE = 64
NT_VOCABULARY = 4107


def hyenadna(originals: str, layers: int, width: int, tokens: int, repeats: int = REPEATS) -> dict[str, Any]:
    """HyenaDNA beside ours with kept filters (`ours`) and with filters made in every forward (`uncached`)."""
    original = originals_of.hyenadna(Path(originals), layers, width, tokens)
    peers = {"ours": converted(original), "uncached": converted(original, filter_cache_size=0)}
    return compared(original, peers, torch.randint(7, 12, (1, tokens)), repeats)


def gpn(
    originals: str, legacy: bool, layers: int, width: int, tokens: int, batch: int, repeats: int = REPEATS
) -> dict[str, Any]:
    """The legacy ConvNet, or GPN with its convnet encoder, beside ours."""
    original = originals_of.gpn(Path(originals), legacy, layers, width)
    return compared(original, {"ours": converted(original)}, torch.randint(3, 7, (batch, tokens)), repeats)


def dnabert2(
    originals: str, layers: int, width: int, tokens: int, batch: int, repeats: int = REPEATS
) -> dict[str, Any]:
    """DNABERT-2's path in plain torch beside ours with sdpa."""
    original = originals_of.dnabert2(Path(originals), layers, width)
    ours = converted(original)
    ours.set_attn_implementation("sdpa")
    return compared(original, {"ours": ours}, torch.randint(5, 4096, (batch, tokens)), repeats)


def converted(original: Original, **options: Any) -> PreTrainedModel:
    """Our model with the original's weights."""
    return from_original(original.source, original.config, original.model.state_dict(), task=original.task, **options)


def compared(original: Original, ours: dict[str, PreTrainedModel], ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Times the original and our models in turns, after one forward of each whose outputs have to agree."""
    calls = {"original": lambda: original.forward(ids)}
    calls |= {name: lambda model=model: output_of(model, ids) for name, model in ours.items()}
    with torch.inference_mode():
        expected, *found = [call() for call in calls.values()]
        difference = max((output - expected).abs().max().item() for output in found)
        scale = expected.abs().max().item()
        # Not `difference > ...`: a NaN agrees with nothing.
        if not difference <= TOLERANCE:
            return {"failed": f"outputs differ by {difference:.3g} at values up to {scale:.3g}"}
        del expected, found
        times = fastest(calls, repeats)
    return times | {"difference": difference, "scale": scale, "repeats": repeats}


def output_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model with a head, states (B, L, E) of one without."""
    output = model(input_ids=ids)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def nt_v1(layers: int, width: int, tokens: int) -> dict[str, Any]:
    """Whether what `from_original` makes of Nucleotide Transformer v1 is transformers' ESM itself; untimed."""
    config = esm_config(layers, width, tokens, "absolute")
    original = EsmForMaskedLM(config).eval()
    ours = from_original("nt_v1", config.to_dict(), original.state_dict(), task="masked_lm")
    ids = torch.randint(4, NT_VOCABULARY, (1, tokens))
    with torch.inference_mode():
        difference = (output_of(ours, ids) - output_of(original, ids)).abs().max().item()
    return {"is_transformers_class": type(ours) is EsmForMaskedLM and difference == 0, "difference": difference}


def nt_v2(layers: int, width: int, tokens: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Our Nucleotide Transformer v2 beside transformers' ESM of equal width, depth and hidden feed-forward units.

    ESM has no gated feed-forward network, so weights and outputs are not the same.
    """
    ours = NucleotideTransformerV2ForMaskedLM(
        NucleotideTransformerV2Config(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32, intermediate_size=4 * width
        )
    ).eval()
    peer = EsmForMaskedLM(esm_config(layers, width, tokens, "rotary")).eval()
    ids = torch.randint(4, NT_VOCABULARY, (1, tokens))
    calls = {"ours": lambda: ours(input_ids=ids), "esm": lambda: peer(input_ids=ids)}
    with torch.inference_mode():
        for call in calls.values():
            call()
        times = fastest(calls, repeats)
    counts = {"ours_parameters": ours.num_parameters(), "esm_parameters": peer.num_parameters()}
    return times | counts | {"repeats": repeats}


def esm_config(layers: int, width: int, tokens: int, positions: str) -> EsmConfig:
    """As the Nucleotide Transformers are published: heads of 32, no dropout."""
    return EsmConfig(
        vocab_size=NT_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=tokens + 2,
        position_embedding_type=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        mask_token_id=2,
        token_dropout=False,
    )


def scan_inputs(length: int, channels: int, states: int) -> tuple[torch.Tensor, ...]:
    """(x, delta, A, B, C) of one sequence, as large as those of a fresh Caduceus: steps from 0.001 to 0.1."""
    delta = torch.empty(1, length, channels).uniform_(-6.9, -2.3).exp_()
    A = -torch.arange(1.0, states + 1).expand(channels, states).contiguous()
    x, B, C = (torch.randn(1, length, size) for size in (channels, states, states))
    return x, delta, A, B, C


def scan(length: int, channels: int, states: int, repeats: int = SCAN_REPEATS) -> dict[str, Any]:
    """Our selective scan beside two loops over the tokens, each with its input in the layout that it wants."""
    x, delta, A, B, C = inputs = scan_inputs(length, channels, states)
    x_BDL, delta_BDL, B_BNL, C_BNL = (tensor.transpose(1, 2).contiguous() for tensor in (x, delta, B, C))
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: step_loop(*inputs),
        "reference": lambda: channels_first_loop(x_BDL, delta_BDL, A, B_BNL, C_BNL),
        "ours": lambda: selective_scan(*inputs),
    }
    with torch.inference_mode():
        plain, reference, ours = (call() for call in calls.values())
        difference = max((ours - plain).abs().max().item(), (ours - reference.transpose(1, 2)).abs().max().item())
        scale = plain.abs().max().item()
        if not difference <= TOLERANCE * scale:
            return {"failed": f"outputs differ by {difference:.3g} at values up to {scale:.3g}"}
        times = fastest(calls, repeats)
    return times | {"difference": difference, "scale": scale, "repeats": repeats}


def scan_alone(length: int, channels: int, states: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Our selective scan of one sequence."""
    inputs, short = (scan_inputs(tokens, channels, states) for tokens in (length, 64))
    with torch.inference_mode():
        return measure(lambda: selective_scan(*inputs), lambda: selective_scan(*short), repeats)


def step_loop(
    x_BLD: torch.Tensor, delta_BLD: torch.Tensor, A_DN: torch.Tensor, B_BLN: torch.Tensor, C_BLN: torch.Tensor
) -> torch.Tensor:
    """The recurrence token by token as it is written down, (B, L, D): the plainest loop."""
    h_BDN, outputs = x_BLD.new_zeros(len(x_BLD), *A_DN.shape), []
    for t in range(x_BLD.shape[1]):
        delta_BD1 = delta_BLD[:, t, :, None]
        h_BDN = torch.exp(delta_BD1 * A_DN) * h_BDN + delta_BD1 * x_BLD[:, t, :, None] * B_BLN[:, t, None]
        outputs.append((h_BDN * C_BLN[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def channels_first_loop(
    x_BDL: torch.Tensor, delta_BDL: torch.Tensor, A_DN: torch.Tensor, B_BNL: torch.Tensor, C_BNL: torch.Tensor
) -> torch.Tensor:
    """In the shape of mamba-ssm's reference, (B, D, L): all decays and inputs first, then a loop over the tokens."""
    decays_BDLN = torch.exp(torch.einsum("bdl,dn->bdln", delta_BDL, A_DN))
    inputs_BDLN = torch.einsum("bdl,bnl,bdl->bdln", delta_BDL, B_BNL, x_BDL)
    h_BDN, outputs = x_BDL.new_zeros(len(x_BDL), *A_DN.shape), []
    for t in range(x_BDL.shape[2]):
        h_BDN = decays_BDLN[:, :, t] * h_BDN + inputs_BDLN[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", h_BDN, C_BNL[:, :, t]))
    return torch.stack(outputs, dim=2)


class MadeTensors(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes; views and what is written in place are none.

    What a kernel needs inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.shapes += [result.shape for result in results if _storage(result) not in given]
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def dnabert2_tensors(layers: int, width: int, tokens: int) -> dict[str, Any]:
    """How large the tensors are that one forward of DNABERT-2 with sdpa makes, beside H L L, the size of its bias."""
    heads = width // DNABERT2_HEAD_SIZE
    config = DNABERT2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )
    model = DNABERT2Model._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad(), MadeTensors() as made:
        model(torch.randint(5, 4096, (1, tokens)))
    dense = heads * tokens**2
    square = [shape for shape in made.shapes if shape[-2:] == (tokens, tokens)]
    return {
        "largest_elements": max(shape.numel() for shape in made.shapes),
        "dense_elements": dense,
        "dense_tensors": sum(shape.numel() >= dense for shape in square),
    }


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (hyenadna, gpn, dnabert2, nt_v1, nt_v2, scan, scan_alone, dnabert2_tensors)
}
# Which checkout a cell needs.
CHECKOUTS = {
    "hyenadna": originals_of.HYENADNA,
    "gpn": originals_of.GPN,
    "dnabert2": originals_of.DNABERT2,
}
