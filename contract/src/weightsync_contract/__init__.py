"""The contract between operator and agents: names, reasons, messages, manifests.

Both sides import it and it imports nothing but the standard library, so that neither can
drift from the other and neither drags its dependencies into the other's image.
"""
