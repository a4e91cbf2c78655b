"""TileLang kernels: the default in inference graphs on Hopper. TileLang itself is imported when a kernel is built."""
