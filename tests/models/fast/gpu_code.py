"""Compiles the Triton kernels to a GPU's machine code, which needs no GPU, and prints what each takes, as JSON.

    python -m tests.models.fast.gpu_code sm_90 --all

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

from models.fast import strip_triton

COUNTS = {"lines", "patches", "dim"}


def compile_kernel(kernel, constants: dict, target: GPUTarget, halves: set[str], options: dict | None = None):
    """The kernel for bfloat16 tensors of the names in ``halves`` and float32 others, their memory aligned."""
    types = {}
    for name in kernel.arg_names:
        types[name] = ("constexpr" if name in constants else "i32" if name in COUNTS else
                       "*bf16" if name in halves else "*fp32")
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
            constants = {"ACROSS": length, "LENGTH": length, "WIDTH": 3, "STEP_ACROSS": steps[0],
                         "STEP_ALONG": steps[1], "BLOCK_L": max(16, triton.next_power_of_2(length))}
            for name, own, halves in (
                ("_mix_kernel", {"HAS_BIAS": True}, {"x", "weight", "y"}),
                ("_weight_grad_kernel", {"PART_LINES": 1792}, {"x", "dy"}),
            ):
                for config in blocks[name] if has_all else blocks[name][:1]:
                    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                    compiled = compile_kernel(getattr(strip_triton, name), constants | own | config.kwargs, target,
                                              halves, options)
                    yield report(f"{name} {axis} {length} {config}", compiled) | {
                        "axis": axis, "loads": load_layouts(compiled), "is_smallest": config is blocks[name][0],
                        "is_square": config.kwargs["BLOCK_M"] == constants["BLOCK_L"]}


def longest_strips(target: GPUTarget):
    """The smallest blocks of both kernels for the longest strips, of 128 tokens in bfloat16 and of 64 in TF32."""
    for length, halves in ((128, {"x", "weight", "y", "dy"}), (64, set())):
        constants = {"ACROSS": length, "LENGTH": length, "WIDTH": 3, "STEP_ACROSS": 1, "STEP_ALONG": length,
                     "BLOCK_L": length}
        for kernel, own, config in (
            (strip_triton._mix_kernel, {"HAS_BIAS": True}, strip_triton.MIX_BLOCKS[0]),
            (strip_triton._weight_grad_kernel, {"PART_LINES": 1792}, strip_triton.WEIGHT_GRAD_BLOCKS[0]),
        ):
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            compiled = compile_kernel(kernel, constants | own | config.kwargs, target, halves, options)
            yield report(f"{kernel.__name__}, {length} tokens", compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90, gfx942, ...")
    parser.add_argument("--all", action="store_true", help="all lengths, axes, layouts and blocks, not one of each")
    args = parser.parse_args()
    is_nvidia = args.target.startswith("sm_")
    target = GPUTarget("cuda", int(args.target[3:]), 32) if is_nvidia else GPUTarget("hip", args.target, 64)
    print(json.dumps({
        "strip": list(strip_kernels(target, args.all)),
        "longest": list(longest_strips(target)) if is_nvidia and args.all else [],
    }))


if __name__ == "__main__":
    main()
