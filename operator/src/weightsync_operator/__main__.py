"""``python -m weightsync_operator``."""

import asyncio
import logging
import os
import sys

from weightsync_contract import logs
from weightsync_operator.app import run_until_signal
from weightsync_operator.kube.connection import Connection
from weightsync_operator.kube.errors import ConfigurationError
from weightsync_operator.lease import LeaseLostError
from weightsync_operator.pki.certificates import UnusableError
from weightsync_operator.reconcile import StoodDownError
from weightsync_operator.settings import parse

log = logs.get("weightsync_operator")


def main() -> int:
    """Run the operator; answers the exit code: 0 stopped, 1 may not go on (start it again), 2 can't start."""
    settings = parse()
    logs.configure(settings.log_format)
    for noisy in ("kopf", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It warns that it does not see signals, which are ours to see.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
    try:
        asyncio.run(run_until_signal(settings, Connection(settings.kubeconfig, settings.context)))
    except (LeaseLostError, StoodDownError) as error:
        log.error("may not go on", error=error)
        logging.shutdown()
        # At once, and without waiting for threads that still talk to the API server.
        os._exit(1)
    except (ConfigurationError, UnusableError) as error:
        log.error("can't start", error=error)
        return 2
    except OSError as error:
        log.error("can't listen", error=error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
