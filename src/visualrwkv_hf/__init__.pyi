# The public names, once: type checkers read this file, and the package imports each name from here when it is used.
from .bundled import bundled_model as bundled_model
from .cache_visualrwkv import VisualRWKVCache as VisualRWKVCache
from .cache_visualrwkv import VisualRWKVStaticCache as VisualRWKVStaticCache
from .configuration_visualrwkv import VisualRWKVConfig as VisualRWKVConfig
from .configuration_visualrwkv import VisualRWKVTextConfig as VisualRWKVTextConfig
from .configuration_visualrwkv import VisualRWKVVisionConfig as VisualRWKVVisionConfig
from .conversion import to_hf as to_hf
from .cpu import accelerate_on_cpu as accelerate_on_cpu
from .dispatch import kernel_backend as kernel_backend
from .films import FrameSampling as FrameSampling
from .films import film_frames as film_frames
from .image_processing_visualrwkv import VisualRWKVImageProcessor as VisualRWKVImageProcessor
from .inference import Chat as Chat
from .inference import export_onnx as export_onnx
from .inference import serve as serve
from .kept_state import KeptState as KeptState
from .modeling_rwkv import VisualRWKVForCausalLM as VisualRWKVForCausalLM
from .modeling_rwkv import VisualRWKVTextModel as VisualRWKVTextModel
from .modeling_vision import VisualRWKVVisionModel as VisualRWKVVisionModel
from .modeling_visualrwkv import VisualRWKVForConditionalGeneration as VisualRWKVForConditionalGeneration
from .modeling_visualrwkv import VisualRWKVModel as VisualRWKVModel
from .processing_visualrwkv import VisualRWKVProcessor as VisualRWKVProcessor
from .state_store import StateStore as StateStore
from .training import VisualRWKVDataCollator as VisualRWKVDataCollator
from .training import VisualRWKVTrainer as VisualRWKVTrainer
from .training import VisualRWKVTrainingArguments as VisualRWKVTrainingArguments
from .training import load_conversations as load_conversations
from .training import lora_config as lora_config
from .training import train_only as train_only
from .tuned_state import TunedState as TunedState
from .wkv import wkv6 as wkv6
from .wkv import wkv7 as wkv7

__version__: str
