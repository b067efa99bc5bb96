/*
 * The inside of the CPU back end: its state, its threads, its scratch, and the ops by file.
 *
 * Private to kernels/cpu_*.c. One back end belongs to one thread of its process (the rank's main
 * thread), and so does its team of threads.
 */
#ifndef INTERNVLD_KERNELS_CPU_BACKEND_H
#define INTERNVLD_KERNELS_CPU_BACKEND_H

#include <stdatomic.h>

#include "kernels/backend.h"
#include "kernels/cpu_cores.h"
#include "kernels/cpu_isa.h"
#include "kernels/cpu_team.h"

struct cpu_scratch {
    void *memory; // aligned to 64; grows, never shrinks
    size_t n_bytes;
};

/* The items of an op that are still to be taken from one thread's part of them. */
struct cpu_part {
    _Alignas(64) _Atomic int64_t next;
    int64_t end;
};

struct cpu_state {
    const struct cpu_tile_ops *tile;
    const struct cpu_expand_ops *expand;
    const struct cpu_multiply_ops *multiply; // NULL: codes are expanded
    const struct cpu_integer_ops *integer;
    const struct cpu_vector_ops *vector;
    struct cpu_team *team;        // NULL: one thread
    struct cpu_scratch shared;    // filled by all threads of an op
    struct cpu_scratch *thread;   // [team] each its thread's own
    struct cpu_scratch *expanded; // [team] the part of a quantised weight a thread works on
    struct cpu_part *parts;       // [team] of the items of the op that runs
    struct cpu_cores cores;
    struct cpu_region *region; // that takes the next block, or NULL
    int n_threads;             // of the next op: the rank's share of its cores, at most the team
    char description[64];
};

static inline struct cpu_state *cpu_state(const struct backend *b)
{
    return b->state;
}

/* At least n_bytes, contents undefined; dies when out of memory. */
void *cpu_scratch_reserve(struct cpu_scratch *s, size_t n_bytes);

/* Calls work(arg, thread, n_threads) on this rank's share of the team, or directly with one thread
 * when `cost` would not repay waking others. Its unit is some 60 ps: a float operation, or four
 * bytes moved. Inside, cpu_team_barrier() waits for the others where n_threads > 1. */
void cpu_parallel(struct backend *b, int64_t cost, void (*work)(void *, int, int), void *arg);
/* Of so many multiply-adds in tiles. */
static inline int64_t cpu_product_cost(const struct cpu_state *s, int64_t n)
{
    return n / s->tile->products_a_unit;
}

static inline int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static inline int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t cpu_round16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

/* Carves n words of 4 bytes, rounded up to a line of the cache, off a scratch block. */
static inline void *cpu_carve(char **at, int64_t n)
{
    void *p = *at;
    *at += (size_t)cpu_round16(n) * 4;
    return p;
}

/* The part of [0, n) that is thread `thread`'s, contiguous. */
static inline void cpu_share(int64_t n, int thread, int n_threads, int64_t *first, int64_t *end)
{
    *first = n * thread / n_threads;
    *end = n * (thread + 1) / n_threads;
}

/* Blocks of sixteen outputs of a weight lie in strips of so many, a line of each side by side, so
 * that a few rows read memory from end to end: as many as tiles of many rows have. (Codes:
 * struct cpu_multiply_ops.) A weight's last strip may have fewer. */
#define STRIP_BLOCKS 2

/* The blocks of the strip that has `block`. */
static inline int cpu_strip_blocks(int64_t n_blocks, int64_t block, int strip)
{
    return (int)smaller(n_blocks - block / strip * strip, strip);
}

/* The items [0, n) are to be taken: called before cpu_parallel(). */
void cpu_parts_init(struct cpu_state *s, int64_t n);
/* The same without shares: whoever is free takes the next, so that the largest can come first. */
void cpu_parts_init_in_order(struct cpu_state *s, int64_t n);
/* The next items, up to `most` together, of the thread's own part, which is contiguous and the same
 * at every step; when that is empty, of the others', whose threads another process may have put
 * aside. 0: all are taken. */
int cpu_parts_take(struct cpu_state *s, int thread, int64_t most, int64_t *first, int64_t *end);

/* Row i of a tensor of float32, seen as [n_rows, n_cols]. */
static inline float *cpu_row(const struct tensor *t, int64_t i)
{
    return (float *)t->data + i * t->row_stride;
}

