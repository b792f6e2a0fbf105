"""A Triton backend without a compiler: with ``TRITON_INTERPRET=1`` kernels run in Triton's interpreter."""
