/*
 * The op table: everything a model computes, as operations on tensors. The page to read first.
 *
 * One forward is written over these functions; the CPU and CUDA back ends each fill one `struct
 * backend_ops`. The op_*() front doors check shapes and types once and then call the table; models
 * call the front doors only. An op runs on the back end's memory and, for CUDA, on its stream:
 * results are visible to the host after op_sync() or op_download().
 *
 * Numerics every back end keeps (design: batch invariance, layout invariance)
 *   - Nothing about the order of a sum depends on how many rows, sequences or tiles share the call.
 *   - matmul: y[m, n] sums over k in one fixed order inside each lane, in float32; lanes are
 * combined by a fixed binary tree ((l0+l1)+(l2+l3))+((l4+l5)+(l6+l7)); a shard that owns a
 * power-of-two run of lanes therefore yields an inner node of the same tree, and comm's all-reduce
 * adds the upper part.
 *   - paged_attention: each (query token, head) walks its keys in position order, in fixed steps of
 * positions (the back end's own, whatever the page size).
 *
 * Activations are float32 on the CPU in both --dtype modes; with bfloat16 weights the input of a
 * matmul is first rounded to bfloat16 and products accumulate in float32; so are, in attention,
 * queries, keys, values and the probabilities that values are multiplied with. CUDA holds what
 * products read as bfloat16 then; ops take the type from their tensors, and norms may change it.
 *
 * Over int8 pages a score is the query times the codes, exact products summed in float32, and then
 * times the key's scale; a probability is multiplied with the value's scale before it meets the
 * codes. On the CPU queries and scaled probabilities are rounded to bfloat16 in both --dtype modes;
 * CUDA multiplies what it has in float32 with the values, code * scale, instead.
 *
 * Letters in shapes: n_tokens rows of a step, dim the hidden size, n_heads/n_kv_heads the shard's
 * own heads.
 */
#ifndef INTERNVLD_KERNELS_BACKEND_H
#define INTERNVLD_KERNELS_BACKEND_H

#include "kernels/quantized.h"
#include "kernels/tensor.h"

#define LANES_MAX 8

enum activation {
    ACTIVATION_NONE,
    ACTIVATION_GELU,       // erf form: "gelu"
    ACTIVATION_GELU_TANH,  // "gelu_new", "gelu_pytorch_tanh", "gelu_fast"
    ACTIVATION_QUICK_GELU, // x * sigmoid(1.702 x)
    ACTIVATION_RELU,
    ACTIVATION_SILU, // "silu", "swish"
};

/*
 * A weight in the back end's own packed layout. y = x W^T + bias, W [out_dim, in_dim].
 * The reduced dimension is cut into n_lanes (a power of two, 1 for all but row-parallel products)
 * at lane_start[0..n_lanes]. Owned by the model; memory by the back end.
 */
struct linear {
    int64_t out_dim, in_dim;
    enum dtype dtype; // what products are computed from, F32 or BF16; the stored type of FLOAT
    enum weight_format format;
    int n_lanes;
    int64_t lane_start[LANES_MAX + 1]; // lane_start[0] = 0, lane_start[n_lanes] = in_dim
    void *packed;                      // opaque to all but the back end
    size_t packed_bytes;
    float *bias; // [out_dim] float32 in back-end memory, or NULL
    /* Of a quantised weight, as in struct quantized; the back end's. */
    int64_t n_groups, group_size, group_phase;
    int has_zeros;
    int32_t *group_of; // opaque to all but the back end, or NULL
    /* What products round x to (kernels/quantized.h), or WEIGHT_FLOAT: nothing. Set by the caller,
     * as its dims are, of a bfloat16 linear: WEIGHT_FP8 of FP8 weights with one scale a row, where
     * the back end has_fp8; WEIGHT_INT8 where it has_int8 and linear_takes_int8(). */
    enum weight_format x_format;
};

/* 1 where x_format may be WEIGHT_INT8 of a weight like q, in l's lanes (kernels/quantized.h). */
int linear_takes_int8(const struct linear *l, const struct quantized *q);

