"""Shapes in signatures: jaxtyping's types where it is installed, else names without effect.

Annotations are not evaluated, so the module runs without jaxtyping; the tests check every shape.
"""

try:
    from jaxtyping import Bool, Float, Int, Shaped, UInt8
except ImportError:
    Bool = Float = Int = Shaped = UInt8 = object  # type: ignore[assignment, misc]

__all__ = ["Bool", "Float", "Int", "Shaped", "UInt8"]
