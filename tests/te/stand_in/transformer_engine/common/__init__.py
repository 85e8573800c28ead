"""What the stand-in shares between frameworks: recipes, of which it can follow none."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
