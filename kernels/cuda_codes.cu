/*
 * Products with quantised weights on CUDA that read the codes and nothing else of the weight: a
 * value becomes code times scale, rounded to bfloat16, in the registers of the tensor core's
 * instruction (mma.m16n8k16). What a weight is worth, and where its codes lie: cuda_codes.h.
 *
 * Weights are the instruction's sixteen rows, rows of x its eight columns, so that a single row of
 * x wastes seven eighths of the arithmetic, and none of the memory's time.
 *
 * Batch and layout invariance. A lane is cut into N_RANGES ranges of whole steps by its width
 * alone; a range's sum walks its columns in order from 0, and the lane's is the ranges' sums added
 * in order. All that depends on a call's number of rows is who does it: with few rows the warps of
 * a block have a range each and meet in shared memory, so that the weight is read by as many
 * threads as can be; with many each warp has outputs and rows of its own and walks range after
 * range. Both call range_sums(): a row's bits are the same in both.
 *
 * Nothing here has been timed: tiles, ranges and MANY_ROWS are reckoned, not measured.
 */
#include "kernels/cuda_codes.h"

#define N_RANGES 8
#define N_WARPS 8

static const int64_t MANY_ROWS = 128;

/* ---- fragments ---- */

/* Of a unit's codes [unit_bytes_of(KIND) / 4 words]. */
template <enum code_kind KIND>
__device__ __forceinline__ uint32_t unit_code(const uint32_t *words, int i)
{
    return unit_bytes_of(KIND) == UNIT ? words[i / 4] >> i % 4 * 8 & 255 : words[0] >> i * 4 & 15;
}

/* w [4] <- columns [k, k + UNIT) of a row, pairs of bfloat16. */
template <enum code_kind KIND>
__device__ __forceinline__ void unit_values(uint32_t w[4], const struct codes &c,
                                            const float *table, int64_t row, int k,
                                            const uint32_t *words)
{
    float v[UNIT];

    if (c.groups_of_units) {
        struct scaling s = scaling_at(c, row, group_at(c, k < c.in_dim ? k : c.in_dim - 1));
#pragma unroll
        for (int i = 0; i < UNIT; i++)
            v[i] = code_value<KIND>(c, table, unit_code<KIND>(words, i), s);
    } else {
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            int column = k + i < c.in_dim ? k + i : c.in_dim - 1;
            struct scaling s = scaling_at(c, row, group_at(c, column));
            v[i] = code_value<KIND>(c, table, unit_code<KIND>(words, i), s);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        w[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
}

/* ---- one range of a lane ---- */

/* The part of a product that a warp has: 16 OUTS outputs from first_out on, 8 ROWS rows of x from
 * first_row on. */
struct tile {
    int lane, first_out;
    int64_t first_row;
    int whole; // units of x can be read at once
};

/* held [OUTS][2] <- this thread's 16 bytes of a step of rows g and g + 8 of each sixteen; behind
 * the last output, the last once more. */
template <int OUTS>
__device__ __forceinline__ void load_codes(uint4 held[OUTS][2], const struct codes &c,
                                           const struct tile &t, int step)
{
    int g = (int)(threadIdx.x & 31) >> 2, q = (int)(threadIdx.x & 3);
    const uint8_t *codes = c.codes + c.lane_at[t.lane] + step * STEP_BYTES + q * 16;

#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = t.first_out + 16 * o + 8 * half + g;
            row = row < c.out_dim ? row : c.out_dim - 1;
            held[o][half] = *(const uint4 *)(codes + row * c.row_bytes);
        }
}

/* a [OUTS][2 instructions][4] <- the unit at column k, whose words come first in held. */
template <enum code_kind KIND, int OUTS>
__device__ __forceinline__ void fragments_of_w(uint32_t a[OUTS][2][4], const struct codes &c,
                                               const float *table, const struct tile &t, int k,
                                               const uint4 held[OUTS][2])
{
    int g = (int)(threadIdx.x & 31) >> 2;

#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t words[2] = {held[o][half].x, held[o][half].y};
            uint32_t w[4];
            int row = t.first_out + 16 * o + 8 * half + g;
            unit_values<KIND>(w, c, table, row < c.out_dim ? row : c.out_dim - 1, k, words);
            a[o][0][half] = w[0];
            a[o][0][2 + half] = w[1];
            a[o][1][half] = w[2];
            a[o][1][2 + half] = w[3];
        }
}

