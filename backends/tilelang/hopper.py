"""The card that the kernels are written for: H100 SXM and H200."""

#: What TileLang compiles for. wgmma needs the "a" of sm_90a.
TARGET = {"kind": "cuda", "arch": "sm_90a"}

#: Streaming multiprocessors.
MULTIPROCESSORS = 132

#: Clusters of so many blocks, one block a multiprocessor, that run at a time: multiprocessors come in groups of 16 or 18,
#: and a cluster stays within its group.
CLUSTERS = {1: 132, 2: 66, 4: 32, 8: 16}

#: Most shared memory of a block, and with which two blocks fit a multiprocessor: 228 KiB less 1 KiB a block.
SHARED_BYTES, HALF_SHARED_BYTES = 227 * 1024, 113 * 1024
