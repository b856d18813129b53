"""The Triton kernel, interpreted on the CPU: triton decides between that and compiling when it is imported, so in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed, as with every CPU build of torch")
def test_triton_kernel_in_the_interpreter():
    checks = Path(__file__).with_name("triton_checks.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    done = subprocess.run(command, cwd=checks.parents[2], env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed, as with every CPU build of torch")
def test_triton_kernel_compiles_for_a_gpu_that_is_not_there():
    """The interpreter takes what the compiler refuses: a name of this module in an annotation, for one."""
    script = Path(__file__).with_name("triton_compiled.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "compiled 48"
