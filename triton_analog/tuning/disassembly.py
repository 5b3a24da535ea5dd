"""What the machine code of a compiled kernel says: instructions, tensor-core instructions and loops.

NVIDIA's SASS comes from ``nvdisasm -c``, AMD's from the compiler's own assembly. Both become a :class:`Listing`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

# SASS names by operand: H(alf), I(nteger), Q(uarter), O(ctant), B(it), D(ouble); a G for Hopper's warp groups, UTC for
# Blackwell's tensor memory. AMD: matrix fused multiply-add, S for structured sparsity.
_TENSOR_CORE = re.compile(r"(?:[HIQOBD]G?|UTC\w*)MMA|v_s?mfma")

_SASS = re.compile(
    r"^(?P<label>\.L_\w+):"
    r"|/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;\n]*)",
    re.M,
)
_AMDGCN = re.compile(r"^(?P<label>\.LBB\w+):|^\t(?P<opcode>[vsdgb][a-z0-9]*_[a-z0-9_]+)(?P<operands>.*)", re.M)

_LONGEST_WAIT = 8
"""Instructions; a shorter loop polls a barrier or an allocation and is not what a kernel spends its instructions on."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: where it may jump, and whether the one after it may follow."""

    opcode: str
    target: str | None = None
    falls_through: bool = True

    @property
    def on_tensor_cores(self) -> bool:
        return _TENSOR_CORE.match(self.opcode) is not None


@dataclass(frozen=True)
class Listing:
    """Instructions in the order of their addresses, and for every label the index of the instruction that it names."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @property
    def tensor_core_instructions(self) -> int:
        return sum(i.on_tensor_cores for i in self.instructions)

    @property
    def hottest_loop(self) -> int:
        """Instructions in the innermost loop with most tensor-core instructions; without any, in the largest innermost.

        0 if there is no loop. A loop's instructions are those that can run between two of its rounds, wherever the
        compiler put them: it moves waiting for barriers behind the end of the kernel.
        """
        loops = [loop for loop in self._loops() if len(loop) > _LONGEST_WAIT]
        heat = {loop: sum(self.instructions[i].on_tensor_cores for i in loop) for loop in loops}
        # A loop around the hottest one often has more of them: its own and what is peeled off by software pipelining.
        working = [loop for loop in loops if heat[loop]] or loops
        innermost = [loop for loop in working if not any(other < loop for other in working)]
        return len(max(innermost, key=lambda loop: (heat[loop], len(loop)), default=()))

    def _successors(self, index: int) -> list[int]:
        instruction = self.instructions[index]
        following = [index + 1] if instruction.falls_through and index + 1 < len(self.instructions) else []
        return following + ([self.labels[instruction.target]] if instruction.target in self.labels else [])

    def _loops(self) -> list[frozenset[int]]:
        """The natural loops: for every header, what reaches a branch back to it without passing through it."""
        predecessors, back_edges = self._walk()
        bodies: dict[int, set[int]] = defaultdict(set)
        for tail, header in back_edges:
            body, pending = {header}, [tail]
            while pending:
                node = pending.pop()
                if node not in body:
                    body.add(node)
                    pending += predecessors[node]
            if header == 0 or 0 not in body:  # else the header can be passed by, so it is none
                bodies[header] |= body
        return [frozenset(body) for body in bodies.values()]

    def _walk(self) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
        """Depth first from the entry: who comes before whom, and the edges back to what is still being visited."""
        predecessors: dict[int, list[int]] = defaultdict(list)
        back_edges, seen, open_nodes = [], {0}, {0}
        stack = [(0, iter(self._successors(0)))] if self.instructions else []
        while stack:
            node, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                stack.pop()
                open_nodes.remove(node)
                continue
            predecessors[following].append(node)
            if following in open_nodes:
                back_edges.append((node, following))
            elif following not in seen:
                seen.add(following)
                open_nodes.add(following)
                stack.append((following, iter(self._successors(following))))
        return predecessors, back_edges


def parse_sass(text: str) -> Listing:
    """The listing of ``nvdisasm -c``, without its padding."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for match in _SASS.finditer(text):
        label, guard, opcode, operands = match.group("label", "guard", "opcode", "operands")
        if label:
            labels[label] = len(instructions)
        elif opcode != "NOP":
            name = opcode.split(".")[0]
            # A call of a local label is a jump that ptxas encodes as a call; a call of a function comes back.
            target = re.search(r"`\((\.L_\w+)\)", operands) if name in ("BRA", "CALL") else None
            # A branch may also be guarded by an operand: BRA.U UP0, `(.L_x_1).
            always_taken = target is not None and name == "BRA" and operands.strip() == target[0]
            ends = guard is None and (always_taken or name in ("EXIT", "RET"))
            instructions.append(Instruction(opcode, target[1] if target else None, falls_through=not ends))
    return Listing(tuple(instructions), labels)


def parse_amdgcn(text: str) -> Listing:
    """The listing of AMD assembly, without its directives and metadata."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for match in _AMDGCN.finditer(text):
        label, opcode, operands = match.group("label", "opcode", "operands")
        if label:
            labels[label] = len(instructions)
        else:
            target = re.match(r"\s*(\.LBB\w+)", operands) if opcode.startswith(("s_branch", "s_cbranch")) else None
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(Instruction(opcode, target[1] if target else None, falls_through=not ends))
    return Listing(tuple(instructions), labels)


def parse_resource_usage(text: str) -> tuple[int, int]:
    """Registers and bytes of stack per thread, from ``cuobjdump -res-usage``."""
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(registers), int(stack)


def parse_amdgcn_metadata(text: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory per thread, from the metadata of AMD assembly."""
    registers, scratch = (
        int(re.findall(rf"^\s+\.{field}:\s+(\d+)", text, re.M)[-1])
        for field in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch
