"""guidekit's own refusals."""


class GuidekitError(ValueError):
    """Something that the user can put right; its text is one line that says how."""
