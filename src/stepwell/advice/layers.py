"""Layers: a model whose layers stand on grids of a list; single and joint losses, each measured once."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from stepwell.advice.allocation import Array, Picks
from stepwell.advice.forecast import Estimate
from stepwell.advice.measure import Losses, increase
from stepwell.probes.stage import Cost, Stage
from stepwell.ptq.chosen import Chosen
from stepwell.quantizers import Quantizer


class Layers:
    """What the layers of a model lose on the grids of a list.

    Attributes:
        names: of the layers' weights.
        bits: `(layers, grids)`, stored bits of a whole layer.
        alone: `(layers, grids)`, increase of the loss with this layer alone on a grid.
        sums: the same, 0 or more: a layer whose rounding happens to help earns no credit where increases are added up.
        start: loss of the float model.
    """

    def __init__(self, stage: Stage, losses: Losses, rows: Sequence[Sequence[Chosen]], bits: Array, say: Callable[[str], None]) -> None:
        """Measure every layer alone on every grid.

        Args:
            stage: the model, just checked: the losses remember what the float model gave.
            losses: the stage's own.
            rows: `rows[k]` are all layers on grid k.
            bits: see above.
            say: told of every measurement.
        """
        self._stage, self._losses, self._base, self._say = stage, losses, list(losses.last), say
        self.names, self.bits, self.start = [row.name for row in rows[0]], bits, stage.start
        self._grids = {(row.name, k): row.quantizer for k, layers in enumerate(rows) for row in layers}
        self._scales: dict[tuple[str, int], Tensor] = {}
        self._seen: dict[Picks, Estimate] = {}
        self.alone = np.array([[self._single(name, k) for k in range(len(rows))] for name in self.names])
        self.sums = np.maximum(self.alone, 0)

    @property
    def cost(self) -> Cost:
        """Passes so far."""
        return self._stage.cost

    @property
    def evaluations(self) -> int:
        """Joint losses measured so far."""
        return len(self._seen)

    def joint(self, picks: Picks) -> Estimate:
        """Return the increase of the loss with every layer on its grid."""
        if picks not in self._seen:
            self._seen[picks] = self._measured(dict(zip(self.names, picks, strict=True)))
            self._say(f"joint loss: {self._seen[picks].increase:+.3g}")
        return self._seen[picks]

    def quantizers(self, picks: Picks) -> dict[str, Quantizer]:
        """Return the picked grids by name."""
        return {name: self._grids[name, k] for name, k in zip(self.names, picks, strict=True)}

    def uniform(self) -> list[Picks]:
        """Return every grid for all layers, the fewest bits first."""
        return [(int(k),) * len(self.names) for k in self.bits.sum(axis=0).argsort(kind="stable")]

    def _single(self, name: str, k: int) -> float:
        found = self._measured({name: k}).increase
        self._say(f"{name} on {self._grids[name, k]}: {found:+.3g}")
        return found

    def _measured(self, picks: Mapping[str, int]) -> Estimate:
        """Return the increase of the loss with some layers rounded; scales are fitted once."""

        def rounded(name: str, base: Tensor) -> Tensor:
            if name not in picks:
                return base
            key = name, picks[name]
            if key not in self._scales:
                self._scales[key] = self._grids[key].scale(base)
            return self._grids[key](base, scale=self._scales[key])

        self._stage.put(rounded)
        return increase(self._stage, self._losses, self._base, "RTN", settle=self._losses)
