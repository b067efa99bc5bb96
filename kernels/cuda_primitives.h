/*
 * What CUDA C++ says with its own syntax or in inline assembly: launches, shared memory, bfloat16
 * conversion, the tensor-core and asynchronous-copy instructions of sm_80, and words shared with
 * other devices (PTX manual, mma, ldmatrix, cp.async, ld.acquire, st.release).
 *
 * The CUDA sources use these and never the syntax itself, so that the emulation
 * (tests/cuda_emulation/include/kernels/cuda_primitives.h, same names) can stand in for the device.
 */
#ifndef INTERNVLD_KERNELS_CUDA_PRIMITIVES_H
#define INTERNVLD_KERNELS_CUDA_PRIMITIVES_H

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/tensor.h"

/* kernel<<<grid, block, shared_bytes, stream>>>(…); a template's name goes in parentheses. */
#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

#define CUDA_SHARED(type, name, count) __shared__ type name[count]

#define CUDA_DYNAMIC_SHARED(type, name)                                                            \
    extern __shared__ __align__(16) unsigned char cuda_dynamic_shared[];                           \
    type *name = (type *)cuda_dynamic_shared

struct bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x)
{
    return x;
}

__device__ __forceinline__ float to_float(bf16 x)
{
    return __uint_as_float((unsigned)x.bits << 16);
}

template <class T> __device__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}

template <> __device__ __forceinline__ bf16 from_float<bf16>(float x)
{
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

/* Two bfloat16 in one register, as the mma fragments hold them. */
__device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

/* c [16, 8] += a [16, 16] b [16, 8], float32 += bfloat16 products; lane 4g + q holds
 *   a: (g, 2q) (g + 8, 2q) (g, 2q + 8) (g + 8, 2q + 8), each with its right neighbour
 *   b: (2q, g) (2q + 8, g), each with the row below;  c: (g, 2q) (g, 2q + 1) (g + 8, 2q) … */
__device__ __forceinline__ void mma_m16n8k16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8x8 matrices from shared memory; lane i names row i % 8 of matrix i / 8 (16 bytes, aligned).
 */
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const bf16 *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const bf16 *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

/* 16 bytes from global to shared memory, or 16 zero bytes when not valid; both sides aligned. */
__device__ __forceinline__ void cp_async_16(void *shared_dst, const void *global_src, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((unsigned)__cvta_generic_to_shared(shared_dst)), "l"(global_src),
                   "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits for all but the last n_pending groups of this thread. */
template <int n_pending> __device__ __forceinline__ void cp_async_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(n_pending) : "memory");
}

/* A word that other devices and the host read and write: what was written before the store is seen
 * by whoever loads its value. */
__device__ __forceinline__ void store_release_system(uint32_t *p, uint32_t v)
{
    asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

/* Between two looks at such a word. */
__device__ __forceinline__ void spin_pause(void)
{
    __nanosleep(20);
}

__device__ __forceinline__ uint64_t device_clock_ns(void)
{
    uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

/* Ends the context: every later call of the run time fails. */
__device__ __forceinline__ void device_trap(void)
{
    __trap();
}

#endif
