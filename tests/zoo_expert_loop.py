"""Form "expert_loop": a Python loop over all experts, each with the tokens that chose it (unbacked sizes)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, bias, flat, weight


class Expert(nn.Module):
    """Three linears, as in Mixtral's first implementation."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)
        self.w3 = nn.Linear(dim, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class WhereIndexAdd(nn.Module):
    """Mixtral of transformers 4: permuted one_hot mask, torch.where, a ModuleList, index_add_."""

    def __init__(self, hidden: int = 32, inner: int = 48, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden_states.shape[-1]
        logits = self.gate(hidden_states)
        weights = F.softmax(logits, dim=1, dtype=torch.float)
        weights, selected = torch.topk(weights, self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(hidden_states.dtype)
        out = torch.zeros_like(hidden_states)
        mask = F.one_hot(selected, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            place, token = torch.where(mask[e])
            rows = hidden_states[None, token].reshape(-1, hidden)
            current = self.experts[e](rows) * weights[token, place, None]
            out.index_add_(0, token, current.to(hidden_states.dtype))
        return out, logits


class EqualitySetItem(nn.Module):
    """DeepSeek's inference loop without its skip: where(ids == e), rows assigned back with +=, stacked weights."""

    def __init__(self, dim: int = 32, inter: int = 32, n_experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.n, self.k = n_experts, k
        self.gate = nn.Linear(dim, n_experts, bias=False)
        self.w1 = weight(n_experts, inter, dim, fan_in=dim)
        self.w3 = weight(n_experts, inter, dim, fan_in=dim)
        self.w2 = weight(n_experts, dim, inter, fan_in=inter)
        self.shared = Expert(dim, inter)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        weights, indices = torch.topk(scores, self.k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True) * 1.8
        y = torch.zeros_like(x)
        for i in range(self.n):
            idx, top = torch.where(indices == i)
            h = F.silu(F.linear(x[idx], self.w1[i])) * F.linear(x[idx], self.w3[i])
            y[idx] += F.linear(h, self.w2[i]) * weights[idx, top, None]
        return y + self.shared(x)


class NonzeroIndexPut(nn.Module):
    """nonzero over a token mask, the weight summed over the places, index_put with accumulate, biased gelu experts."""

    def __init__(self, width: int = 32, inner: int = 32, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.n, self.top_k = experts, top_k
        self.router = nn.Linear(width, experts)
        self.up, self.up_bias = weight(experts, width, inner, fan_in=width), bias(experts, inner)
        self.down, self.down_bias = weight(experts, inner, width, fan_in=inner), bias(experts, width)

    def forward(self, x: Tensor) -> Tensor:
        probs, ids = self.router(x).softmax(-1).topk(self.top_k)
        out = x.new_zeros(x.shape)
        for e in range(self.n):
            hit = ids == e
            rows = hit.any(dim=-1).nonzero().squeeze(-1)
            gate = (probs * hit).sum(-1)[rows]
            h = F.gelu(x[rows] @ self.up[e] + self.up_bias[e])
            y = torch.addmm(self.down_bias[e], h, self.down[e])
            out = out.index_put((rows,), y * gate.unsqueeze(-1), accumulate=True)
        return out


class TopOneAssign(nn.Module):
    """Top-1: the choice is a vector, rows are written once, squared ReLU, nn.Sequential experts."""

    def __init__(self, size: int = 32, inner: int = 64, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(size, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(size, inner), "fc2": nn.Linear(inner, size)}) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        prob, choice = torch.max(F.softmax(self.router(x), dim=-1), dim=-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            assert isinstance(expert, nn.ModuleDict)
            rows = torch.nonzero(choice == index).flatten()
            h = F.relu(expert["fc1"](x.index_select(0, rows))).square()
            out[rows] = expert["fc2"](h) * prob[rows].unsqueeze(1)
        return out


class SharedBase(nn.Module):
    """The shared expert's output is what the loop adds to, in place; masks by equality."""

    def __init__(self, dim: int = 32, inner: int = 32, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.n, self.top_k = experts, top_k
        self.router = nn.Linear(dim, experts, bias=False)
        self.shared = nn.Linear(dim, dim)
        self.w_gate = weight(experts, dim, inner, fan_in=dim)
        self.w_up = weight(experts, dim, inner, fan_in=dim)
        self.w_down = weight(experts, inner, dim, fan_in=inner)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.softmax(self.router(x), -1).topk(self.top_k)
        out = self.shared(x)
        for e in range(self.n):
            token, place = torch.nonzero(ids == e, as_tuple=True)
            rows = x[token]
            rows = (F.silu(rows @ self.w_gate[e]) * (rows @ self.w_up[e])) @ self.w_down[e]
            out.index_add_(0, token, rows * weights[token, place].unsqueeze(-1))
        return out


class SplitBySizes(nn.Module):
    """As jetmoe writes it: sorted rows split by a list of unbacked sizes, one linear for each part, cat, index_add."""

    def __init__(self, hidden: int = 32, inner: int = 32, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.n, self.top_k = experts, top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.input_linear = weight(experts, 2 * inner, hidden, fan_in=hidden)
        self.output_linear = weight(experts, hidden, inner, fan_in=inner)

    def each(self, x: Tensor, sizes: list[int], matrices: Tensor) -> Tensor:
        parts = x.split(sizes, dim=0)
        return torch.cat([F.linear(parts[e], matrices[e]) for e in range(self.n)], dim=0)

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.router(x).topk(self.top_k, dim=1)
        gates = torch.softmax(top, dim=1)
        counts = torch.zeros(x.size(0), self.n, dtype=torch.int64).scatter(1, ids, 1).sum(0)
        sizes = counts.tolist()
        _, order = ids.flatten().sort(0)
        token = order.div(self.top_k, rounding_mode="trunc")
        gate, up = self.each(x[token], sizes, self.input_linear).chunk(2, dim=-1)
        y = self.each(F.silu(gate) * up, sizes, self.output_linear)
        y = y * gates.flatten()[order][:, None]
        return torch.zeros(x.size(0), x.size(1), dtype=y.dtype).index_add(0, token, y)


FORM = "expert_loop"
CASES = [
    Case("where_index_add", FORM, WhereIndexAdd, flat(32), "transformers 4: where(mask[e]), index_add_", True),
    Case("equality_set_item", FORM, EqualitySetItem, flat(32), "where(ids == e), y[idx] +=, stacked weights", True),
    Case("nonzero_index_put", FORM, NonzeroIndexPut, flat(32), "nonzero, index_put(accumulate=True), biases", True),
    Case("top_one_assign", FORM, TopOneAssign, flat(32), "top-1, out[rows] = ..., index_select, relu^2", True),
    Case("shared_base", FORM, SharedBase, flat(32), "nonzero tuples, index_add_ onto the shared output, x @ w", True),
    Case("split_by_sizes", FORM, SplitBySizes, flat(32), "jetmoe: tolist, split, a linear a part, cat", True),
]
