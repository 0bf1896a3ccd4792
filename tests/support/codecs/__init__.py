"""Small codecs of our own, written as research codecs are: each does in its forward what some of those do.

Images of 32 x 32 and more, in multiples of 8, suit all of them.
"""

from collections.abc import Callable

from support.codecs.attention import EinopsAttention, WindowAttention
from support.codecs.checkerboard import Checkerboard, MaskedByProduct
from support.codecs.entropy import Distributions, Mixture
from support.codecs.frozen import Detached, NoGradient
from support.codecs.gain import Gain
from support.codecs.invertible import Invertible
from support.codecs.layers import ConvNeXt, MadeInside
from support.codecs.named import Named
from support.codecs.rounding import NoiseInTraining, StraightThrough
from support.codecs.slices import Slices
from support.codecs.small import Small

CODECS: dict[str, Callable[[], Small]] = {
    cls.__name__: cls
    for cls in (
        *(
            WindowAttention,
            EinopsAttention,
            Slices,
            Checkerboard,
            MaskedByProduct,
            Gain,
            Invertible,
            ConvNeXt,
        ),
        *(MadeInside, Mixture, Distributions, StraightThrough, NoiseInTraining, NoGradient, Detached, Named),
    )
}
