"""One call for the best recipe we know: every code of the grid, scales searched then learned, an annealed forward pass, LOTION's penalty.

At two to four bits every part adds, in this order of size: all 2^b codes, a searched start of the scales, scales that are learned (LSQ),
the annealed forward pass (PARQ), scales that carry their blocks' weights along, latent weights that learn faster than the parameters in
float, and the curvature penalty (LOTION), which is kept away from the learned scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from stepwell.formats import integer
from stepwell.methods.base import Method
from stepwell.methods.distill import distillation
from stepwell.methods.faster import faster
from stepwell.methods.fisher import fisher
from stepwell.methods.learned import learned
from stepwell.methods.lotion import lotion
from stepwell.methods.parq import parq
from stepwell.methods.ste import check_quantizer
from stepwell.quantizers import Quantizer
from stepwell.run.attach import Run, attach
from stepwell.run.check import optimizers_of
from stepwell.run.moments import EXACT
from stepwell.schedules import sigmoid

ANNEALED = 0.8  # share of the run in which the forward pass goes from free to rounded weights

# All of these were chosen on validation data of a byte language model, as means of three seeds; docs/methods.md has every figure.

# Latent weights take steps twice as long as the optimizer makes them: -.0003, -.0028 and -.0055 nats at 4, 3 and 2 bits at AdamW's rate of
# 2.2e-3, and -.0027 and -.0044 at 4 and 3 bits at 1.8e-3. Full precision wins .0017 by it, at its best rate. Steps 1.5 times as long win
# .0018, .0027 and .0045.
MULTIPLIER = 2.0

# Strength of the penalty in theory's unit. With such steps 2 instead of 1 changes the loss by -.0011 nats at 2 bits, and 3 by +.0011.
STRENGTH = 2.0

# Scales carry their weights along: -.0052, -.0051 and -.0073 against scales that move alone (at .01, with Adam's first moment), more than
# half of it due to Adam without a first moment. With long steps .02 instead of .015 changes it by -.0010 and -.0010 at 3 and 2 bits.
RATE, BETAS = 0.02, (0.0, 0.999)


def quantize_training(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    quantizer: Quantizer | Mapping[str, Quantizer | None],
    *,
    steps: int,
    loss_terms: float,
    teacher: nn.Module | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    compile: bool | None = None,
) -> Run:
    """Put the default recipe on a model that was trained in full precision; the loop around it goes on for `steps` steps.

    Use half to three quarters of the learning rate that the full-precision run had, falling to zero. Quantized weights take twice that
    (`sw.faster`), by themselves: the optimizer needs no parameter groups for it.

    Args:
        model: any module.
        optimizer: the optimizer, or all of them, that hold the selected parameters. Where one is not of Adam's kind, the Run averages
            squared gradients itself, at the price of one more tensor of the weights' size.
        quantizer: the grid, or a mapping from names to grids. Where an integer grid was built without `levels=`, the recipe takes all
            codes: half-odd ones ("mid") at 2 bits, "full" with signed scales above. Say `levels="symmetric"` where the runtime needs that.
        steps: optimizer steps of the whole run; rounding is complete after four fifths of them.
        loss_terms: loss terms averaged per optimizer step: batch times sequence for a language model.
        teacher: a finished full-precision model; `run.loss` then has it in it. It costs its forward pass at every step.
        skip, seed, compile: as in `attach`.

    Returns:
        The `Run`; `run.loss(logits, targets, *inputs)` is the cross entropy, half of it the distance to the teacher where there is one.

    Raises:
        TypeError, ValueError: as `attach`; steps that are no positive whole number; a teacher that is the model itself.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be the number of optimizer steps of the whole run: got {steps!r}.")
    if teacher is model:
        raise ValueError(
            "`teacher` is `model` itself, which is about to be quantized. Give `copy.deepcopy(model)`, or a finished run of it."
        )
    loss = None if teacher is None else distillation(teacher)
    moments = all(isinstance(one, EXACT) for one in optimizers_of(optimizer))

    def made(grid: Quantizer) -> Method:
        method = recipe(grid, steps=steps, loss_terms=loss_terms)
        return method if moments else fisher(method)._replace(name=method.name)

    methods: Method | dict[str, Method | None]
    if isinstance(quantizer, Mapping):
        methods = {name: None if grid is None else made(grid) for name, grid in quantizer.items()}
    else:
        methods = made(quantizer)
    run = attach(model, methods, optimizer, skip=skip, seed=seed, compile=compile)
    if loss is not None:
        run.loss = loss
    return run


def recipe(quantizer: Quantizer, *, steps: int, loss_terms: float | None = None) -> Method:
    """Return the default method for a run of `steps` optimizer steps; arguments as in `quantize_training`."""
    grid = all_codes(quantizer)
    penalty = lotion(grid, strength=STRENGTH, loss_terms=loss_terms)
    forward = parq(grid, slope=sigmoid(1, 0, steps=max(1, round(ANNEALED * steps))))
    method = faster(forward._replace(push=penalty.push, loss_terms=penalty.loss_terms, strength=penalty.strength), MULTIPLIER)
    if grid.format.levels == "affine" or isinstance(grid.rule, float):
        return method._replace(name="default")  # nothing to learn: the scale is given, or bound to a zero point
    return learned(method, rate=RATE, betas=BETAS, carry=True)._replace(name="default")


def all_codes(quantizer: Quantizer) -> Quantizer:
    """Return the grid with every code of its bits in use, where the levels were left open."""
    check_quantizer(quantizer)
    if not quantizer.levels_open:
        return quantizer
    signed = quantizer.scale_dtype != "e8m0" and quantizer.format.bits > 2
    return replace(quantizer, format=integer(quantizer.format.bits, "full" if signed else "mid"), levels_open=False)
