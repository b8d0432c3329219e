"""Compile the kernels for GPUs that are not here, and say what they need.

``python -m tests.ops.aot sm_80 gfx942 ...`` prints a line for every kernel and GPU; ``--few`` only those that need
most. In a process of its own without TRITON_INTERPRET, which would replace the compiler.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from .launches import (
    DECODING,
    SEGMENTED,
    SINGLE,
    Launch,
    kernel,
    record,
    record_add_heads,
    record_decode,
    record_derived,
    record_local_states,
    record_loss,
    record_merge,
    record_paged,
    record_pointwise,
    record_rotary,
    record_swiglu,
)

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_LONG = 8192

CONFIGS = [
    dict(dtype=dtype, K=K, V=V, T=T, documents=documents)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for K, V in ((64, 64), (128, 128), (96, 192), (256, 256))
    for T, documents in ((_LONG, 0), (_LONG, 4), (1, 0))
]
# For each GPU, kernels that need most of its shared memory; for one of them also one of each kind, and decoding.
_FP16_128 = (dict(dtype=torch.float16, K=128, V=128, T=_LONG), ("gradients",))
_FP16_256 = (dict(dtype=torch.float16, K=256, V=256, T=_LONG, documents=4), ("o",))
_BF16_128 = (dict(dtype=torch.bfloat16, K=128, V=128, T=_LONG, states=False), ("state", "o", "gradients"))
_BF16_256 = (dict(dtype=torch.bfloat16, K=256, V=256, T=_LONG, documents=4), ("o",))
FEW = {
    "sm_80": [_FP16_128, _BF16_256],
    "sm_86": [_BF16_128, _BF16_256],
    "sm_89": [_FP16_128],
    "sm_90": [
        _FP16_256,
        (dict(dtype=torch.bfloat16, K=128, V=128, T=_LONG), SEGMENTED),
        (dict(dtype=torch.bfloat16, K=128, V=128, T=_LONG, documents=4, by_row=True), ("o", "gradients")),
        (dict(dtype=torch.bfloat16, K=128, V=128, T=1), DECODING),
        (dict(dtype=torch.bfloat16, K=128, V=128, T=_LONG, overlapped=True), SINGLE),
        (dict(dtype=torch.bfloat16, K=64, V=256, T=_LONG, overlapped=True), SINGLE),
        (dict(dtype=torch.bfloat16, K=128, V=128, T=_LONG, documents=4, states=False, overlapped=True), SINGLE),
        (dict(dtype=torch.bfloat16, K=128, V=128, T=_LONG, documents=4, by_row=True, overlapped=True), SINGLE),
    ],
    "sm_100": [_BF16_128, _FP16_128],
    "gfx942": [_BF16_128, _FP16_128],
}
# Around the operator: typical layers, and the widest norm.
AROUND = [
    dict(dtype=torch.bfloat16, s=_LONG, K=128, V=128, width=128),
    dict(dtype=torch.bfloat16, s=_LONG, H=64, K=128, V=128, width=8192),
]
# Decoding: a head in one tile and in several, columns over programs, several tokens.
DECODE = [
    dict(dtype=torch.bfloat16, R=64, K=128, V=128, fused=True),
    dict(dtype=torch.bfloat16, R=64, K=128, V=128, fused=True, normed=False),
    dict(dtype=torch.bfloat16, R=64, K=256, V=256, fused=True),
    dict(dtype=torch.bfloat16, R=64, K=128, V=128, fused=False),
    dict(dtype=torch.bfloat16, R=64, K=128, V=128, fused=False, S=4),
    dict(dtype=torch.float32, R=64, K=256, V=256, fused=False, S=4),
]


# KiB of shared memory of a program: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and
# AMD Instinct MI300 ISA guide, "Local data share"
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
# Decoding with softmax attention: grouped heads, the widest ones, and latents of 64 and of 16 heads (DeepSeek-V3).
PAGED = [
    dict(dtype=torch.bfloat16, H=32, Hkv=4, K=128, V=128),
    dict(dtype=torch.bfloat16, H=128, Hkv=2, K=256, V=256),
    dict(dtype=torch.float32, H=64, Hkv=8, K=128, V=128),
    dict(dtype=torch.bfloat16, H=64, Hkv=1, K=576, V=512, prefix=True),
    dict(dtype=torch.bfloat16, H=16, Hkv=1, K=576, V=512, prefix=True),
    dict(dtype=torch.float32, H=64, Hkv=1, K=576, V=512, prefix=True),
]


class Needs(NamedTuple):
    """Of one kernel: bytes of shared memory per program; registers, and stack in bytes (AMD: registers) per thread; and
    instructions that touch the stack in loops of products by warpgroups."""

    shared: int
    registers: int
    stack: int
    spills: int = 0


def compile_launch(launch: Launch, gpu: str) -> triton.compiler.CompiledKernel:
    """Compile for a GPU as Triton's launcher would, which makes constants of None, of 1 and of ``tl.constexpr``."""
    function = kernel(launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        divisible = isinstance(value, torch.Tensor)  # addresses are multiples of 16
        if parameter.is_constexpr or value is None or special and type(value) is int and value == 1:
            constants[parameter.name], kind = value, "constexpr"
        elif isinstance(value, torch.Tensor):
            kind = _TYPES[value.dtype]
        elif isinstance(value, int):
            kind, divisible = "i32" if value < 2**31 else "i64", special and value % 16 == 0
        else:
            kind = "fp32"
        signature[parameter.name] = kind
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if function.is_gluon() else ASTSource
    source = language(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("hip", gpu, 64) if gpu.startswith("gfx") else GPUTarget("cuda", int(gpu.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=launch.options)


def needs(compiled: triton.compiler.CompiledKernel) -> Needs:
    """What the compiled kernel needs, from its metadata and Triton's own cuobjdump, or AMD's assembly."""
    if "amdgcn" in compiled.asm:
        registers, spilled = (
            re.search(rf"\.vgpr_{what}: +(\d+)", compiled.asm["amdgcn"]) for what in ("count", "spill_count")
        )
        return Needs(compiled.metadata.shared, int(registers[1]), int(spilled[1]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump speaks otherwise now: {text}"
    return Needs(compiled.metadata.shared, int(found[1]), int(found[2]), spills_in_loops(text))


def spills_in_loops(sass: str) -> int:
    """In the innermost loops that have wgmma. What else jumps back, as to a loop from code behind the kernel's end that
    waits for it, encloses or overlaps them."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)]
    jumps = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"BRA.* 0x([0-9a-f]+)", text))]
    inner: list[range] = []
    for loop in sorted((range(to, at + 1) for to, at in jumps if to < at), key=len):
        found = any("HGMMA" in text for at, text in lines if at in loop)
        if found and not any(x.start < loop.stop and loop.start < x.stop for x in inner):
            inner.append(loop)
    return sum(bool(re.search(r"\b(LDL|STL)\b", text)) for at, text in lines if any(at in x for x in inner))


Part = Iterator[tuple[torch.dtype, str, Launch]]
"""Dtype, what distinguishes it in the line that is printed, launch."""


def parts(gpu: str, few: bool) -> list[Callable[[], Part]]:
    """All kernels, in parts; with ``few`` one for each row of FEW, then two of kernels that need little."""
    walks = FEW[gpu] if few else [(config, SEGMENTED + DECODING) for config in CONFIGS]
    return [
        *(functools.partial(_walks, gpu, *row) for row in walks),
        functools.partial(_paged, gpu, PAGED[1:4:2] if few else PAGED),
        functools.partial(_around, gpu),
    ]


def _walks(gpu: str, config: dict, wanted: tuple[str, ...]) -> Part:
    packed = "packed" if config.get("documents") else "plain"
    packed += " overlapped" * config.get("overlapped", False)
    for launch in record(**config, descriptors=gpu in ("sm_90", "sm_100")):
        if launch.what in wanted:
            yield config["dtype"], f"{config['K']}x{config['V']} T={config['T']} {packed}", launch


def _paged(gpu: str, configs: list[dict]) -> Part:
    for config in configs:
        for launch in record_paged(**config, shared=SHARED.get(gpu, 227)):
            yield config["dtype"], f"paged {config['H']}/{config['Hkv']} {config['K']}x{config['V']}", launch


def _around(gpu: str) -> Part:
    for config in AROUND:
        for launch in record_pointwise(**config):
            yield config["dtype"], f"{config['K']}x{config['V']} norm={config['width']}", launch
    for columns in (2816, 5504):
        for launch in record_swiglu(dtype=torch.bfloat16, rows=_LONG, columns=columns):
            yield torch.bfloat16, f"{columns=}", launch
    for D, pairs in ((128, 64), (128, 32), (96, 48)):
        for launch in record_rotary(dtype=torch.bfloat16, s=_LONG, b=1, heads=16, D=D, pairs=pairs):
            yield torch.bfloat16, f"{pairs=} of {D}", launch
    for group, K, V in ((4, 128, 128), (3, 96, 256)):
        for launch in record_add_heads(dtype=torch.bfloat16, T=_LONG, heads=8, group=group, K=K, V=V):
            yield torch.bfloat16, f"{group=} {K}x{V}", launch
    for D in (64, 96, 128):
        for launch in record_merge(dtype=torch.bfloat16, queries=_LONG, heads=8, D=D):
            yield torch.bfloat16, f"merge of {D=}", launch
    for config in DECODE:
        for launch in record_decode(**config):
            yield config["dtype"], f"{config['K']}x{config['V']} S={config.get('S', 1)}", launch
    for documents in (0, 4):
        for launch in record_local_states(dtype=torch.bfloat16, T=_LONG, K=128, V=128, documents=documents):
            direct = ("send", "receive_kernel") if gpu.startswith("sm_") else ()  # with NVIDIA's clock
            if launch.what in ("local state", "combine_kernel", *direct):
                yield torch.bfloat16, f"128x128 T={_LONG} {'packed' if documents else 'plain'}", launch
    for launch in record_derived(T=_LONG, documents=4):
        yield torch.int32, f"T={_LONG}", launch
    for launch in record_loss(dtype=torch.bfloat16, rows=_LONG, columns=32000):
        yield torch.bfloat16, "columns=32000", launch


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="*", default=["sm_90"], metavar="GPU", help="as sm_80 or gfx942")
    parser.add_argument("--few", action="store_true", help="only those that need most")
    parser.add_argument("--part", type=int, metavar="N", help="only so manyth of its parts, from 0")
    options = parser.parse_args(argv)
    for gpu in options.gpus:
        every = parts(gpu, options.few)
        for part in every if options.part is None else [every[options.part]]:
            for dtype, details, launch in part():
                report(gpu, dtype, details, launch)


def report(gpu: str, dtype: torch.dtype, details: str, launch: Launch) -> None:
    numbers = needs(compile_launch(launch, gpu))
    print(
        f"{gpu} {str(dtype).removeprefix('torch.')} {details} {launch.what}",
        *(f"{key}={value}" for key, value in numbers._asdict().items()),
        flush=True,
    )


if __name__ == "__main__":
    main()