/* What happens to a matmul's result before it is stored: y = residual + scale * act(x W^T + bias).
 */
struct epilogue {
    enum activation act;
    const float *scale;            // [out_dim] (layer scale) in back-end memory, or NULL
    const struct tensor *residual; // same shape as y, may be y itself, or NULL
};

/* One layer's keys and values of one shard. Page p, kv head h: keys [head_dim, page_size]
 * (transposed, so that one vector holds one dimension of a page's keys), values [page_size,
 * head_dim]; where the back end keeps pairs (kv_in_pairs), bfloat16 ones are keys [head_dim / 2,
 * page_size, 2] and values [page_size / 2, head_dim, 2], and head_dim is even.
 *
 * In int8 each key and each value vector of a token and kv head is codes [head_dim], a multiple of
 * 16, and a float32 scale of its own: scale = largest |x| / 127 (0 where that is no normal number,
 * NaN where x is not finite), code = x / scale rounded to the nearest, ties to even (0 without a
 * scale), value = code * scale. So what is held of a token depends on nothing but the token. Codes
 * lie as above, but in pairs keys are [head_dim / 2, page_size / 16, 2, 16] and values [page_size /
 * 2, head_dim / 16, 2, 16]; behind those of each head of a page stand the scales [page_size]. */
struct kv_pages {
    void *k;          // [n_pages, n_kv_heads] of kv_head_bytes()
    void *v;          // the same
    enum dtype dtype; // F32, BF16 or I8
    int32_t n_pages, page_size /* tokens, a multiple of 16 */, n_kv_heads, head_dim;
};

/* Of the keys, or of the values, of one kv head of a page. */
static inline size_t kv_head_bytes(int head_dim, int32_t page_size, enum dtype dtype)
{
    const size_t scale = dtype == DTYPE_I8 ? sizeof(float) : 0;
    return (size_t)page_size * ((size_t)head_dim * dtype_size(dtype) + scale);
}

/* Who attends to what in one step; the arrays are in back-end memory. CSR as in FlashInfer's
 * page.cuh. */
struct paged_layout {
    int32_t n_sequences, n_tokens, max_context_len; // max_context_len in tokens
    const int32_t *query_start; // [n_sequences + 1] first row of each sequence's new tokens
    const int32_t *context_len; // [n_sequences] tokens in the cache after this step's are written
    const int32_t *page_start;  // [n_sequences + 1] into `pages`
    const int32_t *pages;       // [page_start[n_sequences]] page numbers, in position order
};

/* The rotation of queries and keys by their positions, half-split form (rotate_half). */
struct rotation {
    struct tensor *q;       // [n_tokens, n_heads * head_dim], of the keys' type
    const float *cos, *sin; // [n_tokens, head_dim / 2] in back-end memory
};

/* Of one row of logits: the best, by (value descending, id ascending), and what the others come to.
 */
#define TOP_K 64
struct top_k {
    double log_sum;    // log(sum(exp(logits)))
    double weight_sum; // of exp((logit - largest) / temperature)
    float values[TOP_K];
    int32_t ids[TOP_K];
    int32_t n;      // TOP_K, or the vocabulary where that is smaller; 0 when not finite
    int32_t finite; // 0: a logit is NaN or infinite, and nothing else is known of the row
};

/* How a token is drawn from the best of its row; vLLM's names. */
struct draw_params {
    double u;          // uniform in [0, 1)
    float temperature; // 0: greedy; else what the best of the row were found with
    float top_p;       // 1: off
    float min_p;       // 0: off
    int32_t top_k;     // 0: off
    int32_t row;       // -1: nothing is drawn
};
enum {
    DRAWN_TOO_FEW = -1, // it takes more than the best: only the whole row can tell
    DRAWN_NOT_FINITE = -2,
};
struct drawn {
    int32_t id;    // or one of these, and then nothing else
    int32_t rank;  // 1 = most likely
    float logprob; // natural log, of the model's own distribution
};

struct backend;

