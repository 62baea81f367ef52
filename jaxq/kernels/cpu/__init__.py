"""The C++ kernels for CPUs: sources, and the shared library `libjaxq_cpu` next to them once it is built."""
