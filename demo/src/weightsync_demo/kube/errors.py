"""What can go wrong in bringing up Kubernetes; every message says what to do."""


class KubeError(Exception):
    """Kubernetes can't be had on this machine as it is."""


class BuildError(KubeError):
    """The binary could not be built."""


class ApiServerError(KubeError):
    """The API server did not start, or ended by itself."""