/* Ops recorded once and replayed as one. They must have run once before with the same shapes
 * (products choose their algorithm at the first call), and nothing between begin and end may
 * allocate, upload, download or synchronise. What the ops point to must stay; what it holds may
 * change from replay to replay. Back ends with `replays` have them: a CUDA graph. */
struct graph;

struct backend_ops {
    const char *name; // "cpu", "cuda"
    const char *(*describe)(
        const struct backend *b); // "AVX-512 BF16, 2 threads": for logs and GetModel

    void *(*alloc)(struct backend *b,
                   size_t n_bytes); // zeroed, aligned to 64, dies when out of memory
    /* Makes zeroed memory resident; NULL where alloc() does. */
    void (*touch)(struct backend *b, void *p, size_t n_bytes);
    void (*free)(struct backend *b, void *p);
    /* Host memory that downloads are fastest to (CUDA: pinned), zeroed; NULL may be freed. */
    void *(*alloc_host)(struct backend *b, size_t n_bytes);
    void (*free_host)(struct backend *b, void *p);
    /* In order with ops. The host memory has been read when it returns. */
    void (*upload)(struct backend *b, void *dst, const void *host_src, size_t n_bytes);
    void (*download)(struct backend *b, void *host_dst, const void *src,
                     size_t n_bytes); // synchronises
    void (*sync)(struct backend *b);
    /* work(arg, thread, n_threads) on each of the back end's threads on the host, 0 being the
     * caller; returns when all have. */
    void (*parallel)(struct backend *b, void (*work)(void *arg, int thread, int n_threads),
                     void *arg);

    /* Packs rows [first, first + n) of a host weight, `w` [n, in_dim] (F32, BF16 or F16; F16 is
     * widened to F32 unless l->dtype is BF16), into l->packed, which begins with first = 0. l's
     * dims, dtype and lanes are set by the caller. `bias` [out_dim] host tensor or NULL. */
    void (*linear_pack)(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                        const struct tensor *bias);
    /* The same of a quantised weight: rows [first, first + q->out_dim) are q, whose scales are
     * finite; all parts have the same format and groups. */
    void (*linear_pack_quantized)(struct backend *b, struct linear *l, int64_t first,
                                  const struct quantized *q, const struct tensor *bias);
    void (*linear_free)(struct backend *b, struct linear *l);

