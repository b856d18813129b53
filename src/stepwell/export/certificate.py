"""Certificate: what a runtime loaded and computed, against the model that was trained."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One weight's comparison.

    Attributes:
        name: the parameter, or the node where no parameter is known.
        nodes: how many operators of the file run on its codes; 0 is a weight in float.
        grid: bits and block in the file, or "float".
        codes_equal, scales_equal: bit for bit, zero points with the codes; None where there is nothing to compare with.
        values_equal: whether the decoded weight in the file is the model's, bit for bit; None where it cannot be told apart.
        note: what differs, or why the weight is in float.
        kernel: how the runtime was found to compute with it, on the inputs that it really got; empty where that was not looked at.
        modelled: largest difference of its outputs from that, relative to their largest; None as well.
    """

    name: str
    nodes: int
    grid: str
    codes_equal: bool | None
    scales_equal: bool | None
    values_equal: bool | None
    note: str = ""
    kernel: str = ""
    modelled: float | None = None

    def __str__(self) -> str:
        """Return what there is to say beyond the columns of the table."""
        known = f"{self.kernel}, to {self.modelled:.0e}" if self.modelled is not None else ""
        return "; ".join(part for part in (self.note, known) if part)


@dataclass(frozen=True)
class Cause:
    """One known reason why a runtime's outputs differ from the model's, modelled or switched off to see what it accounts for.

    Attributes:
        name: the reason, for example "int8 activations in the kernel".
        what: how the check was repeated without it: what was modelled in the reference, or switched off in the runtime.
        before, after: largest relative difference of the outputs without and with that, in the unit of `max_relative_error`.
    """

    name: str
    what: str
    before: float
    after: float


@dataclass(frozen=True)
class Certificate:
    """What a runtime loaded and computed, against the model with `encoded.decode()` in place.

    Attributes:
        path, sha256: the file or folder that was checked.
        runtime, version: what ran it.
        codes_equal, scales_equal: over all layers; None where no encoded weights were given.
        values_equal: whether every decoded weight is the model's; None where no weight could be compared.
        max_relative_error: largest difference of an output over all runs, relative to the largest output.
        tolerance: what that error may be, `max(2e-6, 4 * noise)`.
        noise: what one order of float32 summation moves the same outputs by, in the same unit.
        kl: mean Kullback-Leibler divergence of the runtime's softmax from the model's, in nats per row; None without classes.
        top1_agreement: share of rows with the same largest logit; None without classes.
        inputs: input shapes of every run.
        layers: one row per weight; none where the file holds no quantized weight and no encoded weights were given.
        passed: weights equal, and the error, or what known causes leave of it, within tolerance; never without a weight in `layers`.
        causes: what the error was traced to, in the order in which the causes were taken away; empty where none was looked for.
    """

    path: str
    sha256: str
    runtime: str
    version: str
    codes_equal: bool | None
    scales_equal: bool | None
    values_equal: bool | None
    max_relative_error: float
    tolerance: float
    noise: float
    kl: float | None
    top1_agreement: float | None
    inputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    passed: bool
    causes: tuple[Cause, ...] = ()

    @property
    def remainder(self) -> float:
        """The relative error that no known cause accounts for: all of it where none was looked for."""
        return self.causes[-1].after if self.causes else self.max_relative_error

    @property
    def exact(self) -> bool:
        """Whether the outputs are the model's within tolerance, so that there is nothing to explain."""
        return self.max_relative_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings; numbers that are not finite become None."""
        return dict(_plain(asdict(self)))

    def to_json(self) -> str:
        """Return `to_dict()` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        head = ("weight", "nodes", "grid", "codes", "scales", "values")
        rows = [
            (layer.name, str(layer.nodes), layer.grid, *map(_word, (layer.codes_equal, layer.scales_equal, layer.values_equal)))
            for layer in self.layers
        ]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [f"{self.path} in {self.runtime} {self.version}: {self._verdict()}"]
        if not self.layers:
            return "\n".join([*lines, "no quantized weight was found in the file: nothing was compared but outputs", *self._outputs()])
        for row, note in zip([head, *rows], ["", *map(str, self.layers)], strict=True):
            lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), note]).rstrip())
        return "\n".join([*lines, *self._outputs()])

    def _verdict(self) -> str:
        """Return the certificate in two words."""
        return "NOT PASSED" if not self.passed else "passed" if self.exact else "passed, the difference explained"

    def _outputs(self) -> list[str]:
        """Return the lines about outputs."""
        lines = [
            f"outputs on inputs of {', '.join(self.inputs)}: largest difference {self.max_relative_error:.1e} of the largest output, "
            f"allowed {self.tolerance:.1e} (the larger of 2e-6 and 4 times float32 noise {self.noise:.1e})"
        ]
        if self.kl is not None and self.top1_agreement is not None:
            lines.append(f"KL {self.kl:.1e} nats per row, top-1 agreement {self.top1_agreement:.2%}")
        return [*lines, *(f"cause: {cause.name} ({cause.what}): {cause.before:.1e} becomes {cause.after:.1e}" for cause in self.causes)]


def _word(equal: bool | None) -> str:
    return {True: "equal", False: "DIFFER", None: "-"}[equal]


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
