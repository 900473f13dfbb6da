"""Compiles the Triton kernels to a GPU's machine code, which needs no GPU, and prints what each takes, as JSON.

    python -m tests.models.gpu_code sm_90 --all

In a process of its own, since in the tests' Triton is an interpreter and compiles nothing.
"""

import argparse
import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models import branch_triton, map_triton, strip_triton

MAPS = {"a", "b", "x", "y", "dy", "da", "db", "dx", "first_token"}  # in bfloat16, as what strip kernels multiply
NUMBERS = {"eps": "fp32", "momentum": "fp32", "batches": "*i64"}
COUNTS = {"lines", "patches", "dim", "channels", "tokens", "parts", "count"}
FLAGS = {"_gelu_kernel": ["HAS_SCALE", "HAS_GAIN", "STORES", "ADDS"], "_gelu_dots_kernel": ["IS_NORM"],
         "_gelu_grad_kernel": ["HAS_GAIN"]}


def compile_kernel(kernel, constants: dict, target: GPUTarget, halves: set[str], options: dict | None = None):
    """The kernel for bfloat16 tensors of the names in ``halves`` and float32 others, their memory aligned."""
    types = {}
    for name in kernel.arg_names:
        is_number = name in COUNTS or name.endswith(("_step", "_n", "_c", "_t"))
        types[name] = ("constexpr" if name in constants else "i32" if is_number else
                       NUMBERS.get(name) or ("*bf16" if name in halves else "*fp32"))
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name][0] == "*"}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options or {})


def report(name: str, compiled) -> dict:
    """What a kernel takes: bytes that spill out of registers, bytes of shared memory; whether tensor cores multiply."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        spilled = int(re.search(r"\.private_segment_fixed_size: *(\d+)", code)[1])
        multiplies = "mfma" in code
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True,
                                   capture_output=True, text=True).stdout
        spilled = sum(int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL"))
        multiplies = any(word in compiled.asm["ptx"] for word in ("wgmma", "mma.sync", "tcgen05.mma"))
    return {"kernel": name, "spilled": spilled, "shared": compiled.metadata.shared, "has_tensor_cores": multiplies}


def load_layouts(compiled) -> list[str]:
    """How many numbers each thread loads and how the threads of a warp lie, for the loads of two dimensions."""
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\d*) = #ttg\.blocked<\{(.*)\}>", code))
    return sorted({re.search(r".*threadsPerWarp = \[[\d, ]+\]", layouts[name])[0]
                   for name in re.findall(r"tt\.load .*x!tt\.ptr<bf16>, (#blocked\d*)>", code)})


def strip_kernels(target: GPUTarget, has_all: bool):
    """The strip operator's kernels along rows and columns of 224-pixel images' maps, in all blocks: reports.

    Unless ``has_all``, along the columns of the first stage alone, in the smallest blocks.
    """
    blocks = {"_mix_kernel": strip_triton.MIX_BLOCKS, "_weight_grad_kernel": strip_triton.WEIGHT_GRAD_BLOCKS}
    for length in (56, 28, 14, 7) if has_all else (56,):
        for axis, steps in (("column", (1, length)), ("row", (length, 1)))[:1 + has_all]:
            constants = {"ACROSS": length, "LENGTH": length, "WIDTH": 3, "PRECISION": "ieee", "STEP_ACROSS": steps[0],
                         "STEP_ALONG": steps[1], "BLOCK_L": max(16, triton.next_power_of_2(length)),
                         "HAS_POSITION": True}
            for name, own, halves in (
                ("_mix_kernel", {"HAS_BIAS": True}, {"x", "position", "weight", "y"}),
                ("_weight_grad_kernel", {"PART_LINES": 1792}, {"x", "position", "dy"}),
            ):
                for config in blocks[name] if has_all else blocks[name][:1]:
                    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                    compiled = compile_kernel(getattr(strip_triton, name), constants | own | config.kwargs, target,
                                              halves, options)
                    yield report(f"{name} {axis} {length} {config}", compiled) | {
                        "axis": axis, "loads": load_layouts(compiled), "is_smallest": config is blocks[name][0],
                        "is_square": config.kwargs["BLOCK_M"] == constants["BLOCK_L"]}


def map_kernels(target: GPUTarget, has_all: bool):
    """The kernels that join passes over maps, channels last and, with ``has_all``, in plain order: reports."""
    for module in (map_triton, branch_triton):
        for name, kernel in vars(module).items():
            if not name.endswith("_kernel"):
                continue
            if name == "_statistics_kernel":
                constants = {"ROWS": 896, "HAS_GIVEN": True, "BLOCK_R": 64, "BLOCK_C": 16}
                yield report(name, compile_kernel(kernel, constants, target, MAPS))
                continue
            for step, blocks in (("_c", (64, 32)), ("_t", (256, 8)))[:1 + has_all]:
                constants = {"PART": 512, "BLOCK_T": blocks[0], "BLOCK_C": blocks[1]}
                constants |= dict.fromkeys(FLAGS.get(name, ()), True)
                constants |= {argument: 1 for argument in kernel.arg_names
                              if argument.endswith(step) and argument[:-2] + "_n" in kernel.arg_names}
                yield report(f"{name} {step}", compile_kernel(kernel, constants, target, MAPS))


def longest_strips(target: GPUTarget):
    """The smallest blocks of the weight's gradient for strips of 128 tokens, in TF32: a report."""
    config = strip_triton.WEIGHT_GRAD_BLOCKS[0]
    constants = {"ACROSS": 128, "LENGTH": 128, "WIDTH": 3, "PRECISION": "tf32", "STEP_ACROSS": 1, "STEP_ALONG": 128,
                 "BLOCK_L": 128, "HAS_POSITION": True, "PART_LINES": 1792}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    yield report("longest strips", compile_kernel(strip_triton._weight_grad_kernel, constants | config.kwargs, target,
                                                  set(), options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90, gfx942, ...")
    parser.add_argument("--all", action="store_true", help="all lengths, axes, layouts and blocks, not one of each")
    args = parser.parse_args()
    is_nvidia = args.target.startswith("sm_")
    target = GPUTarget("cuda", int(args.target[3:]), 32) if is_nvidia else GPUTarget("hip", args.target, 64)
    print(json.dumps({
        "strip": list(strip_kernels(target, args.all)),
        "maps": list(map_kernels(target, args.all)),
        "longest": list(longest_strips(target)) if is_nvidia and args.all else [],
    }))


if __name__ == "__main__":
    main()
