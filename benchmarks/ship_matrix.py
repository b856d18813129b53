"""Does every target hold every architecture's codes, and does its runtime compute what was trained? Target by architecture.

    python benchmarks/ship_matrix.py [--only TEXT] [--out benchmarks/results/ship_matrix.json]

Every cell rounds a model to the target's own grid (to nearest), exports it, loads it again in the target's runtime, and takes the numbers
of the certificate: codes and scales bit for bit, largest difference of the outputs relative to the largest output, the tolerance (2e-6, or
four times what one order of float32 summation moves the outputs by), and where the runtime computes in another way, what is left of the
difference once that is modelled. Networks have random weights, those of matrices three times the usual size so that differences show;
"Llama 15M" is the architecture of `recipes.lm`, its weights as they are drawn. Weights that a target's block does not divide stay in float,
as `stepwell quantize` leaves them. A cell without numbers has the refusal as its reason.

Cells that are in the results already are not run again, so that a run may be stopped; delete the file to begin anew. Wall times on one
thread.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import processor
from torch import Tensor, nn

import stepwell as sw
from stepwell.blocks import contraction

ROOT = Path(__file__).parents[1]
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
    "max_position_embeddings": 64,
}  # fmt: skip
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ONNX = ("onnx:matmulnbits", "onnx:qdq")
TARGETS: dict[str, dict[str, Any]] = {
    **{f"{name} {bits} bits": {"name": name, "bits": bits} for name in ONNX for bits in (8, 4, 2)},
    **{row.name: {"name": row.name} for row in sw.targets() if row.name not in ONNX},
    "compressed-tensors:int4 in bf16": {"name": "compressed-tensors:int4", "compute": "bf16"},
    "torchao:int4 in bf16": {"name": "torchao:int4", "compute": "bf16"},
}


class Logits(nn.Module):
    """A transformers model as a function of its tokens, for ONNX."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `(batch, length, classes)`."""
        logits: Tensor = self.inner(tokens, use_cache=False).logits if hasattr(self.inner, "lm_head") else self.inner(tokens).logits
        return logits


class Subject(NamedTuple):
    """An architecture: its model, an example, and which axis of it is a sequence."""

    model: nn.Module
    example: tuple[Tensor, ...]
    sequence: int | None = None


def language(kind: str, **options: Any) -> Subject:
    """Return a small transformers model of a kind."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")(**{**SIZES, **NONE, **options})
    model = getattr(transformers, kind)(config).eval()
    return Subject(enlarged(model), (torch.randint(256, (2, 24)),), 1)


def recipe() -> Subject:
    """Return the 15 million parameters of `recipes.lm`."""
    from stepwell.recipes import lm
    from stepwell.train.language import build

    size = lm.fp_15m()
    model = build(size.architecture, length=size.length, seed=0).eval()
    return Subject(model, (torch.randint(size.architecture.vocabulary, (2, 24)),), 1)


def convolutional() -> Subject:
    """Return a network of convolutions with a batch norm and a classifier."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 9, 10),
    )  # fmt: skip
    return Subject(enlarged(nn.Sequential(*layers).eval()), (torch.randn(4, 1, 8, 8),))


