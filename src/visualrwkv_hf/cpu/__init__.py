"""Fast ops for CPUs, written in C, and the layers that use them."""
