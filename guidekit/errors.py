"""What guidekit refuses: errors whose message is all that a user needs."""


class GuidekitError(ValueError):
    """Input that cannot work: the message says what is wrong, what exists and what to do.

    The command line shows these in one line. Any other exception is a bug, of guidekit or of a
    plugin, and is shown as one.
    """


class NonFiniteError(GuidekitError, ArithmeticError):
    """Images or gradients are NaN or infinite."""


class NoPushError(GuidekitError):
    """At this step no change of the output moves the next sample."""
