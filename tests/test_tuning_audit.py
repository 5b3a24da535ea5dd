"""What ``check`` reports of tuning files: damage, wrong places, what is not used, and what is stale."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_analog.launch import Hardware, store
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.launch.space import Problem, as_values
from triton_analog.launch.store import Entry, Table
from triton_analog.tuning.audit import audit
from triton_analog.tuning.spaces import spaces

H200 = Hardware("NVIDIA H200", "sm_90", 90)
MATMUL = spaces()["matmul"]
REMEDIES = ("sweep again", "delete it", "move it to ")


@pytest.fixture(autouse=True)
def _no_old_warnings(monkeypatch):
    monkeypatch.setattr(store, "_reported", set())


def entry(rows: int = 8192, hardware: Hardware = H200, **changes: Any) -> Entry:
    problem = Problem(hardware, torch.bfloat16, (rows, 4096, 512), (True, True, False))
    fields: dict[str, Any] = {
        "key": MATMUL.key(problem),
        "config": as_values(MATMUL.formula(problem)),
        "origin": "measured",
        "microseconds": 1.0,
        "formula_microseconds": 2.0,
        "spread": 0.0,
        "source": {"code": code_hash(MATMUL), "space": space_hash(MATMUL)},
    }
    return Entry(**fields | changes)


def kept(directory: Path, *entries: Entry, op: str = "matmul", hardware: Hardware = H200) -> Path:
    return store.add(directory, Table(op, hardware.name, hardware.target, entries or (entry(hardware=hardware),)))


def changed(path: Path, **members: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | members))
    return path


def findings(directory: Path) -> list[tuple[Path, str]]:
    """All of them, each of which has to say what to do. Reading a damaged file warns as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", store.TuningWarning)
        found = list(audit(directory))
    for _, text in found:
        assert any(remedy in text for remedy in REMEDIES), text
    return found


def the_finding(directory: Path, path: Path) -> str:
    ((where, text),) = findings(directory)
    assert where == path
    return text


@pytest.mark.parametrize(
    "hardware",
    [H200, Hardware("AMD Instinct MI300X", "gfx942", 0), Hardware("NVIDIA A40/16Q_a", "sm_86", 86), Hardware("cpu", "cpu", 0)],
    ids=lambda hardware: hardware.name,
)  # fmt: skip
def test_nothing_is_found_in_good_files(hardware, tmp_path):
    kept(tmp_path, entry(8192, hardware), entry(16, hardware, origin="model"), hardware=hardware)
    assert findings(tmp_path) == []


@pytest.mark.parametrize("op", spaces())
def test_nothing_is_found_in_a_formulas_entry(op, tmp_path):
    space = spaces()[op]
    for target, capability in (("sm_86", 86), ("sm_90", 90), ("gfx942", 0)):
        hardware = Hardware("a GPU", target, capability)
        problem = Problem(hardware, torch.float16, (8192, 4096, 512)[: len(space.sizes)], (False,) * len(space.flags))
        source: dict[str, str | int] = {"code": code_hash(space), "space": space_hash(space)}
        one = entry(key=space.key(problem), config=as_values(space.formula(problem)), source=source)
        kept(tmp_path / target, one, op=op, hardware=hardware)
        assert findings(tmp_path / target) == []


def test_nothing_is_found_where_nothing_is(tmp_path):
    (tmp_path / "NVIDIA_H200").mkdir()
    (tmp_path / "README.md").write_text("beside the folders")
    (tmp_path / "NVIDIA_H200" / ".matmul.json.lock").write_text("")
    (tmp_path / "NVIDIA_H200" / "matmul.json.damaged").write_text("kept by a sweep")
    assert findings(tmp_path) == []
    assert findings(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (b"", "damaged: not JSON in UTF-8"),
        (b"<<<<<<< HEAD\n{}", "damaged: not JSON in UTF-8"),
        (b'{"format": 0}', "damaged: format: got 0; allowed: 1"),
        (b'{"format": 2}', "damaged: format 2 is newer than this version's 1; upgrade"),
    ],
    ids=["empty", "garbage", "older", "newer"],
)
def test_a_file_that_cannot_be_used_is_damaged(data, finding, tmp_path):
    path = kept(tmp_path)
    path.write_bytes(data)
    assert the_finding(tmp_path, path).startswith(finding)


