"""The one exception that names a user's mistake."""


class CSGError(ValueError):
    """A mistake the user can mend; command-line tools print it as one line."""
