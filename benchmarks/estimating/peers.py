"""Peers: other libraries' training on the same weights, from the same state, with the same batches. Running it does nothing.

Each is set up as its documentation says and given the optimizer, the rates and the tries that every method gets. A library that is not
installed is left out, with a message. Blocks of 64 along the input everywhere. "Untuned" is what a reader of its documentation would run:
AdamW at its own rate, which for Brevitas is also that of the scales.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from estimating.lab import BLOCK, SKIP, Lab
from estimating.methods import FASTER, Arm, Finished, apart, inner

MODULES = {"torchao": "torchao", "brevitas": "brevitas", "quanto": "optimum.quanto"}  # by how the methods' names begin
USUAL = (1e-3,)  # none of them documents a rate for AdamW; this is the optimizer's own
PERIOD, STEEPNESS, CENTRE, BEGIN = 10, 10.0, 0.5, 1  # of PARQ: its own defaults; it anneals from the first step to its last but ten
SCALE_SHARE = 1 / 3  # Brevitas' learned scales: their rate over the weights', the best of those that its table had


def peers() -> dict[str, Arm]:
    """Return the arms of other libraries, installed or not: each with tuned rates, and untuned."""
    tuned = {
        "torchao parq": Arm("peer", "mid", torchao_parq),
        "torchao qat": Arm("peer", "full, scales > 0", torchao_qat),
        "brevitas, learned scales": Arm("peer", "sym", brevitas),
        "quanto": Arm("peer", "affine", quanto, widths=(4, 2)),
    }
    longer = {"torchao parq, faster": tuned["torchao parq"]._replace(start=partial(torchao_parq, multiplier=FASTER))}
    return tuned | longer | {f"{name}, untuned": arm._replace(rates=USUAL) for name, arm in tuned.items()}


def missing(name: str) -> str:
    """Return why a method cannot be run here; empty where it can."""
    for start, module in MODULES.items():
        if name.startswith(start):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                return f"left out: {name} ({error})"
    return ""


def replaced(model: nn.Module, made: Callable[[nn.Linear], nn.Linear]) -> None:
    """Replace every layer that is quantized by a peer's, which holds the same parameters."""
    for name, layer in inner(model).items():
        parent, _, own = name.rpartition(".")
        other = made(layer)
        other.weight, other.bias = layer.weight, layer.bias
        setattr(model.get_submodule(parent), own, other)


def torchao_parq(lab: Lab, bits: float, rate: float, seed: int, *, multiplier: float = 1.0) -> Finished:
    """Train with torchao's PARQ: `QuantOptimizer` around AdamW, uniform grid of 2^bits levels without zero, scales from mean magnitudes."""
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import UnifQuantizer

    student = lab.student(rate, seed)
    block = {} if lab.block == "channel" else {"quant_block_size": lab.block}
    apart(student, lab, multiplier).update(quant_bits=int(bits), **block)
    around = QuantOptimizer(
        student.optimizer,
        UnifQuantizer(),
        ProxPARQ(anneal_start=BEGIN, anneal_end=lab.steps - PERIOD, steepness=STEEPNESS, anneal_center=CENTRE),
        warmup_steps=1,  # none refuses an optimizer that has a state
        quant_period=PERIOD,
        quant_per_channel=True,
    )
    lab.train(student, optimizer=around)
    return Finished(student.model)  # the model holds what the last map gave, which rounds


def torchao_qat(lab: Lab, bits: float, rate: float, seed: int) -> Finished:
    """Train with torchao's fake quantization of weights: straight-through, absmax scales, codes -2^(b-1) to 2^(b-1) - 1."""
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    config = IntxFakeQuantizeConfig(getattr(torch, f"int{bits:g}"), group_size=BLOCK)
    student = lab.student(rate, seed)
    replaced(student.model, lambda old: FakeQuantizedLinear.from_linear(old, weight_config=config))
    lab.train(student)
    return folded(student.model, lambda layer: layer.weight_fake_quantizer(layer.weight))


def brevitas(lab: Lab, bits: float, rate: float, seed: int) -> Finished:
    """Train with Brevitas: one learned scale per block, which starts from a search."""
    from brevitas import nn as quantized
    from brevitas.inject.enum import ScalingImplType, ScalingPerOutputType
    from brevitas.proxy.groupwise_int_parameter_quant import GroupwiseWeightQuantProxyFromInjector
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE

    class Learned(Int8WeightPerChannelFloatMSE):
        proxy_class = GroupwiseWeightQuantProxyFromInjector
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
        scaling_per_output_type = ScalingPerOutputType.GROUP
        group_size = BLOCK
        bit_width = int(bits)

    student = lab.student(rate, seed)
    replaced(
        student.model, lambda old: quantized.QuantLinear(old.in_features, old.out_features, bias=old.bias is not None, weight_quant=Learned)
    )
    layers = inner(student.model).values()
    for layer in layers:
        layer.weight_quant.init_tensor_quant()  # the search sees the weights that are to be trained
        layer.quant_weight()  # and makes the scales, from statistics, when it is first called
    known = {id(one) for group in student.optimizer.param_groups for one in group["params"]}
    scales = [one for one in student.model.parameters() if id(one) not in known]
    own = rate if rate in USUAL else SCALE_SHARE * rate
    student.optimizer.add_param_group({"params": scales, "weight_decay": 0.0, "lr": own, "peak": own})
    lab.train(student)
    return folded(student.model, lambda layer: layer.quant_weight().value)


def quanto(lab: Lab, bits: float, rate: float, seed: int) -> Finished:
    """Train with quanto's dynamic quantization of weights: straight-through, scales and shifts from the least and the largest weight."""
    from optimum.quanto import qint2, qint4, quantize

    student = lab.student(rate, seed)
    quantize(student.model, weights={4: qint4, 2: qint2}[int(bits)], exclude=list(SKIP))
    for layer in inner(student.model).values():
        layer.weight_group_size = BLOCK if layer.in_features > BLOCK else None  # its own choice is 128, or the whole row
    lab.train(student)
    return folded(student.model, lambda layer: layer.qweight.dequantize())


def folded(model: nn.Module, rounded: Callable[[nn.Module], Tensor]) -> Finished:
    """Return a plain model that holds a peer's rounded weights, so that everybody is measured in the same way."""
    with torch.no_grad():
        for name, layer in inner(model).items():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.copy_(rounded(layer))
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, plain)
    return Finished(model)
