"""The error for lines of a forward that no graph can hold."""


class UnrecordableError(Exception):
    """A line of the forward cannot be recorded.

    Args:
        what: the kind of construct, after "the forward".
        advice: what to write instead.
    """

    def __init__(self, what: str, advice: str):
        super().__init__(what)
        self.what, self.advice = what, advice
