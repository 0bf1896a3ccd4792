"""What a forward does that no graph can do, and what to do instead."""


class UnrecordableError(Exception):
    """A line of the forward cannot be recorded.

    Args:
        what: the kind of construct, after "the forward".
        advice: what to write instead.
    """

    def __init__(self, what: str, advice: str):
        super().__init__(what)
        self.what, self.advice = what, advice
