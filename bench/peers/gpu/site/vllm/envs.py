"""vLLM's settings, at their defaults."""

VLLM_BATCH_INVARIANT = False
