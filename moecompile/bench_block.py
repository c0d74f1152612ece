"""One block of experts with its tensors, and those who compute it: moecompile in BF16 and FP8, and the baseline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moecompile import bench_baseline
from moecompile.bench_cases import (
    AGAIN,
    EAGER,
    FORWARD,
    FP8,
    FP8_AGAIN,
    FP8_EACH,
    IN_FP8,
    INDUCTOR,
    OURS,
    STEP,
    Shape,
)
from moecompile.bench_proof import kernels_of
from moecompile.bench_timing import Contender

ATTRIBUTES = {
    "activation": "mul(silu(gate), up)",
    "gate_up": "halves",
    "output": "mul(out, cast(weight, bfloat16))",
}
"""What the baseline computes, as `moecompile::experts` takes it."""


@dataclass(frozen=True)
class Inputs:
    """One input set: what differs from call to call."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    cotangent: Tensor


Experts = Callable[[Inputs], Tensor]


@dataclass
class Block:
    """The weights of the experts, shared by all, and the input sets, which follow each other.

    Attributes:
        shape: the sizes.
        w_in: (E, 2I, H).
        w_out: (E, H, I).
        sets: the input sets.
        quantised: the eight tensors of the quantised weights, once they have been made.
        main: main gradients of the matrices by name, while there are any.
    """

    shape: Shape
    w_in: Tensor
    w_out: Tensor
    sets: Sequence[Inputs]
    quantised: list[Tensor] = field(default_factory=list)
    main: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape, sets: int, device: str) -> Block:
        """Random weights, tokens and routing."""
        torch.manual_seed(0)

        def matrices(out: int, into: int) -> Tensor:
            made = torch.randn(shape.experts, out, into, dtype=torch.bfloat16, device=device).mul_(into**-0.5)
            return made.requires_grad_()

        w_in, w_out = matrices(2 * shape.inner, shape.hidden), matrices(shape.hidden, shape.inner)
        return cls(shape, w_in, w_out, [random_inputs(shape, device) for _ in range(sets)])

    def with_tokens(self, tokens: int, sets: int) -> Block:
        """The same experts with other input sets."""
        shape = replace(self.shape, tokens=tokens)
        made = [random_inputs(shape, self.w_in.device.type) for _ in range(sets)]
        return replace(self, shape=shape, sets=made)

    def inputs(self, number: int) -> Inputs:
        """The input set of that number."""
        return self.sets[number % len(self.sets)]

    def leaves(self, inputs: Inputs) -> dict[str, Tensor]:
        """What gradients are taken of."""
        return {"x": inputs.x, "weights": inputs.weights, "w_in": self.w_in, "w_out": self.w_out}

    def forget_gradients(self) -> None:
        """All gradients are None."""
        for inputs in self.sets:
            for leaf in self.leaves(inputs).values():
                leaf.grad = None

    def quantise(self, backward: bool = True) -> list[Tensor]:
        """The quantised weights, made anew; for inference, those that the backward reads are left out."""
        with torch.no_grad():
            quantise = functools.partial(torch.ops.moecompile.quantize_weights, backward=backward)
            return [*quantise(self.w_in, None, gate_up=ATTRIBUTES["gate_up"]), *quantise(self.w_out, None)]

    def give_main_gradients(self) -> None:
        """Float32 ones, zero."""
        matrices = {"w_in": self.w_in, "w_out": self.w_out}
        self.main = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in matrices.items()}

    def weights_moved(self) -> float:
        """Elements of the weights of experts that anybody chose, on average over the input sets."""
        used = sum(inputs.ids.unique().numel() for inputs in self.sets) / len(self.sets)
        return 3.0 * self.shape.hidden * self.shape.inner * used

    def moved(self, size: int, step: bool) -> float:
        """Bytes that a call must read and write; `size` of them for an element that is multiplied.

        A forward pass reads tokens and weights and writes the result; a step also reads the result's gradient and, once
        more, tokens and weights, and writes the gradients of both.
        """
        shape, weights = self.shape, self.weights_moved()
        tokens = 2.0 * shape.tokens * shape.hidden
        forward = 2 * tokens + size * weights
        return forward + 3 * tokens + (size + 2) * weights if step else forward


