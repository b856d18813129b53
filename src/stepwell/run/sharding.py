"""Sharding: what ranks that hold shards of one parameter must tell each other, always as one vector for all parameters together.

A block never crosses shards, so that most scales need nobody else. One scale for a whole tensor, and the scale of e4m3 scales, follow from
extremes over all shards: a maximum, which is the same number in any order. Health is a mean over all shards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stepwell import scales
from stepwell.health import FRACTIONS, Vitals
from stepwell.methods.learned import Scales
from stepwell.methods.lotion import Push
from stepwell.run.managed import SCALE, Managed, groups_of, wide


def agree(pairs: Iterable[tuple[Managed, Tensor]]) -> list[Managed]:
    """Fit every scale that spans shards to the weights of all ranks; a collective call, once per kind of mesh, if there are any.

    Args:
        pairs: records with the local weight that their scales shall fit.

    Returns:
        The records whose scale is another than before.
    """
    changed: list[Managed] = []
    for groups, members in _by_groups(pairs).items():
        parts = [_extremes(one, tensor) for one, tensor in members]
        stacked = torch.cat(parts)
        for group in groups:
            torch.distributed.all_reduce(stacked, op=torch.distributed.ReduceOp.MAX, group=group)
        for (one, tensor), found in zip(members, torch.split(stacked, [part.numel() for part in parts]), strict=True):
            reach = found.to(wide(tensor).dtype)
            reach = torch.stack([-reach[0], reach[1]])[None] if one.quantizer.block is None else reach[0]
            if one.reach is None or not torch.equal(one.reach, reach):
                changed.append(one)
            one.reach = reach
    return changed


def pooled(managed: Sequence[Managed], rows: Mapping[str, Vitals]) -> dict[str, Vitals]:
    """Return vitals over all shards of every parameter, the same on every rank; a collective call where any parameter is sharded."""
    found = dict(rows)
    for groups, members in _by_groups(((one, one.weight) for one in managed), spanning=False).items():
        parts = [[row.elements, *(getattr(row, key) * row.elements for key in FRACTIONS), not row.finite] for row in _of(rows, members)]
        stacked = torch.tensor(parts, dtype=torch.float64, device=members[0][1].device)
        for group in groups:
            torch.distributed.all_reduce(stacked, group=group)
        for (one, _), (elements, *shares, sick) in zip(members, stacked.tolist(), strict=True):
            means = {key: share / elements for key, share in zip(FRACTIONS, shares, strict=True)}
            found[one.name] = replace(rows[one.name], elements=round(elements), finite=not sick, **means)
    return found


def reshard(model: nn.Module) -> None:
    """Have a model hold its shards again where it does not: FSDP2 leaves the root's weights whole after a pass without gradients.

    Until then the model runs on copies, which nothing that is written to the shards reaches.
    """
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):  # by name: importing it takes half a second
            sharded: Any = module
            sharded.reshard()


def check_spanning(one: Managed) -> None:
    """Refuse what needs more of other ranks' shards than their extremes.

    Raises:
        ValueError: a searched scale, or one per tensor that is learned, that has state of its own, or that the penalty differentiates.
    """
    if not one.groups:
        return
    method, says = one.method, f"{one.name!r} is sharded, and {one.quantizer} has a scale for the whole tensor"
    if one.quantizer.rule == "mse" and not isinstance(method.init, Scales):
        raise ValueError(f"{says}, which cannot be searched there. Use scale='absmax', `learned(method)` or fp32 scales of blocks.")
    if one.quantizer.block is not None:
        return
    if method.init is not None:
        raise ValueError(f"{says}, beside which {method.name!r} keeps tensors of its own. Use blocks, `block='channel'` at the longest.")
    if method.push is not None and not (isinstance(method.push, Push) and not method.push.through_scale):
        raise ValueError(
            f"{says}, through which {method.name!r} differentiates: that needs every shard's sum. Use blocks, `block='channel'` at the "
            "longest, or `through_scale=False`."
        )


def _extremes(one: Managed, tensor: Tensor) -> Tensor:
    """Return what a maximum over ranks makes the scale of: minus the lowest and the highest weight, or the scale of the scales."""
    count = 2 if one.quantizer.block is None else 1
    if not tensor.numel():
        return torch.full((count,), -torch.inf, dtype=wide(tensor).dtype, device=tensor.device)
    blocks = wide(one.blocks(tensor))
    if one.quantizer.block is None:
        low, high = scales.extremes(blocks)
        return torch.cat([-low, high]).flatten()
    if one.begun and SCALE in one.tensors:
        return scales.tensor_scale(one.tensors[SCALE].abs().max(), one.grid.format)[None]  # monotone: its maximum is that of the maximum
    found = one.grid.tensor_scale(blocks)
    assert found is not None
    return found[None]


def _by_groups(pairs: Iterable[tuple[Managed, Tensor]], *, spanning: bool = True) -> dict[tuple[object, ...], list[tuple[Managed, Tensor]]]:
    """Return the pairs whose scales span shards, or all that are sharded, by the process groups that hold the shards."""
    found: dict[tuple[object, ...], list[tuple[Managed, Tensor]]] = {}
    for one, tensor in pairs:
        groups = one.groups if spanning else groups_of(one.parameter)
        if groups:
            found.setdefault(groups, []).append((one, tensor))
    return found


def _of(rows: Mapping[str, Vitals], members: Sequence[tuple[Managed, Tensor]]) -> list[Vitals]:
    return [rows[one.name] for one, _ in members]
