"""Gradients of single patients, clipped and summed: of several at a time, or one after another.

Source: Abadi et al. 2016 (arXiv 1607.00133), the lines of a step before its noise.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

# mean_loss(indices): the mean loss of the images at `indices`, [L] int64; it leaves nothing behind.
MeanLoss = Callable[[Tensor], Tensor]
# Bytes that the gradients of patients may take who are looked at together.
GRADIENT_MEMORY = 1 << 28
# Fewer patients together are slower than one after another.
LEAST_TOGETHER = 4


def clipped_sum(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    patients: Sequence[Tensor],
    mean_loss: MeanLoss,
    *,
    norm: float,
    noise_draws: int,
    chunk: int,
    own: Sequence[nn.Parameter] = (),
    memory: int = GRADIENT_MEMORY,
) -> tuple[list[Tensor], Tensor]:
    """Return the sum of the clipped gradients of patients, one tensor a parameter, and of losses.

    Args:
        model: whose loss it is; the gradients of its parameters are overwritten.
        parameters: of it, by which the gradients are taken.
        patients: the indices of the images of each.
        mean_loss: see `MeanLoss`.
        norm: the largest L2 norm of a patient's gradient.
        noise_draws: how often each image is looked at for it.
        chunk: images that go through the networks at a time, each draw counted.
        own: parameters of which each patient has a part to itself; their gradients are left in them
            as they are.
        memory: bytes that gradients of patients may take together.
    """
    sums = [torch.zeros_like(each) for each in parameters]
    for parameter in own:
        # Not None, at which an optimizer would wait: who else is drawn must make no difference.
        parameter.grad = torch.zeros_like(parameter)
    device = parameters[0].device
    loss_sum = torch.zeros((), device=device)
    size = sum(each.numel() * each.element_size() for each in parameters)
    together = _Together(model, parameters, mean_loss)
    for looked_at in _of_equal_length(patients, noise_draws):
        # Together, each patient would have a gradient of the parts of all.
        at_a_time = 0 if own else min(len(looked_at), chunk // len(looked_at[0]), memory // size)
        if at_a_time < LEAST_TOGETHER:
            found = (_gradient(parameters, each.to(device), mean_loss, chunk) for each in looked_at)
        else:
            pieces = torch.split(torch.stack(looked_at).to(device), at_a_time)
            found = (together.gradients(each) for each in pieces)
        for gradients, losses in found:
            loss_sum += losses.sum()
            for total, each in zip(sums, clipped(gradients, norm), strict=True):
                total.add_(each.sum(0))
    return sums, loss_sum


def clipped(gradients: Sequence[Tensor], norm: float) -> list[Tensor]:
    """Scale the gradients of each patient, together, down to at most an L2 norm.

    Those of a patient that are not finite become zero: one whose loss overflows would otherwise
    show in every weight.

    Args:
        gradients: of each parameter, [patients, *its shape].
        norm: > 0.
    """
    flat = [each.flatten(1) for each in gradients]
    # In float64: of a million values a float32 length is too short by a hundred thousandth.
    each_length = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in flat]
    lengths = torch.linalg.vector_norm(torch.stack(each_length), dim=0)
    finite = lengths.isfinite()[:, None]
    # A little below 1, or rounding could leave it longer than the norm.
    factors = (norm / lengths).clamp(max=1.0)[:, None] * (1 - 1e-6)
    factors = torch.where(finite, factors, 0.0).to(flat[0].dtype)
    return [
        (torch.where(finite, each, 0.0) * factors).view_as(gradient)
        for each, gradient in zip(flat, gradients, strict=True)
    ]


def _of_equal_length(patients: Sequence[Tensor], noise_draws: int) -> Iterator[list[Tensor]]:
    """Put patients with equally many images together, each image as often as it is looked at."""
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for images in patients:
        by_length[len(images)].append(images.repeat_interleave(noise_draws))
    yield from by_length.values()


def _gradient(
    parameters: Sequence[nn.Parameter], looked_at: Tensor, mean_loss: MeanLoss, chunk: int
) -> tuple[list[Tensor], Tensor]:
    """Compute the gradient of one patient in pieces; returns [1, *shape] each and its loss, [1]."""
    for each in parameters:
        each.grad = None
    total = torch.zeros((), device=looked_at.device)
    for piece in torch.split(looked_at, chunk):
        loss = mean_loss(piece) * (len(piece) / len(looked_at))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return [each[None] for each in found], total[None]


class _Together(nn.Module):
    """Computes the gradients of several patients at once, by torch.func."""

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], mean_loss: MeanLoss
    ) -> None:
        super().__init__()
        # `functional_call` finds the parameters of a module by their names.
        self.model, self._mean_loss = model, mean_loss
        names = {id(each): f"model.{name}" for name, each in model.named_parameters()}
        self._values = {names[id(each)]: each.detach() for each in parameters}

    def forward(self, looked_at: Tensor) -> Tensor:
        return self._mean_loss(looked_at)

    def gradients(self, looked_at: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the gradients, [patients, *shape] each, and losses of patients, [patients].

        Args:
            looked_at: [patients, L] int64, the indices of their images.
        """

        def loss_of(values: dict[str, Tensor], indices: Tensor) -> Tensor:
            found: Tensor = functional_call(self, values, (indices,))
            return found

        of_each = vmap(grad_and_value(loss_of), in_dims=(None, 0), randomness="different")
        # Compiled networks cannot be looked into.
        with torch.compiler.set_stance("force_eager"):
            gradients, losses = of_each(self._values, looked_at)
        return [*gradients.values()], losses
