"""VisualRWKV in vLLM: many users at once, on a GPU or a CPU, behind vLLM's OpenAI server.

This is a plugin: vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its
processes. Nothing else of this package imports vLLM. `docs/vllm.md` says how to serve a model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
