"""Kernels that cannot run where they are asked for: the message says what to set, and when."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from triton_analog import launch
from triton_analog.launch import backends
from triton_analog.ops.absmax import absmax_kernel

COMPILED = SimpleNamespace()
INTERPRETED = object.__new__(InterpretedFunction)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")

WRONG = {
    "a kernel for the CPU": (
        "import torch; from triton_analog import launch, ops",
        "kernel = launch.backend('kernel'); kernel.__enter__()",
        r'launch\.backend\("kernel"\)\), but the tensors are on the CPU.*set TRITON_INTERPRET=1 in the shell.* before',
    ),
    "the interpreter after the import": (
        "import torch; from triton_analog import ops",
        "import os; os.environ['TRITON_INTERPRET'] = '1'",
        "set after triton_analog was imported, which is too late: set TRITON_INTERPRET=1 in the shell",
    ),
    "the interpreter after triton's import": (
        "import os, torch, triton.language; os.environ['TRITON_INTERPRET'] = '1'",
        "from triton_analog import ops",
        "set after triton was imported, which is too late: set TRITON_INTERPRET=1 in the shell",
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's kernels are asked for on a machine without a GPU")
def test_what_is_set_wrongly_or_too_late_is_said():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    call = "ops.absmax(torch.randn(4, 8), 2)"
    running = {
        what: subprocess.Popen(
            [sys.executable, "-c", "\n".join((first, then, call))], env=environment, stderr=subprocess.PIPE, text=True
        )
        for what, (first, then, _) in WRONG.items()
    }
    for what, process in running.items():
        error = process.communicate()[1].splitlines()[-1]
        assert error.startswith("RuntimeError: "), what
        with pytest.raises(RuntimeError, match=WRONG[what][2]):
            raise RuntimeError(error)


def test_what_failed_for_another_reason_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(backends, "_triton_runs_on_cpu", lambda: True)
    assert backends.why_not_started(COMPILED, CPU) is None
    monkeypatch.setattr(backends, "_has_driver", lambda: True)
    assert backends.why_not_started(COMPILED, GPU) is None


def test_a_device_without_a_driver_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_has_driver", lambda: False)
    why = backends.why_not_started(COMPILED, torch.device("mps", 0))
    assert "no driver for tensors on mps:0" in why
    assert 'launch.backend("reference")' in why


@pytest.mark.parametrize(
    ("kernel", "interpret", "said"),
    [
        (INTERPRETED, "1", "run in Triton's interpreter, on the CPU, very slowly"),
        (INTERPRETED, "0", "run in Triton's interpreter, on the CPU, very slowly"),
        (COMPILED, "1", "was set after triton_analog was imported and does nothing"),
    ],
)
def test_an_interpreter_that_does_not_fit_the_gpus_tensors_warns_once(kernel, interpret, said, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=said):
        backends.check_start(kernel, GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.check_start(kernel, GPU)  # it was said
        backends.check_start(kernel, CPU)


def test_tensors_of_a_gpu_are_not_given_to_kernels_for_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_triton_runs_on_cpu", lambda: True)
    with pytest.raises(RuntimeError, match=r"tensors are on cuda:0, but .* unset TRITON_CPU_BACKEND"):
        backends.check_start(COMPILED, GPU)


def test_an_error_of_a_kernel_itself_is_not_hidden():
    with launch.backend("kernel"), pytest.raises(Exception, match=r"nonsense|missing"):
        launch.launch(absmax_kernel, (1,), torch.device("cuda" if torch.cuda.is_available() else "cpu"), nonsense=1)
