"""The optimiser: AdamW on fp32 masters of low-precision parameters, moments in bf16; nothing waits for the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dskernels.dispatch import Operation
from dskernels.gemm.weights import counts_changes

# How many numbers torch updates at a time if moments are bf16: their fp32 copies take 256 MB.
PIECE = 1 << 25
LARGE = 1 << 18  # elements from which on a gradient gets a launch of its own


class MasterAdamW:
    """AdamW on fp32 copies of the parameters (report section 3.3.1), or on the parameters themselves if they are fp32.

    Masters, gradients and moments are one flat tensor each, matrices first, so a step is a few launches whatever the
    number of parameters, and the norm of the gradient is one reduction. The update is one kernel, which clips the
    gradient, and skips a step if necessary, on the device: 20 bytes of traffic per number with bf16 moments. On the CPU
    it is torch's fused AdamW. That requires moments of the masters' dtype ("expected scalar type Float but found
    BFloat16"), so bf16 moments are widened piece by piece before the update and rounded to nearest after it: 52 bytes.

    Args:
        model: the model whose parameters are updated.
        betas: of AdamW.
        weight_decay: on matrices (not on norms).
        moments: dtype of the moments, torch.bfloat16 as in the report, or torch.float32.

    Attributes:
        masters: fp32, in the order and of the shape of the parameters; views of ``flat``.
        flat: all masters.
        exp_avg: first moments, flat as well.
        exp_avg_sq: second moments.
        steps: the number of updates so far, fp32 ``[]``.
        parts: begin and end of each part of ``flat``, in the order in which a step updates them; none contains both
            matrices and other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = list(model.parameters())
        self.betas, self.weight_decay = betas, weight_decay
        order = sorted(range(len(self.parameters)), key=lambda i: self.parameters[i].dim() <= 1)
        sizes = [self.parameters[i].numel() for i in order]
        self._matrices = sum(self.parameters[i].numel() for i in order if self.parameters[i].dim() > 1)
        device = self.parameters[0].device
        self.flat = torch.empty(sum(sizes), device=device)
        self._gradient = torch.zeros_like(self.flat)
        self.exp_avg = torch.zeros_like(self.flat, dtype=moments)
        self.exp_avg_sq = torch.zeros_like(self.flat, dtype=moments)
        self.steps = torch.zeros((), device=device)
        self._order, self._sizes = order, sizes
        self.masters = self._views(self.flat)
        self._gradients = self._views(self._gradient)
        ends = (0, self._matrices), (self._matrices, self.flat.numel())
        self.parts = [(begin, end) for begin, end in ends if begin < end]
        self._collected = False
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                master.copy_(parameter)
                if parameter.dtype == torch.float32:
                    parameter.data = master
        self._low = [i for i, parameter in enumerate(self.parameters) if parameter.dtype != torch.float32]
        counts_changes(self.parameters)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor by parameter name."""
        return dict(zip(self.names, self._views(flat), strict=True))

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = dict(zip(self._order, flat.split(self._sizes), strict=True))
        return [pieces[i].view(parameter.shape) for i, parameter in enumerate(self.parameters)]

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of a backward pass to those of the masters, in fp32."""
        pairs = [
            (total, parameter.grad)
            for total, parameter in zip(self._gradients, self.parameters, strict=True)
            if parameter.grad is not None
        ]
        sums, gradients = [total for total, _ in pairs], [gradient for _, gradient in pairs]
        if not self._collected and len(pairs) < len(self.parameters):
            self._gradient.zero_()
        accumulate(sums, gradients, first=not self._collected)
        self._collected = True
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients by parameter name."""
        return dict(zip(self.names, self._gradients, strict=True))

    def norm(self) -> Tensor:
        """The norm of the whole gradient, fp32 ``[]``; not finite if any of its numbers is not."""
        return torch.linalg.vector_norm(self._gradient)

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, scale: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Update the masters, copy them to the parameters, and forget the gradients.

        Args:
            learning_rate: of this step; fp32 ``[]`` if a CUDA graph is to read it from the device.
            scale: fp32 ``[]``, by which gradients are divided first; see `clipping`.
            skip: fp32 ``[]``: if it is 1, nothing changes, whatever the gradient contains.
        """
        if self._collected:
            if not isinstance(learning_rate, Tensor):
                learning_rate = torch.full((), learning_rate, device=self.flat.device)
            state = self.flat, self._gradient, self.exp_avg, self.exp_avg_sq
            for begin, end in self.parts:
                part = (x[begin:end] for x in state)
                decay = self.weight_decay if begin < self._matrices else 0.0
                _adamw(*part, self.steps, learning_rate, scale, skip, *self.betas, decay)
                self.updated(begin, end)
            self.steps += 1.0 if skip is None else 1.0 - skip
            self.refresh()
        self._collected = False

    def updated(self, begin: int, end: int) -> None:
        """Called when this part of the masters has its value for this step; other parts are still to come."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the parameters to the rounded masters."""
        if self._low:
            torch._foreach_copy_([self.parameters[i] for i in self._low], [self.masters[i] for i in self._low])
        # Quantised copies of a weight are kept until its version changes, and writing to a view of `flat` does not
        # change it.
        torch.autograd.graph.increment_version(self.parameters)

    @contextmanager
    def replaced(self, flat: Tensor) -> Iterator[None]:
        """Inside, the parameters are those of other masters, such as their average."""
        mine = self.flat.clone()
        self.flat.copy_(flat)
        self.refresh()
        try:
            yield
        finally:
            self.flat.copy_(mine)
            self.refresh()


def accumulate(totals: Sequence[Tensor], gradients: Sequence[Tensor], *, first: bool) -> None:
    """Add gradients to fp32 totals, or store them as the totals if they are the first.

    Large ones take a launch each, small ones one together: 7.3 ms for a step of 1.9 G numbers and two micro-batches on
    an H200. With torch's kernels, of which one widens bf16 and the next adds, it took 15.2.
    """
    small = [i for i, gradient in enumerate(gradients) if gradient.numel() < LARGE]
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient.numel() >= LARGE:
            _add_gradient(total, gradient, first)
    if small:
        into, some = [totals[i] for i in small], [gradients[i] for i in small]
        if first:
            torch._foreach_copy_(into, some)
        else:
            torch._foreach_add_(into, [gradient.float() for gradient in some])


def _add_gradient_reference(total: Tensor, gradient: Tensor, first: bool) -> None:
    if first:
        total.copy_(gradient)
    else:
        total.add_(gradient)


_add_gradient = Operation(
    "add_gradient(Tensor(a!) total, Tensor gradient, bool first) -> ()",
    reference=_add_gradient_reference,
    triton="dskernels.model.triton_adamw:add_gradient",
)


def _adamw_reference(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    learning_rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Torch's fused AdamW, piece by piece if the moments do not have the dtype of the masters."""
    size = max(master.numel(), 1) if exp_avg.dtype == master.dtype else PIECE
    state = master, gradient, exp_avg, exp_avg_sq
    for masters, gradients, *kept in zip(*(x.split(size) for x in state), strict=True):
        moments = [moment.to(master.dtype) for moment in kept]  # the moments themselves, if they have that dtype
        adamw(
            [masters],
            [gradients],
            [moments[0]],
            [moments[1]],
            [],
            [steps.clone()],  # each piece has its own, since the update increments it
            fused=True,
            grad_scale=scale,
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )
        if exp_avg.dtype != master.dtype:
            torch._foreach_copy_(kept, moments)


_adamw = Operation(
    "adamw(Tensor(a!) master, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor steps, "
    "Tensor learning_rate, Tensor? scale, Tensor? skip, float beta1, float beta2, float weight_decay) -> ()",
    reference=_adamw_reference,
    triton="dskernels.model.triton_adamw:adamw",
)


def clipping(norm: Tensor, largest: float) -> Tensor:
    """The number that a gradient of this norm is divided by, so that its norm is at most the given one."""
    return ((norm + 1e-6) / largest).clamp(min=1.0)
