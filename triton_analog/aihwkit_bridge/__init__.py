"""Models to and from AIHWKIT, IBM's simulator of analog chips (programming noise, drift and more). Needs its package."""

from triton_analog.aihwkit_bridge.depth import Conv3dByDepth
from triton_analog.aihwkit_bridge.export_config import base_aihwkit_rpu_config
from triton_analog.aihwkit_bridge.export_model import export_to_aihwkit
from triton_analog.aihwkit_bridge.import_model import import_from_aihwkit

__all__ = ["Conv3dByDepth", "base_aihwkit_rpu_config", "export_to_aihwkit", "import_from_aihwkit"]
