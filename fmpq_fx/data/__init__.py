"""Package data: the trained sample models that :mod:`fmpq_fx.samples` loads."""
