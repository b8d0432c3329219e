"""Compile the kernels ahead of time for GPUs that are not here: ``python -m tests.ops.aot sm_90 ...`` prints one line each.

Run in a process of its own without TRITON_INTERPRET, which would replace the compiler.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_megatron.ops import kernels

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def compile_walk(arch: int, dtype: torch.dtype, K: int, V: int, **flags: bool) -> triton.compiler.CompiledKernel:
    """``_walk`` for one GPU as ``kernels._run_walk`` would launch it on a long sequence."""
    options = {"REVERSE": False, "STATE_ONLY": False, "HAS_IN": True, "HAS_OUT": False} | flags
    options |= {name: flags.get(name, False) for name in ("VARLEN", "EDGE_IN", "EDGE_OUT")}
    config = kernels._config(dtype, K, V, T=8192)
    launch = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = dict(K=K, V=V, PRECISION="ieee" if dtype == torch.float32 else "tf32")
    constants |= dict(WIDE_STATE=dtype == torch.float16) | config | options
    fp32 = {"log_decay", "s_in", "s_out", "edge_in", "edge_out"}
    signature, attrs = {}, {}
    for index, name in enumerate(kernels._walk.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q", "k", "v", "o"):
            signature[name] = _TYPES[dtype]
        elif name in fp32 or name in ("doc", "cu_seqlens"):
            signature[name] = "*fp32" if name in fp32 else "*i32"
        elif name.endswith("_scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in ("in_sv", "out_sv", "ein_sv", "eout_sv"):
                constants[name], signature[name] = 1, "constexpr"
        if signature[name].startswith("*") or "_s" in name and signature[name] == "i32":
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernels._walk, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)


def spills(kernel: triton.compiler.CompiledKernel) -> int:
    """Bytes of local memory a thread uses, from the ELF's own section sizes via cuobjdump; -1 where that is missing."""
    import re
    import subprocess
    import tempfile

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (-1, -1) if match is None else (int(match[1]), int(match[2]))


if __name__ == "__main__":
    for arch in sys.argv[1:] or ["90"]:
        for dtype in _TYPES:
            for K, V in ((64, 64), (128, 128), (256, 256), (96, 192)):
                for flags in ({}, {"REVERSE": True}, {"STATE_ONLY": True, "HAS_IN": False, "HAS_OUT": True},
                              {"VARLEN": True, "EDGE_IN": True, "EDGE_OUT": True}):  # fmt: skip
                    kernel = compile_walk(int(arch), dtype, K, V, **flags)
                    regs, stack = spills(kernel)
                    print(arch, dtype, K, V, flags, "shared", kernel.metadata.shared, "regs", regs, "stack", stack, flush=True)
