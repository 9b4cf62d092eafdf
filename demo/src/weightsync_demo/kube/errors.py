"""What can go wrong in bringing up Kubernetes; every message says what to do."""


class KubeError(Exception):
    """Kubernetes can't be had on this machine as it is."""


class BuildError(KubeError):
    """The binary could not be built."""


class KubectlError(KubeError):
    """kubectl ended with an error; the message is what it wrote."""


class ApiServerError(KubeError):
    """The API server did not start, or ended by itself."""