def enlarged(model: nn.Module) -> nn.Module:
    """Make matrices three times as large: at the usual scale a small random network hardly uses them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    return model


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "Llama": lambda: language("LlamaForCausalLM", num_key_value_heads=2),
    "Qwen 3": lambda: language("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=64),
    "OLMo 2": lambda: language("Olmo2ForCausalLM"),
    "BERT": lambda: language("BertForMaskedLM"),
    "convolutions": convolutional,
    "Llama 15M": recipe,
}


def cell(subject: Subject, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Round, export, load and compare one model for one target.

    Args:
        subject: the architecture.
        options: of `sw.target`.
        folder: to write into.

    Returns:
        The certificate's numbers, or the reason why there are none.
    """
    family, started = str(options["name"]).partition(":")[0], time.perf_counter()
    grid = sw.target(**options)
    inner = Logits(subject.model) if family == "onnx" and not isinstance(subject.model, nn.Sequential) else subject.model
    chosen = sw.select(inner).chosen
    kept = [row.name for row in chosen if not divides(row.parameter, grid)]
    if len(kept) == len(chosen):
        return {"reason": f"no weight has inputs that are a multiple of the block of {grid.block}"}
    try:
        encoded = sw.ptq.rtn(copy.deepcopy(inner), grid, skip=kept)
        path = export(inner, encoded, subject, options, folder)
        certificate = sw.verify(path, inner, subject.example, encoded)
    except (ValueError, RuntimeError) as error:
        return {"reason": str(error).splitlines()[0]}
    held = [layer for layer in certificate.layers if layer.nodes]
    return {
        "weights": len(held),
        "float": len(kept) + sum(layer.grid == "float" for layer in certificate.layers),
        "codes": certificate.codes_equal,
        "scales": certificate.scales_equal,
        "values": certificate.values_equal,
        "error": certificate.max_relative_error,
        "tolerance": certificate.tolerance,
        "remainder": certificate.remainder,
        "causes": [[cause.name, cause.before, cause.after] for cause in certificate.causes],
        "kl": certificate.kl,
        "top1": certificate.top1_agreement,
        "exact": certificate.exact,
        "passed": certificate.passed,
        "runtime": f"{certificate.runtime} {certificate.version}",
        "seconds": time.perf_counter() - started,
    }


def export(model: nn.Module, encoded: dict[str, sw.Encoded], subject: Subject, options: Mapping[str, Any], folder: Path) -> Path:
    """Write the artifact of a target and return its place."""
    family, _, kind = str(options["name"]).partition(":")
    if family == "onnx":
        write = sw.export.onnx if kind == "matmulnbits" else sw.export.onnx_qdq
        return write(model, encoded, subject.example, folder / "m.onnx", sequence=subject.sequence).path
    if family == "gguf":
        return sw.export.gguf(model, encoded, folder / "m.gguf", ternary="tq1_0" if kind == "tq1_0" else "tq2_0").path
    if family == "safetensors":
        sw.save(encoded, folder / "m.safetensors")
        return folder / "m.safetensors"
    return (sw.export.torchao if family == "torchao" else sw.export.compressed_tensors)(model, encoded, folder / "m").path


def divides(weight: Tensor, grid: sw.Quantizer) -> bool:
    """Say whether a grid's block divides a weight."""
    return not isinstance(grid.block, int) or contraction(tuple(weight.shape), None) % grid.block == 0


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as a table: the largest relative error, and what is left of it where causes are modelled."""
    head = ["target", *SUBJECTS]
    rows = [[name, *(word(cells.get(f"{name} | {subject}")) for subject in SUBJECTS)] for name in TARGETS]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join("  ".join(part.ljust(width) for part, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])


def word(found: Mapping[str, Any] | None) -> str:
    """Return one cell: `=` for equal codes and scales, then the error."""
    if found is None:
        return ""
    if "reason" in found:
        return "n/a"
    equal = "=" if found["codes"] and found["scales"] else "DIFFER"
    rest = "" if found["exact"] else f" -> {found['remainder']:.0e}"
    return f"{equal} {found['error']:.0e}{rest}{'' if found['passed'] else ' NOT PASSED'}"


def main() -> None:
    """Fill the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cells whose 'target | architecture' holds this text")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, before the next cell")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ship_matrix.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"cells": {}}
    results |= {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "python": sys.version.split()[0]}
    started = time.perf_counter()
    for subject, make in SUBJECTS.items():
        wanted = [name for name in TARGETS if f"{name} | {subject}" not in results["cells"] and options.only in f"{name} | {subject}"]
        made = make() if wanted else None
        for name in wanted:
            if time.perf_counter() - started > options.seconds:
                break
            assert made is not None
            folder = Path(tempfile.mkdtemp())
            try:
                found = cell(made, TARGETS[name], folder)
            finally:
                shutil.rmtree(folder)
            results["cells"][f"{name} | {subject}"] = found
            print(f"{name} | {subject}: {word(found)}  {found.get('reason', '')}", flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["cells"]))
    for reason in sorted({found["reason"] for found in results["cells"].values() if "reason" in found}):
        print("n/a:", reason)


if __name__ == "__main__":
    main()
