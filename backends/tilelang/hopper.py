"""The card that the kernels are written for: H100 SXM and H200."""

#: What TileLang compiles for. wgmma needs the "a" of sm_90a.
TARGET = {"kind": "cuda", "arch": "sm_90a"}

#: Streaming multiprocessors.
MULTIPROCESSORS = 132

#: Most shared memory of a block, and with which two blocks fit a multiprocessor: 228 KiB less 1 KiB a block.
SHARED_BYTES, HALF_SHARED_BYTES = 227 * 1024, 113 * 1024
