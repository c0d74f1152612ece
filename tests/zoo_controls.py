"""One plain module for each form, cut into steps: what a refusal changes in one step, detection matches unchanged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, bias, flat, weight

BF16 = torch.bfloat16
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 32, 4, 2


class Values:
    """What the steps of one forward pass have computed so far, by name. (On the module it would become an output.)"""

    # A dictionary of its own: Dynamo of torch 2.11 cannot list the `__dict__` of an object it traced the making of.
    values: dict[str, Tensor]

    def __init__(self, **values: Tensor) -> None:
        object.__setattr__(self, "values", values)

    def __getattr__(self, name: str) -> Tensor:
        return self.values[name]

    def __setattr__(self, name: str, value: Tensor) -> None:
        self.values[name] = value

    def but(self, **values: Tensor) -> Values:
        """These values with some replaced."""
        return Values(**self.values | values)


def route(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, top-k, renormalised: weights and ids of shape (tokens, TOP_K)."""
    weights, ids = router(x).softmax(-1).topk(TOP_K, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


class Grouped(nn.Module):
    """Form "grouped_mm"; tanh, because its backward allows its input to be written."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=BF16)
        self.w_in = weight(EXPERTS, 2 * INTERMEDIATE, HIDDEN, fan_in=HIDDEN, dtype=BF16)
        self.w_out = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=INTERMEDIATE, dtype=BF16)
        self.b_in = bias(EXPERTS, 2 * INTERMEDIATE, dtype=BF16)
        self.b_out = bias(EXPERTS, HIDDEN, dtype=BF16)

    def route(self, v: Values) -> None:
        v.weights, v.ids = route(self.router, v.x)

    def order(self, v: Values) -> None:
        v.sorted_ids, v.perm = torch.sort(v.ids.reshape(-1))

    def counts(self, v: Values) -> Tensor:
        return torch.histc(v.sorted_ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)

    def offsets(self, v: Values) -> Tensor:
        return v.counts.cumsum(0).to(torch.int32)

    def gather(self, v: Values) -> Tensor:
        return v.x[v.perm // TOP_K]

    def gemm_in(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.rows, self.w_in.transpose(1, 2), offs=v.offs) + self.b_in[v.sorted_ids]

    def activate(self, v: Values) -> Tensor:
        return torch.tanh(v.h[:, :INTERMEDIATE]) * v.h[:, INTERMEDIATE:]

    def gemm_out(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.a, self.w_out.transpose(1, 2), offs=v.offs) + self.b_out[v.sorted_ids]

    def weigh(self, v: Values) -> Tensor:
        return v.y * v.weights.reshape(-1)[v.perm].unsqueeze(-1)

    def inverse(self, v: Values) -> Tensor:
        inverse = torch.empty_like(v.perm)
        inverse[v.perm] = torch.arange(v.perm.shape[0])
        return inverse

    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(-1, TOP_K, HIDDEN).sum(dim=1)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        v = Values(x=x)
        self.route(v)
        self.order(v)
        v.counts = self.counts(v)
        v.offs = self.offsets(v)
        v.rows = self.gather(v)
        v.h = self.gemm_in(v)
        v.a = self.activate(v)
        v.y = self.gemm_out(v)
        v.y = self.weigh(v)
        return self.finish(v, self.combine(v))


class Batched(nn.Module):
    """Form "batched_mm"."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = weight(EXPERTS, 2 * INTERMEDIATE, HIDDEN, fan_in=HIDDEN)
        self.w_out = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=INTERMEDIATE)
        self.b_in, self.b_out = bias(EXPERTS, 2 * INTERMEDIATE), bias(EXPERTS, HIDDEN)

    def route(self, v: Values) -> None:
        v.weights, v.ids = route(self.router, v.x)
        v.flat_ids = v.ids.reshape(-1)

    def gather(self, v: Values) -> Tensor:
        return v.x.repeat_interleave(TOP_K, dim=0)

    def gemm_in(self, v: Values) -> Tensor:
        return torch.bmm(self.w_in[v.flat_ids], v.rows.unsqueeze(-1)).squeeze(-1) + self.b_in[v.flat_ids]

    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gemm_out(self, v: Values) -> Tensor:
        return torch.bmm(self.w_out[v.flat_ids], v.a.unsqueeze(-1)).squeeze(-1) + self.b_out[v.flat_ids]

    def combine(self, v: Values) -> Tensor:
        return (v.y * v.weights.reshape(-1).unsqueeze(-1)).view(-1, TOP_K, HIDDEN).sum(dim=1)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        v = Values(x=x)
        self.route(v)
        v.rows = self.gather(v)
        v.h = self.gemm_in(v)
        v.a = self.activate(v)
        v.y = self.gemm_out(v)
        return self.finish(v, self.combine(v))


