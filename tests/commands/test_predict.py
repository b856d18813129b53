"""`stepwell predict`: what it prints is what the theory says; bad input is one line and exit code 2; torch stays away."""

import json
import subprocess
import sys
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.theory.rows import ROWS

from stepwell import cli
from stepwell.theory import closure, exact

P1 = ["--bits", "2", "--range", "2", "--input-bits", "2", "--input-range", "2", "--lr", "0.2", "--noise", "0"]


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "COMMANDS", ("predict", "formats"))
    monkeypatch.chdir(tmp_path)
    return partial(run, "predict")


def test_json_is_the_theory(run):
    code, out, _ = run(*P1, "--time", 40, "--json")
    told = json.loads(out)
    assert code == 0
    np.testing.assert_allclose(told["error"], exact(ROWS["P1"].problem, told["t"]).error, rtol=1e-12)
    assert told["end"]["error"] == pytest.approx(0.20432, abs=1e-4)
    assert told["plateau"]["l10"] == pytest.approx(0.284, rel=0.02)
    assert told["estimate"]["mechanism"] == "none"
    assert told["stability"]["linear_threshold"] == pytest.approx(2 / 1.093058, abs=1e-5)
    # unquantized: v = eta s_e^2 / (2 - eta rho), eps = (R (1 - a^2 / rho) + rho v) / 2; rounded: tau = .887 ends near the level .667
    assert told["unquantized_end"]["error_latent"] == pytest.approx(0.07885, abs=1e-4)
    assert told["status"] == "ok"


def test_the_table_names_everything_that_was_promised(run):
    code, out, _ = run(*P1)
    assert code == 0
    for words in ("plateau length", "mechanism", "sharpness", "end of training", "unquantized", "PTQ", "linear threshold", "0.20432"):
        assert words in out


def test_the_figure_is_a_drawing_with_axes_and_its_sentence(run, tmp_path):
    _, out, _ = run(*P1, "--figure", tmp_path / "deep" / "p.svg")
    text = " ".join(
        "".join(node.itertext())
        for node in ElementTree.parse(tmp_path / "deep" / "p.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    )
    assert "t = steps / dimension" in text
    assert "generalization error" in text
    assert "The error falls from the start" in text
    assert "The error falls from the start" in out


def test_check_adds_a_simulation_that_agrees(run):
    pytest.importorskip("numba")
    _, out, _ = run(*P1, "--time", 20, "--check", "--dim", 400, "--seeds", 4, "--json")
    told = json.loads(out)
    simulated = told["simulation"]
    assert len(simulated["stderr"]) == len(simulated["error"])
    predicted = np.interp(simulated["t"], told["t"], told["error"])
    assert np.max(np.abs(simulated["error"] - predicted)) < 4 / np.sqrt(400)


def test_closure_on_demand(run):
    _, out, _ = run(*P1, "--theory", "closure", "--json")
    told = json.loads(out)
    np.testing.assert_allclose(told["error"], closure(ROWS["P1"].problem, told["t"]).error, rtol=1e-9)
    assert told["end"]["error"] == pytest.approx(0.20415, abs=1e-4)


def test_a_sweep_finds_ranges_and_draws_them(run, tmp_path):
    code, out, _ = run("--lr", 0.2, "--noise", 0.3, "--sweep", "bits=2:3", "range=0.8:2:5", "--time", 20, "--json", "--figure", "phase.svg")
    told = json.loads(out)
    assert code == 0
    assert (tmp_path / "phase.svg").stat().st_size > 5000
    assert [row["bits"] for row in told["rows"]] == [2, 3]
    assert told["ranges"] == pytest.approx([0.8, 1.1, 1.4, 1.7, 2.0])
    for row, errors in zip(told["rows"], told["error"], strict=True):
        assert row["error_there"] == min(errors)
    assert told["theory"] == "closure"


def test_a_runaway_is_said(run):
    _, out, _ = run("--range", 0.25, "--input-bits", 2, "--time", 400)
    assert "runaway" in out
    assert "saturation" in out


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--bits", 20], "from 1 to 16: got 20"),
        (["--lr", -1], "`lr` must be finite, from 1e-06 to 1000"),
        (["--input-bits", 2, "--input-range", 1e-300], "`range` must be a finite number from 1e-06 to 1e+06: got 1e-300"),
        (["--range", 1e-300], "`range` must be a finite number from 1e-06"),
        (["--range", 1e300], "`range` must be a finite number from 1e-06"),
        (["--noise", 1e200], "from 0 to 1e+06: got 1e+200"),
        (["--variance", 1e200], "from 0 to 1e+12: got 1e+200"),
        (["--noise", "nan"], "`noise` must be finite, from 0 to 1e+06: got nan"),
        (["--overlap", 1e9], "`overlap` must be"),
        (["--check", "--sweep", "bits=2:3", "range=1:2:3"], "`check` must not be given with `sweep`"),
        (["--dim", 100], "`check` must be given with `dim` or `seeds`"),
        (["--seeds", 2], "`check` must be given with `dim` or `seeds`"),
        (["--variance", -1], "`variance` must be"),
        (["--range", 0], "`range` must be"),
        (["--time", -3], "`time` must be"),
        (["--kind", "tread", "--bits", 1], "at least 2"),
        (["--input-range", 2], "`input-bits`"),
        (["--method", "lotion", "--theory", "closure"], "Use `exact`"),
        (["--sweep", "bits=2", "range=1:2"], "must look like bits=2:8 range=0.5:4:64"),
        (["--sweep", "bits=0:4", "range=1:2:3"], "bits 1..16"),
        (["--sweep", "bits=2:4", "range=2:1:3"], "bits 1..16"),
        (["--figure", "p.xyz"], "must end in one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, shown):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert shown in err


def test_an_in_cell_plateau_is_the_flat_window_not_the_first_drop(run):
    arguments = ["--bits", 2, "--range", 1.2, "--variance", 0.01, "--time", 60]
    told = json.loads(run(*arguments, "--json")[1])
    low, high = told["plateau"]["flat"]
    assert low >= told["plateau"]["l10"]
    assert f"plateau from t = {low:.3g} to {high:.3g} (in-cell)" in told["meaning"]


def test_a_second_figure_says_that_it_replaced_the_first(run):
    first, second = (run("--theory", "closure", "--time", 5)[1] for _ in range(2))
    assert "(replaced)" not in first
    assert "(replaced)" in " ".join(second.split())


def test_a_figure_below_a_file_is_one_line_and_exit_code_2(run, tmp_path):
    (tmp_path / "f").write_text("a file")
    code, _, err = run("--theory", "closure", "--figure", "f/x.svg")
    assert (code, err.count("\n")) == (2, 1)
    assert "`figure` must lie in a folder: got 'f/x.svg', but 'f' is a file" in err


def test_it_starts_without_torch(tmp_path):
    code = (
        "import sys; from stepwell import cli; cli.COMMANDS = ('predict', 'formats'); sys.argv = ['stepwell', 'predict', '--json']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.strip().endswith("False")
