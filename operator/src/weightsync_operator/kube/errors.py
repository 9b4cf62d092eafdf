"""What the API server answered, split by what the caller can do about it."""


class KubeError(Exception):
    """A request to the API server that did not succeed."""


class ConfigurationError(KubeError):
    """There is no way to the API server that could be used: somebody has to change flags or files."""


class NotFoundError(KubeError):
    """The object is not there, or its type is not served."""


class ConflictError(KubeError):
    """The object is there already, or has changed since it was read: read it again."""


class ForbiddenError(KubeError):
    """Not allowed (401, 403): the operator's role or token is wrong, trying again later may help."""


class InvalidError(KubeError):
    """The API server refused the document (400, 422): trying again does not help."""


class UnavailableError(KubeError):
    """No answer, or one that says to try again (429, 5xx)."""
