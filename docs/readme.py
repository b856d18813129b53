"""Fill the README's tree and tables: the tree from the modules' first lines, the numbers from committed results.

python docs/readme.py          # rewrites README.md between its markers; a test asks that it is up to date
"""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH = 24


def tree() -> str:
    """Return one line per module: its name and the first sentence of its docstring."""
    lines = ["```text", "src/stepwell/"]
    package = ROOT / "src" / "stepwell"
    for folder in [package, *sorted(path for path in package.iterdir() if path.is_dir() and any(path.glob("*.py")))]:
        depth = "  " if folder == package else "    "
        if folder != package:
            lines.append(f"  {folder.name + '/':<{WIDTH}}{_first(folder / '__init__.py')}".rstrip())
        modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        lines += [f"{depth}{path.name + ' ':<{WIDTH}}{_first(path)}" for path in modules]
    return "\n".join([*lines, "```"])


def cost() -> str:
    """Return the table of training-step cost, from the benchmark's results."""
    result = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())
    head = "| step | time over plain | memory growth over plain | extra ms | floor ms |\n|---|---|---|---|---|"
    rows = [
        f"| {name} | {row['cpu_ratio']:.3f} | {row['memory_ratio']:.3f} | {row['extra_cpu_ms']:.1f} | "
        + (f"{row['floor_ms']:.1f} |" if row["floor_ms"] else "|")
        for name, row in result["variants"].items()
    ]
    weights = f"{result['quantized_weights'] / 1e6:.1f} million"
    without = "Eager: where numba is not installed. " if any("eager" in name for name in result["variants"]) else ""
    note = (
        f"int4 in blocks of 32 on the {weights} block weights of a 4-layer transformer, 1024 tokens a step, AdamW, float32. Medians of "
        f"{result['rounds']} interleaved rounds, ratio within a round (processor time); {result['machine']}; torch {result['torch']}. "
        f"{without}The floor is the memory traffic of the extra passes at the speed of a copy; what is still in the cache costs less. "
        "`python benchmarks/step_cost.py` measures it again."
    )
    return "\n".join([head, *rows, "", note])


def optimizer() -> str:
    """Return the table of the optimizer step's cost, from the benchmark's results."""
    result = json.loads((ROOT / "benchmarks" / "results" / "optim.json").read_text())
    ways = ("one pass, c", "one pass, numba", "numba passes around torch fused", "compiled passes around torch fused")
    heads = ("one pass in C", "one pass in numba", "passes around torch's, numba", "passes around torch's, torch.compile")
    lines = [f"| time over torch's fused AdamW | {' | '.join(heads)} |", "|---" * (1 + len(ways)) + "|"]
    for shape, found in result["shapes"].items():
        for method in ("lotion", "ste", "ste + lotion"):
            ratios = [f"{found['variants'][f'{method}: {way}']['ratio']:.2f}" for way in ways]
            lines.append(f"| {method}, {shape} | {' | '.join(ratios)} |")
    one = result["shapes"]["one matrix"]
    floors = ", ".join(f"{name} {one['variants'][name]['over_floor']:.2f}" for name in ("torch fused", "lotion: one pass, c"))
    first, again = result["compile_seconds"]["numba"]
    note = (
        "Ten million parameters, int4 in blocks of 32, one thread, the step alone. "
        f"Medians of {result['rounds']} interleaved rounds, ratio within a round (processor time); {result['machine']}; "
        f"torch {result['torch']}. Over the floor of 28 bytes per parameter: {floors}. Compiled once per machine: C in "
        f"{result['compile_seconds']['c'][0]:.0f} s, numba in {first:.0f} s (then {again:.1f} s per process). "
        "`python benchmarks/optim.py` measures it again."
    )
    return "\n".join([*lines, "", note])


def render(text: str) -> str:
    """Return the README with every marked part filled in."""
    for name, part in (("tree", tree), ("cost", cost), ("optimizer", optimizer)):
        pattern = re.compile(rf"(<!-- {name}[^>]*-->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no part marked {name!r}.")
        text = pattern.sub(lambda found, part=part: found[1] + part() + found[2], text)
    return text


def _first(path: Path) -> str:
    """Return the first line of a module's docstring, without the name that many begin with."""
    line = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    line = re.sub(r"^\w+( \w+)?: ", "", line).rstrip(".").split(". ")[0]
    return line[:1].lower() + line[1:] if line[1:2].islower() else line


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
