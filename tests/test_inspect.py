"""The inspector: what it reads from machine code, what it hands to the compiler, and what it says when that fails."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from helpers import in_a_compilers_process
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_analog.launch.occupancy import occupancy
from triton_analog.tuning import command
from triton_analog.tuning import inspect as inspector
from triton_analog.tuning.disassembly import (
    Instruction,
    parse_amdgcn,
    parse_amdgcn_metadata,
    parse_resource_usage,
    parse_sass,
)
from triton_analog.tuning.inspect import TARGETS, Failure, Launch, Report, Work

# ---- Instructions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", True),
        ("IMMA.16832.S8.S8.SAT", True),
        ("QMMA.16832.F32.E4M3.E4M3", True),
        ("HGMMA.64", True),
        ("IGMMA.64", True),
        ("QGMMA.64", True),
        ("UTCHMMA", True),
        ("UTCIMMA", True),
        ("UTCQMMA", True),
        ("v_mfma_f32_32x32x8_bf16", True),
        ("v_mfma_i32_32x32x16_i8", True),
        ("HFMA2.MMA", False),
        ("IMAD.MOV.U32", False),
        ("UTCBAR", False),
        ("UTCATOMSWS.FIND_AND_SET.ALIGN", False),
        ("UTMALDG.2D", False),
        ("v_fma_f32", False),
    ],
)
def test_tensor_core_instructions_are_known_by_their_names(opcode, expected):
    assert Instruction(opcode).on_tensor_cores is expected


HOPPER = """
mm:
.text.mm:
        /*0920*/                   ULDC.64 UR24, c[0x0][0x208] ;
        /*0930*/                   @UP6 UTMALDG.2D [UR28], [UR32] ;
        /*0940*/              @!P0 BRA `(.L_x_0) ;
        /*0950*/                   VIADD R2, R2, 0xffffff80 ;
.L_x_2:
        /*0be0*/                   VIADD R4, R4, 0x40 ;
        /*0c70*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR14+0x12000], R3 ;
        /*0ca0*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*0cb0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0dc0*/                   WARPGROUP.ARRIVE ;
        /*0df0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24 ;
        /*1050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*10a0*/               @P2 SYNCS.ARRIVE.TRANS64 RZ, [UR10+0x12000], R3 ;
        /*10d0*/                   @UP0 UTMALDG.2D [UR16], [UR14] ;
        /*1100*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*1110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1ad0*/                   EXIT ;
.L_x_1:
        /*1ae0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR14+0x12000], R3 ;
        /*1af0*/              @!P0 BRA `(.L_x_1) ;
        /*1b00*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*1b10*/                   BRA `(.L_x_4);
        /*1b20*/                   NOP;
        /*1b30*/                   NOP;
.L_x_5:
"""
"""A loop over tensor-memory loads; its wait for a barrier is behind the end of the kernel. From nvdisasm, shortened."""


def test_a_waits_way_back_into_its_loop_is_part_of_the_loop():
    listing = parse_sass(HOPPER)
    assert len(listing.instructions) == 20  # without padding
    assert listing.tensor_core_instructions == 2
    assert listing.hottest_loop == 10 + 3


def test_jumps_of_sass():
    listing = parse_sass(
        """
        /*0000*/               @P2 BRA `(.L_x_0) ;
        /*0010*/                   BRA.U UP0, `(.L_x_0) ;
        /*0020*/               @P4 CALL.REL.NOINC `(.L_x_0) ;
        /*0030*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath) ;
        /*0040*/              @!P0 EXIT ;
        /*0050*/                   BRA `(.L_x_0) ;
.L_x_0:
        /*0060*/                   RET.REL.NODEC R2 `(mm) ;
        """
    )
    assert listing.labels == {".L_x_0": 6}
    assert [(i.target, i.falls_through) for i in listing.instructions] == [
        (".L_x_0", True),
        (".L_x_0", True),
        (".L_x_0", True),
        (None, True),
        (None, True),
        (".L_x_0", False),
        (None, False),
    ]


def sass(*lines):
    """A listing of labels, opcodes and branches without their addresses; a number stands for that many additions."""
    text = []
    for line in lines:
        if isinstance(line, int):
            text += ["/*0000*/ FADD R0, R0, R1 ;"] * line
        else:
            text.append(line if line.endswith(":") else f"/*0000*/ {line} ;")
    return parse_sass("\n".join(text))


def test_the_hottest_loop_is_an_inner_one_even_if_its_surroundings_multiply_more():
    """Software pipelining peels multiplications off the inner loop."""
    listing = sass(
        ".L_out:", 10, ".L_in:", 20, "HMMA.16816 R0", "@P0 BRA `(.L_in)", *["HMMA.16816 R0"] * 3, "@P1 BRA `(.L_out)", "EXIT"
    )  # fmt: skip
    assert listing.hottest_loop == 22


def test_the_hottest_loop_has_most_tensor_core_instructions_not_most_instructions():
    listing = sass(
        ".L_a:", 50, "HMMA.16816 R0", "@P0 BRA `(.L_a)", ".L_b:", 9, *["HMMA.16816 R0"] * 2, "@P0 BRA `(.L_b)",
        ".L_c:", 99, "@P0 BRA `(.L_c)", "EXIT",
    )  # fmt: skip
    assert listing.hottest_loop == 12


def test_without_tensor_cores_it_is_the_largest_innermost_loop():
    listing = sass(
        ".L_out:", 100, ".L_a:", 10, "@P0 BRA `(.L_a)", ".L_b:", 20, "@P0 BRA `(.L_b)", "@P1 BRA `(.L_out)", "EXIT"
    )
    assert listing.hottest_loop == 21


def test_loops_that_wait_and_code_that_nothing_reaches_do_not_count():
    waits = sass(20, ".L_a:", "NANOSLEEP 0x64", "@P0 BRA `(.L_a)", "EXIT", ".L_b:", 20, "BRA `(.L_b)")
    assert waits.hottest_loop == 0


def test_a_loop_may_start_at_the_first_instruction():
    assert sass(".L_a:", 20, "@P0 BRA `(.L_a)", "EXIT").hottest_loop == 21


def test_an_empty_listing_has_no_loop():
    assert parse_sass("").hottest_loop == 0


AMDGCN = """
	.text
