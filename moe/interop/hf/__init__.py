"""Published checkpoints in and out, in Hugging Face's layout; transformers itself is not needed.

    from_hf(source, destination)   config.json and weights -> one of our checkpoint folders
    to_hf(source, destination)     one of ours -> what transformers.AutoModelForCausalLM opens

One table of names per family (names.py) serves both directions and the comparison afterwards. Tensors stream: the
memory that a conversion needs is that of the largest one.
"""

from moe.interop.hf.export_checkpoint import to_hf
from moe.interop.hf.families import FAMILIES
from moe.interop.hf.import_checkpoint import from_hf

__all__ = ["FAMILIES", "from_hf", "to_hf"]
