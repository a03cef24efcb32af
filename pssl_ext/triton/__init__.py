"""Triton kernels of the operators, for GPUs: one module an operator, with ``forward(a)`` and
``backward(*grads, a, needs)`` for the bound arguments a of its schema (``OpSpec.arguments`` in ``pssl_ext/op.py``).
Imported when one of them is called first; nothing is tuned or compiled before.

``launch``      how a kernel is called, and how tensors come to it
``arithmetic``  products of float32's accuracy on matrix units, norms
``cells``       passes over the features: products with class vectors, sums by class, gradients
``pixels``      passes over label pixels, for both grids: what happens at a pixel is a function that an operator brings

Sums have a fixed order: each program writes its part, and a second pass adds the parts. Offsets have 64 bits. What does
not count is left out by its mask, never by a factor of 0.
"""
