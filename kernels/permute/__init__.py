from .op import RowOrder, permute, sort_by_expert, unpermute

__all__ = ["RowOrder", "permute", "sort_by_expert", "unpermute"]
