/* The kernels with vectors of 8 floats: AVX2, or whatever the processor has where it is not an x86. */
#define LANES 8
#define MODULE "_kernels8"
#define INIT PyInit__kernels8
#ifdef __x86_64__
#pragma GCC target("avx2,fma") /* asked for at import; without them torch does the work */
#define PROCESSOR_FITS (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define PROCESSOR_FITS 1
#endif
#include "_kernels.h"
