"""What runs inside vLLM: a weight transfer backend that its ``vllm.general_plugins`` entry point registers.

``--weight-transfer-config '{"backend":"weightsync"}'`` chooses it. For vLLM 0.25.1 to 0.33; run on 0.32 (CPU).
"""