/* held <- held without the words of its first unit. */
template <enum code_kind KIND, int OUTS>
__device__ __forceinline__ void drop_unit(uint4 held[OUTS][2])
{
#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 *h = &held[o][half];
            *h = unit_bytes_of(KIND) == UNIT ? uint4{h->z, h->w, 0, 0} : uint4{h->y, h->z, h->w, 0};
        }
}

/* sums [OUTS][ROWS] fragments += of the unit at column k, n_k columns before the lane's end. x is
 * this thread's row of the first eight, n_rows what is left of x from it on. */
template <enum code_kind KIND, int OUTS, int ROWS>
__device__ __forceinline__ void add_unit(float sums[OUTS][ROWS][4], uint32_t a[OUTS][2][4],
                                         const bf16 *x, int64_t x_stride, int n_rows, int n_k,
                                         int whole)
{
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        uint4 pairs = unit_of_x(x + 8 * r * x_stride, 8 * r < n_rows ? n_k : 0, whole);
        uint32_t b[2][2] = {{pairs.x, pairs.y}, {pairs.z, pairs.w}};
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            mma_m16n8k16(sums[o][r], a[o][0], b[0]);
            mma_m16n8k16(sums[o][r], a[o][1], b[1]);
        }
    }
}

/* sums [OUTS][ROWS] fragments <- the tile's sums over a range of its lane. */
template <enum code_kind KIND, int OUTS, int ROWS>
__device__ __forceinline__ void range_sums(float sums[OUTS][ROWS][4], const struct codes &c,
                                           const float *table, const struct codes_product &p,
                                           const struct tile &t, int range)
{
    const int n_units = 16 / unit_bytes_of(KIND);
    int n_steps = (c.lane_at[t.lane + 1] - c.lane_at[t.lane]) / STEP_BYTES;
    int per_range = (n_steps + N_RANGES - 1) / N_RANGES, step = range * per_range;
    int end = step + per_range < n_steps ? step + per_range : n_steps;
    int g = (int)(threadIdx.x & 31) >> 2, q = (int)(threadIdx.x & 3);
    int k = c.lane_start[t.lane] + (step * n_units * 4 + q) * UNIT; // of the unit at hand
    const bf16 *x_row = p.x + (t.first_row + g) * p.x_stride;
    int n_rows = (int)(p.n_rows - t.first_row) - g;
    uint4 next[OUTS][2];

#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            sums[o][r][0] = sums[o][r][1] = sums[o][r][2] = sums[o][r][3] = 0.0f;
    if (step < end)
        load_codes<OUTS>(next, c, t, step);
    for (; step < end; step++) {
        uint4 held[OUTS][2];
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            held[o][0] = next[o][0];
            held[o][1] = next[o][1];
        }
        if (step + 1 < end)
            load_codes<OUTS>(next, c, t, step + 1);
            /* Wide tiles need their registers. */
#pragma unroll(ROWS <= 2 ? n_units : 1)
        for (int i = 0; i < n_units; i++, k += 4 * UNIT) {
            uint32_t a[OUTS][2][4];
            fragments_of_w<KIND, OUTS>(a, c, table, t, k, held);
            drop_unit<KIND, OUTS>(held);
            add_unit<KIND, OUTS, ROWS>(sums, a, x_row + k, p.x_stride, n_rows,
                                       c.lane_start[t.lane + 1] - k, t.whole);
        }
    }
}

/* ---- the kernels ---- */

__device__ __forceinline__ void store(const struct codes_product &p, const struct tile &t,
                                      int64_t row, int out, float sum)
{
    if (p.type_y == DTYPE_F32)
        finish_sum<false>((float *)p.y + t.lane * p.lane_stride, p.finish, row, out, sum);
    else
        finish_sum<false>((bf16 *)p.y, p.finish, row, out, sum);
}

