"""The ensemble over strands and shifts: a plain loop, equivariance by construction, and modes left alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genesplice_hf.data.track_augment import reverse_complement_ids, shift_ids
from genesplice_hf.errors import DataError
from genesplice_hf.scoring.tracks import predict_ensemble

PAIRS = [1, 0, 2]


class ToyTracks(nn.Module):
    """A convolution over one-hot bases, bins of four, three tracks; dropout tells whether it is in eval mode."""

    def __init__(self, width=6):
        super().__init__()
        self.embedding = nn.Embedding(width, 5)
        self.conv = nn.Conv1d(5, 3, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, offset=0.0):
        hidden = self.conv(self.embedding(input_ids.long()).mT).relu() + offset
        return SimpleNamespace(logits=self.dropout(hidden).unflatten(-1, (-1, 4)).mean(-1).mT, other=None)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return ToyTracks()


@pytest.fixture
def ids():
    return torch.randint(0, 5, (2, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_equals_a_plain_loop(model, ids):
    model.eval()
    parts = []
    for shift in (0, -1, 1):
        parts.append(model(shift_ids(ids, shift)).logits)
        turned = model(reverse_complement_ids(shift_ids(ids, shift))).logits
        parts.append(torch.stack([turned.flip(1)[..., pair] for pair in PAIRS], dim=-1))
    expected = torch.stack(parts).mean(0)
    torch.testing.assert_close(predict_ensemble(model, ids, strand_pair=PAIRS), expected)


def test_the_other_strand_gets_the_turned_prediction(model, ids):
    forward = predict_ensemble(model, ids, strand_pair=PAIRS)
    reverse = predict_ensemble(model, reverse_complement_ids(ids), strand_pair=PAIRS)
    torch.testing.assert_close(reverse, forward.flip(1)[..., PAIRS])
    plain = predict_ensemble(model, reverse_complement_ids(ids), rc=False)
    assert not torch.allclose(plain, predict_ensemble(model, ids, rc=False).flip(1)[..., PAIRS])


def test_alone_it_is_the_model(model, ids):
    assert torch.equal(predict_ensemble(model, ids, rc=False, shifts=(0,)), model.eval()(ids).logits)


def test_modes_are_left_as_they_were(model, ids):
    model.train()
    model.conv.eval()
    first, second = (predict_ensemble(model, ids) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert model.training and model.dropout.training and not model.conv.training


def test_half_precision_is_averaged_in_float32(model, ids):
    def half(input_ids):
        return SimpleNamespace(logits=model.eval()(input_ids).logits.to(torch.bfloat16))

    parts = [half(shift_ids(ids, shift)).logits.float() for shift in (0, 1, 2)]
    assert torch.equal(predict_ensemble(half, ids, rc=False, shifts=(0, 1, 2)), sum(parts) / 3)


def test_species_and_further_inputs(model, ids):
    def both(input_ids, offset):
        logits = model.eval()(input_ids, offset).logits
        return SimpleNamespace(predictions={"human": logits, "mouse": logits[..., :2]}, logits=None)

    pairs = {"human": PAIRS, "mouse": None}
    found = predict_ensemble(both, ids, strand_pair=pairs, model_inputs={"offset": 2.0})
    expected = predict_ensemble(model, ids, strand_pair=PAIRS, model_inputs={"offset": 2.0})
    assert list(found) == ["human", "mouse"] and torch.equal(found["human"], expected)
    with pytest.raises(DataError, match=r"`strand_pair` has entries for \['human'\], but the model predicts 'mouse'"):
        predict_ensemble(both, ids, strand_pair={"human": PAIRS}, model_inputs={"offset": 0.0})


def test_ids_of_another_vocabulary(ids):
    torch.manual_seed(1)
    other, table = ToyTracks(width=12), torch.tensor([7, 8, 9, 10, 3, 0])
    expected = other.eval()(table[ids.long()]).logits
    assert torch.equal(predict_ensemble(other, ids, rc=False, shifts=(0,), id_map=table.tolist()), expected)


def test_arguments_that_do_not_fit(model, ids):
    with pytest.raises(DataError, match=r"`ids` must be \(batch, length\), was \(16,\).*ids\[None\]"):
        predict_ensemble(model, ids[0])
    with pytest.raises(DataError, match="`shifts` must hold at least one number"):
        predict_ensemble(model, ids, shifts=())
    with pytest.raises(DataError, match=r"`shift` \(16\) must be smaller than the 16 bases"):
        predict_ensemble(model, ids, shifts=(16,))
    with pytest.raises(DataError, match="`strand_pair` must be 3 whole numbers"):
        predict_ensemble(model, ids, strand_pair=[1, 0])
    with pytest.raises(DataError, match="`model` must return `logits`"):
        predict_ensemble(lambda input_ids: SimpleNamespace(logits=torch.zeros(2)), ids)
