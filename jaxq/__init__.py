"""Group-wise quantized weights for JAX."""