/* Few rows: blockIdx.x the outputs, .y the rows, .z the lane; a range a warp. */
template <enum code_kind KIND, int OUTS, int ROWS>
__global__ void __launch_bounds__(32 * N_RANGES)
    few_rows_kernel(struct codes c, struct codes_product p, int whole)
{
    const int n_outs = 16 * OUTS, part_stride = n_outs + 4; // 4: no bank is met twice
    CUDA_SHARED(float, table, 16);
    CUDA_SHARED(float, parts, N_RANGES * 8 * part_stride); // [range, row, output]
    int g = (int)(threadIdx.x & 31) >> 2, q = (int)(threadIdx.x & 3), range = threadIdx.x >> 5;
    struct tile t = {(int)blockIdx.z, (int)blockIdx.x * n_outs, (int64_t)blockIdx.y * 8 * ROWS,
                     whole};
    float sums[OUTS][ROWS][4];

    if (threadIdx.x < 16)
        table[threadIdx.x] = c.table[threadIdx.x];
    __syncthreads();
    range_sums<KIND, OUTS, ROWS>(sums, c, table, p, t, range);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int o = 0; o < OUTS; o++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                parts[(range * 8 + 2 * q + i % 2) * part_stride + 16 * o + 8 * (i / 2) + g] =
                    sums[o][r][i];
        __syncthreads();
        for (int i = threadIdx.x; i < 8 * n_outs; i += 32 * N_RANGES) {
            int64_t row = t.first_row + 8 * r + i / n_outs;
            int out = i % n_outs;
            float sum = parts[i / n_outs * part_stride + out];
            for (int other = 1; other < N_RANGES; other++)
                sum += parts[(other * 8 + i / n_outs) * part_stride + out];
            if (row < p.n_rows && t.first_out + out < c.out_dim)
                store(p, t, row, t.first_out + out, sum);
        }
        __syncthreads();
    }
}

/* Many rows: the same grid, 16 outputs a warp, whose rows of x the block's warps share in the first
 * cache. */
template <enum code_kind KIND, int ROWS>
__global__ void __launch_bounds__(32 * N_WARPS)
    many_rows_kernel(struct codes c, struct codes_product p, int whole)
{
    CUDA_SHARED(float, table, 16);
    int g = (int)(threadIdx.x & 31) >> 2, q = (int)(threadIdx.x & 3), warp = threadIdx.x >> 5;
    struct tile t = {(int)blockIdx.z, ((int)blockIdx.x * N_WARPS + warp) * 16,
                     (int64_t)blockIdx.y * 8 * ROWS, whole};
    float total[1][ROWS][4];

    if (threadIdx.x < 16)
        table[threadIdx.x] = c.table[threadIdx.x];
    __syncthreads();
    if (t.first_out >= c.out_dim)
        return;
    range_sums<KIND, 1, ROWS>(total, c, table, p, t, 0);
    for (int range = 1; range < N_RANGES; range++) {
        float sums[1][ROWS][4];
        range_sums<KIND, 1, ROWS>(sums, c, table, p, t, range);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                total[0][r][i] += sums[0][r][i];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int64_t row = t.first_row + 8 * r + 2 * q + i % 2;
            int out = t.first_out + 8 * (i / 2) + g;
            if (row < p.n_rows && out < c.out_dim)
                store(p, t, row, out, total[0][r][i]);
        }
}

/* ---- launches ---- */

template <enum code_kind KIND, int OUTS, int ROWS>
static void few_rows(struct cuda_state *s, const struct codes &c, const struct codes_product &p,
                     int whole)
{
    dim3 grid(blocks_for(c.out_dim, 16 * OUTS), blocks_for(p.n_rows, 8 * ROWS),
              (unsigned)c.n_lanes);

    LAUNCH((few_rows_kernel<KIND, OUTS, ROWS>), grid, dim3(32 * N_RANGES), 0, s->stream, c, p,
           whole);
}

template <enum code_kind KIND>
static void multiply(struct cuda_state *s, const struct codes &c, const struct codes_product &p,
                     int whole)
{
    dim3 grid(blocks_for(c.out_dim, 16 * N_WARPS), blocks_for(p.n_rows, 64), (unsigned)c.n_lanes);

    if (p.n_rows <= 8)
        few_rows<KIND, 1, 1>(s, c, p, whole);
    else if (p.n_rows <= 16)
        few_rows<KIND, 1, 2>(s, c, p, whole);
    else if (p.n_rows <= 32)
        few_rows<KIND, 2, 4>(s, c, p, whole);
    else if (p.n_rows <= MANY_ROWS)
        few_rows<KIND, 2, 8>(s, c, p, whole);
    else
        LAUNCH((many_rows_kernel<KIND, 8>), grid, dim3(32 * N_WARPS), 0, s->stream, c, p, whole);
}

void cuda_codes_multiply(struct cuda_state *s, const struct linear *l,
                         const struct codes_product *p)
{
    const struct codes c = cuda_codes_of(s, l);
    int whole = units_are_whole(c, p->x, p->x_stride);

    WITH_KIND(c.kind, KIND, multiply<KIND>(s, c, *p, whole));
}
