"""Start kernels where their tensors are: compiled on a GPU, in Triton's interpreter on a CPU.

Covers: the choice, and the options on which exactness depends.
Does not cover: the kernels (`kvstore.codecs.triton_kernels`).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

EXACT = {"enable_fp_fusion": False}
"""Options of every compilation: a fused multiply-add rounds once where the CPU's decoder rounds twice."""


def launch(
    kernel: Callable[..., None], grid: tuple[int, ...], *args: torch.Tensor | int, num_warps: int, **constants: int
) -> None:
    """Run a kernel on the device of its first argument, behind what was launched there before.

    On a CPU it has run when this returns.
    """
    first = args[0]
    assert isinstance(first, torch.Tensor)
    if first.device.type == "cpu":
        # Damaged symbols may overflow to infinity, as they do elsewhere without a word.
        with np.errstate(all="ignore"):
            _interpreted(kernel)[grid](*args, **constants)
        return
    with torch.cuda.device(first.device):
        compiled(kernel)[grid](*args, num_warps=num_warps, **EXACT, **constants)


@cache
def compiled(kernel: Callable[..., None]) -> Any:
    """The kernel for GPUs; machine code is made at the first launch, and kept on disk by Triton."""
    return JITFunction(kernel)


@cache
def _interpreted(kernel: Callable[..., None]) -> Any:
    return InterpretedFunction(kernel)
