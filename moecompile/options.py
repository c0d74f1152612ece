"""What the user may set: `Options`, a frozen record checked where it is written, and the environment variables.

One more option is one more line in `Options`: its annotation is its check, its default and its text are its
documentation. One more environment variable is one more row in `ENVIRONMENT`. docs/options.md is tested against both.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moecompile.option_values import check, did_you_mean, names, pairs
from moecompile.passes.exclusions import check_pattern
from moecompile.runtime.peer_memory import MOST_PATIENCE, MOST_SMS, PATIENCE, ROWS, ROWS_AT_LEAST, SMS

# The passes over the captured graph, in the order in which they run; `Options.disable` takes these names.
PASSES: dict[str, str] = {
    "detect": "finds the mixture-of-experts blocks; without it none is rewritten",
    "fuse": "replaces each block found by moecompile's operators; without it blocks are only reported",
    "exchange": "exchanges tokens between the ranks that share a block's experts; without it each rank gathers all "
    "experts (`moecompile.shard_experts`), or the model's own exchange stays",
    "precision": "casts linear layers and experts to FP8 where the option `precision` asks for it",
    "hide": "makes one operator of a block and its exchange of tokens, which it hides behind the experts in inference; "
    "without it experts begin when all tokens are there, and the host calls operators one by one",
}


@dataclass(frozen=True)
class EnvironmentVariable:
    """A row of `ENVIRONMENT`: the values it takes, what holds when it is not set, and what it does."""

    values: str
    default: str
    meaning: str


ENVIRONMENT: dict[str, EnvironmentVariable] = {
    "MOECOMPILE_DISABLE": EnvironmentVariable(
        "0, 1",
        "0",
        "1: the backend hands every graph untouched to the lowering that was chosen, Inductor by default, to tell "
        "whether moecompile is to blame",
    ),
    "MOECOMPILE_DISABLE_PASSES": EnvironmentVariable(
        "names, with commas between", "none", "passes to leave out, besides those of the option `disable`"
    ),
    "MOECOMPILE_CACHE_DIR": EnvironmentVariable(
        "a directory", "$XDG_CACHE_HOME/moecompile, or ~/.cache/moecompile", "where moecompile keeps what it may reuse"
    ),
}


def _option(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning})


WITHOUT_CUDA_GRAPHS = {
    "fp8_cache_weights": "which want their inputs to lie where they were captured",
    "profile": "whose operators cannot be measured one by one",
}
"""Options, and why CUDA graphs do not go with them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the backend: `torch.compile(model, backend="moecompile", options=Options(...).as_dict())`.

    Every value is checked here, so that a mistake is reported on the line that makes it, not at the model's first call.
    Instances are hashable and compare by value; `dataclasses.replace` makes changed copies.

    Raises:
        ValueError: an unknown option, or a value that the option does not take.
    """

    lowering: Literal["inductor", "eager"] = _option(
        "inductor", 'what runs the rewritten graphs: Inductor, or PyTorch operator by operator ("eager")'
    )
    kernels: Literal["auto", "reference"] = _option(
        "auto",
        'what runs inside the operators: the fastest kernels the machine has, or only PyTorch\'s own ("reference")',
    )
    precision: Literal["model", "fp8"] = _option(
        "model",
        "what linear layers and experts multiply: numbers of the model's own precision, or FP8 by DeepSeek-V3's recipe "
        '("fp8", bfloat16 and float16 models; embeddings, head, routers, norms and attention itself stay as they are)',
    )
    fp8_exclude: tuple[str, ...] = _option(
        (),
        "patterns (`*`, `?`, `[...]`, numbers as in `layers.[0-11]`) of paths of modules that stay in the model's "
        "precision, with all that is inside them",
    )
    fp8_include: tuple[str, ...] = _option(
        (),
        "the same of modules that are cast although they would be kept, if they can be; what `fp8_exclude` "
        "names is kept all the same",
    )
    fp8_keep_first_layers: int = _option(0, "how many of the first layers of each list of layers are kept")
    fp8_keep_last_layers: int = _option(0, "how many of the last ones, as far as a graph holds them")
    fp8_scale_format: Literal["power_of_two", "float32"] = _option(
        "power_of_two",
        "scales of blocks of numbers: powers of two, or float32, amax / 448, as checkpoints in FP8 and other "
        "implementations have them; float32 forward and for gradients of rows alone",
    )
    fp8_compare: Literal["first_call"] | None = _option(
        None,
        "compares every layer in FP8 with the same in the model's own precision, and the experts that tokens choose, "
        "at the first call: the report has a table; what runs does not depend on it, but that no exchange is hidden",
    )
    fp8_cache_weights: bool = _option(
        False,
        "the FP8 copies of matrices are kept until the parameters change, not made in every forward; "
        "changes through `.data` need `moecompile.invalidate(model)`; not with CUDA graphs",
    )
    fp8_recast_weights: bool = _option(
        False,
        "the backward casts matrices for itself, so that transposed copies, half a matrix's bytes in bfloat16, are not "
        "held until then; matrices are read twice in a step",
    )
    recompute: bool = _option(
        False,
        "the backward computes the experts' first products (gate and up projection) again instead of having them kept: "
        "less memory, some fifth more floating-point operations",
    )
    main_grad: bool = _option(
        False,
        "gradients of the experts' matrices are added, in float32, to `parameter.main_grad` where a parameter has one, "
        "as Megatron-LM keeps them; `parameter.grad` stays what it was, and hooks of the parameter find no gradient",
    )
    expert_load: bool = _option(
        False,
        "how many tokens each expert was assigned is counted, block by block, in tensors on the device that "
        "`moecompile.expert_load(model)` gives without waiting for it",
    )
    verify: Literal["first_call"] | None = _option(
        None,
        "compares every rewritten block, any exchange between ranks included, before any cast to FP8, with the "
        "original region at the first call: outputs, and gradients in training (in the bodies of cond, map, scan and "
        "other operators than checkpoint: outputs alone); ranks that share experts do so together, when all first "
        "compile",
    )
    ep_capacity: int | None = _option(
        None,
        "tokens that a rank brings to an exchange with the ranks that share its experts, at most; every rank has to "
        "give the same number. Without it the ranks agree on the most of the first graph that they compile",
    )
    ep_rows: float = _option(
        ROWS,
        "rows that a rank's experts have room for, as a multiple of tokens (`ep_capacity`) times experts of each; what "
        "the backward needs is as large. More give the exchange up: results are NaN on all ranks, and the next step of "
        f"an optimizer raises an error with the number. There is always room for {ROWS_AT_LEAST}",
    )
    ep_dispatch_again: bool = _option(
        False,
        "the backward has tokens dispatched once more instead of keeping those that came from all ranks, which are as "
        "many as ranks times `ep_capacity`: less memory, a quarter more bytes between ranks; every rank has to give "
        "the same",
    )
    ep_sms: int | Literal["auto"] = _option(
        "auto",
        "multiprocessors that send tokens to the ranks which share experts, where moecompile's kernels do it; every "
        f"rank has to give the same number. `auto` takes as many as keep NVLink busy, {SMS}",
    )
    ep_patience: float = _option(
        PATIENCE,
        "seconds that these kernels wait for another rank; then all ranks give up, results are NaN, and the next step "
        "of an optimizer raises an error that says who has waited for whom",
    )
    overlap: bool = _option(
        False,
        "orders the operators of compiled graphs so that what travels between ranks does so while others compute, "
        "where that is predicted to be faster; every rank has to give the same; the report says what is predicted. "
        "Compiled code is not taken from torch's caches then",
    )
    microbatches: Literal[1, 2] = _option(
        1,
        "2 runs a graph that exchanges tokens with other ranks on two halves of its batch, so that what travels for "
        "one half does while the other computes; implies `overlap`, and no exchange is hidden in a block. The batch "
        "has to be marked (`moecompile.mark_batch`), `ep_capacity` given, and it must be proven that elements are "
        "computed one by one: else the report says why the graph stays whole. Every rank has to give the same",
    )
    profile: bool = _option(
        False,
        "`overlap`, which this implies, reckons with what operators take on this device: the first calls of each graph "
        "run operator by operator and are measured; stored beside the compiled kernels, for later processes too. Every "
        "rank has to give the same",
    )
    disable: tuple[str, ...] = _option((), "passes to leave out, by exact name: " + ", ".join(PASSES))
    # Given as a mapping; kept as sorted pairs, which cannot be changed and compare whatever the order was.
    inductor: Mapping[str, Any] | tuple[tuple[str, Any], ...] = dataclasses.field(
        default=(),
        hash=False,  # Inductor takes lists and dicts too; the other fields are enough for a hash
        metadata={
            "meaning": "options of Inductor, a mapping as in `torch.compile(options=...)`; needs Inductor's lowering"
        },
    )

    def __new__(cls, **values: Any) -> Options:
        """Refuses unknown names with a suggestion, which a dataclass's own message would not make."""
        for name, value in values.items():
            if name not in cls.__dataclass_fields__:
                raise ValueError(_unknown_option(name, value))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Mappings, lists and generators are taken, and kept in the one form that compares and hashes by value.
        for name in ("disable", "fp8_exclude", "fp8_include"):
            object.__setattr__(self, name, names(name, getattr(self, name)))
        object.__setattr__(self, "inductor", pairs("inductor", self.inductor))
        annotations = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            check(field.name, annotations[field.name], getattr(self, field.name))
        _check_passes(self.disable, "the option `disable`")
        self._check_fp8()
        self._check_exchange()
        if self.microbatches == 2 or self.profile:
            object.__setattr__(self, "overlap", True)
        if self.lowering != "inductor" and self.inductor:
            raise ValueError(
                f"moecompile: options for Inductor ({', '.join(dict(self.inductor))}) came together with "
                f"lowering={self.lowering!r}, which would drop them. Leave one of the two out."
            )

    def _check_exchange(self) -> None:
        """Raises ValueError for numbers that no exchange of tokens can have."""
        if self.ep_capacity is not None and self.ep_capacity < 1:
            raise ValueError(f"moecompile: option `ep_capacity`: expected 1 or more, got {self.ep_capacity}.")
        if not self.ep_rows > 0:
            raise ValueError(f"moecompile: option `ep_rows`: expected more than 0, got {self.ep_rows}.")
        if self.ep_sms != "auto" and not 1 <= self.ep_sms <= MOST_SMS:
            raise ValueError(f"moecompile: option `ep_sms`: expected 1 to {MOST_SMS}, or 'auto', got {self.ep_sms}.")
        if not 0.001 <= self.ep_patience <= MOST_PATIENCE:
            most = f"{MOST_PATIENCE:g}"
            raise ValueError(
                f"moecompile: option `ep_patience`: expected 0.001 to {most} seconds, got {self.ep_patience}."
            )

    def _check_fp8(self) -> None:
        """Raises ValueError for options of FP8 without FP8, and for numbers of layers below 0."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("fp8_") and value != field.default and self.precision != "fp8":
                raise ValueError(
                    f"moecompile: option `{field.name}` is about FP8, which precision={self.precision!r} does not "
                    "use. Add precision='fp8', or leave it out."
                )
            if field.name.endswith("_layers") and value < 0:
                raise ValueError(f"moecompile: option `{field.name}`: expected 0 or more, got {value}.")
            for pattern in value if field.name in ("fp8_exclude", "fp8_include") else ():
                try:
                    check_pattern(pattern)
                except ValueError as error:
                    raise ValueError(f"moecompile: option `{field.name}`: {error}.") from None
        if self.fp8_cache_weights and self.fp8_recast_weights:
            raise ValueError(
                "moecompile: `fp8_cache_weights` keeps the copies that `fp8_recast_weights` is to save. Leave one out."
            )

    @classmethod
    def parse(cls, mode: str | None, options: Mapping[str, Any] | Options | None) -> Options:
        """Reads what torch.compile hands to a backend, and adds what the environment says.

        Args:
            mode: as in `torch.compile(mode=...)`; stands for the options of Inductor that it stands for there.
            options: as in `torch.compile(options=...)`: a mapping of this class's fields, or an instance.

        Returns:
            the options that hold, with the names and types of Inductor's options checked against this torch.

        Raises:
            ValueError: an unknown name, a value that an option does not take, or an unknown mode.
        """
        chosen = options if isinstance(options, Options) else cls._from_mapping(options)
        inductor = {**_mode_options(mode), **_checked_inductor_options(dict(chosen.inductor))}
        disable = dict.fromkeys((*chosen.disable, *environment_disabled_passes()))
        parsed = dataclasses.replace(chosen, inductor=tuple(inductor.items()), disable=tuple(disable))
        for option, why in WITHOUT_CUDA_GRAPHS.items():
            if getattr(parsed, option):
                parsed.refuse_cuda_graphs(f"option `{option}` does not go", why)
        return parsed

    @classmethod
    def _from_mapping(cls, options: Mapping[str, Any] | None) -> Options:
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(
                f"moecompile: expected options as a mapping or as moecompile.Options, got {options!r}. "
                'Write options={"lowering": "inductor"}, say.'
            )
        return cls(**{str(name): value for name, value in (options or {}).items()})

    def refuse_cuda_graphs(self, what: str, why: str) -> None:
        """Raises ValueError if Inductor is to make CUDA graphs, which do not go with something, for this reason."""
        from torch._inductor import config

        asked = dict(self.inductor).get("triton.cudagraphs", config.triton.cudagraphs)
        if asked and self.lowering == "inductor":
            raise ValueError(
                f"moecompile: {what} with Inductor's CUDA graphs (mode='reduce-overhead', triton.cudagraphs), {why}. "
                "Leave one of the two out."
            )

    def as_dict(self) -> dict[str, Any]:
        """Every field in a plain dict, which `torch.compile(options=...)` and `Options.parse(None, ...)` take."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {
            "inductor": dict(self.inductor)
        }


