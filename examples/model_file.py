"""Ship a codec: plan in bytes as they are on disk, write the model file, and code a photograph with nothing else.

python examples/model_file.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import fmpq_fx


def main() -> None:
    """Print where the bytes of a model file eight times smaller than float32 are, and code a photograph with it."""
    gm = fmpq_fx.prepare(fmpq_fx.samples.model(), 8, size="coded", planner="optimal")
    photo = fmpq_fx.samples.held_out_photos()["motorcycle"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.fmpq"
        fmpq_fx.save(gm, path)
        print(fmpq_fx.file_report(path))

        # All that a decoder needs is that file: no class for models of CompressAI's zoo, no CDF to compute.
        codec = fmpq_fx.load_codec(path)
    data = fmpq_fx.encode(codec, photo)
    decoded = fmpq_fx.decode(codec, data)
    error = (decoded - photo).abs().mean().item()
    print(
        f"\n{len(data):,} bytes, {8 * len(data) / photo[0].numel():.3f} bits per pixel, mean error {error:.4f}"
    )


if __name__ == "__main__":
    main()
