"""The sizes that `python -m moecompile bench` measures, and the targets: plain tables."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.bench_results import Target

INDUCTOR, EAGER = "Inductor", "eager"
OURS, FP8, FP8_EACH = "ours BF16", "ours FP8", "ours FP8, quantising"
FP8_TWICE = "ours FP8, quantising twice"
ADDING = "forward+backward, main gradients"
AGAIN, FP8_AGAIN = "ours BF16, recomputing", "ours FP8, recomputing"
IN_FP8 = (FP8, FP8_EACH, FP8_TWICE, FP8_AGAIN)
FP8_COPYING = "ours FP8, with copies"
TORCH, CEILING = "torch", "cuBLAS"
FORWARD, STEP = "forward", "forward+backward"
GPU_TIME, CALLS = "time on the GPU", "calls back to back"
ALONE, BURST, IN_A_ROW = "one at a time", "bursts of 4", "back to back"
BURST_CALLS = 4
QUANTISING = "quantising the weights"
WHOLE_BLOCK, EXPERT_KERNELS = "whole block", "kernels of the experts"
IN_MODEL, IN_BENCH = "ours BF16, in the model", "ours BF16, in the bench"


@dataclass(frozen=True)
class Shape:
    """One block of experts: H, I, E, top-k and T."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    tokens: int

    @property
    def title(self) -> str:
        """In print."""
        return f"{self.name} H{self.hidden} I{self.inner} E{self.experts} top-{self.top_k} T{self.tokens}"

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass: three products for each assignment."""
        return 6.0 * self.tokens * self.top_k * self.hidden * self.inner


BLOCKS = (
    Shape("deepseek", 7168, 2048, 64, 8, 8192),
    Shape("qwen3", 2048, 768, 128, 8, 8192),
    Shape("mixtral", 4096, 14336, 8, 2, 8192),
    Shape("gpt-oss", 2880, 2880, 128, 4, 8192),
)
DECODE = ("qwen3", "deepseek")
DECODE_TOKENS = (1, 8, 64, 256)
TINY = Shape("tiny", 64, 32, 4, 2, 48)
"""For a look at the command on a CPU."""


@dataclass(frozen=True)
class Product:
    """One grouped GEMM.

    Attributes:
        name: in print and for `--shapes`.
        counts: rows of each group.
        n: columns of the result.
        k: what is summed over; for `outer`, rows of each group's result.
        outer: whether it is the gradient of the weights: each group's rows times its rows, summed over the rows.
    """

    name: str
    counts: tuple[int, ...]
    n: int
    k: int
    outer: bool = False

    @property
    def rows(self) -> int:
        """Of all groups."""
        return sum(self.counts)

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return 2.0 * self.rows * self.n * self.k

    def moved(self, size: int) -> float:
        """Bytes that must be read and written, for operands of that many bytes an element and results of two."""
        left, right, groups = self.rows * self.k, self.rows * self.n, len(self.counts) * self.n * self.k
        return float(size * (left + right) + 2 * groups if self.outer else size * (left + groups) + 2 * right)


SKEWED = (12304, 7152, 5136, 3056, 2320, 1520, 784, 496)
"""32768 rows in eight groups, multiples of 16, which PyTorch asks for in FP8, and of no tile."""
PRODUCTS = (
    Product("8x4096-n4096-k7168", (4096,) * 8, 4096, 7168),
    Product("8x4096-n7168-k2048", (4096,) * 8, 7168, 2048),
    Product("skewed-n4096-k7168", SKEWED, 4096, 7168),
    Product("32x256-n4096-k7168", (256,) * 32, 4096, 7168),
    Product("256x128-n4096-k7168", (128,) * 256, 4096, 7168),
    Product("wgrad-8x4096", (4096,) * 8, 7168, 4096, outer=True),
    Product("wgrad-32x1024", (1024,) * 32, 7168, 4096, outer=True),
)
TINY_PRODUCTS = (
    Product("tiny-8x16", (16,) * 8, 64, 128),
    Product("tiny-wgrad", (16,) * 8, 64, 128, outer=True),
)

# Which names a quick look takes.
QUICK = ("deepseek", "qwen3", "8x4096-n4096-k7168", "32x256-n4096-k7168", "wgrad-8x4096")
QUICK_TOKENS = (1, 64)


MODELS = ("qwen3", "deepseek")
"""Sizes at which blocks of transformers are compiled."""


def _block(case: str, what: str, **ratios: float) -> dict[tuple[str, str, str], Target]:
    names = {"bf16": OURS, "fp8": FP8, "quantising": FP8_EACH}
    return {(case, what, names[name]): Target(ratio, INDUCTOR) for name, ratio in ratios.items()}


def _decode(case: str, tokens: int, **ratios: float) -> dict[tuple[str, str, str], Target]:
    found: dict[tuple[str, str, str], Target] = {}
    for what in (GPU_TIME, CALLS):
        found |= _block(f"{case} T{tokens}", what, **ratios)
    return found


def _product(case: str, **ratios: float) -> dict[tuple[str, str, str], Target]:
    names = {"bf16": ("BF16", OURS), "fp8": ("FP8", FP8), "copying": ("FP8", FP8_COPYING)}
    return {
        (case, f"{names[name][0]}, {BURST}", names[name][1]): Target(ratio, CEILING) for name, ratio in ratios.items()
    }


def _model(case: str) -> dict[tuple[str, str, str], Target]:
    return {(case, f"{what}, {EXPERT_KERNELS}", IN_MODEL): Target(0.971, IN_BENCH) for what in (FORWARD, STEP)}


SPEED_TARGETS: dict[tuple[str, str, str], Target] = {
    **_block("deepseek", FORWARD, bf16=1.25, fp8=2.1),
    **_block("deepseek", STEP, bf16=1.2, fp8=1.8, quantising=1.55),
    **_block("qwen3", FORWARD, bf16=1.4, fp8=2.2),
    **_block("qwen3", STEP, bf16=1.25, fp8=1.5),
    **_block("mixtral", FORWARD, bf16=1.1, fp8=1.8),
    **_block("mixtral", STEP, bf16=1.1, fp8=1.6),
    **_block("gpt-oss", FORWARD, bf16=1.3, fp8=2.0),
    **_block("gpt-oss", STEP, bf16=1.2, fp8=1.5),
    **_decode("qwen3", 1, bf16=1.5),
    **_decode("qwen3", 8, bf16=1.5),
    **_decode("qwen3", 64, bf16=1.5, fp8=2.2),
    **_decode("qwen3", 256, bf16=1.5, fp8=2.2),
    **_decode("deepseek", 1, bf16=1.3),
    **_decode("deepseek", 8, bf16=1.3, fp8=2.3),
    **_decode("deepseek", 64, bf16=1.3, fp8=2.3),
    **_decode("deepseek", 256, bf16=1.3, fp8=2.3),
    **_product("8x4096-n4096-k7168", bf16=0.97, fp8=0.97),
    **_product("8x4096-n7168-k2048", bf16=0.97, fp8=0.93),
    **_product("skewed-n4096-k7168", fp8=0.93),
    **_product("32x256-n4096-k7168", fp8=0.88),
    **_product("256x128-n4096-k7168", fp8=0.57),
    **_product("wgrad-8x4096", fp8=0.80, copying=0.65),
    **_product("wgrad-32x1024", fp8=0.70, copying=0.55),
    **_model("qwen3"),
    **_model("deepseek"),
}
"""By case, what is measured and contender: how many times as fast as the other it is to be, in the same run."""
LAYERS, SEQUENCE = (1, 4), 1024
"""Of `bench model`: how many decoder layers, and tokens of a sequence. Attention, which nobody changes, grows with the
latter: with sequences of 4096 it is half of DeepSeek-V3's step (docs/perf.md)."""
CASTS, HELD, MOST_CASTS = "casts of rows and gradients", "held for the backward", 0.08
LAYER_TARGETS: dict[tuple[str, str, str], Target] = {
    **_block("deepseek", FORWARD, fp8=1.5),
    **_block("deepseek", STEP, quantising=1.35),
    **_block("qwen3", FORWARD, fp8=1.3),
    **_block("qwen3", STEP, quantising=1.2),
}
"""The same of whole layers: a forward with matrices that were cast before, a step that casts them."""
MEMORY_TARGETS = {("deepseek", name): Target(1.0, INDUCTOR) for name in (OURS, FP8, FP8_EACH)}
"""A training step's peak beyond the gradients is to be no larger than the other's."""
