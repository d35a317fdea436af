"""GeneSplice nano learns to copy: words that no training has seen, in windows longer than those of the training.

The other learning test of the specification, two repeats 20 kb apart, takes minutes and stands in
`training/experiments/planted_dependency.py`.
"""

import pytest
import torch

from genesplice_hf.models.genesplice.configuration_genesplice import GeneSpliceConfig
from genesplice_hf.models.genesplice.modeling_genesplice import GeneSpliceForCausalLM

STEPS, BATCH = 150, 16


def repeats(count: int, length: int, period: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Every row repeats a random word of its own; the word itself cannot be predicted and is not asked for."""
    words = torch.randint(5, 9, (count, period), generator=generator)
    ids = words.repeat(1, length // period + 1)[:, :length]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < period, -100)}


@pytest.mark.parametrize("period", [13, 50])
def test_a_causal_model_learns_a_periodic_repeat(period: int) -> None:
    torch.manual_seed(0)
    model, generator = GeneSpliceForCausalLM(GeneSpliceConfig(is_decoder=True)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for _ in range(STEPS):
        loss = model(**repeats(BATCH, 128, period, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.05:
            break
    with torch.no_grad():
        # A guess costs log 4 = 1.39 nats per base.
        assert model.eval()(**repeats(BATCH, 512, period, generator)).loss < 0.1