/* Of one of any type. */
static inline void *cpu_element(const struct tensor *t, int64_t row, int64_t column)
{
    return (char *)t->data + (size_t)(row * t->row_stride + column) * dtype_size(t->dtype);
}

/* cpu_factor.c */
/* The left factor of a product with values of `dtype`, in steps of one k or of a pair: a pair is
 * one word of 4 bytes (two bfloat16, for tables of takes_bf16) or two (rounded, still float32). */
struct cpu_factor {
    enum tile_source source;
    int step, words;
};
struct cpu_factor cpu_factor_of(int takes_bf16, enum dtype dtype);
/* dst [n_rows] rows of dst_row words <- n >= 1 floats of each row of src, a last pair being filled
 * with a zero. Returns the words of a row. */
int64_t cpu_factor_rows(const struct cpu_vector_ops *vector, const struct cpu_factor *f,
                        uint32_t *dst, int64_t dst_row, const float *src, int64_t src_row,
                        int n_rows, int64_t n);
/* The same of values that are bfloat16 already, for a factor of bfloat16. */
int64_t cpu_factor_rows_bf16(const struct cpu_factor *f, uint32_t *dst, int64_t dst_row,
                             const uint16_t *src, int64_t src_row, int n_rows, int64_t n);
/* The left factor of a product of integers with codes of `bits`, of one lane, whose n columns are
 * the runs first_run, run, run, …: the codes in words as struct cpu_integer_ops has them, [n_units,
 * unit_words, n_rows], the runs' begins [n_runs, n_rows] (struct expand_product) and the scales
 * [n_rows]. */
struct cpu_codes {
    int bits, offset; // offset: of the weight's stored codes, 1 where zero points have it
    int64_t first_run, run, n_runs;
    int32_t *begins; // begins and scales are not loaded as a pair, which waits for both stores
    uint32_t *words;
    float *scales;
};
/* c's arrays <- n columns from `column` on of n_rows rows of x. */
void cpu_factor_codes(const struct cpu_state *s, const struct cpu_codes *c, const struct tensor *x,
                      int64_t row, int64_t column, int n_rows, int64_t n);
/* Such rows as the tile takes them: where they are, or, more of them than may lie apart, as columns
 * [n_words][TILE_ROWS_MAX]. Rows up to the next multiple of four are read. */
struct cpu_factor_place {
    const uint32_t *a;
    int64_t a_step, a_row;
};
struct cpu_factor_place cpu_factor_place(const struct cpu_vector_ops *vector, const uint32_t *rows,
                                         int64_t row_words, uint32_t *columns, int n_rows,
                                         int64_t n_words);

/* cpu_matmul.c */
void cpu_linear_pack(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                     const struct tensor *bias);
/* l->bias <- `bias` [out_dim] as float32, or NULL. */
void cpu_linear_pack_bias(struct backend *b, struct linear *l, const struct tensor *bias);
/* Of the packed input of any product of this size: backend_cpu_matmul_bytes(). */
size_t cpu_matmul_bytes(const struct cpu_tile_ops *tile, int64_t n_rows, int64_t in_dim,
                        enum dtype dtype);
/* backend_cpu_expanded_bytes() */
size_t cpu_expanded_bytes(const struct cpu_tile_ops *tile, int64_t out_dim, int64_t in_dim,
                          int n_parts, enum dtype dtype);
void cpu_linear_free(struct backend *b, struct linear *l);
void cpu_matmul(struct backend *b, struct tensor *y, const struct tensor *x, const struct linear *l,
                const struct epilogue *e);
int cpu_matmul_gated(struct backend *b, struct tensor *y, const struct tensor *x,
                     const struct linear *l, enum activation act);

/* What a product fetches while it runs: what it will read itself (`own`), or of the next strip so
 * many lines a step (0: none), which together, in all steps of all lanes, are that strip's part-th
 * part from end to end. */
struct cpu_ahead {
    int own;
    int64_t part;
    int lines;
};

/* cpu_quantized.c */
void cpu_linear_pack_quantized(struct backend *b, struct linear *l, int64_t first,
                               const struct quantized *q, const struct tensor *bias);
