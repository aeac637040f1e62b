"""What a GPU machine without a network needs, made on a machine without a GPU: wheels and compiled kernels in one folder."""
