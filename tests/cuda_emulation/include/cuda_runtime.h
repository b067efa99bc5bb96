/*
 * CUDA's kernel language as a C++ compiler for the host reads it: qualifiers, thread indices,
 * barriers, warp collectives, vector types. Every CUDA thread is a fibre of execution.cc.
 *
 * A collective counts as no synchronisation of memory except __syncwarp(), as on the device. What
 * needs inline assembly or a launch is in kernels/cuda_primitives.h beside this file.
 */
#ifndef CUDA_EMULATION_CUDA_RUNTIME_H
#define CUDA_EMULATION_CUDA_RUNTIME_H

#include <math.h>
#include <string.h>

#include "cuda_runtime_api.h"
#include "execution.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (emulated_now->thread)
#define blockIdx (emulated_now->block)
#define blockDim (emulated_now->block_dim)
#define gridDim (emulated_now->grid_dim)
#define __syncthreads() emulated_barrier(__FILE__, __LINE__)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    emulated_collective(mask, EMULATED_SYNCWARP, nullptr, nullptr);
}

template <class T> struct emulated_shuffle {
    T value;
    int source; // lane, or negative: the lane's own value
};

/* Every lane of the mask names the lane whose value it wants. */
template <class T> T emulated_shuffle_sync(unsigned mask, T value, int source)
{
    emulated_shuffle<T> in = {value, source};
    T out;

    emulated_collective(mask, EMULATED_SHUFFLE, &in, &out,
                        [](unsigned m, const void *const *ins, void *const *outs) EMULATION_UNSEEN {
                            for (int lane = 0; lane < 32; lane++) {
                                if (!(m >> lane & 1))
                                    continue;
                                int from = ((const emulated_shuffle<T> *)ins[lane])->source;
                                if (from < 0 || from > 31)
                                    from = lane;
                                if (!(m >> from & 1))
                                    emulated_die("a shuffle reads a lane outside its mask");
                                *(T *)outs[lane] = ((const emulated_shuffle<T> *)ins[from])->value;
                            }
                        });
    return out;
}

inline unsigned __float_as_uint(float x)
{
    unsigned bits;

    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline unsigned atomicAdd(unsigned *p, unsigned n)
{
    return __atomic_fetch_add(p, n, __ATOMIC_RELAXED);
}

template <class T> T __shfl_xor_sync(unsigned mask, T v, int lane_mask)
{
    return emulated_shuffle_sync(mask, v, (int)(emulated_now->linear & 31) ^ lane_mask);
}

template <class T> T __shfl_sync(unsigned mask, T v, int lane)
{
    return emulated_shuffle_sync(mask, v, lane & 31);
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int n_bytes)
{
    return emulated_func_limit((const void *)kernel, n_bytes);
}

inline float __uint_as_float(unsigned bits)
{
    float f;

    memcpy(&f, &bits, sizeof(f));
    return f;
}

/* The device's rounding of these differs in the last bits; tests compare with tolerances. */
inline float __expf(float x)
{
    return expf(x);
}

inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}

inline float __fdividef(float a, float b)
{
    return a / b;
}

#endif
