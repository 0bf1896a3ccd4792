"""The package's one exception type."""


class FmpqError(Exception):
    """An error of the input or of the request; the message says what was given, what was expected and what to do.

    Raised where neither ValueError (an argument out of its range) nor TypeError (an argument of the wrong
    type) says enough: a model that cannot be traced, an image folder without images, a damaged table.
    """
