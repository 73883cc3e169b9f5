"""What differs between the versions of libraries that preparing, training and publishing run with.

Each names the version that brought it: delete it when the lower bound of requirements.txt rises. Those of the
shipped code are in `modeling_mmcot/versions_mmcot.py`.
"""

try:  # huggingface-hub 2.0 lets through the errors of httpx2, its client; before, those of httpx
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError

__all__ = ["TransportError"]
