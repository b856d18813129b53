"""Select: which parameters of a model are quantized, along which dimension, and why the others are not.

Selected by default: weights of Linear, Conv, GPT-2's Conv1D, attention projections and known expert tensors. Never embeddings, heads tied
to them, norms and biases.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

Choice = TypeVar("Choice")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
WEIGHTED = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True)
class Row(Generic[Choice]):
    """One parameter's fate.

    Attributes:
        name: the parameter's name; the first one where it is shared.
        parameter: the parameter itself.
        choice: what the caller's mapping holds for it, or None where it stays in float.
        axis: the contraction dimension where it is not the usual one.
        reason: why it was taken or left, in words.
    """

    name: str
    parameter: nn.Parameter
    choice: Choice | None
    axis: int | None
    reason: str


class Selection(tuple[Row[Choice], ...]):
    """Rows for every parameter of a model, in the model's order; `print` and the prompt show a table."""

    __slots__ = ()

    @property
    def chosen(self) -> tuple[Row[Choice], ...]:
        """The rows that are quantized."""
        return tuple(row for row in self if row.choice is not None)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self], default=4)
        lines = [f"{'name':<{width}}  {'shape':<20}  {'quantized':<9}  why"]
        for row in self:
            taken = "yes" if row.choice is not None else "-"
            lines.append(f"{row.name:<{width}}  {tuple(row.parameter.shape)!s:<20}  {taken:<9}  {row.reason}")
        chosen = sum(row.parameter.numel() for row in self.chosen)
        total = sum(row.parameter.numel() for row in self)
        lines.append(f"{len(self.chosen)} of {len(self)} parameters quantized: {chosen:,} of {total:,} elements")
        return "\n".join(lines)

    __repr__ = __str__


def select(model: nn.Module, choices: Choice | Mapping[str, Choice | None] = True, *, skip: Sequence[str] = ()) -> Selection[Choice]:  # type: ignore[assignment]
    """Return what becomes of each parameter of a model.

    Args:
        model: any module.
        choices: one value for every selected parameter, or a mapping from names to values in which the first match wins and None leaves
            the parameter out. A name is a parameter's, a module's (for all below it), or a shell pattern over them. The full name of a
            parameter also takes one that is not selected by default.
        skip: names or patterns to leave out.

    Raises:
        TypeError: `model` is no module, `skip` no sequence of names, or a name in the mapping no string.
        ValueError: a parameter without a shape yet (a lazy module), a name that matches nothing, or a selected weight that is computed
            from other parameters (weight_norm, LoRA).
    """
    if isinstance(skip, str):
        raise TypeError(f"`skip` must be a sequence of names: got the string {skip!r}. Write skip=[{skip!r}].")
    if not isinstance(skip, Collection):
        raise TypeError(f"`skip` must be a sequence of names: got {skip!r}. Write skip=['head'], or leave it out to skip nothing.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module: got {type(model).__name__}. Give the model itself, not its weights or its name.")
    _refuse_odd(model, [*skip, *(choices if isinstance(choices, Mapping) else ())])
    names = _aliases(model)
    mapping: Mapping[str, Choice | None] = choices if isinstance(choices, Mapping) else {"*": choices}
    computed = dict(_computed(model))
    _refuse_unmatched([*skip, *mapping], [*(alias for aliases, *_ in names.values() for alias in aliases), *computed])
    rows: list[Row[Choice]] = []
    fates: dict[str, Choice | None] = {}
    for aliases, parameter, known, axis, reason in names.values():
        choice, why = None, reason
        key = next((key for key in mapping if any(matches(alias, key) for alias in aliases)), None)
        if any(matches(alias, pattern) for pattern in skip for alias in aliases):
            why = "skipped by name"
        elif key is None:
            why = "no name in the mapping matches" if known else reason
        elif mapping[key] is None:
            why = "left out by the mapping"
        elif known or key in aliases:
            choice, why = mapping[key], reason if known else "named exactly"
        rows.append(Row(aliases[0], parameter, choice, axis, why))
        fates.update(dict.fromkeys(aliases, choice))
    for name, reason in computed.items():
        wanted = next((mapping[key] for key in mapping if matches(name, key)), None)
        if fates.get(name, wanted) is not None and not any(matches(name, pattern) for pattern in skip):
            _refuse_computed(name, reason)
    return Selection(rows)


