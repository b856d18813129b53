"""What holds the house together outside the code: versions, pins, licence, make targets, public names, errors that tell what came."""

import ast
import hashlib
import inspect
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import stepwell

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LARGEST = 1_000_000  # bytes of a committed file


def pins():
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def committed():
    """Every file of the checkout that git knows; without git, those of the folders that hold what we write."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [
        path for name in ("src", "tests", "benchmarks", "papers", "examples") for path in (ROOT / name).rglob("*") if path.suffix != ".pyc"
    ]


def test_version_is_one():
    version = PROJECT["version"]
    assert stepwell.__version__ == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_licence_is_apache_2():
    # sha256 of https://www.apache.org/licenses/LICENSE-2.0.txt, which begins with an empty line
    canonical = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256(b"\n" + (ROOT / "LICENSE").read_bytes()).hexdigest() == canonical


def test_constraints_are_exact_and_free_of_builds():
    assert [pin for pin in pins() if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9.]+", pin)] == []
    names = [canonicalize_name(pin.partition("==")[0]) for pin in pins()]
    assert len(names) == len(set(names))
    assert "torch==2.13.0" in pins()


def test_constraints_meet_every_requirement():
    pinned = {canonicalize_name(name): version for name, _, version in (pin.partition("==") for pin in pins())}
    wanted = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]
    requirements = [requirement for requirement in map(Requirement, wanted) if requirement.name != PROJECT["name"]]
    unmet = [str(r) for r in requirements if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))]
    assert len(requirements) > 15
    assert unmet == []


def make(*arguments):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PIP_ARGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout


def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert re.findall(r"^make (\S+)", make("help"), re.MULTILINE) == [name for name in phony if name != "help"]


def test_demo_installs_no_developer_tools():
    commands = make("--dry-run", "--always-make", "demo")
    assert "'.[demo]'" in commands
    assert not re.search(r"\[\w*dev|pytest|ruff|mypy", commands)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_pip_arguments_reach_every_install(target):
    commands = make("--dry-run", "--always-make", target, "PIP_ARGS=--marker-option")
    installs = [line for line in commands.splitlines() if "install" in line and "--editable" in line]
    assert installs
    assert all("--marker-option" in line and "--constraint constraints.txt" in line for line in installs)


@pytest.mark.parametrize("name", sorted(set(stepwell.__all__) - {"__version__"}))
def test_public_name_resolves_and_is_documented(name):
    value = getattr(stepwell, name)
    assert len(inspect.getdoc(value) or "") > 20


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "src/stepwell/__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname or alias.name for node in ast.walk(blocks[0]) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(stepwell.__all__) - {"__version__"}


def test_unknown_public_name_is_an_attribute_error_that_helps():
    with pytest.raises(AttributeError, match="int4"):
        _ = stepwell.no_such_name


def test_readme_has_a_line_for_every_module():
    readme = (ROOT / "README.md").read_text()
    modules = [path for path in SOURCES if path.name != "__init__.py"]
    assert [
        str(path.relative_to(ROOT)) for path in modules if not re.search(rf"^\W*{re.escape(path.name)}\s+\S", readme, re.MULTILINE)
    ] == []


def calls(tree, *names):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_errors_tell_what_came_and_nothing_is_unfinished(path):
    text = path.read_text()
    tree = ast.parse(text)
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    errors = [call for call in raised if isinstance(call.func, ast.Name) and call.func.id in ("ValueError", "TypeError")]
    # either the argument by its name, in backticks, or a received value put into the text
    mute = [
        call for call in errors if "`" not in ast.unparse(call) and not any(isinstance(node, ast.FormattedValue) for node in ast.walk(call))
    ]
    assert not mute, [f"{path.name}:{call.lineno} {ast.unparse(call)}" for call in mute]
    assert not re.search(r"\b(TODO|FIXME|XXX|raise NotImplemented\w*)\b", text)
    if "commands" not in path.parts and path.name != "cli.py":
        assert not [call.lineno for call in calls(tree, "print", "input", "eval", "exec", "breakpoint")]


def test_committed_files_are_small_and_name_no_machine():
    forbidden = [f"{ROOT}/".encode(), f"{Path.home()}/".encode()]
    assert len(committed()) > 20
    for path in committed():
        content = path.read_bytes()
        assert len(content) <= LARGEST, f"{path.relative_to(ROOT)} has {len(content)} bytes"
        assert not [word for word in forbidden if word in content], f"{path.relative_to(ROOT)} names a path of this machine"


def test_ci_calls_every_gate():
    text = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert re.findall(r'^step ".*" (.*)$', text, re.MULTILINE)[:3] == ["make check", "make test", 'make demo DEMO_ARGS="--quick"']
    assert "demo_without_compiler" in text.splitlines()[-2]
