"""Integer operators as runtimes compute them, on numpy arrays: what an INT8 file gives, predicted without its runtime.

A weighted operator is a sum of products (``products``) that a requantization (``requantize``) brings to the grid of its result; what combines two
tensors is in ``elementwise``.
"""
