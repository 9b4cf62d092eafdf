"""Imported by a vLLM worker before it makes its model: linear layers are not packed for the CPU.

Their kernels then read the parameters themselves, which lie as checkpoints have them: as it is on GPUs.
"""

import vllm._custom_ops

vllm._custom_ops._supports_onednn = False


class PlainLinears:
    """vLLM wants a class to extend its worker with."""
