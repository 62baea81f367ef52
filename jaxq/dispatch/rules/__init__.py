"""The rules of dispatch, one file per kind of operation. Importing this package registers them."""

from jaxq.dispatch.rules import control, derivatives, layout, lookup, pieces, products, sharding

__all__ = ["control", "derivatives", "layout", "lookup", "pieces", "products", "sharding"]
