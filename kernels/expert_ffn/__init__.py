from .gradient_memory import GradientMemory
from .op import expert_ffn
from .routed_op import routed_expert_ffn

__all__ = ["GradientMemory", "expert_ffn", "routed_expert_ffn"]