def unknown_variables() -> dict[str, str]:
    """Environment variables that begin like ours and are none -> a sentence about each."""
    return {
        name: f"{name} is set, and is no variable of moecompile's.{did_you_mean(name, ENVIRONMENT)} "
        "Unset it, or correct it."
        for name in sorted(os.environ)
        if name.startswith("MOECOMPILE_") and name not in ENVIRONMENT
    }


def environment_disables_backend() -> bool:
    """Whether MOECOMPILE_DISABLE asks to hand every graph untouched to its lowering.

    Raises:
        ValueError: it is set to something else than 0 or 1.
    """
    value = os.environ.get("MOECOMPILE_DISABLE", "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"MOECOMPILE_DISABLE: expected 0 or 1, got {value!r}. Unset it, or set it to one of the two.")
    return value == "1"


def environment_disabled_passes() -> tuple[str, ...]:
    """The passes that MOECOMPILE_DISABLE_PASSES names.

    Raises:
        ValueError: a name that is no pass.
    """
    names = tuple(filter(None, (name.strip() for name in os.environ.get("MOECOMPILE_DISABLE_PASSES", "").split(","))))
    _check_passes(names, "MOECOMPILE_DISABLE_PASSES")
    return names


def _unknown_option(name: str, value: Any) -> str:
    from torch._inductor import config

    if name.replace("-", "_") in config.get_config_copy():
        return (
            f"moecompile: {name!r} is an option of Inductor, not of moecompile. "
            f'Write options={{"inductor": {{{name!r}: {value!r}}}}}.'
        )
    known = list(Options.__dataclass_fields__)
    hint = did_you_mean(name, known)
    if not hint and any(word in name.lower() for word in ("fp8", "float8")):
        hint = ' FP8 is options={"precision": "fp8"}.'
    return f"moecompile: unknown option {name!r}.{hint} Known: {', '.join(known)}."


def _check_passes(names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in PASSES:
            raise ValueError(
                f"moecompile: {where} names the pass {name!r}, which does not exist.{did_you_mean(name, PASSES)} "
                f"Passes: {', '.join(PASSES)}."
            )


def _mode_options(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if not isinstance(mode, str) or mode not in known:
        hint = did_you_mean(mode, known) if isinstance(mode, str) else ""
        raise ValueError(f"moecompile: unknown mode {mode!r}.{hint} Modes: {', '.join(known)}.")
    return dict(known[mode])


def _checked_inductor_options(options: dict[str, Any]) -> dict[str, Any]:
    if not options:
        return options
    from torch._inductor import config

    known = config.get_config_copy()
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"moecompile: option `inductor`: Inductor has no option {name!r}.{did_you_mean(name, known)}"
            )
        expected = config.get_type(name)  # type: ignore[attr-defined]
        # Inductor itself does not check subscripted types either.
        if typing.get_origin(expected) is None and not isinstance(value, expected):
            raise ValueError(f"moecompile: option `inductor`: {name!r} is of type {expected.__name__}, got {value!r}.")
    return options