mm:                                     ; @mm
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_4
	s_branch .LBB0_3
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=1
	s_or_b64 exec, exec, s[8:9]
	v_mfma_f32_32x32x8_bf16 v[18:33], v[104:105], v[34:35], v[18:33]
	v_mfma_f32_32x32x8_bf16 v[2:17], v[104:105], v[36:37], v[2:17]
	s_cbranch_scc0 .LBB0_4
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
	ds_read_b64 v[34:35], v1
	buffer_load_dwordx4 v[4:7], v0, s[0:3], 0 offen
	global_load_dwordx4 v[8:11], v0, s[0:1]
	v_cmp_gt_i32_e32 vcc, s4, v0
	s_and_saveexec_b64 s[8:9], vcc
	s_cbranch_execz .LBB0_2
	ds_write_b64 v1, v[8:9]
	s_branch .LBB0_2
.LBB0_4:
	s_endpgm
.Lfunc_end0:
	.set .Lmm.num_vgpr, 129
amdhsa.kernels:
  - .agpr_count:     0
    .name:           mm
    .private_segment_fixed_size: 24
    .vgpr_count:     129
    .vgpr_spill_count: 5
"""
"""A loop whose first block is in the middle. From Triton's AMD compiler, shortened."""


def test_amd_assembly():
    listing = parse_amdgcn(AMDGCN)
    assert len(listing.instructions) == 16
    assert listing.tensor_core_instructions == 2
    assert listing.hottest_loop == 12
    assert parse_amdgcn_metadata(AMDGCN) == (129, 24)


