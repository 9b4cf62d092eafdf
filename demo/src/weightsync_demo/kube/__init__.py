"""A real Kubernetes API server on 127.0.0.1, built from source once a machine.

Everything that talks to Kubernetes in the demo and the fast tests talks to this one: conflicts, watches, CEL
rules, tokens and status isolation are the real ones. No kubelet, scheduler or controller-manager runs: nobody
starts pods, deletes what an owner left behind, or empties a namespace that is deleted.
"""
