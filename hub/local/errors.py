"""Error of a local hub."""


class StartError(RuntimeError):
    """The hub cannot start on this machine; the message gives the reason and the remedy."""
