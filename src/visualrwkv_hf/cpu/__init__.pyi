from .layers import accelerate_on_cpu as accelerate_on_cpu
from .ops import build_native_ops as build_native_ops
