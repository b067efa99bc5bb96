/*
 * The emulation's twin of kernels/cuda_primitives.h, found first on its include path: launches,
 * shared memory, bfloat16 conversion, mma.sync, ldmatrix and cp.async without a device. See the
 * real one for what each does; fragment layouts are the PTX manual's.
 */
#ifndef INTERNVLD_KERNELS_CUDA_PRIMITIVES_H
#define INTERNVLD_KERNELS_CUDA_PRIMITIVES_H

#include <cuda_runtime.h>

#include "kernels/clock.h"
#include "kernels/tensor.h"

#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                \
    emulated_launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#define CUDA_SHARED(type, name, count)                                                             \
    static char name##_site;                                                                       \
    type *name = (type *)emulated_shared(&name##_site, sizeof(type) * (count))

#define CUDA_DYNAMIC_SHARED(type, name) type *name = (type *)emulated_dynamic_shared()

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x)
{
    return x;
}

inline float to_float(bf16 x)
{
    return bf16_to_f32(x.bits);
}

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x)
{
    return x;
}

template <> inline bf16 from_float<bf16>(float x)
{
    return {f32_to_bf16(x)};
}

inline uint32_t pack_bf16(float low, float high)
{
    return (uint32_t)f32_to_bf16(low) | (uint32_t)f32_to_bf16(high) << 16;
}

/* c += a b: one m16n8k16 tile; the sum over k is in order, each product exact. */
inline void mma_m16n8k16(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    struct operands {
        const uint32_t *a, *b;
    } in = {a, b};
    float sum[4];

    emulated_collective(0xffffffffu, EMULATED_MMA, &in, sum,
                        [](unsigned, const void *const *ins, void *const *outs) EMULATION_UNSEEN {
                            float ma[16][16], mb[16][8];
                            for (int lane = 0; lane < 32; lane++) {
                                const operands *o = (const operands *)ins[lane];
                                int g = lane >> 2, q = lane & 3;
                                for (int i = 0; i < 8; i++)
                                    ma[g + 8 * (i >> 1 & 1)][2 * q + (i & 1) + 8 * (i >> 2)] =
                                        bf16_to_f32((uint16_t)(o->a[i >> 1] >> 16 * (i & 1)));
                                for (int i = 0; i < 4; i++)
                                    mb[2 * q + (i & 1) + 8 * (i >> 1)][g] =
                                        bf16_to_f32((uint16_t)(o->b[i >> 1] >> 16 * (i & 1)));
                            }
                            for (int lane = 0; lane < 32; lane++)
                                for (int i = 0; i < 4; i++) {
                                    int row = (lane >> 2) + 8 * (i >> 1),
                                        column = 2 * (lane & 3) + (i & 1);
                                    float s = 0;
                                    for (int k = 0; k < 16; k++)
                                        s += ma[row][k] * mb[k][column];
                                    ((float *)outs[lane])[i] = s;
                                }
                        });
    for (int i = 0; i < 4; i++)
        c[i] += sum[i];
}

/* The lane's row is read here, where the sanitizers see it; `x4` may be transposed. */
template <bool transposed> void emulated_ldmatrix(uint32_t r[4], const bf16 *row)
{
    uint16_t in[8], out[8];

    if ((uintptr_t)row & 15)
        emulated_die("ldmatrix: a row is not aligned to 16 bytes");
    for (int i = 0; i < 8; i++)
        in[i] = row[i].bits;
    emulated_collective(0xffffffffu, EMULATED_LDMATRIX, in, out,
                        [](unsigned, const void *const *ins, void *const *outs) EMULATION_UNSEEN {
                            for (int lane = 0; lane < 32; lane++)
                                for (int i = 0; i < 8; i++) {
                                    int r0 = lane >> 2, c0 = 2 * (lane & 3) + (i & 1);
                                    int from = 8 * (i >> 1) + (transposed ? c0 : r0);
                                    ((uint16_t *)outs[lane])[i] =
                                        ((const uint16_t *)ins[from])[transposed ? r0 : c0];
                                }
                        });
    for (int i = 0; i < 4; i++)
        r[i] = (uint32_t)out[2 * i] | (uint32_t)out[2 * i + 1] << 16;
}

inline void ldmatrix_x4(uint32_t r[4], const bf16 *row)
{
    emulated_ldmatrix<false>(r, row);
}

inline void ldmatrix_x4_trans(uint32_t r[4], const bf16 *row)
{
    emulated_ldmatrix<true>(r, row);
}

/* Until its wait the destination reads as NaN. */
inline void cp_async_16(void *shared_dst, const void *global_src, bool valid)
{
    if (((uintptr_t)shared_dst | (valid ? (uintptr_t)global_src : 0)) & 15)
        emulated_die("cp.async: an address is not aligned to 16 bytes");
    *(uint4 *)shared_dst = {~0u, ~0u, ~0u, ~0u};
    emulated_copy_push(shared_dst, valid ? global_src : nullptr);
}

inline void cp_async_commit(void)
{
    emulated_copy_commit();
}

template <int n_pending> void cp_async_wait(void)
{
    emulated_copy c;

    while (emulated_copy_pop(n_pending, &c))
        *(uint4 *)c.dst = c.src ? *(const uint4 *)c.src : uint4{0, 0, 0, 0};
}

/* The host's order is stronger than the device's: a missing acquire or release does not show. */
inline void store_release_system(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}

inline uint32_t load_acquire_system(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

inline void spin_pause(void)
{
    emulated_pause();
}

inline uint64_t device_clock_ns(void)
{
    return clock_now_ns();
}

inline void device_trap(void)
{
    emulated_die("trap");
}

#endif