def random_inputs(shape: Shape, device: str) -> Inputs:
    """Tokens, and K different experts for each, all alike in how often they are chosen."""
    scores = torch.rand(shape.tokens, shape.experts, device=device)
    chosen, ids = scores.topk(shape.top_k)
    weights = (chosen / chosen.sum(1, keepdim=True)).requires_grad_()
    x, cotangent = (torch.randn(shape.tokens, shape.hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Inputs(x.requires_grad_(), ids, weights, cotangent)


def ours(block: Block, recompute: bool = False) -> Experts:
    """The operators of the rewritten graph."""
    attributes: dict[str, Any] = ATTRIBUTES | {"recompute": recompute} | _main(block)

    def experts(inputs: Inputs) -> Tensor:
        _, offsets, slots, order = torch.ops.moecompile.plan(inputs.ids, block.shape.experts)
        return torch.ops.moecompile.experts(
            inputs.x, inputs.weights, offsets, slots, order, block.w_in, block.w_out, **attributes
        )

    return experts


def ours_fp8(block: Block, each: bool, recompute: bool = False) -> Experts:
    """The same in FP8, with the weights quantised before or, if `each`, in every call."""
    attributes: dict[str, Any] = ATTRIBUTES | {"recompute": recompute} | _main(block)

    def experts(inputs: Inputs) -> Tensor:
        quantised = block.quantise(torch.is_grad_enabled()) if each else block.quantised
        _, offsets, slots, order = torch.ops.moecompile.plan(inputs.ids, block.shape.experts)
        return torch.ops.moecompile.experts_fp8(
            inputs.x, inputs.weights, offsets, slots, order, block.w_in, block.w_out, **attributes, quantized=quantised
        )

    return experts


def _main(block: Block) -> dict[str, Any]:
    """What the operators are told of main gradients."""
    from moecompile.runtime.main_gradients import keywords

    return keywords(block.main)


def baseline(block: Block, compiled: bool) -> Experts:
    """PyTorch's grouped GEMM, eager or under Inductor with static sizes."""
    run = bench_baseline.experts
    if compiled:
        torch._dynamo.reset()  # one shape of experts at a time: none is refused for being the ninth
        run = torch.compile(run, fullgraph=True, dynamic=False)

    def experts(inputs: Inputs) -> Tensor:
        return run(inputs.x, inputs.ids, inputs.weights, block.w_in, block.w_out)

    return experts


def entrants(block: Block, quantising: bool) -> list[tuple[str, Experts]]:
    """Everybody who computes the block, in the order of their turns; the compiled baseline compiles when called."""
    found = [
        (OURS, ours(block)),
        (INDUCTOR, baseline(block, compiled=True)),
        (EAGER, baseline(block, compiled=False)),
        (FP8, ours_fp8(block, each=False)),
    ]
    return [*found, (FP8_EACH, ours_fp8(block, each=True))] if quantising else found


def recomputing(block: Block) -> list[tuple[str, Experts]]:
    """Those who compute GEMM1's rows again in the backward, instead of saving them."""
    return [(AGAIN, ours(block, recompute=True)), (FP8_AGAIN, ours_fp8(block, each=False, recompute=True))]


def adding(block: Block, inductor: Experts) -> list[tuple[str, Experts]]:
    """Those who add gradients of the matrices to main gradients, which the block has: ours in the backward."""
    others = [(INDUCTOR, inductor), (EAGER, baseline(block, compiled=False))]
    return [(OURS, ours(block)), *others, (FP8, ours_fp8(block, each=False))]


def forward(block: Block, name: str, experts: Experts) -> Contender:
    """Inference."""

    def call(number: int) -> Tensor:
        with torch.no_grad():
            return experts(block.inputs(number))

    return Contender(name, call, block.shape.flops, precision(name), kernels_of(name, FORWARD))


def step(block: Block, name: str, experts: Experts) -> Contender:
    """Forward and backward: gradients of tokens, routing weights and the experts' weights, from None.

    Where the block has main gradients, those that PyTorch's operators return are added to them.
    """

    def call(number: int) -> None:
        block.forget_gradients()
        inputs = block.inputs(number)
        experts(inputs).backward(inputs.cotangent)
        if name in (INDUCTOR, EAGER):
            with torch.no_grad():
                for matrix, main in block.main.items():
                    main.add_(getattr(block, matrix).grad)

    return Contender(name, call, 3 * block.shape.flops, precision(name), kernels_of(name, STEP))


def precision(name: str) -> str:
    """What a contender multiplies."""
    return "fp8" if name in IN_FP8 else "bf16"
