/*
 * The front doors of the ops: shapes and types are checked here once, whatever the back end.
 *
 * A mismatch is our own mistake, so it is a BUG(). An op over no rows returns here. Nothing below
 * needs to ask again; nothing here knows how an op is computed.
 */
#include "kernels/backend.h"

#include "kernels/log.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            BUG("%s: %s does not hold", __func__, #condition);                                     \
    } while (0)

/* A tensor of activations: float32, or the back end's own type; rows that do not overlap. */
static int is_activation(const struct backend *b, const struct tensor *t)
{
    return (t->dtype == DTYPE_F32 || t->dtype == b->activation_dtype) && t->n_dims >= 1 &&
           t->n_dims <= TENSOR_MAX_DIMS && tensor_n_cols(t) >= 0 &&
           (tensor_n_rows(t) <= 1 || t->row_stride >= tensor_n_cols(t));
}

/* What products of `dtype` read: activations, or values of that type. */
static int is_factor(const struct backend *b, const struct tensor *x, enum dtype dtype)
{
    struct tensor as_activation = *x;
    if (x->dtype == dtype)
        as_activation.dtype = DTYPE_F32;
    return is_activation(b, &as_activation);
}

static int same_rows(const struct tensor *a, const struct tensor *b)
{
    return tensor_n_rows(a) == tensor_n_rows(b);
}

static int same_shape(const struct tensor *a, const struct tensor *b)
{
    return same_rows(a, b) && tensor_n_cols(a) == tensor_n_cols(b);
}

static int same_matrix(const struct tensor *a, const struct tensor *b)
{
    return same_shape(a, b) && a->dtype == b->dtype;
}

static int is_empty(const struct tensor *t)
{
    return tensor_n_elements(t) == 0;
}

static int linear_is_sound(const struct linear *l)
{
    int n = l->n_lanes;
    if (n < 1 || n > LANES_MAX || (n & (n - 1)) || l->lane_start[0] != 0 ||
        l->lane_start[n] != l->in_dim || l->out_dim < 1 || l->in_dim < 1)
        return 0;
    for (int i = 0; i < n; i++) {
        if (l->lane_start[i] > l->lane_start[i + 1])
            return 0;
    }
    return l->dtype == DTYPE_F32 || l->dtype == DTYPE_BF16;
}

int linear_takes_int8(const struct linear *l, const struct quantized *q)
{
    int takes = weight_format_is_integer(q->format) && q->in_dim <= INT8_COLUMNS_MAX;
    for (int i = 0; i < l->n_lanes && takes; i++)
        takes = quantized_is_regular(q, l->lane_start[i], l->lane_start[i + 1]);
    return takes;
}

static int is_float(enum dtype t)
{
    return t == DTYPE_F32 || t == DTYPE_BF16 || t == DTYPE_F16;
}

void backend_close(struct backend *b)
{
    if (b)
        b->ops->close(b);
}

void op_linear_pack(struct backend *b, struct linear *l, const struct tensor *w,
                    const struct tensor *bias)
{
    CHECK(tensor_n_rows(w) == l->out_dim);
    op_linear_pack_rows(b, l, 0, w, bias);
}

/* Rows [first, first + n) may be packed, with a bias or NULL. */
static int is_part(const struct linear *l, int64_t first, int64_t n, const struct tensor *bias)
{
    if (first < 0 || first % LINEAR_PACK_ROWS != 0 || (first > 0 && !l->packed))
        return 0;
    if (n > l->out_dim - first || (n % LINEAR_PACK_ROWS != 0 && n != l->out_dim - first))
        return 0;
    return bias == NULL ||
           (first == 0 && is_float(bias->dtype) && tensor_n_elements(bias) == l->out_dim);
}

void op_linear_pack_rows(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                         const struct tensor *bias)
{
    CHECK(linear_is_sound(l));
    CHECK(is_float(w->dtype));
    CHECK(tensor_n_cols(w) == l->in_dim);
    CHECK(is_part(l, first, tensor_n_rows(w), bias));
    b->ops->linear_pack(b, l, first, w, bias);
}

void op_linear_pack_quantized(struct backend *b, struct linear *l, const struct quantized *q,
                              const struct tensor *bias)
{
    CHECK(q->out_dim == l->out_dim);
    op_linear_pack_quantized_rows(b, l, 0, q, bias);
}

