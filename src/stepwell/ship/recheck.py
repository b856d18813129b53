"""Recheck: an artifact against a model, at any later time: is it whole, was it made from this model, does its runtime compute the same?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwell.export.certificate import Certificate
from stepwell.export.outputs import digest
from stepwell.export.parity import verify
from stepwell.ship.artifact import CERTIFICATE
from stepwell.ship.checkpoint import read_json
from stepwell.ship.quantize import sha256_of_values
from stepwell.ship.records import Losses
from stepwell.ship.rounded import as_certified
from stepwell.ship.rounding import Progress
from stepwell.ship.source import Source, logits_only, losses
from stepwell.ship.stored import put, stored

RELATED = 0.5  # cosine between a weight and what was made of it; two bits leave 0.9, another model's weights next to nothing


@dataclass(frozen=True)
class Compared:
    """One quantized weight of an artifact beside the model's.

    Attributes:
        name: of the parameter.
        error: relative distance, `|q - w| / |w|`.
        cosine: between the two.
        unchanged: whether it stands for the values that its certificate names; None without one.
    """

    name: str
    error: float
    cosine: float
    unchanged: bool | None


@dataclass(frozen=True)
class Rechecked:
    """What came out.

    Attributes:
        artifact, model: as they were given.
        passed: whether all that could be checked is right.
        problems: what is not, in words.
        certificate: what the runtime loaded and computed, against the model with the artifact's own weights.
        weights: one row per quantized weight.
        losses: of the model, and with the artifact's weights; None without data.
        certified: whether a certificate of ours was there to compare with.
    """

    artifact: str
    model: str
    passed: bool
    problems: tuple[str, ...]
    certificate: Certificate
    weights: tuple[Compared, ...]
    losses: Losses | None
    certified: bool


def recheck(artifact: Path, source: Source, *, progress: Progress) -> Rechecked:
    """Check an artifact of `quantize`, or any file or folder that one of its targets is, against a model.

    The model takes the artifact's weights, and the runtime must compute what it then computes. Where a certificate lies beside it, every
    file and every weight must be what it names.

    Args:
        artifact: what `quantize` wrote, or a file or folder of any of its kinds.
        source: the model that it should have been made from; it holds the artifact's weights afterwards.
        progress: told what is being done.

    Raises:
        ValueError: an artifact that cannot be read, or that has no weight of this model.
    """
    held = read_json(artifact / CERTIFICATE) if (artifact / CERTIFICATE).is_file() else None
    path = artifact if held is None else artifact / _served(held, artifact)
    problems = [] if held is None else _files(held, artifact)
    progress("reading the artifact", 0, 3)
    found = stored(path, source)
    wanted = {} if held is None else {str(row.get("name")): row.get("sha256") for row in _rows(held)}
    parameters = dict(source.model.named_parameters(remove_duplicate=False))
    before = losses(source)
    rows = [_compared(name, parameters[name], found.tensors[name], wanted.get(name)) for name in sorted(found.quantized)]
    lacking = [name for name in wanted if name not in found.quantized]
    problems += [f"{name} is in the certificate and not in the artifact" for name in lacking[:3]]
    problems += [f"{row.name} is not what the certificate names" for row in rows if row.unchanged is False][:3]
    if strangers := [row for row in rows if row.cosine < RELATED]:
        first = f"{strangers[0].name} (cosine {strangers[0].cosine:.2f})"
        problems.append(f"{len(strangers)} of {len(rows)} weights are none of this model's, such as {first}")
    put(source.model, found)
    with as_certified(source.model, held or {}, str(artifact / CERTIFICATE)):
        after = losses(source)
        progress("loading and comparing", 2, 3)
        with logits_only(source):
            checked = verify(path, source.model, source.example)
    if not checked.passed:
        problems.append("the runtime does not compute what the weights in the artifact say")
    compared = Losses.of(before, after, source.unit)
    return Rechecked(str(artifact), source.name, not problems, tuple(problems), checked, tuple(rows), compared, held is not None)


def batches_of(artifact: Path) -> int | None:
    """Return how many batches an artifact was made with, by its certificate: the same ones measure then; None where it does not say."""
    if not (artifact / CERTIFICATE).is_file():
        return None
    held = read_json(artifact / CERTIFICATE).get("batches")
    return held if isinstance(held, int) and not isinstance(held, bool) and held > 0 else None


def _compared(name: str, weight: Tensor, value: Tensor, wanted: str | None) -> Compared:
    """Hold one weight of an artifact against the model's, and against its certificate."""
    one, two = weight.detach().double().flatten(), value.double().flatten()
    norm = max(float(one.norm()), 1e-300)
    cosine = float(torch.dot(one, two)) / max(norm * float(two.norm()), 1e-300)
    unchanged = None if wanted is None else sha256_of_values(value) == wanted
    return Compared(name, float(torch.dist(one, two)) / norm, cosine, unchanged)


def _served(held: dict[str, Any], artifact: Path) -> str:
    """Return the name of what an artifact serves."""
    file = held.get("file")
    if not isinstance(file, str) or file != Path(file).name:
        raise ValueError(f"`artifact`: {artifact / CERTIFICATE} is no certificate of `stepwell quantize`.")
    return file


def _rows(held: dict[str, Any]) -> list[dict[str, Any]]:
    rows = held.get("weights")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _files(held: dict[str, Any], artifact: Path) -> list[str]:
    """Name the files of an artifact that are not what its certificate says."""
    files = held.get("files")
    problems = []
    for name, wanted in (files if isinstance(files, dict) else {}).items():
        path = artifact / name
        if not path.resolve().is_relative_to(artifact.resolve()):
            raise ValueError(f"`artifact`: {artifact / CERTIFICATE} names {name!r}, which lies elsewhere.")
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif digest(path) != wanted:
            problems.append(f"{name} has changed since its certificate was written")
    return problems
