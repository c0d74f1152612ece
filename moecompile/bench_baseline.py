"""The experts as PyTorch users write them for speed, without kernels of their own: what the bench compares with.

One pass over the assignments in expert order, on PyTorch's grouped GEMM:

    assignments sorted by expert, stably        rows of x in that order
    GEMM1, silu(gate) * up, GEMM2               each row times its routing weight
    rows back in token order                    the sum of each token's rows

Nothing in it waits for the device, and every product is one grouped GEMM. Inductor fuses what lies between them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """The weighted sum of each token's experts.

    Args:
        x: (T, H) bfloat16.
        expert_ids: (T, K) int64, each in [0, E).
        weights: (T, K) float32.
        w_in: (E, 2I, H), gate first; (E, 2I, H) @ (H,) is a hidden row.
        w_out: (E, H, I).

    Returns:
        (T, H) of x's dtype.
    """
    (tokens, top_k), num_experts = expert_ids.shape, w_in.shape[0]
    assigned = expert_ids.flatten()
    in_expert_order = torch.argsort(assigned, stable=True)
    counts = torch.histc(assigned.to(torch.float32), bins=num_experts, min=0, max=num_experts - 1)
    ends = counts.cumsum(0).to(torch.int32)

    rows = x[in_expert_order // top_k]
    gate, up = torch._grouped_mm(rows, w_in.mT, offs=ends).chunk(2, dim=1)
    products = torch._grouped_mm(F.silu(gate) * up, w_out.mT, offs=ends)
    weighted = products * weights.flatten()[in_expert_order, None].to(products.dtype)

    places = torch.empty_like(in_expert_order)
    places[in_expert_order] = torch.arange(places.numel(), device=places.device)
    return weighted[places].unflatten(0, (tokens, top_k)).sum(dim=1)