def matches(name: str, pattern: str) -> bool:
    """Say whether a parameter name matches a pattern, or lies below a module whose name does.

    >>> matches("blocks.0.mlp.weight", "*.mlp.*"), matches("head.weight", "head"), matches("ahead.weight", "head")
    (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


Entry = tuple[list[str], nn.Parameter, bool, int | None, str]


def _aliases(model: nn.Module) -> dict[int, Entry]:
    """Return every parameter with all its names, whether it is selected by default, its contraction dimension and the reason."""
    entries: dict[int, Entry] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{local}" if path else local
            known, axis, reason = _layout(module, local, parameter)
            if id(parameter) not in entries:
                entries[id(parameter)] = ([name], parameter, known, axis, reason)
                continue
            names, _, before, along, why = entries[id(parameter)]
            names.append(name)
            if before != known or along != axis:  # one of its uses forbids it, or they sum over different dimensions
                entries[id(parameter)] = (names, parameter, False, None, f"tied: {why} and {reason}")
    return entries


def _layout(module: nn.Module, local: str, parameter: nn.Parameter) -> tuple[bool, int | None, str]:
    """Return (selected by default, contraction dimension, reason) of one parameter."""
    kind = type(module).__name__
    if parameter.ndim < 2:
        return False, None, f"{local} of {kind} is no matrix"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False, None, "embedding"
    if isinstance(module, WEIGHTED) and local == "weight":
        return True, None, f"{kind} weight"
    if kind == "Conv1D" and local == "weight":
        return True, 0, "Conv1D weight, stored as (in, out)"
    if isinstance(module, nn.MultiheadAttention) and local in PROJECTIONS:
        return True, None, "attention projection"
    if parameter.ndim == 3 and "Expert" in kind:
        return _experts(module, local, parameter)
    return False, None, f"{local} of {kind} has no known layout"


def _experts(module: nn.Module, local: str, parameter: nn.Parameter) -> tuple[bool, int | None, str]:
    """Tell (experts, in, out) from (experts, out, in) by how the two projections of an expert fit together."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if local not in ("gate_up_proj", "down_proj") or not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return False, None, "expert tensor of unknown layout: name it exactly and give `axis=`"
    inputs_first = up.shape[1] == down.shape[2] and up.shape[2] in (down.shape[1], 2 * down.shape[1])
    outputs_first = up.shape[2] == down.shape[1] and up.shape[1] in (down.shape[2], 2 * down.shape[2])
    if inputs_first == outputs_first:
        return False, None, "expert tensor whose layout its shapes do not settle: name it exactly and give `axis=`"
    return True, (1 if inputs_first else 2), "expert weights, stored as (experts, " + ("in, out)" if inputs_first else "out, in)")


def _refuse_odd(model: nn.Module, patterns: Sequence[object]) -> None:
    """Refuse names that are no strings, and parameters that a lazy module has not made yet."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`skip` and mapping names must be strings: got {pattern!r}. `model.named_parameters()` lists the names.")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"`model`: parameter {name!r} has no shape yet, its lazy module is not initialized. Run one forward pass first."
            )


def _refuse_unmatched(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if pattern != "*" and not any(matches(name, pattern) for name in names):
            raise ValueError(f"`skip` or mapping name {pattern!r} matches no parameter. Parameters are named like {', '.join(names[:3])}.")


def _computed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) of weights that would be selected if the forward pass did not compute them from other parameters."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(module, "lora_A"):
            for local, parameter in module.named_parameters():
                if parameter.ndim > 1 and not any(part.startswith("lora_") for part in local.split(".")):
                    yield f"{prefix}{local}", "LoRA adds a low-rank product to it"
        if not isinstance(module, (*WEIGHTED, nn.MultiheadAttention)) and not type(module).__name__.endswith("Conv1D"):
            continue
        for local in ("weight", *PROJECTIONS):
            if parametrize.is_parametrized(module, local):
                yield f"{prefix}{local}", "torch.nn.utils.parametrize computes it"
            elif hasattr(module, f"{local}_g") and hasattr(module, f"{local}_v"):
                yield f"{prefix}{local}", f"weight_norm computes it from {local}_g and {local}_v"
            elif hasattr(module, f"{local}_mask"):
                yield f"{prefix}{local}", f"torch.nn.utils.prune computes it from {local}_orig and {local}_mask"
            elif hasattr(module, f"{local}_orig"):
                yield f"{prefix}{local}", f"spectral_norm computes it from {local}_orig"


def _refuse_computed(name: str, reason: str) -> None:
    raise ValueError(
        f"{name!r} cannot be quantized: {reason}, so the forward pass would not see the grid. "
        f"Merge or remove the parametrization first, or leave it out with `skip=[{name.rpartition('.')[0] or name!r}]`."
    )