def test_spills_are_what_the_stack_holds():
    usage = """
Resource usage:
 Common:
  GLOBAL:0
 Function mm:
  REG:255 STACK:640 SHARED:0 LOCAL:0 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert parse_resource_usage(usage) == (255, 640)


# ---- Occupancy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "resources", "expected", "limit"),
    [
        ("sm_90", {"registers": 255, "shared_bytes": 0, "warps": 8}, 1, "registers"),
        ("sm_90", {"registers": 128, "shared_bytes": 0, "warps": 4}, 4, "registers"),
        ("sm_90", {"registers": 129, "shared_bytes": 0, "warps": 4}, 3, "registers, in steps of 8"),
        ("sm_90", {"registers": 40, "shared_bytes": 73728, "warps": 4}, 3, "shared memory"),
        ("sm_90", {"registers": 40, "shared_bytes": 76800, "warps": 4}, 3, "shared memory with the driver's share"),
        ("sm_90", {"registers": 40, "shared_bytes": 76801, "warps": 4}, 2, "shared memory with the driver's share"),
        ("sm_90", {"registers": 16, "shared_bytes": 0, "warps": 4}, 16, "2048 threads"),
        ("sm_86", {"registers": 16, "shared_bytes": 0, "warps": 4}, 12, "1536 threads"),
        ("sm_86", {"registers": 16, "shared_bytes": 0, "warps": 1}, 16, "programs"),
        ("sm_86", {"registers": 16, "shared_bytes": 99 * 1024, "warps": 4}, 1, "shared memory"),
        ("sm_86", {"registers": 16, "shared_bytes": 99 * 1024 + 1, "warps": 4}, 0, "shared memory"),
        ("sm_80", {"registers": 16, "shared_bytes": 163 * 1024, "warps": 4}, 1, "shared memory"),
        ("sm_100", {"registers": 64, "shared_bytes": 0, "warps": 4, "tensor_columns": 256}, 2, "tensor memory"),
        ("gfx942", {"registers": 129, "shared_bytes": 0, "warps": 4}, 3, "registers"),
        ("gfx942", {"registers": 32, "shared_bytes": 0, "warps": 4}, 8, "warps"),
        ("gfx942", {"registers": 32, "shared_bytes": 64 * 1024, "warps": 4}, 1, "shared memory"),
        ("gfx942", {"registers": 32, "shared_bytes": 64 * 1024 + 1, "warps": 4}, 0, "shared memory"),
    ],
)
def test_occupancy(target, resources, expected, limit):
    assert occupancy(target, **resources) == expected, limit


# ---- What is compiled ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def descriptor_matmul_kernel(
    a, b, out, M, K, scale_and_bias, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    acc = acc * scale_and_bias[0] + tl.load(scale_and_bias[1])
    out.store([m, n], acc.to(out.dtype))


def descriptor(rows, columns, *block):
    tensor = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
    return TensorDescriptor.from_tensor(tensor, list(block))


def descriptor_matmul():
    descriptors = descriptor(4096, 2048, 64, 64), descriptor(2048, 2048, 128, 64), descriptor(4096, 2048, 64, 128)
    args = (*descriptors, 4096, 2048, (2.0, torch.empty(1, device="meta")))
    options = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return Launch(descriptor_matmul_kernel, args, options)


def compile_descriptor_matmul(target):
    compiled = inspector.compile_launch(descriptor_matmul(), target)
    assembly = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    return dict(compiled.src.signature), "cp.async.bulk.tensor" in assembly, inspector.measure(compiled, target)


def test_descriptors_and_tuples_compile_as_triton_would_launch_them():
    targets = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
    for target, (signature, tensor_memory_loads, numbers) in zip(
        targets, in_a_compilers_process(compile_descriptor_matmul, *targets), strict=True
    ):
        assert [signature[name] for name in ("a", "b", "out", "M", "scale_and_bias")] == [
            "tensordesc<bf16[64, 64]>",
            "tensordesc<bf16[128, 64]>",
            "tensordesc<bf16[64, 128]>",
            "i32",
            ("fp32", "*fp32"),
        ]
        assert tensor_memory_loads is (target in ("sm_90", "sm_100", "sm_120")), target
        assert numbers["tensor_core_instructions"] > 0, target
        assert 0 < numbers["hottest_loop"] < numbers["instructions"], target


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op: got 'conv'; allowed are absmax, "):
        inspector.inspect(ops=["conv"])
    with pytest.raises(ValueError, match="target: got 'sm_1'; allowed are sm_80, "):
        inspector.inspect(targets=["sm_1"])
    with pytest.raises(ValueError, match="dtype: got 'fp64'; allowed are bf16, fp16, fp32"):
        inspector.inspect(dtypes=["fp64"])


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set: the interpreter compiles nothing; unset it"):
        inspector.inspect(ops=["noise"])


def test_at_least_one_process_is_needed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="jobs: got 0; allowed is a number of processes >= 1"):
        inspector.inspect(ops=["noise"], jobs=0)


# ---- Failures -----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "registers": 40,
    "spilled_bytes": 0,
    "shared_bytes": 4096,
    "tensor_core_instructions": 0,
    "instructions": 868,
    "hottest_loop": 0,
    "occupancy": 12,
}
REPORT = Report("noise", "plain", "noise_kernel", "sm_90", "bf16", {"BLOCK_M": 32}, **NUMBERS)
FAILURE = Failure("std", "plain", "moments_kernel", "sm_90", "bf16", "RuntimeError: out of registers")


def test_a_kernel_that_does_not_compile_leaves_the_others(monkeypatch):
    def compile_launch(launched, target):
        if launched.kernel.__name__ == "moments_kernel":
            raise RuntimeError("out of registers")

    monkeypatch.setattr(inspector, "compile_launch", compile_launch)
    monkeypatch.setattr(inspector, "measure", lambda compiled, target: NUMBERS)
    failure, report = inspector.inspect_variant(Work("std", 0, "sm_90", "bf16"))
    assert failure == FAILURE
    assert (report.kernel, report.instructions) == ("merge_moments_kernel", 868)


def triple(number):
    if number == 2:
        os.abort()
    if number == 3:
        raise KeyError(number)
    return 3 * number


def test_a_process_that_dies_takes_only_its_own_item_along():
    first, died, raised, last = inspector.run_in_processes(triple, [1, 2, 3, 4], jobs=2)
    assert (first, last) == (3, 12)
    assert isinstance(died, Exception)
    assert repr(raised) == "KeyError(3)"


def test_what_a_process_raises_is_a_failure_of_its_variant(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(inspector, "run_in_processes", lambda function, work, jobs: [MemoryError("full")])
    assert inspector.inspect(ops=["noise"], targets=["sm_90"]) == (
        [],
        [Failure("noise", "plain", None, "sm_90", "bf16", "MemoryError: full")],
    )


# ---- The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inspected(monkeypatch):
    """The command without a compiler; what it asked for."""
    asked = SimpleNamespace(failures=[])

    def inspect(ops, targets, dtypes, jobs):
        asked.ops, asked.targets, asked.dtypes, asked.jobs = ops, targets, dtypes, jobs
        return [REPORT], asked.failures

    monkeypatch.setattr(command, "inspect", inspect)
    return asked


def test_the_table_has_a_line_per_kernel(inspected, capsys):
    assert command.main(["inspect", "--target", "sm_90"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.index("kernel") == line.index("noise_kernel")
    assert heading.index("instructions") + len("instructions") == line.index("868") + 3
    assert (inspected.targets, inspected.dtypes, inspected.jobs) == (["sm_90"], ["bf16"], None)


def test_json_holds_every_field(inspected, capsys):
    arguments = "inspect --json --target all --op noise --op std --dtype fp16 --dtype fp32 --jobs 3"
    assert command.main(arguments.split()) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report == REPORT.__dict__
    assert inspected.targets == list(TARGETS)
    assert (inspected.ops, inspected.dtypes, inspected.jobs) == (["noise", "std"], ["fp16", "fp32"], 3)


def test_failures_are_named_and_change_the_exit_status(inspected, capsys):
    inspected.failures = [FAILURE, Failure("dac", "static", None, "sm_90", "bf16", "MemoryError: full")]
    assert command.main(["inspect", "--target", "sm_90", "--json"]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 1
    assert err.splitlines() == [
        "error: std (plain), moments_kernel, sm_90, bf16: RuntimeError: out of registers",
        "error: dac (static), before any kernel, sm_90, bf16: MemoryError: full",
    ]


def test_the_command_names_what_is_allowed(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["inspect", "--target", "sm_1"])
    assert stopped.value.code == 2
    assert "sm_90" in capsys.readouterr().err
