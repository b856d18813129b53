"""Source: what is quantized: a Hugging Face folder or a Python function, with or without data to run it on."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stepwell.advice.measure import BatchLoss
from stepwell.explain.language import from_folder, like_the_folder, model_alone, next_token_loss
from stepwell.explain.sources import FORM, Subject, attempted, from_function
from stepwell.export.extras import need
from stepwell.export.trace import quiet
from stepwell.modes import evaluating
from stepwell.ship.checkpoint import CONFIG, Checkpoint, open_checkpoint, read_json, refuse_pickle

MOST_MEASURING = 8  # batches
RANDOM = (2, 16)  # rows and tokens of a language model's example without data


@dataclass(frozen=True)
class Source:
    """A model to be quantized, and what it can be run on.

    Attributes:
        name: as the user wrote it.
        model: in float32 and evaluation mode.
        loss: of one batch.
        learning: batches that calibrate or train; empty without data.
        measuring: batches that losses and outputs are compared on; the same ones where there is only one.
        unit: of the loss.
        facts: name and value of what a reader should know.
        checkpoint: the folder it comes from; None for a function.
        weights: where the model is without memory: its tensors by name, read from the checkpoint one at a time; else None.
    """

    name: str
    model: nn.Module
    loss: BatchLoss
    learning: list[Any]
    measuring: list[Any]
    unit: str
    facts: tuple[tuple[str, str], ...]
    checkpoint: Checkpoint | None
    weights: Mapping[str, Tensor] | None = None

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The inputs of one measuring batch, as the model takes them by position; random tokens for a language model without data."""
        if self.checkpoint is None or self.measuring:
            return inputs(self, self.measuring[0])
        return (_random_tokens(self.model),)

    @property
    def batches(self) -> int:
        """How many there are; one that calibrates and measures is one."""
        both = len(self.learning) == len(self.measuring) == 1 and self.learning[0] is self.measuring[0]
        return 1 if both else len(self.learning) + len(self.measuring)

    @property
    def terms(self) -> int:
        """How many losses are averaged in one batch: predicted tokens, or rows."""
        batch = self.learning[0]
        if self.checkpoint is not None:
            return int(batch.shape[0] * (batch.shape[1] - 1))
        first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
        return 1 if first is None else len(first)


def open_source(model: str, data: Path | None, *, limit: int, window: int | None) -> Source:
    """Load what is to be quantized.

    Args:
        model: a Hugging Face folder, or `module:function` or `file.py:function` that returns (model, loss, batches).
        data: text for a folder, or None to do without; else passed to the function.
        limit: most batches to take.
        window: tokens of a row of text; None is 128 or what the model reads.

    Raises:
        ModuleNotFoundError: transformers is not installed and a folder was given.
        ValueError: a pickle, a file in place of a folder, a folder that is quantized already, and all that cannot be loaded; one line.
    """
    path = Path(model)
    refuse_pickle(path)
    if path.is_dir():
        return _from_folder(path, data, limit, window)
    if path.is_file() or ":" not in model:
        raise ValueError(f"`model` must be {FORM}: got {model!r}, which is {'a file' if path.is_file() else 'no folder'}.")
    if window is not None:
        raise ValueError(f"`window` must not be given with a function: got {window}. It cuts text for a Hugging Face folder.")
    subject = from_function(model, data, limit=limit)
    subject.model.eval()
    for place, batch in enumerate(subject.batches, 1):
        what = f"`model`: the loss of {model} on batch {place} of {len(subject.batches)}"
        with torch.no_grad():
            attempted(lambda batch=batch: subject.loss(subject.model, batch), what)  # type: ignore[misc]
    return _source(subject, None)


def folder_of(model: str) -> Checkpoint | None:
    """Return the headers of a Hugging Face folder, checked, or None for anything else.

    Raises:
        ValueError: a folder that is damaged or quantized already, or a pickle.
    """
    path = Path(model)
    refuse_pickle(path)
    if not path.is_dir():
        return None
    checkpoint = open_checkpoint(path)
    config = read_json(path / CONFIG)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown") if isinstance(config["quantization_config"], dict) else "?"
        raise ValueError(f"`model`: {path} is quantized already ({method}). Give the float model that it was made from.")
    return checkpoint


