"""What an ONNX runtime really computes: rounding inside kernels, runtimes' defaults, and activations rounded to 8 bits.

    python benchmarks/ship_onnx.py [--only TEXT] [--out benchmarks/results/ship_onnx.json]

Beside `ship_matrix.py`, which asks whether every target holds every architecture. Each cell exports one of its networks in one way and
takes the certificate: the largest difference of the outputs relative to the largest output, what is left of it after every known cause is
switched off, and the largest difference of any single product from its model on the inputs that it really got. W8A8 is 8-bit weights with
one scale per output and 8-bit activations, W4A8 the same with 4-bit weights; static ranges come from the very batch that is compared.
"loss" is the mean Kullback-Leibler divergence, in nats, of the network with rounded activations from the same without, weights in float:
the price of rounding them at all. Where OpenVINO is installed, its outputs with and without the two hints that make it exact.

Cells that are in the results already are not run again; delete the file to begin anew.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import processor
from ship_matrix import SUBJECTS, Subject, divides

import stepwell as sw

ROOT = Path(__file__).parents[1]
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
Cell = dict[str, Any]


def certified(subject: Subject, export: Callable[..., Any], grid: sw.Quantizer, *, activations: str = "", **options: Any) -> Cell:
    """Export a network, load it in onnxruntime and return its certificate's numbers."""
    model = copy.deepcopy(subject.model)
    logits = outputs(model, subject)
    if activations:
        sw.quantize_activations(model, calibrate=[subject.example] if activations == "static" else None)
    encoded = sw.ptq.rtn(copy.deepcopy(model), grid, skip=undivided(model, grid))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        export(model, encoded, subject.example, path, sequence=subject.sequence, **options)
        found = sw.verify(path, model, subject.example, encoded)
    return {
        "codes": found.codes_equal and found.scales_equal,
        "error": found.max_relative_error,
        "tolerance": found.tolerance,
        "remainder": found.remainder,
        "kernel": max((layer.modelled for layer in found.layers if layer.modelled is not None), default=None),
        "kernels": sorted({layer.kernel for layer in found.layers if layer.kernel}),
        "causes": [[cause.name, cause.before, cause.after] for cause in found.causes],
        "passed": found.passed,
        "loss": divergence(logits, outputs(model, subject)) if activations else None,
    }


def openvino(subject: Subject, export: Callable[..., Any], grid: sw.Quantizer, hints: Mapping[str, str]) -> Cell:
    """Export a network and return how far OpenVINO's outputs are from the model's."""
    import openvino as runtime

    model = copy.deepcopy(subject.model)
    encoded = sw.ptq.rtn(model, grid, skip=undivided(model, grid))  # the model holds the grid weights from here on
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        export(model, encoded, subject.example, path, sequence=subject.sequence)
        found = runtime.compile_model(str(path), "CPU", dict(hints))([part.numpy() for part in subject.example])[0]
    expected = outputs(model, subject).numpy()
    return {"error": float(np.abs(found - expected).max() / np.abs(expected).max()), "version": runtime.__version__}


def undivided(model: torch.nn.Module, grid: sw.Quantizer) -> list[str]:
    """Return the weights that a grid's block does not divide; they stay in float."""
    return [row.name for row in sw.select(model).chosen if not divides(row.parameter, grid)]


def outputs(model: torch.nn.Module, subject: Subject) -> torch.Tensor:
    """Return a network's logits on its example."""
    with torch.no_grad():
        found = model(*subject.example)
    return found if isinstance(found, torch.Tensor) else found.logits


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence in nats."""
    one, two = (part.double().log_softmax(-1) for part in (expected, found))
    return float((one.exp() * (one - two)).sum(-1).mean())


GRID, BYTE, NIBBLE = sw.target("onnx:qdq"), sw.int8(block="channel"), sw.intn(4, block="channel")
WAYS: dict[str, Callable[[Subject], Cell]] = {
    "MatMulNBits, float32 inside": lambda subject: certified(subject, sw.export.onnx, GRID),
    "MatMulNBits, int8 inside": lambda subject: certified(subject, sw.export.onnx, GRID, compute="int8"),
    "DequantizeLinear": lambda subject: certified(subject, sw.export.onnx_qdq, GRID),
    **{
        f"{name}, {scheme}": lambda subject, grid=grid, scheme=scheme: certified(subject, sw.export.onnx_qdq, grid, activations=scheme)
        for name, grid in (("W8A8", BYTE), ("W4A8", NIBBLE))
        for scheme in ("static", "dynamic")
    },
    **{
        f"OpenVINO, {name}, {how}": lambda subject, export=export, hints=hints: openvino(subject, export, GRID, hints)
        for name, export in (("MatMulNBits", sw.export.onnx), ("DequantizeLinear", sw.export.onnx_qdq))
        for how, hints in (("with hints", EXACT), ("default", {}))
    },
}
NETWORKS = ("Llama", "BERT", "convolutions")


def word(found: Mapping[str, Any] | None) -> str:
    """Return one cell of the table: the error, and what is left of it without its causes."""
    if found is None:
        return ""
    if "passed" not in found:
        return f"{found['error']:.0e}"
    kernel = "" if found["kernel"] is None else f", kernels {found['kernel']:.0e}"
    loss = "" if found["loss"] is None else f", KL {found['loss']:.0e}"
    return f"{found['error']:.0e} -> {found['remainder']:.0e}{kernel}{loss}{'' if found['passed'] else ' NOT PASSED'}"


def main() -> None:
    """Fill the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cells whose 'way | network' holds this text")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ship_onnx.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"cells": {}}
    results |= {"processor": processor(), "torch": torch.__version__, "python": sys.version.split()[0]}
    for network in NETWORKS:
        subject = SUBJECTS[network]()
        for way, run in WAYS.items():
            name = f"{way} | {network}"
            if name in results["cells"] or options.only not in name or (way.startswith("OpenVINO") and find_spec("openvino") is None):
                continue
            torch.manual_seed(0)
            results["cells"][name] = run(subject)
            print(f"{name}: {word(results['cells'][name])}", flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    for way in WAYS:
        print(f"{way:<40}", *(f"{word(results['cells'].get(f'{way} | {network}')):<50}" for network in NETWORKS))


if __name__ == "__main__":
    main()