class Dense(nn.Module):
    """Form "dense", the weight after the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = weight(EXPERTS, HIDDEN, 2 * INTERMEDIATE, fan_in=HIDDEN)
        self.w_out = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=INTERMEDIATE)

    def gates(self, v: Values) -> Tensor:
        return v.x.new_zeros(v.x.shape[0], EXPERTS).scatter(1, v.ids, v.weights)

    def gather(self, v: Values) -> Tensor:
        return v.x.unsqueeze(0).expand(EXPERTS, -1, -1)

    def gemm_in(self, v: Values) -> Tensor:
        return torch.bmm(v.rows, self.w_in)

    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gemm_out(self, v: Values) -> Tensor:
        return torch.bmm(v.a, self.w_out)

    def combine(self, v: Values) -> Tensor:
        return (v.y * v.gates.t().unsqueeze(-1)).sum(0)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        v = Values(x=x)
        v.weights, v.ids = route(self.router, x)
        v.gates = self.gates(v)
        v.rows = self.gather(v)
        v.h = self.gemm_in(v)
        v.a = self.activate(v)
        v.y = self.gemm_out(v)
        return self.finish(v, self.combine(v))


class DenseBefore(Dense):
    """Form "dense", the weight before the experts: right only because an expert maps zero to zero."""

    def gates(self, v: Values) -> Tensor:
        value, ids = self.router(v.x).topk(TOP_K, dim=1)
        scores = torch.full((v.x.shape[0], EXPERTS), float("-inf"))
        return scores.scatter_(1, ids, value).sigmoid()

    def gather(self, v: Values) -> Tensor:
        rows = v.x.repeat(EXPERTS, 1) * v.gates.transpose(0, 1).reshape(-1, 1)
        return rows.view(EXPERTS, -1, HIDDEN)

    def combine(self, v: Values) -> Tensor:
        return v.y.sum(dim=0)


class Titan(nn.Module):
    """Form "torchtitan"."""

    load: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=BF16)
        self.w1 = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=HIDDEN, dtype=BF16)
        self.w2 = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=INTERMEDIATE, dtype=BF16)
        self.w3 = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=HIDDEN, dtype=BF16)
        self.shared = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=BF16)
        self.register_buffer("load", torch.zeros(EXPERTS))

    def route(self, v: Values) -> None:
        v.weights, v.ids = torch.topk(self.router(v.x).float().sigmoid(), TOP_K, dim=1)

    def counts(self, v: Values) -> Tensor:
        return v.ids.new_zeros(v.ids.shape[0], EXPERTS).scatter_(1, v.ids, 1).sum(dim=0)

    def order(self, v: Values) -> Tensor:
        return torch.argsort(v.ids.view(-1), stable=True)

    def index(self, v: Values) -> Tensor:
        return (v.perm // TOP_K).reshape(-1, 1).expand(-1, HIDDEN)

    def gate(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.rows, self.w1.transpose(1, 2), offs=v.offs)

    def up(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.rows, self.w3.transpose(1, 2), offs=v.offs)

    def down(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.a, self.w2.transpose(1, 2), offs=v.offs)

    def weigh(self, v: Values) -> Tensor:
        return (v.y.float() * v.weights.view(-1)[v.perm].reshape(-1, 1)).to(v.x.dtype)

    def combine(self, v: Values) -> Tensor:
        return self.shared(v.x).scatter_add(dim=0, index=v.index, src=v.y)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        v = Values(x=x)
        self.route(v)
        v.counts = self.counts(v)
        self.load.add_(v.counts)
        v.perm = self.order(v)
        v.index = self.index(v)
        v.rows = torch.gather(x, 0, v.index)
        v.offs = v.counts.cumsum(0, dtype=torch.int32)
        v.a = F.silu(self.gate(v)) * self.up(v)
        v.y = self.down(v)
        v.y = self.weigh(v)
        return self.finish(v, self.combine(v))


FLAT32, FLAT16 = flat(HIDDEN), flat(HIDDEN, BF16)
CASES = [
    Case("grouped_control", "grouped_mm", Grouped, FLAT16, "steps of transformers' form, out-of-place biases, tanh"),
    Case("batched_control", "batched_mm", Batched, FLAT32, "steps of transformers' form, out-of-place biases"),
    Case("dense_control", "dense", Dense, FLAT32, "zeros.scatter gates, expanded rows, bmm, weight after"),
    Case("dense_before_control", "dense", DenseBefore, FLAT32, "llama4 in steps"),
    Case("titan_control", "torchtitan", Titan, FLAT16, "torchtitan in steps"),
]
