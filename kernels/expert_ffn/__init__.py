from .op import expert_ffn

__all__ = ["expert_ffn"]