/* How a packed quantised weight lies, bytes a block. */
struct cpu_quantized_layout {
    size_t codes, scales, zeros, n_bytes; // n_bytes: of all three
    int64_t lane_unit[LANES_MAX + 1];     // first unit of each lane
    int unit;                             // k
    int strip;                            // blocks of a strip
    unsigned irregular; // bit i: lane i has groups in no order, or that meet within a unit
    int is_factored;    // regular lanes are summed by runs of multiples (kernels/quantized.h)
};
void cpu_quantized_layout(struct cpu_quantized_layout *at, const struct cpu_state *s,
                          const struct linear *l);
/* Columns of a regular `lane` from `first` on that are of one group, at most n_k. */
int64_t cpu_quantized_run(const struct linear *l, int lane, int64_t first, int64_t n_k);
/* Of all columns of a regular lane. */
int64_t cpu_quantized_n_runs(const struct linear *l, int lane);
/* Columns [first, first + n_k) of lane `lane` (first a whole unit) of n_blocks blocks of sixteen
 * outputs from `block` on, in the layout of a dense weight of l->dtype; block i at dst + i *
 * dst_block bytes. */
void cpu_expand(const struct cpu_state *s, const struct linear *l,
                const struct cpu_quantized_layout *at, void *dst, size_t dst_block, int64_t block,
                int n_blocks, int lane, int64_t first, int64_t n_k, enum expand_to to);
/* The runs of a factored `lane` of the blocks from `block` on. */
struct tile_runs cpu_quantized_runs(const struct linear *l, const struct cpu_quantized_layout *at,
                                    int64_t block, int lane);
/* 1 where so few rows, in so many panels, are multiplied without expanding. */
int cpu_quantized_multiplies(const struct cpu_state *s, const struct linear *l,
                             const struct cpu_quantized_layout *at, int64_t n_rows,
                             int64_t n_panels);
/* t->c <- the product of lane `lane`, t->a having all its steps, of floats or, with `codes`, those
 * words; t's b is not used. The blocks are of one strip, or begin one. */
void cpu_quantized_multiply(const struct cpu_state *s, const struct linear *l,
                            const struct cpu_quantized_layout *at, const struct tile *t,
                            const struct cpu_codes *codes, int n_rows, int64_t block, int n_blocks,
                            int lane, const struct cpu_ahead *ahead);

/* cpu_paged.c */
void cpu_paged_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                         const struct kv_pages *kv, const struct paged_layout *layout,
                         const int32_t *kv_of_head, int32_t n_heads, float scale, int32_t window);

/* cpu_attention.c */
void cpu_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                   const struct tensor *k, const struct tensor *v, int64_t n_tiles, int32_t n_heads,
                   float scale, enum dtype dtype, float *probs);

/* cpu_rows.c */
void cpu_rms_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                  float eps);
void cpu_add_rms_norm(struct backend *b, struct tensor *y, struct tensor *x,
                      const struct tensor *add, const float *weight, float eps);
void cpu_layer_norm(struct backend *b, struct tensor *y, const struct tensor *x,
                    const float *weight, const float *bias, float eps);
void cpu_add(struct backend *b, struct tensor *y, const struct tensor *x);
void cpu_add_bias(struct backend *b, struct tensor *y, const float *bias);
void cpu_gated_activation(struct backend *b, struct tensor *y, const struct tensor *x,
                          enum activation act);

/* cpu_move.c */
void cpu_embed(struct backend *b, struct tensor *y, const struct tensor *table, const int32_t *ids,
               int32_t first_row);
void cpu_embed_quantized(struct backend *b, struct tensor *y, const struct linear *table,
                         const int32_t *ids, int32_t first_row);
void cpu_scatter_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                      const int32_t *rows);
void cpu_gather_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                     const int32_t *rows);
void cpu_kv_write(struct backend *b, struct kv_pages *kv, const struct paged_layout *layout,
                  struct tensor *k, const struct tensor *v, const struct rotation *rope);
void cpu_patchify(struct backend *b, struct tensor *patches, const struct tensor *pixels,
                  int32_t ph, int32_t pw, const float *mean, const float *std);
void cpu_pixel_shuffle(struct backend *b, struct tensor *y, const struct tensor *x, int32_t side,
                       int32_t k);
void cpu_copy(struct backend *b, struct tensor *y, const struct tensor *x);
void cpu_copy_pages(struct backend *b, struct kv_pages *kv, const int32_t *src, const int32_t *dst,
                    int32_t n);

#endif
