"""Published checkpoints in and out, in Hugging Face's format; transformers itself is not needed.

    from_hf(source, destination)   config.json and weights -> one of our checkpoint folders
    to_hf(source, destination)     one of ours -> a folder for transformers.AutoModelForCausalLM

One name table per family (names.py) serves both directions and the verification afterwards. Tensors are streamed: a
conversion needs memory for the largest one only.
"""

from moe.interop.hf.export_checkpoint import to_hf
from moe.interop.hf.families import FAMILIES
from moe.interop.hf.import_checkpoint import from_hf

__all__ = ["FAMILIES", "from_hf", "to_hf"]