    /* y [n_tokens, out_dim] <- epilogue(x [n_tokens, in_dim]); y may not overlap x. Both may be of
     * the type that products are computed from; the residual is of activations. */
    void (*matmul)(struct backend *b, struct tensor *y, const struct tensor *x,
                   const struct linear *l, const struct epilogue *e);
    /* y [n_tokens, d] <- act(gate) * up, both [n_tokens, d], of x W^T + bias, whose columns are
     * gate then up: bit for bit matmul, then gated_activation. y may be of the type that products
     * with W are computed from. Returns 0, having done nothing, where that is not to be had at
     * once or would be slower; NULL where it never is. */
    int (*matmul_gated)(struct backend *b, struct tensor *y, const struct tensor *x,
                        const struct linear *l, enum activation act);
    /* y [n_tokens, dim] <- table [n_rows, dim] (F32 or BF16) row ids[i] - first_row; rows outside
     * the table give 0 (another shard owns them). ids [n_tokens] in back-end memory. */
    void (*embed)(struct backend *b, struct tensor *y, const struct tensor *table,
                  const int32_t *ids, int32_t first_row);
    /* The same from the rows of a quantised weight of one lane: y <- value, rounded to its dtype.
     */
    void (*embed_quantized)(struct backend *b, struct tensor *y, const struct linear *table,
                            const int32_t *ids, int32_t first_row);
    /* y[rows[i]] <- x[i] for each i with rows[i] >= 0; x [n, dim], y [n_tokens, dim], rows [n]. */
    void (*scatter_rows)(struct backend *b, struct tensor *y, const struct tensor *x,
                         const int32_t *rows);
    /* y[i] <- x[rows[i]]; y [n, dim]. */
    void (*gather_rows)(struct backend *b, struct tensor *y, const struct tensor *x,
                        const int32_t *rows);
    /* y <- x / rms(x) * weight [n_cols]; mean of squares in float32 (Transformers: LlamaRMSNorm
     * order). y may be x. Seen as [n_rows, n_cols]: per-head norms pass a reshaped view. */
    void (*rms_norm)(struct backend *b, struct tensor *y, const struct tensor *x,
                     const float *weight, float eps);
    /* x += add, then y <- its rms_norm(): the residual stream and what the next products read. */
    void (*add_rms_norm)(struct backend *b, struct tensor *y, struct tensor *x,
                         const struct tensor *add, const float *weight, float eps);
    void (*layer_norm)(struct backend *b, struct tensor *y, const struct tensor *x,
                       const float *weight, const float *bias, float eps);
    void (*add)(struct backend *b, struct tensor *y, const struct tensor *x); // y += x
    void (*add_bias)(struct backend *b, struct tensor *y,
                     const float *bias); // y += bias, broadcast over rows
    /* y [n, d] <- act(x[:, :d]) * x[:, d:2d]; x [n, 2d] is gate then up. y is of x's type, or, on
     * the CPU, rounded to bfloat16. */
    void (*gated_activation)(struct backend *b, struct tensor *y, const struct tensor *x,
                             enum activation act);
    /* Rotates q and k in place as `rope` says (NULL: leaves them), then stores k, v [n_tokens,
     * n_kv_heads * head_dim] into the pages of their sequences. */
    void (*kv_write)(struct backend *b, struct kv_pages *kv, const struct paged_layout *layout,
                     struct tensor *k, const struct tensor *v, const struct rotation *rope);
    /* out, q [n_tokens, n_heads * head_dim]; causal; softmax in float32; query head h reads the kv
     * head kv_of_head[h] (host array [n_heads]). window > 0: a query sees itself and the window - 1
     * keys before. */
    void (*paged_attention)(struct backend *b, struct tensor *out, const struct tensor *q,
                            const struct kv_pages *kv, const struct paged_layout *layout,
                            const int32_t *kv_of_head, int32_t n_heads, float scale,
                            int32_t window);
    /* Full (not causal) attention inside each of n_tiles groups of n_tokens_per_tile rows. q, k, v
     * and out [n_tiles * n_tokens_per_tile, n_heads * head_dim], of activations or of `dtype`,
     * which is what its products are computed from, F32 or BF16 (CUDA: as its tensors are). probs:
     * [n_tiles, n_heads, T, T] float32 to fill, or NULL. */
    void (*attention)(struct backend *b, struct tensor *out, const struct tensor *q,
                      const struct tensor *k, const struct tensor *v, int64_t n_tiles,
                      int32_t n_heads, float scale, enum dtype dtype, float *probs);
    /* Pixels [n_tiles, channels, height, width] (U8 or F32) -> patches
     * [n_tiles * (height / ph) * (width / pw), channels * ph * pw]; U8 is normalised as
     * (float(u8) - mean[c]) / std[c], host arrays [channels]. Ragged remainders are dropped. */
    void (*patchify)(struct backend *b, struct tensor *patches, const struct tensor *pixels,
                     int32_t ph, int32_t pw, const float *mean, const float *std);
    /* x [n_tiles, side * side, dim] -> y [n_tiles, (side / k)^2, k * k * dim]: output token (i, j),
     * channel block a * k + b comes from (row k*i + a, column k*j + b).
     * (InternVLModel.pixel_shuffle, ps_version v2) */
    void (*pixel_shuffle)(struct backend *b, struct tensor *y, const struct tensor *x, int32_t side,
                          int32_t k);
    /* y <- x with a type change (F32 <-> BF16), or a plain copy; shapes equal; row strides may
     * differ. */
    void (*copy)(struct backend *b, struct tensor *y, const struct tensor *x);
    /* Page dst[i] <- page src[i], keys and values; src and dst are host arrays [n]. */
    void (*copy_pages)(struct backend *b, struct kv_pages *kv, const int32_t *src,
                       const int32_t *dst, int32_t n);
    /* out [n_rows] <- of each row of logits [n_parts, n_rows, part] float32, whose id i is column
     * i % part of part i / part, i < vocab <= n_parts * part. temperature [n_rows], above 0. All in
     * back-end memory. NULL where the host reads whole rows as fast. */
    void (*top_k)(struct backend *b, struct top_k *out, const float *logits, int32_t n_parts,
                  int32_t n_rows, int32_t part, int32_t vocab, const float *temperature);
    /* out[i] <- a token drawn as params[i] says, for each i < n whose row is one of first …
     * first + n_rows - 1, of which best [n_rows] were found; a function of these alone
     * (kernels/draw_best.h). All in back-end memory. NULL where top_k is. */
    void (*draw)(struct backend *b, struct drawn *out, const struct draw_params *params, int32_t n,
                 const struct top_k *best, int32_t first, int32_t n_rows, int32_t vocab);
    /* NULL where nothing is ever recorded. Ops between are recorded, not run. */
    void (*graph_begin)(struct backend *b);
    struct graph *(*graph_end)(struct backend *b);
    void (*graph_launch)(struct backend *b, struct graph *g);
    void (*graph_free)(struct backend *b, struct graph *g);
    void (*close)(struct backend *b); // releases `state` and `b`; backend_close() calls it
};

