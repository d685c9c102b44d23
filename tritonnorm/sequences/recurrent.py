"""Batch norm in recurrent networks: statistics of their own for every time step.

Cooijmans, Ballas, Laurent, Gulcehre and Courville, "Recurrent Batch Normalization", 2016
(arXiv 1603.09025). The weight starts at 0.1: with 1 the tanh of a cell saturates, and gradients
through time vanish (their section 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .masked import masked_batch_norm, valid_positions

State = tuple[Tensor, Tensor]


class RecurrentBatchNorm(nn.Module):
    """Batch norm of one time step, with one weight for all steps and running statistics for each.

    Steps from ``max_length`` on use (and in training update) the statistics of the last one, so
    sequences may be longer than those of the training set. Set it to the longest of those: a step
    that training never reached keeps mean 0 and variance 1.

    The ``state_dict`` holds ``weight [C]``, ``bias [C]`` if there is one, ``running_mean`` and
    ``running_var [max_length, C]`` and ``num_batches_tracked [max_length]``.

    Args:
        num_features: C.
        max_length: steps with statistics of their own.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        bias: learn a shift; the terms of an LSTM share one instead.
        gain: first value of the weight.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        ValueError: ``max_length`` is less than 1.
    """

    def __init__(
        self,
        num_features: int,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        bias: bool = True,
        gain: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.num_features, self.max_length = num_features, max_length
        self.eps, self.momentum, self.gain = eps, momentum, gain
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **kind))
        self.bias = nn.Parameter(torch.empty(num_features, **kind)) if bias else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.empty(max_length, num_features, **kind))
        self.register_buffer("running_var", torch.empty(max_length, num_features, **kind))
        counters = torch.empty(max_length, dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", counters)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Back to the first values."""
        self.reset_running_stats()
        nn.init.constant_(self.weight, self.gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, step: int, mask: Tensor | None = None) -> Tensor:
        """Normalize the batch at one time step.

        Args:
            input: ``[N, C]``.
            step: the time step, from 0.
            mask: bool ``[N]``, True for the sequences that are not over yet; the others come out as
                zero. With fewer than two of them the statistics stay as they are.
        """
        if input.dim() != 2 or input.shape[1] != self.num_features:
            raise ValueError(f"input: expected [N, {self.num_features}], got {tuple(input.shape)}")
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        at = min(step, self.max_length - 1)
        return masked_batch_norm(
            input[:, :, None],
            self.running_mean[at],
            self.running_var[at],
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            mask=None if mask is None else mask[:, None],
            num_batches_tracked=self.num_batches_tracked[at] if self.training else None,
        )[:, :, 0]

    def extra_repr(self) -> str:
        """Features, steps and options."""
        return (
            f"{self.num_features}, max_length={self.max_length}, eps={self.eps}, "
            f"momentum={self.momentum}, bias={self.bias is not None}"
        )


class BatchNormLSTMCell(nn.Module):
    """An LSTM cell with batch norm as in Cooijmans et al. (2016), equations 6 to 8.

    ``f, i, o, g = BN(h W_h) + BN(x W_x) + b``, then ``c' = sigmoid(f) * c + sigmoid(i) * tanh(g)``
    and ``h' = sigmoid(o) * tanh(BN(c'))``. The first two batch norms have no bias, ``b`` is theirs;
    the bias of the forget gate starts at 1.

    Args:
        input_size: features of the input.
        hidden_size: H, features of both states.
        max_length: steps with statistics of their own.
        eps: added to the variances.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        options = (max_length, eps, momentum)
        gates = 4 * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(gates, input_size, **kind))
        self.weight_hh = nn.Parameter(torch.empty(gates, hidden_size, **kind))
        self.bias = nn.Parameter(torch.empty(gates, **kind))
        self.norm_ih = RecurrentBatchNorm(gates, *options, bias=False, **kind)
        self.norm_hh = RecurrentBatchNorm(gates, *options, bias=False, **kind)
        self.norm_c = RecurrentBatchNorm(hidden_size, *options, **kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal weights, zero biases but for the forget gate, new batch norms."""
        with torch.no_grad():
            nn.init.orthogonal_(self.weight_ih)
            for block in self.weight_hh.chunk(4):
                nn.init.orthogonal_(block)
            nn.init.zeros_(self.bias)
            self.bias[: self.hidden_size] = 1.0
        for norm in (self.norm_ih, self.norm_hh, self.norm_c):
            norm.reset_parameters()

    def forward(
        self, input: Tensor, step: int, state: State | None = None, mask: Tensor | None = None
    ) -> State:
        """The states after one step.

        Args:
            input: ``[N, input_size]``.
            step: the time step, from 0.
            state: hidden and cell state ``[N, H]``; zeros if None.
            mask: bool ``[N]``, True for the sequences that are not over yet; the others keep their
                state.
        """
        if state is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            state = (zeros, zeros)
        h, c = state
        if mask is not None:  # what lies in the padding must not reach the gradient of weight_ih
            input = torch.where(mask[:, None], input, 0.0)
        gates = (
            self.norm_hh(h @ self.weight_hh.t(), step, mask)
            + self.norm_ih(input @ self.weight_ih.t(), step, mask)
            + self.bias
        )
        forget, write, read, new = gates.chunk(4, 1)
        next_c = forget.sigmoid() * c + write.sigmoid() * new.tanh()
        next_h = read.sigmoid() * self.norm_c(next_c, step, mask).tanh()
        if mask is not None:
            over = ~mask[:, None]
            next_h, next_c = torch.where(over, h, next_h), torch.where(over, c, next_c)
        return next_h, next_c

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.input_size}, {self.hidden_size}"


class BatchNormLSTM(nn.Module):
    """One layer of `BatchNormLSTMCell` over padded sequences.

    Args:
        input_size: features of the input.
        hidden_size: H, features of both states.
        max_length: steps with statistics of their own: the longest sequence of the training set.
        eps: added to the variances.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        batch_first: sequences are ``[N, L, features]``, else ``[L, N, features]``.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        max_length: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.cell = BatchNormLSTMCell(
            input_size, hidden_size, max_length, eps, momentum, device=device, dtype=dtype
        )

    def forward(
        self, input: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """All hidden states, and the last states of each sequence.

        Args:
            input: ``[L, N, input_size]``, or ``[N, L, input_size]`` if ``batch_first``.
            lengths: integer ``[N]``: valid steps of each sequence; all if None.
            state: the first hidden and cell state ``[N, H]``; zeros if None.

        Returns:
            Hidden states in the layout of the input, zero past the end of a sequence; hidden and
            cell state ``[N, H]`` at each sequence's end.
        """
        if input.dim() != 3:
            raise ValueError(f"input: expected 3 dimensions, got {input.dim()}D")
        steps = input.transpose(0, 1) if self.batch_first else input
        length, samples = steps.shape[:2]
        masks: list[Tensor] | None = None
        if lengths is not None:
            keep = valid_positions(samples, length, None, lengths, input.device)
            masks = list(keep.t().contiguous().unbind())
        zeros = input.new_zeros(samples, self.cell.hidden_size)
        h, c = state or (zeros, zeros)
        outputs = []
        for t in range(length):
            mask = None if masks is None else masks[t]
            h, c = self.cell(steps[t], t, (h, c), mask)
            outputs.append(h if mask is None else torch.where(mask[:, None], h, 0.0))
        y = torch.stack(outputs) if outputs else input.new_zeros(0, *zeros.shape)
        return (y.transpose(0, 1) if self.batch_first else y), (h, c)
