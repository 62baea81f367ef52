"""A language model on quantized weights, in plain JAX: Qwen3, Qwen2 and Llama 3, from a directory or a GGUF file."""
