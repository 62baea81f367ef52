"""What an operation means: binding, abstract evaluation, batching, derivatives. One file per operation."""
