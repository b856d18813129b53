"""The demo's whole course: compare, ship the best 4-bit network, and check what was claimed."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stepwell.export.certificate import Certificate
from stepwell.export.onnx import onnx as export_onnx
from stepwell.export.parity import verify
from stepwell.quantizers import Quantizer
from stepwell.recipes.digits import RTN, TRAINED
from stepwell.train.compare import Comparison, Network, Trial, compare
from stepwell.train.data import Digits, load_digits
from stepwell.train.summary import Estimate, Row, best, chosen, summarize

SHIPPED_BITS = 4
DISTANCE_BITS = 2
BINS = 20


class Claim(NamedTuple):
    """What the best trained method (by validation loss) gains over RTN on test images, and how many standard errors were asked for."""

    bits: int
    arm: str
    rtn_loss: float
    loss: float
    gain: Estimate
    asked: float

    @property
    def holds(self) -> bool:
        """Whether the gain is larger than what was asked for."""
        return self.gain.sigmas > self.asked


class Shipped(NamedTuple):
    """The exported network: which one, the number and bytes of its quantized weights, the file's bytes, and what the runtime made of it."""

    arm: str
    bits: int
    seed: int
    weights: int
    float_bytes: int
    stored_bytes: int
    file_bytes: int
    accuracy: float
    certificate: Certificate


class Story(NamedTuple):
    """All that the demo measured.

    Attributes:
        config: what was compared.
        trials: every trained and rounded network's scores.
        rows: the same per method and width, at the learning rate that validation picked.
        claims: the best trained method against RTN.
        shipped: what was exported, with its certificate.
        distances: method -> share of weights per bin of distance to the grid, from 0 to half a step, before rounding.
        versions: of everything the numbers depend on.
        seconds: processor time.
    """

    config: Comparison
    trials: list[Trial]
    rows: list[Row]
    claims: list[Claim]
    shipped: Shipped
    distances: dict[str, list[float]]
    versions: dict[str, str]
    seconds: float = 0.0


def tell(config: Comparison, path: Path, fitted: Callable[[str], None]) -> Story:
    """Run the comparison and ship its best 4-bit network to `path`.

    Args:
        config: needs the widths 4, 3 and 2, RTN and the trained methods.
        path: the ONNX file to write.
        fitted: called after each training run with a few words about it.
    """
    digits = load_digits()
    networks: dict[Trial, Network] = {}
    for trial, network in compare(config, digits, fitted):
        networks[trial] = network
    trials = list(networks)
    rows = summarize(trials, against=RTN)
    claims = [_claim(rows, bits, asked) for bits, asked in ((3, 2.0), (2, 5.0))]
    arms = [arm.name for arm in config.arms]
    winner = min(chosen(trials, best(rows, SHIPPED_BITS, arms).arm, SHIPPED_BITS), key=lambda trial: trial.validation.loss)
    quantizer = dict(config.grids)[DISTANCE_BITS]
    looked_at = {arm: networks[chosen(trials, arm, DISTANCE_BITS)[0]].latent for arm in (RTN, *TRAINED)}
    distances = {arm: _distances(latent, quantizer) for arm, latent in looked_at.items()}
    return Story(config, trials, rows, claims, _ship(winner, networks[winner], digits, path), distances, _versions())


def _claim(rows: list[Row], bits: int, asked: float) -> Claim:
    """Compare the best trained method with RTN at one width."""
    row = best(rows, bits, TRAINED)
    return Claim(bits, row.arm, best(rows, bits, (RTN,)).loss.mean, row.loss.mean, row.gain, asked)


def _ship(trial: Trial, network: Network, digits: Digits, path: Path) -> Shipped:
    """Export a network and compare what onnxruntime computes on the test images with what PyTorch does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model, encoded, example = network.model.eval(), network.encoded, (digits.test.pixels,)
    export_onnx(model, encoded, example, path)
    weights = sum(e.codes.numel() for e in encoded.values())
    return Shipped(
        arm=trial.arm,
        bits=trial.bits,
        seed=trial.seed,
        weights=weights,
        float_bytes=4 * weights,
        stored_bytes=weights * trial.bits // 8 + sum(e.scales.numel() * e.scales.element_size() for e in encoded.values()),
        file_bytes=path.stat().st_size,
        accuracy=trial.nearest.accuracy,
        certificate=verify(path, model, example, encoded=encoded),
    )


def _distances(latent: dict[str, Tensor], quantizer: Quantizer) -> list[float]:
    """Return the share of weights per bin of distance to the nearest grid value, in steps (0 to 0.5)."""
    parts = []
    for weight in latent.values():
        bracket = quantizer.bracket(weight)
        step = (bracket.upper - bracket.lower).clamp_min(torch.finfo(weight.dtype).tiny)
        parts.append((torch.minimum(bracket.x - bracket.lower, bracket.upper - bracket.x) / step).flatten())
    distances = torch.cat(parts)
    return (torch.histc(distances, bins=BINS, min=0.0, max=0.5) / distances.numel()).tolist()


def _versions() -> dict[str, str]:
    """Return what the numbers depend on: versions and processor."""
    names = ("stepwell", "torch", "numpy", "scikit-learn", "onnx", "onnxruntime")
    return {"python": platform.python_version(), **{name: version(name) for name in names}, "processor": platform.machine()}
