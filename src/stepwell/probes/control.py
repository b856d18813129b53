"""Control: plain float training with the same budget, rounded afterwards: what more training alone would have done (D8).

A gain of quantization-aware training counts only beyond this: on networks that have not converged, any training lowers the loss.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from stepwell.probes.descent import LR, STEPS, Train, check_budget, descend
from stepwell.probes.grid import grid
from stepwell.probes.neighbours import encoded_place
from stepwell.probes.points import Weights, place, working
from stepwell.probes.stage import Cost, Loss, staged
from stepwell.quantizers import Quantizer


@dataclass(frozen=True)
class Control:
    """Losses before and after float training, and after rounding it; exact for the given data, but one run of one schedule.

    Attributes:
        start, before: loss at the model's own weights, and with them rounded.
        trained: loss after float training.
        loss: the same rounded to nearest with the scales of `around`.
        refitted: the same with scales fitted again by the quantizer's own rule.
        final: loss as `loss`, BatchNorm statistics re-estimated for the rounded weights.
        cost: passes over the data, training batches included.
    """

    start: float
    before: float
    trained: float
    loss: float
    refitted: float
    final: float
    cost: Cost

    @property
    def removed(self) -> float:
        """Share of the rounding's loss increase that float training removes; 0 where rounding costs nothing."""
        damage = self.before - self.start
        return (self.before - self.loss) / damage if damage > 0 else 0.0


def control(
    model: nn.Module,
    loss: Loss,
    *,
    around: Weights | Quantizer,
    train: Train | None = None,
    steps: int = STEPS,
    lr: float = LR,
) -> Control:
    """Train the float weights with the budget of `box_qat`, round them, and return what that gives.

    Args:
        model: holds the float weights; left exactly as found, nothing but the named weights is trained.
        loss: evaluates the model on fixed data and returns one number as a tensor.
        around: the rounded weights, encoded, by name: their grid is used; a Quantizer rounds the model's to nearest.
        train: `train(model, step)` returns the loss on that step's batch; None trains on `loss` itself.
        steps: of Adam.
        lr: its learning rate, annealed to zero by a cosine.

    Returns:
        The losses; `steps` forward and backward passes and seven forward passes more, eight with BatchNorm.

    Raises:
        TypeError, ValueError: as `neighbours`; steps or rate out of range.
    """
    check_budget(steps, lr)
    centre = encoded_place(place(model, around, "around"), "around")
    with staged(model, loss, centre) as stage:
        stage.put(lambda name, base: centre[name].decode().to(base))
        before = stage.loss()
        held = {name: grid(encoded, working(stage.base[name])) for name, encoded in centre.items()}

        def plain(name: str, weight: Tensor) -> Tensor:
            return weight

        latent = descend(stage, train, steps=steps, lr=lr, show=plain, keep=plain, visit=lambda step: None)
        trained = stage.loss()
        stage.put(lambda name, base: centre[name].quantizer(latent[name]))
        refitted = stage.loss()
        stage.put(lambda name, base: held[name].round(latent[name]))
        return Control(stage.start, before, trained, stage.loss(), refitted, stage.settled(), stage.cost)
