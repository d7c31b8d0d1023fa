"""Operations on an NVIDIA GPU, by Triton kernels. Imported only where such a kernel is to run.

Features are BHWC, bf16 or fp32 in memory. Sums, norms, softmax and gates are fp32.
"""