void op_linear_pack_quantized_rows(struct backend *b, struct linear *l, int64_t first,
                                   const struct quantized *q, const struct tensor *bias)
{
    CHECK(linear_is_sound(l));
    CHECK(q->format != WEIGHT_FLOAT && q->in_dim == l->in_dim);
    CHECK(is_part(l, first, q->out_dim, bias));
    CHECK(first == 0 || (q->format == l->format && q->n_groups == l->n_groups));
    CHECK(l->x_format == WEIGHT_FLOAT || l->dtype == DTYPE_BF16);
    CHECK(l->x_format != WEIGHT_FP8 || (b->has_fp8 && q->format == WEIGHT_FP8 && q->n_groups == 1));
    CHECK(l->x_format != WEIGHT_INT8 || (b->has_int8 && linear_takes_int8(l, q)));
    b->ops->linear_pack_quantized(b, l, first, q, bias);
}

void op_linear_free(struct backend *b, struct linear *l)
{
    b->ops->linear_free(b, l);
}

void op_matmul(struct backend *b, struct tensor *y, const struct tensor *x, const struct linear *l,
               const struct epilogue *e)
{
    CHECK(linear_is_sound(l) && l->packed);
    CHECK(is_factor(b, y, l->dtype) && is_factor(b, x, l->dtype) && same_rows(x, y));
    CHECK(tensor_n_cols(x) == l->in_dim && tensor_n_cols(y) == l->out_dim);
    CHECK(y->data != x->data || is_empty(y));
    CHECK(!e || !e->residual || (is_activation(b, y) && same_matrix(e->residual, y)));
    if (!is_empty(y))
        b->ops->matmul(b, y, x, l, e);
}

void op_matmul_gated(struct backend *b, struct tensor *y, struct tensor *gate_up,
                     const struct tensor *x, const struct linear *l, enum activation act)
{
    CHECK(linear_is_sound(l) && l->packed);
    CHECK(is_factor(b, y, l->dtype) && is_factor(b, x, l->dtype) && same_rows(x, y));
    CHECK(tensor_n_cols(x) == l->in_dim && 2 * tensor_n_cols(y) == l->out_dim);
    CHECK(y->data != x->data || is_empty(y));
    if (is_empty(y) || (b->ops->matmul_gated && b->ops->matmul_gated(b, y, x, l, act)))
        return;
    op_matmul(b, gate_up, x, l, NULL);
    op_gated_activation(b, y, gate_up, act);
}

void op_embed(struct backend *b, struct tensor *y, const struct tensor *table, const int32_t *ids,
              int32_t first_row)
{
    CHECK(is_activation(b, y));
    CHECK(table->dtype == DTYPE_F32 || table->dtype == DTYPE_BF16);
    CHECK(tensor_n_cols(table) == tensor_n_cols(y));
    if (!is_empty(y))
        b->ops->embed(b, y, table, ids, first_row);
}

void op_embed_quantized(struct backend *b, struct tensor *y, const struct linear *table,
                        const int32_t *ids, int32_t first_row)
{
    CHECK(is_activation(b, y));
    CHECK(table->format != WEIGHT_FLOAT && table->n_lanes == 1);
    CHECK(table->in_dim == tensor_n_cols(y));
    if (!is_empty(y))
        b->ops->embed_quantized(b, y, table, ids, first_row);
}

void op_scatter_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                     const int32_t *rows)
{
    CHECK(is_activation(b, y) && y->dtype == x->dtype && tensor_n_cols(y) == tensor_n_cols(x));
    if (!is_empty(x))
        b->ops->scatter_rows(b, y, x, rows);
}

void op_gather_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                    const int32_t *rows)
{
    CHECK(is_activation(b, y) && y->dtype == x->dtype && tensor_n_cols(y) == tensor_n_cols(x));
    if (!is_empty(y))
        b->ops->gather_rows(b, y, x, rows);
}

void op_rms_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                 float eps)
{
    CHECK(is_activation(b, y) && is_activation(b, x) && same_shape(y, x) && weight);
    if (!is_empty(y))
        b->ops->rms_norm(b, y, x, weight, eps);
}

void op_add_rms_norm(struct backend *b, struct tensor *y, struct tensor *x,
                     const struct tensor *add, const float *weight, float eps)
{
    CHECK(is_activation(b, y) && is_activation(b, x) && same_shape(y, x) && weight);
    CHECK(same_matrix(add, x) && y->data != x->data && y->data != add->data);
    if (!is_empty(y))
        b->ops->add_rms_norm(b, y, x, add, weight, eps);
}

