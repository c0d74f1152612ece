"""What autocast must not change."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def exact(tensor: Tensor) -> AbstractContextManager[object]:
    """Runs what is inside in the dtypes that the operator was given, whatever autocast surrounds it."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
