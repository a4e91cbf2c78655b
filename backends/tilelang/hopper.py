"""The card that the kernels are written for: H100 SXM and H200."""

#: What TileLang compiles for. wgmma needs the "a" of sm_90a.
TARGET = {"kind": "cuda", "arch": "sm_90a"}

#: Streaming multiprocessors.
MULTIPROCESSORS = 132

#: Clusters of so many blocks, one block a multiprocessor, that are sure to run at a time. A cluster stays within one of
#: the 8 groups of multiprocessors, which have 14, 16 or 18: in the worst case five have 18 and three 14. Of a kernel
#: whose blocks stay, one cluster more than fit would run after all others and double the time.
CLUSTERS = {1: 132, 2: 66, 4: 29, 8: 13}

#: Most shared memory of a block: 228 KiB less 1 KiB a block.
SHARED_BYTES = 227 * 1024
