"""Every name that more than one component must spell the same way."""

from typing import Final

GROUP: Final = "weightsync.dev"
API_VERSION: Final = "v1alpha1"
KIND: Final = "WeightSync"
PLURAL: Final = "weightsyncs"

LABEL_INJECT: Final = f"{GROUP}/inject"
LABEL_ROLE: Final = f"{GROUP}/role"
LABEL_NAME: Final = f"{GROUP}/name"
ANNOTATION_ACTION: Final = f"{GROUP}/action"
LABEL_CA_OF: Final = f"{GROUP}/ca-of"
"""On the authority's Secret and ConfigMaps: the namespace of the operator that they belong to."""

CA_NAME: Final = "weightsync-ca"
"""The Secret with the operator's own authority, and the ConfigMap with what agents are to trust."""
CA_FILE: Final = "ca.crt"
"""The ConfigMap's key: a bundle of certificates (PEM)."""

TOKEN_AUDIENCE: Final = "weightsync"
FLEET_AUDIENCE: Final = "weightsync-fleet"
"""Of tokens that are good for reading a fleet and for nothing else."""
LEASE_NAME: Final = "weightsync-operator"

SESSION_PATH: Final = "/v1/session"
FLEET_PATH: Final = "/v1/weightsyncs"
FLEET_TOKEN_HEADER: Final = "X-Weightsync-Token"
"""Carries a token through the API server's proxy, which keeps ``Authorization`` for itself."""
SESSION_PORT: Final = 8443
METRICS_PORT: Final = 8080
HEALTH_PORT: Final = 8081

MAX_FRAME_BYTES: Final = 256 * 1024
"""Largest session frame either side accepts."""

PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
"""Range of session protocols this release speaks."""

TENSOR_ALIGNMENT: Final = 256
"""Every tensor starts at a multiple of this many bytes in a version's flat image."""