void op_layer_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                   const float *bias, float eps)
{
    CHECK(is_activation(b, y) && is_activation(b, x) && same_shape(y, x) && weight && bias);
    if (!is_empty(y))
        b->ops->layer_norm(b, y, x, weight, bias, eps);
}

void op_add(struct backend *b, struct tensor *y, const struct tensor *x)
{
    CHECK(is_activation(b, y) && same_matrix(y, x));
    if (!is_empty(y))
        b->ops->add(b, y, x);
}

void op_add_bias(struct backend *b, struct tensor *y, const float *bias)
{
    CHECK(is_activation(b, y) && bias);
    if (!is_empty(y))
        b->ops->add_bias(b, y, bias);
}

void op_gated_activation(struct backend *b, struct tensor *y, const struct tensor *x,
                         enum activation act)
{
    CHECK(is_activation(b, x) && same_rows(x, y));
    CHECK(y->dtype == x->dtype || y->dtype == DTYPE_BF16);
    CHECK(tensor_n_cols(x) == 2 * tensor_n_cols(y));
    if (!is_empty(y))
        b->ops->gated_activation(b, y, x, act);
}

static int kv_is_sound(const struct kv_pages *kv)
{
    const int is_known = kv->dtype == DTYPE_F32 || kv->dtype == DTYPE_BF16 ||
                         (kv->dtype == DTYPE_I8 && kv->head_dim % 16 == 0);
    return is_known && kv->page_size > 0 && kv->page_size % 16 == 0 && kv->head_dim > 0 &&
           kv->n_kv_heads > 0 && kv->n_pages > 0;
}

static int rotation_is_sound(const struct backend *b, const struct rotation *r,
                             const struct kv_pages *kv, const struct tensor *k)
{
    return is_activation(b, r->q) && same_rows(r->q, k) && r->q->dtype == k->dtype &&
           kv->head_dim % 2 == 0 && tensor_n_cols(r->q) % kv->head_dim == 0 && r->cos && r->sin;
}

void op_kv_write(struct backend *b, struct kv_pages *kv, const struct paged_layout *layout,
                 struct tensor *k, const struct tensor *v, const struct rotation *rope)
{
    CHECK(kv_is_sound(kv) && is_activation(b, k) && same_matrix(k, v));
    CHECK(tensor_n_cols(k) == (int64_t)kv->n_kv_heads * kv->head_dim);
    CHECK(tensor_n_rows(k) == layout->n_tokens);
    CHECK(!rope || rotation_is_sound(b, rope, kv, k));
    if (layout->n_tokens > 0)
        b->ops->kv_write(b, kv, layout, k, v, rope);
}

void op_paged_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                        const struct kv_pages *kv, const struct paged_layout *layout,
                        const int32_t *kv_of_head, int32_t n_heads, float scale, int32_t window)
{
    CHECK(kv_is_sound(kv) && is_activation(b, q) && same_matrix(out, q) && n_heads > 0);
    CHECK(tensor_n_cols(q) == (int64_t)n_heads * kv->head_dim);
    CHECK(tensor_n_rows(q) == layout->n_tokens);
    for (int32_t h = 0; h < n_heads; h++)
        CHECK(kv_of_head[h] >= 0 && kv_of_head[h] < kv->n_kv_heads);
    if (layout->n_tokens > 0)
        b->ops->paged_attention(b, out, q, kv, layout, kv_of_head, n_heads, scale, window);
}

void op_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                  const struct tensor *k, const struct tensor *v, int64_t n_tiles, int32_t n_heads,
                  float scale, enum dtype dtype, float *probs)
{
    CHECK(dtype == DTYPE_F32 || dtype == DTYPE_BF16);
    CHECK(is_factor(b, q, dtype) && same_matrix(out, q) && same_matrix(k, q));
    CHECK(same_matrix(v, q));
    CHECK(n_heads > 0 && tensor_n_cols(q) % n_heads == 0);
    CHECK(n_tiles >= 0 && (n_tiles > 0 ? tensor_n_rows(q) % n_tiles == 0 : is_empty(q)));
    if (!is_empty(q))
        b->ops->attention(b, out, q, k, v, n_tiles, n_heads, scale, dtype, probs);
}

void op_patchify(struct backend *b, struct tensor *patches, const struct tensor *pixels, int32_t ph,
                 int32_t pw, const float *mean, const float *std)
{
    CHECK(is_activation(b, patches) && pixels->n_dims == 4 && ph > 0 && pw > 0);
    CHECK(pixels->dtype == DTYPE_F32 || (pixels->dtype == DTYPE_U8 && mean && std));
    CHECK(pixels->row_stride == pixels->shape[3]);
    CHECK(tensor_n_cols(patches) == pixels->shape[1] * ph * pw);
    CHECK(tensor_n_rows(patches) ==
          pixels->shape[0] * (pixels->shape[2] / ph) * (pixels->shape[3] / pw));
    if (!is_empty(patches))
        b->ops->patchify(b, patches, pixels, ph, pw, mean, std);
}

