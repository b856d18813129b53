"""Theory starts without torch, numba and matplotlib."""

import subprocess
import sys


def test_theory_imports_neither_torch_nor_the_compiler():
    code = (
        "import sys; from stepwell import theory as th\n"
        "p = th.Problem(th.Staircase(2, 2.0, temperature=.1), lr=.2); th.closure(p, [0., 1.]); th.stationary(p); th.stability(p)\n"
        "print([name for name in ('torch', 'numba', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_solvers_never_import_torch():
    code = "import sys; from stepwell import theory as th; th.exact(th.Problem(th.Staircase(2, 2.0)), [1.]); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_functions_keep_their_names_after_their_modules_are_loaded():
    code = (
        "import stepwell.theory.plateau, stepwell.theory.closure\n"
        "from stepwell import theory as th\n"
        "print(all(callable(getattr(th, n)) for n in th.__all__))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"
