"""The two operations that the tokenizer lives on: `nearest_code` (an exact argmin) and `ema_update_`.

This package knows nothing of poses. Today both are the pure-PyTorch twin of `reference.py`; its docstring states the
contract that any faster backend has to meet bit for bit.
"""

from .reference import code_statistics, ema_update_, nearest_code

__all__ = ["code_statistics", "ema_update_", "nearest_code"]
