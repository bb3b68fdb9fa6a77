"""`compile: true`: the forward and backward pass of both towers as fused kernels (torch.compile, inductor)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile a module in place at its next call; its parameters, their names and its methods stay as they are.

    What is called elsewise, such as an encoder's `encode_images` in an evaluation, goes on eagerly.

    The number of rows and the length of the texts are variables of the kernels (see `sizes_vary`), the size of the
    pictures is not: each phase of a
    run compiles anew. A kernel is then a function of the code and the shapes alone, not of which batch came first, so
    that a resumed run has the kernels of one that was never interrupted.

    Args:
        network: What training calls.
        device: Where it runs.

    Raises:
        ValueError: There is no compiler.
    """
    require_compiler(device)
    torch.compiler.reset()  # kernels of an earlier phase would count towards dynamo's limit, and be kept
    network.compile()


def sizes_vary(images: torch.Tensor, tokens: torch.Tensor, *more: torch.Tensor) -> None:
    """Say of a compiled network's inputs that their rows, and the length of the texts, are others now and then."""
    for tensor in (images, tokens, *more):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    torch._dynamo.maybe_mark_dynamic(tokens, tokens.ndim - 1)


def require_compiler(device: torch.device) -> None:
    """Refuse `compile` where inductor could not build its kernels.

    Raises:
        ValueError: No C++ compiler, or on a GPU no Triton; the message says what was looked for.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        looked: Any = config.cpp.cxx
        names = ", ".join(str(name) for name in ([looked] if isinstance(looked, str) else looked) if name)
        raise ValueError(
            f"compile: true needs a C++ compiler, and none of these runs here: {names}. Install one (Debian: "
            "apt-get install g++), name it in the environment variable CXX, or set compile: false."
        ) from error
    if device.type == "cuda" and not has_triton():
        raise ValueError(
            "compile: true on a GPU needs Triton, which this torch has not (or not for this GPU): install a torch "
            "that brings it, or set compile: false."
        )
