"""Akita's head: states of bins become a map of pairs, and its upper triangle the predictions.

Shapes: B batch, N bins, P pairs, E trunk width, C channels of the map, T targets.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from genesplice_hf.layers.batch_norm import BatchNorm2d, foldable
from genesplice_hf.layers.pair_maps import PairConv2d, symmetrised, upper_triangle
from genesplice_hf.models.akita.configuration_akita import AkitaConfig
from genesplice_hf.models.akita.modeling_akita_layer import AkitaDilatedBlock2d

_FINAL = {"linear": nn.Identity, "relu": nn.ReLU, "softplus": nn.Softplus}


class AkitaContactHead(nn.Module):
    """(B, N, E) -> (B, P, T)."""

    def __init__(self, config: AkitaConfig) -> None:
        super().__init__()
        size = config.head2d_filters
        self.activation = ACT2FN[config.hidden_act]
        # The trunk ends with a relu: the mean of two states is not negative, and a second one changes nothing.
        self.is_rectified = config.hidden_act == "relu" and config.one_to_two == "mean"
        self.conv = PairConv2d(
            config.trunk_out_filters, size, config.head2d_kernel_size, config.one_to_two, config.concat_distance
        )
        self.norm = BatchNorm2d(size, config.batch_norm_eps, config.batch_norm_momentum)
        self.dilated = nn.ModuleList(AkitaDilatedBlock2d(config, dilation) for dilation in config.dilations2d)
        self.final = nn.Linear(size, config.num_targets)
        self.final_activation = _FINAL[config.final_activation]()
        self.crop, self.offset = config.target_crop, config.diagonal_offset

    def forward(self, x_BNE: torch.Tensor) -> torch.Tensor:
        """Predictions of the pairs that are left without crop and diagonals.

        Raises:
            SequenceError: nothing is left.
        """
        affine = foldable(self.conv, self.norm)
        x_BCNN = self.conv(x_BNE.transpose(1, 2), None if self.is_rectified else self.activation, affine)
        x_BCNN = symmetrised(x_BCNN if affine is not None else self.norm(x_BCNN))
        for block in self.dilated:
            x_BCNN = block(x_BCNN)
        return self.final_activation(self.final(upper_triangle(x_BCNN, self.crop, self.offset)))
