"""What a network computes, and what the machine could."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tests.benchmarks.contestants import timed

# The best of several: the rate of one size depends on caches and tiles.
MATRIX_SIZES = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 8192)}
# Enough of a size to be timed; on a GPU, to be busy for longer than a launch takes.
FLOP_AT_ONCE = {"cpu": 4e10, "cuda": 2e13}
# A processor without instructions for bfloat16 is fifty times slower, at every size.
LONGEST_SECONDS = 0.5


def count_flop(work: Callable[[], object]) -> int:
    """Count the floating-point operations of products and convolutions, 2 per multiply-add."""
    # Not every fused attention is known to the counter; matrix products are.
    with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        work()
    return counter.flop


class _Counter(TorchDispatchMode):
    """Adds up what torch's own formulas say; its `FlopCounterMode` fails at second gradients."""

    flop = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flop += int(formula(*args, **kwargs, out_val=result))
        return result


def matmul_rate(device: torch.device) -> float:
    """Measure the FLOP/s of products of bfloat16 matrices: the best of sizes and repetitions."""
    best = 0.0
    for size in MATRIX_SIZES[device.type]:
        if best > 0 and 2 * size**3 / best > LONGEST_SECONDS:
            break
        for _ in range(3):
            best = max(best, _rate(size, device, flop=best * LONGEST_SECONDS))
    return best


def _rate(size: int, device: torch.device, *, flop: float) -> float:
    left, right, product = torch.randn(3, size, size, device=device).bfloat16()
    products = max(1, round(min(flop, FLOP_AT_ONCE[device.type]) / (2 * size**3)))

    def multiply() -> None:
        for _ in range(products):
            torch.mm(left, right, out=product)

    return products * 2 * size**3 / timed(device, multiply)
