"""A stand-in for Transformer Engine: the parts that megatron-core's dense layers are made of,
computed by plain PyTorch on any device.

Parameters have the names, shapes, order and attributes of Transformer Engine 2.6, and those made on
the meta device stay there without values and attributes, as there. It has no FP8, no kernels of its
own, and nothing for experts. Tests put its folder before all others on the path of a process
(tests/te/test_te.py); to the rest of the project it does not exist.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"
__all__ = ["common", "pytorch"]