struct backend {
    const struct backend_ops *ops;
    enum dtype activation_dtype; // F32 on the CPU
    int kv_in_pairs;             // how bfloat16 and int8 pages are laid out (struct kv_pages)
    int is_host;                 // its memory is the host's: nothing need be downloaded
    int replays;                 // steps are to be recorded and replayed as graphs
    int has_fp8;                 // products of E4M3 with E4M3 (struct linear's x_format)
    int has_int8;                // of int8 with integers of 8 and 4 bits
    int n_threads;               // on the host, at most
    void *state;                 // the back end's own
};

/* isa: NULL or "auto" (backend_cpu_best()), "avx512bf16", "avx512bf16fma", "avx512vnni", "avx512",
 * "avx2", "scalar" (INTERNVLD_ISA): a name this processor lacks dies. n_threads >= 1. The caller
 * closes it.
 */
struct backend *backend_cpu_open(int n_threads, const char *isa);
/* From now on ops take this rank's share of `cores`, at most n_threads, which is what others leave
 * (cpu_cores.h). Without it they take n_threads. */
struct cpu_cores;
void backend_cpu_share(struct backend *b, const struct cpu_cores *cores);
void backend_close(struct backend *b);
/* What products of up to n_rows rows of in_dim columns take of the process's memory beyond their
 * operands, with a weight of `dtype`; `isa` as above. */
size_t backend_cpu_matmul_bytes(const char *isa, int64_t n_rows, int64_t in_dim, enum dtype dtype);
/* What each thread may take beside that for products with a quantised weight [out_dim, in_dim] that
 * is expanded to `dtype`; n_parts 2: gate and up (op_matmul_gated()), else 1. */
size_t backend_cpu_expanded_bytes(const char *isa, int64_t out_dim, int64_t in_dim, int n_parts,
                                  enum dtype dtype);
/* 1 when this processor has the instruction-set path `isa`. */
int backend_cpu_has(const char *isa);
/* The name of the path that is the fastest here: CPUID's, and, between the two of AVX-512 BF16,
 * which has the faster tile, tried once a process (some 100 us). */
const char *backend_cpu_best(void);

/* ---- front doors: same contracts as the table above; a wrong shape or type is a BUG ---- */
void op_matmul(struct backend *b, struct tensor *y, const struct tensor *x, const struct linear *l,
               const struct epilogue *e /* NULL: none */);
/* `gate_up` [n_tokens, 2 d] is scratch for what cannot be had at once. */
void op_matmul_gated(struct backend *b, struct tensor *y, struct tensor *gate_up,
                     const struct tensor *x, const struct linear *l, enum activation act);
