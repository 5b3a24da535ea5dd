"""A 3-D convolution by way of a 2-D one, for AIHWKIT, whose own needs its C++ tile."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad


class Conv3dByDepth(nn.Module):
    """A 3-D convolution whose ``conv`` sees the kernel's depth as channels: a 2-D one from ``C * kernel`` channels.

    Args:
        conv: The 2-D convolution over height and width.
        kernel, stride, padding, dilation: Those of the depth.
    """

    def __init__(self, conv: nn.Module, kernel: int, stride: int, padding: int, dilation: int) -> None:
        super().__init__()
        self.conv = conv
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, D, H, W]`` or ``[C, D, H, W]`` to the same with the output's sizes."""
        batched = x if x.ndim == 5 else x[None]
        padded = pad(batched, (0, 0, 0, 0, self.padding, self.padding))
        span = self.dilation * (self.kernel - 1) + 1
        windows = padded.unfold(2, span, self.stride)[..., :: self.dilation]  # [B, C, D', H, W, kernel]
        images = windows.permute(0, 2, 1, 5, 3, 4)
        y = self.conv(images.flatten(2, 3).flatten(0, 1)).unflatten(0, images.shape[:2]).transpose(1, 2)
        return y if x.ndim == 5 else y[0]

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
