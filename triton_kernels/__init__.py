"""Triton kernels behind the WKV ops. A leaf: imports torch and triton only."""
