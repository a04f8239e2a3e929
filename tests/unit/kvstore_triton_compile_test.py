"""The GPU's decoder compiles, and its machine code rounds as the CPU does. No GPU is needed: only its compiler.

Covers: every kernel with the arguments of a real decode, compiled for NVIDIA's sm_90: no fused multiply-add anywhere,
integer matrix units, no registers spilled to memory.
Does not cover: running it (marker `gpu` in `kvstore_triton_decode_test.py`), other architectures.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from kvstore.codecs import triton_decode, triton_launch
from kvstore.codecs.transform import TransformCodec
from kvstore.codecs.triton_decode import TritonDecoder
from kvstore.testing.profiles import make_profile, make_profile_kv, make_profile_meta

_TOOLS = Path(nvidia.__file__).parent / "bin"


class Driver:
    """Says what the compiler wants to know about a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    # A compiled function remembers for which GPU.
    triton_launch.compiled.cache_clear()


def launches(dtype: str) -> dict[str, tuple[Any, ...]]:
    """Every launch of decoding one chunk with escapes, exact tokens and a refinement, by a name of its own."""
    seen: dict[str, tuple[Any, ...]] = {}

    def record(kernel: Any, grid: Any, *args: Any, num_warps: int, **constants: int) -> None:
        name = kernel.__name__ + (str(constants["IS_BASE"]) if "IS_BASE" in constants else "")
        seen[name] = (kernel, args, {"num_warps": num_warps} | constants)

    profile = make_profile(num_layers=1, num_kv_heads=2, head_dim=128, num_levels=2, with_classes=True)
    meta = make_profile_meta(profile, num_tokens=3, dtype=dtype)
    kv = make_profile_kv(profile, meta) * 60
    codec = TransformCodec(profile)
    out = bytearray(1 << 20)
    payload = memoryview(out)[: codec.encode(kv, out=memoryview(out), meta=meta)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_decode, "launch", record)
        patch.setattr(triton_decode, "_INTERPRETED_SECTIONS", triton_decode._WARP_SECTIONS)
        TritonDecoder(profile, device=torch.device("cpu")).decode(payload, meta=meta)
    return seen


def compile_for_gpu(kernel: Any, args: tuple[Any, ...], options: dict[str, int], exact: dict[str, bool]) -> Any:
    return triton_launch.compiled(kernel).warmup(*args, grid=(1,), **exact, **options)


def machine_code(compiled: Any, folder: Path) -> str:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [str(_TOOLS / "nvdisasm"), "-c", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.usefixtures("no_gpu")
def test_compiled_kernels_round_like_the_cpu(tmp_path: Path) -> None:
    code = {
        name: machine_code(compile_for_gpu(*launch, triton_launch.EXACT), tmp_path)
        for name, launch in launches("bfloat16").items()
    }
    assert set(code) == {"decode_sectionsTrue", "decode_sectionsFalse", "place_escapes", "transform", "place_exact"}
    for name, text in code.items():
        assert not re.search(r"\b[FD]FMA", text), f"{name} fuses"
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
    assert re.search(r"\bI[GM]*MMA", code["transform"]), "no integer matrix unit is used"
    assert "FMUL" in code["transform"]
    assert "FADD" in code["transform"]


@pytest.mark.usefixtures("no_gpu")
def test_without_the_option_it_would_fuse(tmp_path: Path) -> None:
    """So the test above can fail."""
    kernel, args, options = launches("float32")["transform"]
    small = {"TOKENS": 16, "PAIRS": 16, "ROWS": 32}
    text = machine_code(compile_for_gpu(kernel, args, options | small, {}), tmp_path)
    assert "FFMA" in text
