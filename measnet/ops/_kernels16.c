/* The kernels with vectors of 16 floats: AVX-512. */
#define LANES 16
#define MODULE "_kernels16"
#define INIT PyInit__kernels16
#ifdef __x86_64__
#pragma GCC target("avx2,fma,avx512f,avx512dq") /* asked for at import */
#define PROCESSOR_FITS (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
#else
#define PROCESSOR_FITS 0
#endif
#include "_kernels.h"
