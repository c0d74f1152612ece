"""What predictions of a cluster take for granted, in words and numbers, and what has been published of one."""

from __future__ import annotations

from moecompile.cluster import Outcome, Run
from moecompile.cluster_costs import Batch
from moecompile.cluster_exchange import ENOUGH, reach
from moecompile.cluster_shapes import MODELS
from moecompile.passes.hardware import Hardware, named

TRACE = Outcome(0.1290, 0.1243, 0.1134, 0.0042, "as published")
"""DeepSeek's training trace (train.json of github.com/deepseek-ai/profile-data): a pair of four layers on H800s."""


def published(run: Run) -> Outcome | None:
    """What a published trace has of that run; None if there is none."""
    where = (run.model, run.cluster.nodes, run.cluster.gpus, run.cluster.hardware, run.cluster.sms, run.layers)
    settings = (MODELS["deepseek-v3"], 8, 8, named("h800"), 20, 4)
    return TRACE if where == settings and run.batch == Batch(4096) else None


def assumptions(run: Run) -> list[str]:
    """All of them, of layers and pairs."""
    model, hardware = run.model, run.cluster.hardware
    fp8 = run.batch.precision == "float8"
    kept = (
        "the router's, and between queries, keys and values, in BF16; FP8 operands are cast and transposed by kernels"
    )
    found = [
        *_device(hardware),
        *_travel(run),
        f"products in FP8, but {kept} of their own" if fp8 else "all products in BF16",
        "a kernel takes as long as its operations, or its bytes read and written once, whichever is longer; the "
        "backward of what multiplies nothing moves twice the bytes of its forward",
        "attention is causal: half of all products; its backward has 5 products in place of 2 (FlashAttention); beyond "
        "that nothing is computed again in a backward",
        "gradients of matrices are added to float32",
        f"a micro-batch is {run.batch.sequences} x {run.batch.sequence} tokens on each GPU",
        f"the {run.layers} layers are alike, all with experts; embedding, head and other layers are left out",
        "no tensor parallelism; gradients are not reduced, there is no optimizer, memory is not checked, hosts launch "
        "kernels in time",
        "a forward or a backward by itself runs in the order that the option `overlap` would find; the pair in the "
        "fastest of that, DeepSeek-V3's figure 4, and one after the other",
    ]
    if model.shared:
        found.append("the shared expert is computed by every GPU for its own tokens")
    if run.compute_factor != 1 or run.exchange_factor != 1:
        found.append(
            f"as asked for, kernels take {run.compute_factor:g} times, and exchanges {run.exchange_factor:g} times, "
            "what follows from all this"
        )
    return found


def _device(hardware: Hardware) -> list[str]:
    rates = ", ".join(
        f"{hardware.flops[kind] / 1e12:.0f} TFLOP/s in {name}"
        for kind, name in (("float8", "FP8"), ("bfloat16", "BF16"))
    )
    links = ", ".join(f"{name} {link.rate / 1e9:g} GB/s" for name, link in hardware.links.items())
    waits = ", ".join(f"{name} {link.latency * 1e6:g} us" for name, link in hardware.links.items())
    return [
        f"{hardware.title}: {rates}, {hardware.memory / 1e12:.2f} TB/s of memory: shares of the peaks as reached by an "
        "H200 (passes/hardware.toml); all products reach them, those of attention too; "
        f"{hardware.launch * 1e6:g} us between kernels",
        f"links, each way of each GPU: {links}; until the first byte is there: {waits}",
    ]


def _travel(run: Run) -> list[str]:
    """Of exchanges, and of what they take from kernels."""
    cluster, model, far = run.cluster, run.model, reach(run.model, run.cluster)
    alone = "; within one host fewer fill NVLink, so that few are better than this says" if cluster.nodes == 1 else ""
    limited = model.most_nodes is not None and model.most_nodes < cluster.nodes
    limit = f", of at most {model.most_nodes} nodes" if limited else ""
    there = "FP8 with a float32 scale for 128 values" if run.batch.precision == "float8" else "BF16"
    return [
        f"exchanges take {cluster.sms} of {cluster.hardware.multiprocessors} multiprocessors; they fill links with "
        f"{ENOUGH} (DeepSeek-V3, section 3.2.2), and carry in proportion with fewer{alone}",
        "meanwhile kernels are slower in proportion to the multiprocessors that are left; at other times they have all",
        f"a token goes to {model.top} of {model.experts} experts{limit}, each as likely, with even loads: it crosses "
        f"the network {far.network:.2f} times and NVLink {far.nvlink:.2f} times",
        f"dispatch in {there}, forward and backward, combine in BF16; positions and weights that travel along are not "
        "counted; network and NVLink are in use at once; one exchange follows the other, and nobody is waited for",
    ]


def assumptions_of_steps(run: Run, stages: int) -> list[str]:
    """Those that a step adds, of so many stages."""
    return [
        f"{stages} stages of {run.layers} layers each ({run.model.name} has {run.model.layers}), each on "
        f"{run.cluster.ranks} GPUs; what goes on to the next crosses the network in BF16, and shares it with nothing",
        "schedules with weight parts run a whole backward as its two parts, one after the other; 1F1B hides exchanges "
        "behind weight parts; a forward or a backward outside a pair hides behind nothing else",
    ]
