"""The example for models that no single device holds, on two processes: a resumed training is an uninterrupted one."""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from triton_analog.restore import restore_analog

EXAMPLE = Path(__file__).parents[1] / "examples" / "large_model" / "train.py"
RANKS = 2
SPLIT = ("--tp", "2")
RUNS: dict[str, tuple[str, ...]] = {"whole": (), "resumed": (), "split whole": SPLIT, "split resumed": SPLIT}


def train(out: Path, steps: int, *others: str) -> None:
    options = (
        f"--steps {steps} --save-every 1 --start-up 1 --length 16 --out {shlex.quote(str(out))} {' '.join(others)}"
    )
    sys.argv = [str(EXAMPLE), *shlex.split(options)]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def one_rank(rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    for (name, others), port in zip(RUNS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if name.endswith("resumed") and rank == 0:
            shutil.copytree(folder / name.replace("resumed", "whole") / "1", folder / name / "1")
        train(folder / name, 2, *others)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is an optional peer: make test-peers installs it")
    folder = tmp_path_factory.mktemp("large_model")
    mp.spawn(one_rank, (free_ports(len(RUNS)), folder), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("kind", ["", "split "], ids=["sharded", "split"])
def test_a_resumed_training_is_an_uninterrupted_one(folder: Path, kind: str) -> None:
    whole, resumed = (
        torch.load(folder / (kind + name) / "model.pt", weights_only=True) for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("kind", ["", "split "], ids=["sharded", "split"])
def test_what_was_trained_is_restored_on_one_device(folder: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    state = torch.load(folder / (kind + "whole") / "model.pt", weights_only=True)
    digital: nn.Module = AutoModelForCausalLM.from_config(runpy.run_path(str(EXAMPLE))["SMALL"])
    model = restore_analog(digital, state).eval()
    for layer in model.analog_layers():
        assert layer.input_range_update_idx.unique().tolist() == [1]
        assert layer.rpu_config.clip.sigma == 2.5
    assert model(torch.arange(8)[None]).logits.isfinite().all()
