"""What training minimises (Eq. 11-12)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from measnet.network import Restoration


class Losses(NamedTuple):
    """0-d fp32 tensors."""

    total: Tensor
    """Eq. 12: l1 + balance_weight · balance; plus the frequency loss and the z-loss, which are 0 by
    default."""
    l1: Tensor
    """Eq. 11: mean absolute difference over all pixels and channels."""
    balance: Tensor
    """Eq. 6, unweighted."""


def restoration_loss(
    restoration: Restoration, clean: Tensor, balance_weight: float, frequency_weight: float = 0.0
) -> Losses:
    """The training loss of one micro-batch.

    Args:
        restoration: output of the network.
        clean: (B, 3, H, W) in [0, 1], the target.
        balance_weight: λ of Eq. 12; 1e-4 in the paper.
        frequency_weight: of `frequency_loss`, which is not computed at 0.
    """
    image, target = restoration.image.float(), clean.float()
    l1 = F.l1_loss(image, target)
    total = l1 + balance_weight * restoration.balance_loss + restoration.z_loss
    if frequency_weight:
        total = total + frequency_weight * frequency_loss(image, target)
    return Losses(total, l1, restoration.balance_loss)


def frequency_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the spectra, real and imaginary parts; 0-d.

    The 2-D FFT is not normalised, as MIMO-UNet has it (Cho et al., 2021), and after it DACG-IR,
    MIRAGE and BioIR with weight 0.1. So the loss grows with the side of the crops.

    Args:
        image: (B, 3, H, W) fp32.
        target: likewise.
    """
    difference: Tensor = torch.fft.rfft2(image - target)
    return torch.view_as_real(difference).abs().mean()
