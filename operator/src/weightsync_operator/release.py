"""Which release this is."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("weightsync-operator")
    except PackageNotFoundError:
        return "unknown"
