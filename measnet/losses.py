"""What training minimises (Eq. 11-12)."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from measnet.network import Restoration


class Losses(NamedTuple):
    """0-d fp32 tensors."""

    total: Tensor
    """Eq. 12: l1 + balance_weight · balance; plus the z-loss, which is 0 by default."""
    l1: Tensor
    """Eq. 11: mean absolute difference over all pixels and channels."""
    balance: Tensor
    """Eq. 6, unweighted."""


def restoration_loss(restoration: Restoration, clean: Tensor, balance_weight: float) -> Losses:
    """The training loss of one micro-batch.

    Args:
        restoration: output of the network.
        clean: (B, 3, H, W) in [0, 1], the target.
        balance_weight: λ of Eq. 12; 1e-4 in the paper.
    """
    l1 = F.l1_loss(restoration.image.float(), clean.float())
    total = l1 + balance_weight * restoration.balance_loss + restoration.z_loss
    return Losses(total, l1, restoration.balance_loss)
