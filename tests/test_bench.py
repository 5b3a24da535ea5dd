"""The benchmarks: what they let into a race, how they take turns, count, predict and report."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import inf, nan
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from bench import command, host, host_model, memory, report
from bench.count import saved_bytes
from bench.machine import ROOT
from bench.models import Transformer
from bench.operations import operations
from bench.other_revision import OtherRevision
from bench.peers import PEERS
from bench.peers.base import Peer, UnsupportedError
from bench.peers.compiled import Compiled, PlainAnalogLinear
from bench.peers.digital import Digital
from bench.peers.lightning import Lightning
from bench.peers.lightning_triton import LightningTriton, WithoutBlocks, names_blocks
from bench.peers.ours import Ours
from bench.race import Gate, WrongResultError, disagreements, distance, ratios, spread, take_turns
from bench.recipes import EVERYTHING, FLAGSHIP, LIGHTNING, Recipe
from bench.results import Result
from bench.run import Plan, race_workload
from bench.training import digital, input_of, output_of, prepare, truth_of
from bench.workloads import Workload, cpu_workloads, gpu_workloads, linear, model

CPU = torch.device("cpu")
PLAN = Plan(CPU, ("layers",), seconds=0.0)
TINY: Recipe = {**EVERYTHING, "mapping.max_input_size": 32}


def tiny(recipe: Recipe = TINY, rows: int = 16, inputs: int = 64, outputs: int = 48) -> Workload:
    return linear("group", "tiny", rows, inputs, outputs, recipe, torch.float32)


def race(*peers: Peer, workload: Workload | None = None) -> dict[str, Any]:
    with OtherRevision(None, CPU, quick=False) as base:
        return {r.contender: r for r in race_workload(workload or tiny(), peers, PLAN, base)}


# ---- The gate --------------------------------------------------------------------------------------------------------


class Wrong(Ours):
    """This library with one thing spoilt."""

    name = "wrong"

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        model = super().convert(digital, recipe)
        self.spoil(model)
        return model


def noiseless(model: nn.Module) -> None:
    model.eval()  # which switches noise off


def drifting(model: nn.Module) -> None:
    def drift(module: nn.Module, *_: object) -> None:
        module.weight.data[0, 0] += 1e-6

    model.register_forward_hook(drift)


SPOILT = {
    "output": lambda model: model.register_forward_hook(lambda module, given, y: 1.05 * y),
    "input": lambda model: model.register_full_backward_hook(lambda module, dx, dy: (1.05 * dx[0],)),
    "weight": lambda model: model.weight.register_hook(lambda grad: 1.05 * grad),
    "input_range": lambda model: model.input_range.register_hook(lambda grad: grad.sum().expand_as(grad)),
    "noise": noiseless,
    "weights": drifting,
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_wrong_result_fails_and_is_not_timed(what):
    found = race(Wrong(SPOILT[what]), Digital())
    wrong = found["wrong"]
    assert wrong.status == "FAILED"
    assert what.removesuffix("s") in wrong.detail
    assert wrong.seconds == []
    assert wrong.saved_bytes is None
    assert found["torch.nn"].status == "ok"
    assert found["torch.nn"].ratios == {}


@pytest.mark.parametrize("recipe", [TINY, LIGHTNING, FLAGSHIP], ids=["everything", "Lightning", "flagship"])
def test_right_results_are_timed(recipe):
    for result in race(Ours(), Digital(), workload=tiny(recipe)).values():
        assert (result.status, result.defects) == ("ok", []), result.detail
        assert result.rounds >= 5
        first, middle, third = result.seconds
        assert 0 < first <= middle <= third


def test_a_known_defect_is_named_beside_the_time():
    wrong = Wrong(SPOILT["input_range"])
    wrong.known_defects = frozenset({"input_range"})
    result = race(wrong)["wrong"]
    assert result.status == "ok"
    assert len(result.defects) == 1
    assert "input_range" in result.defects[0]


def test_whatever_a_contender_raises_is_a_result():
    def fail(model: nn.Module) -> None:
        raise RuntimeError("no such kernel")

    def refuse(model: nn.Module) -> None:
        raise UnsupportedError("linear layers only")

    failed, refused = race(Wrong(fail))["wrong"], race(Wrong(refuse))["wrong"]
    assert (failed.status, failed.detail) == ("FAILED", "RuntimeError: no such kernel")
    assert (refused.status, refused.detail) == ("unsupported", "linear layers only")


def test_an_absent_peer_is_reported_with_the_reason():
    class Missing(Ours):
        name, package = "missing", "no_such_package"

    result = race(Missing())["missing"]
    assert (result.status, result.detail) == ("absent", "the package no_such_package is not installed")


def test_distance_is_relative_and_infinite_where_it_is_not_defined():
    truth = torch.tensor([3.0, 4.0])
    assert distance(truth * 1.5, truth) == pytest.approx(0.5)
    assert distance(torch.ones(3), truth) == inf
    assert distance(torch.tensor([3.0, nan]), truth) == inf


def test_gradients_that_are_zero_in_theory_are_not_compared():
    truth = {"weight": torch.ones(4), "key.bias": torch.full((4,), 1e-17)}
    given = {"weight": torch.ones(4), "key.bias": torch.full((4,), 1e-8)}
    assert disagreements(given, truth, 1e-2) == {}
    assert list(disagreements({"weight": torch.zeros(4)}, truth, 1e-2)) == ["weight"]


def test_the_gate_knows_a_defect_by_the_last_part_of_its_name():
    gate = Gate(frozenset({"input_range"}))
    gate.refuse({"blocks.0.query.input_range": "off"})
    assert gate.defects == ["off"]
    with pytest.raises(WrongResultError, match="off"):
        gate.refuse({"blocks.0.query.weight": "off"})


# ---- The race --------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    order: list[str] = []

    def turn(name: str):
        return lambda: order.append(name) or float(len(order))

    times = take_turns({"A": turn("A"), "B": turn("B")}, seconds=0.0, least=3)
    assert order == ["A", "B"] * 4
    assert times == {"A": [3.0, 5.0, 7.0], "B": [4.0, 6.0, 8.0]}


def test_rounds_fill_the_time_up_to_the_most():
    assert len(take_turns({"A": lambda: 1.0}, seconds=1e9, least=2, most=7)["A"]) == 7


def test_ratios_compare_turns_of_the_same_round():
    """A machine that slows down in one round slows both of its turns."""
    times = {"A": [1.0, 10.0, 2.0], "B": [2.0, 20.0, 4.0]}
    assert ratios(times, "A") == {"B": [0.5, 0.5, 0.5]}
    assert ratios(times, "B") == {"A": [2.0, 2.0, 2.0]}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("name", sorted(operations()))
def test_every_operation_agrees_with_its_reference_and_has_a_plain_contender(name):
    operation = operations()[name].set_up(128, CPU)
    operation.check()
    operation.functions["torch"]()
    if name not in ("noise", "lookup", "input_range_learn_after_the_start_up"):
        assert operation.least_bytes() >= 128 * 128 * 4


def test_an_operation_that_disagrees_is_refused():
    operation = operations()["dac"].set_up(64, CPU)
    right = operation.functions["op"]
    operation.functions = {**operation.functions, "op": lambda: 1.1 * right()}
    with pytest.raises(WrongResultError, match="off by 10"):
        operation.check()


@pytest.mark.parametrize(
    "found", [cpu_workloads(False), gpu_workloads(False), gpu_workloads(True)], ids=["cpu", "gpu", "quick"]
)
def test_names_of_workloads_are_unique(found):
    assert len({workload.name for workload in found}) == len(found)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_each_storage_is_counted_once_and_not_what_is_there_anyway():
    x, w = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)

    def forward():
        y = (x * w).exp()  # keeps x and w, and its result
        return y[:4] * y[4:]  # keeps two views of one storage

    assert saved_bytes(forward, [x, w]) == 8 * 4
    assert saved_bytes(forward, [x]) == 2 * 8 * 4


def counted(peer: Peer, workload: Workload) -> int:
    model = peer.convert(digital(workload, workload.dtype, CPU), workload.recipe)
    x = input_of(workload, workload.dtype, CPU)
    return saved_bytes(lambda: output_of(model, x), [x, *model.parameters(), *model.buffers()])


@pytest.mark.parametrize("inputs", [64, 70], ids=["equal slices", "unequal slices"])
@pytest.mark.parametrize(
    "recipe",
    [TINY, {**TINY, "forward.save_input": "INT8"}, LIGHTNING, {**LIGHTNING, "mapping.max_input_size": 32}, FLAGSHIP],
    ids=["everything", "int8", "Lightning", "Lightning, sliced", "flagship"],
)
@pytest.mark.parametrize("peer", [Ours(), Digital(), Lightning(), LightningTriton()], ids=lambda peer: peer.name)
def test_the_formulas_predict_what_is_counted(peer, recipe, inputs):
    if peer.absent(CPU):
        pytest.skip(peer.absent(CPU))
    if peer.name != "triton_analog":
        recipe = {path: value for path, value in recipe.items() if path != "forward.save_input"}
    workload = tiny(recipe, rows=40, inputs=inputs, outputs=150)
    predicted = memory.FORMULAS[peer.name](40, inputs, 150, recipe, 4)
    assert predicted.saved == counted(peer, workload)


def test_this_library_keeps_a_tenth_of_its_predecessors_bytes_at_most():
    recipe = {**EVERYTHING, "mapping.max_input_size": 512}
    kept = {name: formula(512, 2048, 2048, recipe, 4).saved for name, formula in memory.FORMULAS.items()}
    assert kept["triton_analog"] <= 0.1 * kept["aihwkit-lightning"]


def test_the_memory_command_lists_every_layer_and_contender(capsys):
    assert command.main(["memory", "--model", "llama-8b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| all 32 blocks | triton_analog |") for line in lines) == 1
    assert sum(line.startswith("| down: 14336 to 4096") for line in lines) == len(memory.FORMULAS)


# ---- Reports ---------------------------------------------------------------------------------------------------------


def record(**changes: Any) -> dict[str, Any]:
    """Two contenders on one workload, one that failed, and one that was not there."""
    common = {
        "suite": "layers", "group": "group", "workload": "tiny", "size": 64, "status": "ok", "detail": "", "dtype": "float32",
        "defects": [], "seconds": [1.0, 2.0, 3.0], "rounds": 5, "gflop_s": 10.0, "gb_s": 1.0, "intensity": 10.0,
        "saved_bytes": 2**20, "peak_bytes": None, "launches": None,
    }  # fmt: skip
    ours = {
        **common,
        "contender": "triton_analog",
        "ratios": {"torch.nn": [1.5, 2.0, 2.5], "aihwkit-lightning": [0.4, 0.5, 0.6]},
    }
    ideal = {**common, "contender": "torch.nn", "ratios": {"triton_analog": [0.4, 0.5, 0.7]}, "saved_bytes": 0}
    theirs = {**common, "contender": "aihwkit-lightning", "ratios": {"torch.nn": [3.0, 4.0, 5.0]}, "saved_bytes": 2**24}
    broken = {**common, "contender": "broken", "status": "FAILED", "detail": "output\noff", "seconds": [], "ratios": {},
              "saved_bytes": None}  # fmt: skip
    environment = {
        "device": "cpu",
        "threads": 2,
        "cores": 2,
        "load": 0.1,
        "torch": "2",
        "triton": "3",
        "revision": "abc",
        "date": "2026-01-02T03",
    }
    return {
        "environment": {**environment, **changes},
        "ceilings": {"copy_gb_s": 10.0, "matmul_gflop_s": 100.0},
        "base": None,
        "absent": {"aihwkit": "the package aihwkit is not installed"},
        "results": [ours, ideal, theirs, broken],
    }


def test_the_report_has_ratios_failures_and_absences():
    text = report.markdown(record())
    assert "| group: tiny | 2.00 (1.50 to 2.50) | 4.00 (3.00 to 5.00) | FAILED | 0.50 (0.40 to 0.60) |" in text
    assert "| group: tiny | 1.00 | 0.00 | 16.00 |  |" in text
    assert "- aihwkit did not take part: the package aihwkit is not installed" in text
    assert "- tiny, broken: FAILED: output off" in text
    assert "not slower in 1 of 1 races" in text
    assert "at most 6.2% (tiny)" in text


def test_absolute_figures_are_a_gpus_only():
    assert "TFLOP/s" not in report.markdown(record())
    found = record(device="NVIDIA_H200")
    found["results"][0] |= {"peak_bytes": 3 * 2**20, "predicted_peak_bytes": 2**21, "launches": 8}
    text = report.markdown(found)
    assert "| tiny | triton_analog | 2000.000 | 0.0 | 10% |" in text
    assert "| group: tiny | 3.00 (2.00) |" in text
    assert "| group: tiny | 8 |" in text


def test_the_report_has_what_a_step_costs_the_host():
    def result(group: str, contender: str, **fields: Any) -> dict[str, Any]:
        return asdict(Result("host", group, "a step", 0, contender, seconds=[1e-3, 2e-3, 3e-3], **fields))

    found = record(device="NVIDIA_H200")
    ratios = {"torch.nn": [1.0, 2.0, 3.0]}
    found["results"] += [
        result(host.COUNTED, "triton_analog", ratios=ratios, python_calls=7, c_calls=9, launches=8, allocations=5),
        result(host.TIMED, "triton_analog", ratios=ratios, device_seconds=4e-3, detail="the GPU takes longer"),
        result(host_model.GROUP, "torch.nn, from Python", first_seconds=1.25),
        result(host_model.GROUP, "triton_analog, compiled", ratios={"torch.nn, from Python": [0.5, 0.6, 0.7]}),
        *map(asdict, host.not_run(host.TIMED, "there is no GPU", 0.0)),
    ]
    text = report.markdown(found)
    assert "| a step | triton_analog | 7 + 9 | 8 | 5 | 2 (1 to 3) | 2.00 (1.00 to 3.00) |" in text
    assert "| a step | triton_analog | 2 (1 to 3) † | 2.00 (1.00 to 3.00) |  | 4 |  |" in text
    assert "| a step | torch.nn, from Python | 2 (1 to 3) | 1 | 1 | 1.2 |" in text
    assert "| a step | triton_analog, compiled | 2 (1 to 3) | 0.60 (0.50 to 0.70) |  |  |" in text
    assert "- † a step, triton_analog: the GPU takes longer" in text
    assert "- host, time, all: not run: there is no GPU" in text
    assert "| a step |" not in text.partition("## Rates")[2]


def test_a_model_takes_a_step_whose_loss_is_its_own():
    shape = Transformer("tiny", 32, 64, 1, 2, 1, 50, decoder=True)
    workload = model(shape, 2, 8, torch.float32)
    step, first = host_model.prepare(workload, Ours(), host_model.FROM_PYTHON, CPU)
    assert first > 0
    assert step().item() == pytest.approx(step().item(), rel=host_model.LOSS)


def test_a_step_with_another_loss_is_refused(monkeypatch):
    monkeypatch.setitem(host_model.WAYS, "wrong", lambda net, x, optimizer: lambda: 1.1 * net(x).detach())
    workload = model(Transformer("tiny", 32, 64, 1, 2, 1, 50, decoder=True), 2, 8, torch.float32)
    with pytest.raises(WrongResultError, match="the loss is off by 10%"):
        host_model.prepare(workload, Digital(), "wrong", CPU)


def test_the_readmes_section_lists_gpus_first(tmp_path):
    for device in ("cpu", "NVIDIA_H200"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "results.json").write_text(json.dumps(record(device=device)))
    section = report.readme_section(tmp_path)
    assert 0 <= section.index("### NVIDIA H200") < section.index("### a CPU with 2 threads")


def test_the_readmes_section_is_what_its_results_give():
    text = (ROOT / "README.md").read_text("utf-8")
    assert report.with_section(text, report.readme_section(ROOT / "bench" / "results")) == text, (
        "run python -m bench readme"
    )


def test_a_readme_without_the_marks_is_an_error():
    with pytest.raises(ValueError, match="marks"):
        report.with_section("no marks", "section")


def test_results_that_are_committed_are_small():
    for folder in (ROOT / "bench" / "results").iterdir():
        assert sum(path.stat().st_size for path in folder.glob("*.png")) < 200_000, folder


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert command.main(["plot", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--only", "no such workload"], "no such workload"),
        (["run", "--base", "no-such-revision"], "no-such-revision"),
        (["run", "--out", "{}/results.json/deeper"], "Not a directory"),
        (["plot", "{}"], "not JSON"),
        (["readme", "--results", "{}/missing"], "missing: no */results.json there"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work_and_changes_no_file(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("bench.run.ceilings", mock.Mock(side_effect=AssertionError("the work began")))
    (tmp_path / "results.json").write_text("{damaged")
    readme = (ROOT / "README.md").read_text("utf-8")
    given = [argument.format(tmp_path) for argument in arguments]
    if given[0] == "run" and "--out" not in given:
        given += ["--out", str(tmp_path)]
    assert command.main([*given, *(["--device", "cpu"] if given[0] == "run" else [])]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "{damaged"
    assert (ROOT / "README.md").read_text("utf-8") == readme


def test_pictures_and_report_are_made_from_the_results_alone(tmp_path: Path):
    pytest.importorskip("matplotlib")
    first = record()
    first["results"] += [{**result, "size": 128, "workload": "tiny 2"} for result in first["results"]]
    (tmp_path / "results.json").write_text(json.dumps(first))
    assert command.main(["plot", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "report.md", "time.png", "memory.png", "roofline.png",
    }  # fmt: skip


def test_a_revision_that_git_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="no-such-revision"):
        OtherRevision("no-such-revision", CPU, quick=False)


# ---- Peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [TINY, {**LIGHTNING, "mapping.max_input_size": 32}, FLAGSHIP], ids=["all", "own", "flagship"]
)
@pytest.mark.parametrize(
    "peer", [peer for peer in PEERS if peer.name != "plain torch, compiled"], ids=lambda peer: peer.name
)
def test_every_installed_peer_passes_the_gate(peer, recipe):
    """Without its known defects where it has none; AIHWKIT-Lightning's kernels run in the interpreter here."""
    if peer.absent(CPU):
        pytest.skip(peer.absent(CPU))
    workload = tiny(recipe)
    ready = prepare(workload, peer, truth_of(workload, CPU), CPU)
    assert bool(ready.defects) <= bool(peer.known_defects)


@pytest.mark.parametrize(
    "recipe", [TINY, {**LIGHTNING, "mapping.max_input_size": 32}, FLAGSHIP], ids=["all", "own", "flagship"]
)
def test_the_formulas_that_are_compiled_are_right(recipe):
    class Eager(Compiled):
        def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
            return PlainAnalogLinear(digital, recipe).train()

    workload = tiny(recipe)
    assert prepare(workload, Eager(), truth_of(workload, CPU), CPU).defects == []


def test_lightnings_triton_mode_runs_in_fp16_where_it_has_no_bf16():
    assert LightningTriton().dtype(torch.bfloat16) == torch.float16
    assert LightningTriton().dtype(torch.float32) == torch.float32


def test_an_autotuned_kernel_is_not_handed_the_block_sizes_that_its_autotuner_chooses():
    class Tuned:
        arg_names = ("weights_ptr", "size", "BLOCK_SIZE_OUT", "BLOCK_SIZE_HIDDEN")

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args: (grid, args)

    assert WithoutBlocks(Tuned())["grid"]("weights", 3, 32, 32) == ("grid", ("weights", 3))
    assert names_blocks(Tuned(), "grid")
