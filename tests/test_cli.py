"""The command line: what it prints is checked against torch's own limits, stored sizes against arithmetic, bad input against exit codes."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest
import torch
import typer
from onnx import TensorProto, helper
from safetensors.torch import save_file

from stepwell import cli
from stepwell.commands.formats import ruler
from stepwell.presets import int4, nvfp4
from stepwell.runtimes import targets
from stepwell.storage import save

ROOT = Path(__file__).parents[1]


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def matmul_model(path, *, outputs, inputs, bits, block, zero_points):
    """Write a model with one MatMulNBits node, its tensors in the layout of the operator's definition."""
    blocks = inputs // block
    tensors = [
        helper.make_tensor("codes", TensorProto.UINT8, [outputs, blocks, block * bits // 8], bytes(outputs * inputs * bits // 8), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [outputs * blocks], bytes(4 * outputs * blocks), raw=True),
    ]
    if zero_points:
        row = -(-blocks * bits // 8)  # packed row by row, the last byte filled up
        tensors.append(helper.make_tensor("zeros", TensorProto.UINT8, [outputs * row], bytes(outputs * row), raw=True))
    names = ["x", *(tensor.name for tensor in tensors)]
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", K=inputs, N=outputs, bits=bits, block_size=block)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", inputs), ("y", outputs))]
    onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], tensors)), str(path))


def test_starting_loads_nothing_heavy():
    code = "import sys; from stepwell import cli; cli.build(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "scipy", "matplotlib", "onnx"} & set(loaded)


def test_version_is_the_package_s(run):
    expected = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version") == (0, f"{expected}\n", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_and_speaks_json(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "--json" in out
    assert len(getattr(__import__(f"stepwell.commands.{name}", fromlist=[name]), name).__doc__) > 20


def test_formats_have_torch_s_limits(run):
    code, out, _ = run("formats", "--json")
    rows = {(row["name"], row["levels"]): row for row in json.loads(out)}
    assert code == 0
    for name, dtype in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        limits = torch.finfo(dtype)
        patterns = torch.arange(256).to(torch.uint8).view(dtype).float()
        finite = patterns[patterns.isfinite()].unique()  # -0 and 0 are one value
        row = rows[name, "float"]
        assert (row["lowest"], row["highest"], row["values"]) == (limits.min, limits.max, len(finite))
        assert row["step"] == finite.diff().min()
    for bits in range(2, 9):
        limits = 2 ** (bits - 1) - 1
        assert (rows[f"int{bits}", "symmetric"]["lowest"], rows[f"int{bits}", "full"]["lowest"]) == (-limits, -limits - 1)
        assert rows[f"int{bits}", "affine"]["highest"] == 2**bits - 1


def test_targets_are_listed_with_their_grids(run):
    code, out, _ = run("formats", "--targets", "--json")
    rows = {row["target"]: row for row in json.loads(out)}
    assert code == 0
    assert rows.keys() == {target.name for target in targets()}
    assert rows["gguf:q4_0"]["grid"] == "int4/full block 32, absmax fp16 scales"
    assert rows["compressed-tensors:fp8"]["blocks"] == "channel, tensor"
    assert "onnx:matmulnbits" in run("formats", "--targets")[1]


def test_formats_table_draws_every_grid(run):
    code, out, _ = run("formats")
    rows = json.loads(run("formats", "--json")[1])
    lines = [line for line in out.splitlines() if line.rstrip().endswith(("|", "#"))]
    assert code == 0
    assert [line.split()[:2] for line in lines] == [[row["name"], row["levels"]] for row in rows]


def test_ruler_marks_values_where_they_lie():
    assert ruler((0.0, 1.0, 4.0), 9) == "|.|.....|"
    assert ruler((0.0, 0.1, 4.0), 9) == "#.......|"


def test_inspect_counts_bits_per_weight(run, tmp_path):
    weight = gaussian(64, 96)
    encoded = {
        "layers[red].plain": int4(block=32).encode(weight),
        "half": int4(block=16, scale_dtype="fp16").encode(weight),
        "nv": nvfp4().encode(weight),
    }
    save(encoded, tmp_path / "w.safetensors")
    code, out, _ = run("inspect", tmp_path / "w.safetensors", "--json")
    found = json.loads(out)
    bits = {row["name"]: row["bits_per_weight"] for row in found["weights"]}
    assert (code, found["kind"]) == (0, "encoded weights")
    # code + scale / block, plus one float32 for the tensor where there is one
    assert bits == pytest.approx({"layers[red].plain": 4 + 32 / 32, "half": 4 + 16 / 16, "nv": 4 + 8 / 16 + 32 / weight.numel()}, rel=1e-12)
    assert all(row["shape"] == [64, 96] for row in found["weights"])
    table = run("inspect", tmp_path / "w.safetensors")[1]
    assert all(word in table for word in ("layers[red].plain", "64 x 96", "int4", "fp4_e2m1", "3 weights"))


