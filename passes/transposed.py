"""The geometry of a transposed convolution that runs as a convolution and a pixel shuffle."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """How a transposed convolution is lowered along one spatial dimension; all in taps or pixels."""

    stride: int
    kernel: int
    padding: int
    output_padding: int
    dilation: int

    @property
    def extent(self) -> int:
        """Size of the kernel with the gaps of its dilation."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def first(self) -> int:
        """The first input that an output sees, counted from its own place."""
        return -((self.extent - 1 - self.padding) // self.stride)

    @property
    def last(self) -> int:
        """The last input that an output sees, counted from its own place."""
        return -(-self.padding // self.stride)

    @property
    def taps(self) -> int:
        """Size of the convolution's kernel."""
        return self.last - self.first + 1

    @property
    def front(self) -> int:
        """Zeros before the kernel, so that its parts start at a multiple of the stride."""
        return self.stride * self.last - self.padding

    @property
    def back(self) -> int:
        """Zeros behind the kernel, so that its parts have one size."""
        return self.stride * self.taps - self.extent - self.front

    @property
    def _excess(self) -> int:
        """Outputs beyond ``stride`` times the size of the input."""
        return self.extent - self.stride - 2 * self.padding + self.output_padding

    @property
    def pads(self) -> tuple[int, int]:
        """Zeros before and behind the input of the convolution; negative ones crop it."""
        return -self.first, self.last - (-self._excess // self.stride)

    @property
    def surplus(self) -> int:
        """Outputs that the shuffle makes beyond the end, which are cut off."""
        return -self._excess % self.stride
