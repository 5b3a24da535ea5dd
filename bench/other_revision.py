"""Another revision of this library as a contender: a process of its own that takes its turns in the same rounds.

The process runs this revision's benches on the other revision's ``triton_analog``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, git


class OtherRevision:
    """A context in which ``revision`` can be raced; without a revision it has no name and does nothing.

    Raises:
        ValueError: git knows no such revision.
    """

    def __init__(self, revision: str | None, device: torch.device, quick: bool) -> None:
        self.revision, self.device, self.quick = revision, device, quick
        self.name = None if revision is None else f"triton_analog at {revision}"
        if revision is not None and not git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"):
            raise ValueError(f"--base: git knows no revision {revision!r}; give a commit, tag or branch")

    def __enter__(self) -> OtherRevision:
        if self.revision is None:
            return self
        self.folder = tempfile.TemporaryDirectory(prefix="triton_analog_base_")
        place = Path(self.folder.name)
        self.tree = place / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", str(self.tree), self.revision], cwd=ROOT, check=True
        )
        link(self.tree / "triton_analog" / "reference", self.tree / "reference")
        link(place / "path" / "triton_analog", self.tree / "triton_analog")
        link(place / "path" / "bench", ROOT / "bench")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.other_revision", str(self.device), str(int(self.quick))],
            cwd=place / "path", env=os.environ | {"PYTHONPATH": str(place / "path")},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.ask({"threads": torch.get_num_threads()})
        return self

    def __exit__(self, *_: object) -> None:
        if self.revision is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        subprocess.run(["git", "worktree", "remove", "--force", str(self.tree)], cwd=ROOT, check=True)
        self.folder.cleanup()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.name} ended; its messages are above")
        return json.loads(answer)

    def prepare(self, what: dict[str, Any]) -> dict[str, Any]:
        """What it counted, or the error that keeps it from being timed."""
        return self.ask(what)

    def turn(self) -> float:
        return self.ask({"turn": True})["seconds"]


def link(name: Path, target: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    if not name.exists():
        name.symlink_to(target)


def serve(device: torch.device, quick: bool) -> None:
    """Answer one request a line; whatever else is printed goes to the other stream."""
    from bench.operations import operations
    from bench.peers.ours import Ours
    from bench.race import event_turn, host_turn, kernel_turn
    from bench.training import prepare, truth_of
    from bench.workloads import workloads

    answers, sys.stdout = sys.stdout, sys.stderr
    on_gpu = device.type == "cuda"
    turn = None

    def entered(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal turn
        if "operation" in request:
            operation = operations()[request["operation"]].set_up(request["size"], device)
            operation.check()
            turn = (kernel_turn if on_gpu else host_turn)(operation.functions["op"])
            return {"saved_bytes": None, "peak_bytes": None, "launches": None, "defects": [], "dtype": ""}
        workload = next(w for w in workloads(device, quick) if w.name == request["workload"])
        ready = prepare(workload, Ours(), truth_of(workload, device), device)
        turn = (event_turn if on_gpu else host_turn)(ready.step)
        return ready.counts() | {"defects": ready.defects, "dtype": str(ready.dtype).removeprefix("torch.")}

    for text in sys.stdin:
        request = json.loads(text)
        try:
            if "threads" in request:
                torch.set_num_threads(request["threads"])
                answer: dict[str, Any] = {}
            elif "turn" in request:
                assert turn is not None
                answer = {"seconds": turn()}
            else:
                answer = entered(request)
        except Exception as error:  # whatever the other revision cannot do
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(torch.device(sys.argv[1]), sys.argv[2] == "1")