void op_linear_pack(struct backend *b, struct linear *l, const struct tensor *w,
                    const struct tensor *bias);
/* The same a part at a time: rows [first, first + n) of the weight are w [n, in_dim]; parts begin
 * at multiples of LINEAR_PACK_ROWS, the first at 0, which brings the bias. */
#define LINEAR_PACK_ROWS 16
void op_linear_pack_rows(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                         const struct tensor *bias);
/* The same of a quantised weight, whole and in parts. */
void op_linear_pack_quantized(struct backend *b, struct linear *l, const struct quantized *q,
                              const struct tensor *bias);
void op_linear_pack_quantized_rows(struct backend *b, struct linear *l, int64_t first,
                                   const struct quantized *q, const struct tensor *bias);
void op_linear_free(struct backend *b, struct linear *l);
void op_embed(struct backend *b, struct tensor *y, const struct tensor *table, const int32_t *ids,
              int32_t first_row);
void op_embed_quantized(struct backend *b, struct tensor *y, const struct linear *table,
                        const int32_t *ids, int32_t first_row);
void op_scatter_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                     const int32_t *rows);
void op_gather_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                    const int32_t *rows);
void op_rms_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                 float eps);
void op_add_rms_norm(struct backend *b, struct tensor *y, struct tensor *x,
                     const struct tensor *add, const float *weight, float eps);
void op_layer_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                   const float *bias, float eps);
void op_add(struct backend *b, struct tensor *y, const struct tensor *x);
void op_add_bias(struct backend *b, struct tensor *y, const float *bias);
void op_gated_activation(struct backend *b, struct tensor *y, const struct tensor *x,
                         enum activation act);
void op_kv_write(struct backend *b, struct kv_pages *kv, const struct paged_layout *layout,
                 struct tensor *k, const struct tensor *v, const struct rotation *rope);
void op_paged_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                        const struct kv_pages *kv, const struct paged_layout *layout,
                        const int32_t *kv_of_head, int32_t n_heads, float scale, int32_t window);
void op_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                  const struct tensor *k, const struct tensor *v, int64_t n_tiles, int32_t n_heads,
                  float scale, enum dtype dtype, float *probs);
void op_patchify(struct backend *b, struct tensor *patches, const struct tensor *pixels, int32_t ph,
                 int32_t pw, const float *mean, const float *std);
void op_pixel_shuffle(struct backend *b, struct tensor *y, const struct tensor *x, int32_t side,
                      int32_t k);
void op_copy(struct backend *b, struct tensor *y, const struct tensor *x);
void op_copy_pages(struct backend *b, struct kv_pages *kv, const int32_t *src, const int32_t *dst,
                   int32_t n);
void *op_alloc(struct backend *b, size_t n_bytes);
/* The same, and from now on nobody else can have that memory: what steps need is there. */
void *op_alloc_resident(struct backend *b, size_t n_bytes);
void op_free(struct backend *b, void *p);
void *op_alloc_host(struct backend *b, size_t n_bytes);
void op_free_host(struct backend *b, void *p);
void op_upload(struct backend *b, void *dst, const void *host_src, size_t n_bytes);
void op_download(struct backend *b, void *host_dst, const void *src, size_t n_bytes);
void op_sync(struct backend *b);
void op_parallel(struct backend *b, void (*work)(void *arg, int thread, int n_threads), void *arg);
/* Of a back end that has them. */
void op_top_k(struct backend *b, struct top_k *out, const float *logits, int32_t n_parts,
              int32_t n_rows, int32_t part, int32_t vocab, const float *temperature);
void op_draw(struct backend *b, struct drawn *out, const struct draw_params *params, int32_t n,
             const struct top_k *best, int32_t first, int32_t n_rows, int32_t vocab);
/* Of a back end that can record, whether it is to (`replays`) or not. */
void op_graph_begin(struct backend *b);
struct graph *op_graph_end(struct backend *b); // the caller frees it, before the back end closes
void op_graph_launch(struct backend *b, struct graph *g);
void op_graph_free(struct backend *b, struct graph *g); // NULL allowed

#endif