def meta_model(folder: Path) -> nn.Module:
    """Return a folder's model without its weights: names, shapes and kinds of modules, no memory.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: an architecture that transformers does not know as a causal language model.
    """
    need("transformers", extra="hf")
    try:
        with quiet():
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                made = like_the_folder(AutoModelForCausalLM.from_config(config, trust_remote_code=False), folder)
    except Exception as error:  # transformers raises whatever the config meets
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"`model`: {folder} is of no architecture that transformers knows: {type(error).__name__}: {said}") from error
    assert isinstance(made, nn.Module)
    return made


def check_finite(model: nn.Module) -> None:
    """Refuse a model that holds NaN or infinity anywhere, quantized or not, and say where.

    Raises:
        ValueError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if values.is_floating_point() and not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
            bad = values[~values.isfinite()]
            raise ValueError(f"`model`: {name} holds {bad.numel()} of {values.numel()} values that are no number, such as {bad[0].item()}.")


def _from_folder(folder: Path, data: Path | None, limit: int, window: int | None) -> Source:
    """Load a language model, with batches of text where there is one."""
    checkpoint = folder_of(str(folder))
    assert checkpoint is not None
    if data is None:
        model = model_alone(folder, tensors=checkpoint.slices())
        facts = (("source", f"{folder} ({type(model).__name__})"), ("data", "none"))
        subject = Subject(str(folder), model, next_token_loss, [], "nats per token", facts)
    else:
        subject = from_folder(folder, data, limit=limit, window=window, tensors=checkpoint.slices())
    return _source(subject, checkpoint)


def _source(subject: Subject, checkpoint: Checkpoint | None) -> Source:
    learning, measuring = divided(subject.batches)
    return Source(subject.name, subject.model, subject.loss, learning, measuring, subject.unit, subject.facts, checkpoint)


def divided(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the batches that calibrate or train and those that measure: a third, at most 8, evenly spread; one batch does both.

    >>> divided([1, 2, 3, 4, 5, 6])
    ([1, 2, 4, 5], [3, 6])
    """
    if len(batches) < 2:
        return list(batches), list(batches)
    count = min(MOST_MEASURING, max(1, len(batches) // 3))
    places = {(k + 1) * len(batches) // count - 1 for k in range(count)}
    return [one for k, one in enumerate(batches) if k not in places], [batches[k] for k in sorted(places)]


def inputs(source: Source, batch: Any) -> tuple[Tensor, ...]:
    """Return what the loss of a batch calls the model with, in the order of the model's own signature.

    Raises:
        ValueError: it never calls the model itself, or not with tensors alone.
    """
    if source.checkpoint is not None:
        return (batch,)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = source.model.register_forward_pre_hook(lambda _, given, named: seen.append((given, named)), with_kwargs=True)
    try:
        with torch.no_grad():
            source.loss(source.model, batch)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"`model`: the loss of {source.name} never calls the model itself, so its inputs are not known.")
    bound = inspect.signature(source.model.forward).bind(*seen[0][0], **seen[0][1])
    values = tuple(bound.args) + tuple(value for value in bound.kwargs.values() if value is not None)
    if not values or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise ValueError(f"`model`: the loss of {source.name} must call the model with tensors alone, by position: got {kinds}.")
    return values


def _random_tokens(model: Any) -> Tensor:
    """Return tokens of the model's vocabulary, the same at every call."""
    most = int(getattr(model.config, "max_position_embeddings", None) or RANDOM[1])
    words = model.get_input_embeddings().num_embeddings
    return torch.randint(words, (RANDOM[0], min(RANDOM[1], most)), generator=torch.Generator().manual_seed(0))


@contextmanager
def logits_only(source: Source) -> Iterator[None]:
    """Keep a language model from returning its cache beside the logits; its configuration comes back."""
    config: Any = getattr(source.model, "config", None)
    before = getattr(config, "use_cache", None)
    if source.checkpoint is None or before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def losses(source: Source) -> list[float]:
    """Return the loss of every measuring batch, in evaluation mode."""
    with evaluating(source.model), torch.no_grad():
        return [float(source.loss(source.model, batch)) for batch in source.measuring]