void op_pixel_shuffle(struct backend *b, struct tensor *y, const struct tensor *x, int32_t side,
                      int32_t k)
{
    CHECK(is_activation(b, y) && y->dtype == x->dtype && k > 0 && side > 0 && side % k == 0);
    CHECK(tensor_n_cols(y) == (int64_t)k * k * tensor_n_cols(x));
    CHECK(tensor_n_rows(x) % ((int64_t)side * side) == 0);
    CHECK(tensor_n_rows(y) == tensor_n_rows(x) / ((int64_t)k * k));
    if (!is_empty(y))
        b->ops->pixel_shuffle(b, y, x, side, k);
}

void op_copy(struct backend *b, struct tensor *y, const struct tensor *x)
{
    CHECK(same_shape(y, x));
    CHECK(y->dtype == DTYPE_F32 || y->dtype == DTYPE_BF16 || y->dtype == x->dtype);
    CHECK(x->dtype == DTYPE_F32 || x->dtype == DTYPE_BF16 || y->dtype == x->dtype);
    if (!is_empty(y))
        b->ops->copy(b, y, x);
}

void op_copy_pages(struct backend *b, struct kv_pages *kv, const int32_t *src, const int32_t *dst,
                   int32_t n)
{
    CHECK(kv_is_sound(kv) && n >= 0);
    if (n > 0)
        b->ops->copy_pages(b, kv, src, dst, n);
}

void *op_alloc(struct backend *b, size_t n_bytes)
{
    return b->ops->alloc(b, n_bytes);
}

void *op_alloc_resident(struct backend *b, size_t n_bytes)
{
    void *p = b->ops->alloc(b, n_bytes);
    if (b->ops->touch)
        b->ops->touch(b, p, n_bytes);
    return p;
}

void op_free(struct backend *b, void *p)
{
    b->ops->free(b, p);
}

void *op_alloc_host(struct backend *b, size_t n_bytes)
{
    return b->ops->alloc_host(b, n_bytes);
}

void op_free_host(struct backend *b, void *p)
{
    b->ops->free_host(b, p);
}

void op_upload(struct backend *b, void *dst, const void *host_src, size_t n_bytes)
{
    b->ops->upload(b, dst, host_src, n_bytes);
}

void op_download(struct backend *b, void *host_dst, const void *src, size_t n_bytes)
{
    b->ops->download(b, host_dst, src, n_bytes);
}

void op_sync(struct backend *b)
{
    b->ops->sync(b);
}

void op_top_k(struct backend *b, struct top_k *out, const float *logits, int32_t n_parts,
              int32_t n_rows, int32_t part, int32_t vocab, const float *temperature)
{
    CHECK(b->ops->top_k && n_parts > 0 && n_rows >= 0 && part > 0);
    CHECK(vocab > 0 && vocab <= (int64_t)n_parts * part);
    if (n_rows > 0)
        b->ops->top_k(b, out, logits, n_parts, n_rows, part, vocab, temperature);
}

void op_draw(struct backend *b, struct drawn *out, const struct draw_params *params, int32_t n,
             const struct top_k *best, int32_t first, int32_t n_rows, int32_t vocab)
{
    CHECK(b->ops->draw && n >= 0 && first >= 0 && n_rows >= 0 && vocab > 0);
    if (n > 0 && n_rows > 0)
        b->ops->draw(b, out, params, n, best, first, n_rows, vocab);
}

void op_graph_begin(struct backend *b)
{
    CHECK(b->ops->graph_begin);
    b->ops->graph_begin(b);
}

struct graph *op_graph_end(struct backend *b)
{
    return b->ops->graph_end(b);
}

void op_graph_launch(struct backend *b, struct graph *g)
{
    CHECK(g);
    b->ops->graph_launch(b, g);
}

void op_graph_free(struct backend *b, struct graph *g)
{
    if (g)
        b->ops->graph_free(b, g);
}

void op_parallel(struct backend *b, void (*work)(void *arg, int thread, int n_threads), void *arg)
{
    if (b->n_threads == 1)
        work(arg, 0, 1);
    else
        b->ops->parallel(b, work, arg);
}
