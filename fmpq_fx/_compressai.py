"""Import CompressAI without the warning that its own use of ``torch.jit.script`` causes in recent torch."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    import compressai.models  # noqa: F401
