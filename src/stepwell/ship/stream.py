"""Stream: a folder's weights rounded and written one after the other, so that the model is never in memory.

Rounding to nearest needs no data and no other weight; names, shapes and kinds of layers come from the model without memory. What was
written is read again weight by weight and compared with what was encoded; nothing is run.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from stepwell.advice.allocation import stored_bits
from stepwell.explain.language import next_token_loss
from stepwell.ptq.scale_search import scale_search
from stepwell.quantizers import check_weight
from stepwell.ship import targets
from stepwell.ship.artifact import draft
from stepwell.ship.checkpoint import FLOATS, Checkpoint
from stepwell.ship.plan import Plan, plan
from stepwell.ship.quantize import SCRATCH, Clock, Order, digests, named, peak_memory, sha256_of_values
from stepwell.ship.readback import readback, weights_only
from stepwell.ship.records import Choice, Shipped, Weight
from stepwell.ship.rounding import Progress
from stepwell.ship.source import Source, meta_model
from stepwell.ship.spill import Spill
from stepwell.ship.tokenizer import copy_tokenizer

METHODS = ("rtn", "search")  # that look at one weight alone


class Lazy(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for and checked to be finite."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name)
        if tensor.is_floating_point() and self._checkpoint.tensors[name].dtype in FLOATS:
            check_weight(tensor, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)


@contextmanager
def stream(checkpoint: Checkpoint, order: Order, out: Path, *, progress: Progress) -> Iterator[Shipped]:
    """Yield what was shipped, complete but not yet in its place, as `quantize` does; outputs are not compared.

    Args:
        checkpoint: a Hugging Face folder.
        order: the target, and the method "rtn" or "search".
        out: the artifact's folder.
        progress: told every weight.

    Raises:
        ValueError: a folder that is no language model transformers knows, tensors that are missing, misshapen or not finite.
        OSError: a full disk.
    """
    route = targets.route(order.target)
    model = meta_model(checkpoint.folder)
    notes = _matched(model, checkpoint)
    weights = Lazy(checkpoint)
    chosen = plan(model, order.grid, skip=order.skip, matrices=route.matrices, target=order.target)
    facts = (("source", f"{checkpoint.folder} ({type(model).__name__})"), ("data", "none"))
    source = Source(str(checkpoint.folder), model, next_token_loss, [], [], "nats per token", facts, checkpoint, weights)
    clock = Clock()
    with draft(out, force=order.force) as folder:
        store = Spill(folder / SCRATCH)
        with clock.part("rounding"):
            rows = tuple(_rounded(weights, chosen, order.method, store, progress))
        with clock.part("export"):
            progress("writing", 0, 1)
            written = route.write(source, store, folder / route.file)
        with clock.part("reading again"):
            layers = readback(route.family, folder / route.file, model, store)
            checked = weights_only(folder / route.file, layers, runtime="stepwell", version=version("stepwell"))
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        if not route.folder:
            copy_tokenizer(checkpoint.folder, folder)
        served = out.absolute() / route.file
        yield Shipped(
            model=source.name, target=order.target, grid=named(chosen), choice=Choice(order.method, ("asked for",)), out=str(folder),
            file=route.file, serve=route.serve.format(path=served), files=digests(folder), certificate=replace(checked, path=str(served)),
            weights=tuple(row for row in rows if row.name not in written.floats), floats=chosen.floats | written.floats,
            notes=(*notes, *written.notes), elements=sum(row.elements for row in rows if row.name not in written.floats),
            total=chosen.total, losses=None, tolerance=order.tolerance, seconds=dict(clock.seconds), peak=peak_memory(), facts=facts,
        )  # fmt: skip


def _matched(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Refuse a checkpoint that does not fill the model; return a note on what the model has no place for."""
    wanted = model.state_dict(keep_vars=True)
    tied = {id(wanted[name]) for name in checkpoint.tensors if name in wanted}
    missing = [name for name, tensor in wanted.items() if name not in checkpoint.tensors and id(tensor) not in tied]
    if missing:
        raise ValueError(
            f"`model`: {checkpoint.folder} lacks {len(missing)} tensors that {type(model).__name__} has, such as {missing[0]!r}."
        )
    for name, stored in checkpoint.tensors.items():
        if name in wanted and tuple(wanted[name].shape) != stored.shape:
            raise ValueError(f"`model`: {stored.file} holds {name!r} of shape {stored.shape}, the model's is {tuple(wanted[name].shape)}.")
    more = [name for name in checkpoint.tensors if name not in wanted]
    return (f"{len(more)} tensors of the checkpoint have no place in the model and were left out, such as {more[0]}.",) if more else ()


def _rounded(weights: Mapping[str, Tensor], chosen: Plan, method: str, store: Spill, progress: Progress) -> Iterator[Weight]:
    """Round one weight after the other onto the disk, and describe each."""
    for place, (name, grid) in enumerate(chosen.grids.items()):
        progress(f"rounding {name}", place, len(chosen.grids))
        weight = weights[name].to(torch.float32)
        encoded = grid.encode(weight, scale=scale_search(weight, grid) if method == "search" else None)
        store[name] = encoded
        norm, value = float(weight.norm()), encoded.decode()
        error = float(torch.dist(value, weight)) / norm if norm else 0.0
        shape = tuple(weight.shape)
        yield Weight(name, shape, str(encoded.quantizer), stored_bits(encoded.quantizer, shape), error, sha256_of_values(value))
    progress("rounded", len(chosen.grids), len(chosen.grids))


def is_streamed(order: Order, checkpoint: Checkpoint | None, data: Path | None) -> bool:
    """Say whether an order is carried out without the model in memory: a folder, no data, one weight at a time, a file of tensors."""
    alone = order.method in METHODS and not order.learns
    return checkpoint is not None and data is None and alone and targets.route(order.target).streams