def test_inspect_shows_plain_safetensors(run, tmp_path):
    tensors = {
        "a": gaussian(3, 5),
        "b": gaussian(4).bfloat16(),
        "c": torch.ones(6, dtype=torch.bool),
        "d": gaussian(2, 2).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    found = json.loads(run("inspect", tmp_path / "w.safetensors", "--json")[1])
    assert found["kind"] == "plain safetensors"
    assert {row["name"]: row["bytes"] for row in found["weights"]} == {name: tensor.nbytes for name, tensor in tensors.items()}


@pytest.mark.parametrize(("bits", "zero_points"), [(4, False), (8, False), (4, True)])
def test_inspect_reads_matmulnbits_nodes(run, tmp_path, bits, zero_points):
    matmul_model(tmp_path / "m.onnx", outputs=10, inputs=96, bits=bits, block=32, zero_points=zero_points)
    code, out, _ = run("inspect", tmp_path / "m.onnx", "--json")
    row = json.loads(out)["weights"][0]
    size = 10 * 96 * bits // 8 + 10 * 3 * 4 + (10 * 2 if zero_points else 0)  # codes, scales, two bytes for a row's three 4-bit zeros
    expected = {"name": "codes", "shape": [10, 96], "bits": bits, "block": 32, "zero_points": zero_points, "bytes": size}
    assert code == 0
    assert row == {**expected, "bits_per_weight": 8 * size / 960}


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("MatMul", "ONNX model without quantized weights, 1 nodes and 1 constants"),
        ("MatMulInteger", "ONNX model without MatMulNBits, quantized by MatMulInteger, which is not read here"),
    ],
)
def test_inspect_says_what_an_onnx_model_without_matmulnbits_is(run, tmp_path, operator, kind):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [helper.make_tensor("w", 1, [1, 1], [2])]
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "m.onnx"))
    code, out, _ = run("inspect", tmp_path / "m.onnx")
    assert code == 0
    assert kind in out
    assert "0 weights" not in out
    assert "No quantized weight in it" in out
    found = json.loads(run("inspect", tmp_path / "m.onnx", "--json")[1])
    assert (found["kind"], found["weights"]) == (kind, [])


@pytest.mark.parametrize(
    ("arguments", "content", "words"),
    [
        (["inspect", "missing.safetensors"], None, "missing.safetensors"),
        (["inspect", "damaged.safetensors"], b"\x05garbage that is no header", "damaged.safetensors"),
        (["inspect", "damaged.onnx"], b"garbage that is no protocol buffer", "damaged.onnx"),
        (["inspect", "empty.safetensors"], b"", "empty.safetensors"),
        (["inspect", "folder.onnx"], "folder", "the folder folder.onnx has no safetensors"),
        (["inspect"], None, "Missing argument 'file'. Try `stepwell inspect --help`."),
        (["formats", "--nonsense"], None, "No such option: --nonsense. Try `stepwell formats --help`."),
        (["nonsense"], None, "No such command 'nonsense'. Try `stepwell --help`."),
        (["predict", "--bits", "four"], None, "Invalid value for '--bits'"),
        (["demo", "--out", "/dev/null/demo"], None, "`out`: cannot write into the folder /dev/null/demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_and_leaves_with_two(run, tmp_path, monkeypatch, arguments, content, words):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path(arguments[-1]).mkdir()
    elif content is not None:
        Path(arguments[-1]).write_bytes(content)
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert words in error
    assert error.startswith("stepwell: ")
    assert error.count("\n") == 1


def test_no_arguments_print_the_help(run):
    code, out, error = run()
    assert (code, error) == (2, "")
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_leaves_without_a_traceback(run, monkeypatch, stop):
    def interrupted():
        raise stop

    monkeypatch.setattr("stepwell.formats.formats", interrupted)
    assert run("formats") == (130, "", "")


def test_missing_extra_is_a_failure_that_names_it(run, tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)  # makes `import onnx` fail as if it were not installed
    code, out, error = run("inspect", tmp_path / "m.onnx")
    assert (code, out) == (1, "")
    assert "stepwell[onnx]" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(TypeError("`bits` must be an int: got 4.0"), 2), (TypeError("f() missing 1 argument"), None)])
def test_wrong_type_is_bad_input_but_a_bug_shows_whole(monkeypatch, error, code):
    def broken():
        raise error

    monkeypatch.setattr("stepwell.formats.formats", broken)
    monkeypatch.setattr(sys, "argv", ["stepwell", "formats"])
    with pytest.raises(SystemExit if code else TypeError) as left:
        cli.main()
    assert getattr(left.value, "code", None) == code


def test_installed_script_runs():
    script = Path(sys.executable).with_name("stepwell")
    done = subprocess.run([script, "inspect", "no-such-file"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no-such-file" in done.stderr
