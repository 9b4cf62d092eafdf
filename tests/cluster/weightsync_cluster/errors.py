"""What can go wrong with a cluster; every message says what to do."""


class ClusterError(Exception):
    """The cluster can't be had, or can't do what it is asked, on this machine as it is."""
