from .errors import ConversionError as ConversionError
from .hf_to_original import to_original as to_original
from .new_model import assemble_vlm as assemble_vlm
from .original_to_hf import to_hf as to_hf
from .state_dicts import convert_state_dict as convert_state_dict
from .state_dicts import expected_shapes as expected_shapes
from .state_dicts import load_original as load_original
from .state_dicts import restore_state_dict as restore_state_dict