def test_every_damaged_entry_is_named_and_the_others_are_looked_at(tmp_path):
    path = kept(tmp_path, entry(1), entry(2), entry(4, config={"BLOCK_M": 16}), entry(8))
    entries = json.loads(path.read_text())["entries"]
    entries[0]["origin"], entries[3]["spread"] = "guessed", -1
    changed(path, entries=entries)
    found = findings(tmp_path)
    assert [where for where, _ in found] == [path] * 3
    texts = [text for _, text in found]
    assert texts[0].startswith("damaged: entry 1: origin: got 'guessed'")
    assert texts[1].startswith("damaged: entry 4: spread: got -1")
    assert texts[2].startswith("unknown: Key(")


def test_a_file_of_an_unknown_operation_is_reported(tmp_path):
    path = kept(tmp_path, op="convolution")
    assert "unknown: 'convolution' is not an operation of this version" in the_finding(tmp_path, path)


def test_a_file_in_another_gpus_folder_is_used_and_reported_with_its_place(tmp_path):
    path = kept(tmp_path)
    path.parent.rename(tmp_path / "NVIDIA_H100")
    text = the_finding(tmp_path, tmp_path / "NVIDIA_H100" / "matmul.json")
    assert text.startswith("misplaced: it is used for 'NVIDIA H200'")
    assert text.endswith(f"move it to {path}")


def test_a_misplaced_files_entries_are_looked_at_too(tmp_path):
    path = kept(tmp_path, entry(config={"BLOCK_M": 16}))
    path.parent.rename(tmp_path / "elsewhere")
    assert [text.partition(":")[0] for _, text in findings(tmp_path)] == ["misplaced", "unknown"]


def test_a_file_under_another_operations_name_is_skipped_and_reported_with_its_place(tmp_path):
    path = kept(tmp_path)
    other = path.rename(path.with_name("dac.json"))
    text = the_finding(tmp_path, other)
    assert text.startswith("misplaced: it holds matmul for 'NVIDIA H200'; it is skipped")
    assert text.endswith(f"move it to {path}")


def test_a_gpu_that_no_folder_can_be_named_after_is_reported(tmp_path):
    path = changed(kept(tmp_path), device="..")
    assert the_finding(tmp_path, path).startswith("misplaced: it is used for '..'")


@pytest.mark.parametrize("target", ["sm_90a", "sm_", "sm_²", "cuda"])
def test_an_architecture_that_does_not_exist_is_no_reason_to_fail(target, tmp_path):
    path = changed(kept(tmp_path), target=target)
    assert all(where == path for where, _ in findings(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"num_warps": 3},
        {"PREPARED": 1},
        {"BLOCK_Q": 16},
        {"BLOCK_M": 256, "BLOCK_N": 256},
        {"DESCRIPTORS": False},
    ],
    ids=str,
)
def test_a_configuration_out_of_the_space_is_unknown(config, tmp_path):
    path = kept(tmp_path, entry(config=entry().config | config), entry(16))
    text = the_finding(tmp_path, path)
    assert text.startswith("unknown: Key(dtype='bfloat16', sizes=(('columns', 4096), ('rows', 8192)")
    assert f"is not in the space of {MATMUL.op}" in text


@pytest.mark.parametrize("member", [{"dtype": "float17"}, {"depth": 3}, {"flags": ["wide_loads"]}], ids=str)
def test_a_problem_that_the_operation_does_not_have_is_unknown(member, tmp_path):
    path = kept(tmp_path, entry(), entry(16))
    entries = json.loads(path.read_text())["entries"]
    entries[1]["key"] |= member
    changed(path, entries=entries)
    text = the_finding(tmp_path, path)
    assert text.startswith("unknown: key: got Key(")
    assert "matmul has the sizes rows, columns, width and the flags per_slice, noise, dynamic" in text


@pytest.mark.parametrize("source", [{"code": "0"}, {"space": "0"}], ids=str)
def test_an_entry_for_other_kernels_is_stale_and_still_used(source, tmp_path):
    path = kept(tmp_path, entry(source=entry().source | source), entry(16))
    text = the_finding(tmp_path, path)
    assert text.startswith("stale: Key(dtype='bfloat16', sizes=(('columns', 4096), ('rows', 8192)")
    assert "still used" in text


def test_findings_are_of_all_files_in_the_order_of_their_names(tmp_path):
    stale = entry(source={})
    paths = [
        kept(tmp_path, stale, hardware=Hardware(name, "sm_90", 90)) for name in ("NVIDIA H200", "NVIDIA H100", "A GPU")
    ]
    assert [where for where, _ in findings(tmp_path)] == sorted(paths)
