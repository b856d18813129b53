"""The house's rules, read off the source: imports go downwards only, heavy extras are imported where they are used, files stay small.

A new module must be entered in LAYERS below. Modules of one group may import each other (without cycles); groups beside each other on one
level may not; everything may import from the levels above it in this table, which are the lower layers of the library.
"""

import ast
import graphlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "stepwell"

# Lowest layer first; a level is a tuple of groups, a group a set of modules or packages.
LAYERS: tuple[tuple[set[str], ...], ...] = (
    ({"formats", "rounding", "randomness", "blocks", "schedules", "threads"}, {"report"}),
    ({"grids", "scales", "shrink", "quantizers", "presets", "runtimes", "packing", "storage", "selection", "modes", "activation_grids"},),
    ({"methods"}, {"ptq"}, {"theory"}, {"health"}),
    ({"run", "optim", "activations", "testbed"},),
    ({"probes"},),
    ({"advice"}, {"export"}),
    ({"train", "recipes", "integrations"}, {"explain"}),
    ({"ship"},),
    ({"commands"},),
    ({"cli"},),
    ({"__main__"},),
)
# Modules that may import less than their layer allows.
ONLY: dict[str, set[str]] = {"formats": set(), "report": set(), "theory": {"formats"}}
# Who may import `report`: it draws what it is given, so only what tells a story to a person needs it.
REPORTERS = {"report", "train", "recipes", "integrations", "ship", "commands"}
WITHOUT_TORCH = {"formats", "theory", "report", "commands", "cli", "__main__"}  # commands import it inside the function that needs it
HEAVY = {
    "PIL", "accelerate", "compressed_tensors", "datasets", "gguf", "llama_cpp", "numba", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
    "pandas", "pyarrow", "sklearn", "tensorboard", "tokenizers", "torchao", "transformers", "wandb",
}  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION = 350, 70

LEVEL = {name: (level, group) for level, groups in enumerate(LAYERS) for group, names in enumerate(groups) for name in names}
FILES = {
    ".".join(("stepwell", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path for path in SOURCE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(tree: ast.AST, modules: set[str]) -> list[tuple[str, int]]:
    """Return what is imported anywhere in a module as (dotted name, line); `from p import m` names `p.m` where that is a module of ours."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [(full if (full := f"{base}.{alias.name}") in modules else base, node.lineno) for alias in node.names]
    return found


def at_import(tree: ast.Module) -> list[ast.AST]:
    """Return the statements that run when the module is imported: all but function bodies and blocks for the type checker."""
    statements: list[ast.AST] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        statements.append(node)
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)]
    return statements


def loaded(tree: ast.Module, modules: set[str]) -> list[tuple[str, int]]:
    """Return what importing the module imports, as (dotted name, line)."""
    flat = [node for node in at_import(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return imported(ast.Module(body=flat, type_ignores=[]), modules)


def top(module: str) -> str:
    """Return the entry of LAYERS that a module of ours belongs to; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def upward(module: str, tree: ast.AST, modules: set[str]) -> list[str]:
    """Return every import that the layers forbid, in words."""
    wrong, me = [], top(module)
    for target, line in imported(tree, modules):
        if target.startswith("."):
            wrong.append(f"{module}:{line} imports `{target}`: write the absolute name")
        if target.split(".")[0] != "stepwell" or not me:
            continue
        you = top(target)
        if not you:
            wrong.append(f"{module}:{line} imports the whole package: name the module that holds it")
        elif you != me and not allowed(me, you):
            wrong.append(f"{module}:{line} imports `{target}`: `{me}` may not import `{you}`")
    return wrong


def allowed(me: str, you: str) -> bool:
    """Return whether one entry of LAYERS may import another; both must be listed."""
    if me in ONLY:
        return you in ONLY[me]
    if you == "report":
        return me in REPORTERS
    (my_level, my_group), (your_level, your_group) = LEVEL[me], LEVEL[you]
    return your_level < my_level or (your_level, your_group) == (my_level, my_group)


def heavy_at_import(module: str, tree: ast.Module, modules: set[str]) -> list[str]:
    """Return every extra, and every torch where none may be, that importing the module pulls in."""
    wrong = []
    for target, line in loaded(tree, modules):
        root = target.split(".")[0]
        if root in HEAVY and root != "numba":
            wrong.append(f"{module}:{line} imports `{root}` at the top: move it into the function that needs it")
        if root == "torch" and top(module) in WITHOUT_TORCH:
            wrong.append(f"{module}:{line} imports torch, which `{top(module)}` must load without")
    return wrong


def needs_numba(trees: dict[str, ast.Module]) -> list[str]:
    """Return every module that loads numba unasked: kernels may import it at the top, but nobody may import such a module at the top."""
    modules = set(trees)
    targets = {name: {target for target, _ in loaded(tree, modules)} for name, tree in trees.items()}
    kernels = {name for name, names in targets.items() if any(target.split(".")[0] == "numba" for target in names)}
    return [
        f"{name} imports `{kernel}`, and with it numba, at the top: import it in a function"
        for name, names in targets.items()
        if name not in kernels
        for kernel in kernels & names
    ]


def overlong(module: str, text: str) -> list[str]:
    """Return the file and the functions that are too long to be read at once."""
    lines = text.count("\n")
    wrong = [f"{module} has {lines} lines, more than {LONGEST_FILE}: split it"] if lines > LONGEST_FILE else []
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
        ):
            wrong.append(f"{module}:{node.lineno} `{node.name}` has {length} lines, more than {LONGEST_FUNCTION}: split it")
    return wrong


def open_ended(module: str, tree: ast.Module) -> list[str]:
    """Return the public functions and methods that swallow unknown keyword arguments."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    functions = [node for owner in (tree, *classes) for node in owner.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        f"{module}:{node.lineno} `{node.name}` takes **{node.args.kwarg.arg}: name the arguments"
        for node in functions
        if node.args.kwarg and (not node.name.startswith("_") or node.name.startswith("__"))
    ]


def cycle(trees: dict[str, ast.Module]) -> list[str]:
    """Return the modules of one import cycle, function-level imports included; empty without one."""
    modules = set(trees)
    graph = {name: {target for target, _ in imported(tree, modules)} & modules - {name} for name, tree in trees.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_has_a_layer():
    unknown = sorted({top(name) for name in FILES} - set(LEVEL) - {""})
    assert not unknown, f"no layer for {unknown}: enter them in LAYERS of {Path(__file__).name}, at the place the design gives them"


@pytest.mark.parametrize("module", sorted(FILES))
def test_module_keeps_the_rules_of_the_house(module):
    if top(module) not in LEVEL and top(module):
        pytest.fail(f"enter `{top(module)}` in LAYERS first")
    tree, text = TREES[module], FILES[module].read_text()
    wrong = upward(module, tree, set(FILES)) + heavy_at_import(module, tree, set(FILES)) + overlong(module, text) + open_ended(module, tree)
    assert not wrong, "\n" + "\n".join(wrong)


def test_imports_have_no_cycle():
    assert not cycle(TREES), " -> ".join(cycle(TREES))


def test_numba_is_never_loaded_unasked():
    assert not needs_numba(TREES)


# The rules themselves, on sources that break exactly one of them.

OURS = {
    "stepwell",
    "stepwell.formats",
    "stepwell.quantizers",
    "stepwell.methods.ste",
    "stepwell.ptq.rtn",
    "stepwell.report.page",
    "stepwell.run.attach",
}


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("stepwell.run.attach", "from stepwell.methods import ste", 0),
        ("stepwell.methods.ste", "from stepwell.quantizers import Quantizer", 0),
        ("stepwell.methods.ste", "def f():\n    from stepwell.run.attach import attach", 1),
        ("stepwell.methods.ste", "from stepwell.ptq import rtn", 1),
        ("stepwell.theory.closure", "from stepwell.formats import integer", 0),
        ("stepwell.theory.closure", "import stepwell.quantizers", 1),
        ("stepwell.formats", "from stepwell.quantizers import Quantizer", 1),
        ("stepwell.report.page", "from stepwell.formats import Format", 1),
        ("stepwell.run.attach", "from stepwell.report.page import page", 1),
        ("stepwell.train.digits", "from stepwell.report.page import page", 0),
        ("stepwell.methods.ste", "import stepwell", 1),
        ("stepwell.methods.ste", "from stepwell import lotion", 1),
        ("stepwell.methods.ste", "from . import base", 1),
    ],
)
def test_upward_import_is_found(module, source, count):
    assert len(upward(module, ast.parse(source), OURS)) == count


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("stepwell.export.onnx", "import onnx", 1),
        ("stepwell.export.onnx", "def f():\n    import onnx", 0),
        ("stepwell.export.onnx", "try:\n    import onnx\nexcept ImportError:\n    from onnx_ir import model", 2),
        ("stepwell.export.onnx", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx", 0),
        ("stepwell.theory.closure", "from torch import Tensor", 1),
        ("stepwell.commands.inspect", "class A:\n    import torch", 1),
        ("stepwell.run.attach", "import torch", 0),
    ],
)
def test_heavy_import_is_found(module, source, count):
    assert len(heavy_at_import(module, ast.parse(source), OURS)) == count


def test_kernel_imported_at_the_top_is_found():
    kernel, user = ast.parse("import numba"), "from stepwell.kernel import run"
    assert needs_numba({"stepwell.kernel": kernel, "stepwell.user": ast.parse(user)})
    assert not needs_numba({"stepwell.kernel": kernel, "stepwell.user": ast.parse(f"def f():\n    {user}")})


def test_cycle_through_a_function_is_found():
    a, b = ast.parse("from stepwell import b"), ast.parse("def f():\n    import stepwell.a")
    assert set(cycle({"stepwell": ast.parse(""), "stepwell.a": a, "stepwell.b": b})) == {"stepwell.a", "stepwell.b"}


def test_length_and_open_signature_are_found():
    body = "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION
    assert len(overlong("m", body)) == 1
    assert not overlong("m", body.removesuffix("    x = 1\n"))
    assert len(overlong("m", "x = 1\n" * (LONGEST_FILE + 1))) == 1
    source = "def f(**options): ...\ndef _g(**options): ...\nclass C:\n    def __init__(self, **options): ...\n    def h(self): ..."
    assert len(open_ended("m", ast.parse(source))) == 2
