/*
 * The ops that only move values on the CPU: embedding rows, scatter and gather, pages of keys and
 * values (keys rotated on their way), patches of pixels, pixel shuffle, type changes. No sums, so
 * any order will do.
 */
#include <string.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"

/* One op of this file, run for each of n rows. */
struct move_job {
    const struct cpu_vector_ops *vector;
    void (*row)(const struct move_job *job, int64_t i);
    int64_t n;
    struct tensor *y;
    const struct tensor *x, *x2;
    const int32_t *rows, *rows2;
    int32_t first_row, a, b;
    const float *mean, *std;
    struct kv_pages *kv;
    const struct paged_layout *layout;
    const struct rotation *rope;
};

static void move_work(void *arg, int thread, int n_threads)
{
    const struct move_job *job = arg;
    int64_t first, end;
    cpu_share(job->n, thread, n_threads, &first, &end);
    for (int64_t i = first; i < end; i++)
        job->row(job, i);
}

static void move_run(struct backend *b, struct move_job *job, int64_t n, int64_t n_elements)
{
    job->vector = cpu_state(b)->vector;
    job->n = n;
    cpu_parallel(b, n_elements, move_work, job);
}

/* n values from src to dst, widened or rounded to bfloat16 where the types differ. */
static void convert(const struct cpu_vector_ops *vector, void *dst, enum dtype to, const void *src,
                    enum dtype from, int64_t n)
{
    if (to == from)
        memcpy(dst, src, (size_t)n * dtype_size(to));
    else if (to == DTYPE_F32)
        tensor_widen(dst, src, from, n);
    else
        vector->to_bf16(dst, src, n);
}

static void embed_row(const struct move_job *job, int64_t i)
{
    const struct tensor *table = job->x;
    const int64_t dim = tensor_n_cols(table), row = (int64_t)job->rows[i] - job->first_row;
    float *y = cpu_row(job->y, i);
    if (row < 0 || row >= tensor_n_rows(table)) {
        memset(y, 0, (size_t)dim * sizeof(float));
        return;
    }
    convert(job->vector, y, DTYPE_F32, cpu_element(table, row, 0), table->dtype, dim);
}

void cpu_embed(struct backend *b, struct tensor *y, const struct tensor *table, const int32_t *ids,
               int32_t first_row)
{
    struct move_job job = {.row = embed_row, .y = y, .x = table, .rows = ids};
    job.first_row = first_row;
    move_run(b, &job, tensor_n_rows(y), tensor_n_elements(y));
}

static void scatter_row(const struct move_job *job, int64_t i)
{
    if (job->rows[i] < 0)
        return;
    if (job->rows[i] >= tensor_n_rows(job->y))
        BUG("row %d of %lld", job->rows[i], (long long)tensor_n_rows(job->y));
    memcpy(cpu_row(job->y, job->rows[i]), cpu_row(job->x, i),
           (size_t)tensor_n_cols(job->x) * sizeof(float));
}

void cpu_scatter_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                      const int32_t *rows)
{
    struct move_job job = {.row = scatter_row, .y = y, .x = x, .rows = rows};
    move_run(b, &job, tensor_n_rows(x), tensor_n_elements(x));
}

static void gather_row(const struct move_job *job, int64_t i)
{
    if (job->rows[i] < 0 || job->rows[i] >= tensor_n_rows(job->x))
        BUG("row %d of %lld", job->rows[i], (long long)tensor_n_rows(job->x));
    memcpy(cpu_row(job->y, i), cpu_row(job->x, job->rows[i]),
           (size_t)tensor_n_cols(job->x) * sizeof(float));
}

void cpu_gather_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                     const int32_t *rows)
{
    struct move_job job = {.row = gather_row, .y = y, .x = x, .rows = rows};
    move_run(b, &job, tensor_n_rows(y), tensor_n_elements(y));
}

/* The sequence that owns token row i: the last one that starts at or before it. */
static int32_t sequence_of(const struct paged_layout *layout, int64_t i)
{
    int32_t lo = 0, hi = layout->n_sequences;
    while (hi - lo > 1) {
        int32_t middle = lo + (hi - lo) / 2;
        if (layout->query_start[middle] <= i)
            lo = middle;
        else
            hi = middle;
    }
    return lo;
}

/* Slot `slot` of the head of a page whose keys and values these are. */
static void write_slot_f32(const struct kv_pages *kv, float *keys, float *values, int64_t slot,
                           const float *k, const float *v)
{
    keys += slot;
    values += slot * kv->head_dim;
    for (int64_t d = 0; d < kv->head_dim; d++)
        keys[d * kv->page_size] = k[d];
    memcpy(values, v, (size_t)kv->head_dim * sizeof(float));
}

/* The same in pairs: of dimensions in keys, of slots in values. */
static void write_slot_bf16(const struct kv_pages *kv, uint16_t *keys, uint16_t *values,
                            int64_t slot, const float *k, const float *v)
{
    keys += slot * 2;
    values += slot / 2 * 2 * kv->head_dim + slot % 2;
    for (int64_t d = 0; d < kv->head_dim; d += 2, keys += 2 * kv->page_size) {
        keys[0] = f32_to_bf16(k[d]);
        keys[1] = f32_to_bf16(k[d + 1]);
    }
    for (int64_t d = 0; d < kv->head_dim; d++)
        values[2 * d] = f32_to_bf16(v[d]);
}

/* The same in codes, and their scales. */
static void write_slot_i8(const struct cpu_vector_ops *vector, const struct kv_pages *kv,
                          int8_t *keys, int8_t *values, int64_t slot, const float *k,
                          const float *v)
{
    const int64_t dim = kv->head_dim, size = kv->page_size;
    const float scale[2] = {vector->code_scale(k, DTYPE_F32, dim),
                            vector->code_scale(v, DTYPE_F32, dim)};
    memcpy(keys + dim * size + slot * 4, &scale[0], sizeof(float));
    memcpy(values + dim * size + slot * 4, &scale[1], sizeof(float));
    keys += slot / 16 * 32 + slot % 16;
    values += slot / 2 * 2 * dim + slot % 2 * 16;
    for (int64_t d = 0; d < dim; d += 16, values += 32) {
        int8_t codes[16];
        vector->codes(values, v + d, DTYPE_F32, 16, scale[1]);
        vector->codes(codes, k + d, DTYPE_F32, 16, scale[0]);
        for (int i = 0; i < 16; i += 2, keys += 2 * size) {
            keys[0] = codes[i];
            keys[16] = codes[i + 1];
        }
    }
}

/* Row i of t, head by head. */
static void rotate_heads(const struct move_job *job, const struct tensor *t, int64_t i)
{
    const int64_t dim = job->kv->head_dim, half = dim / 2;
    float *row = cpu_row(t, i);
    for (int64_t c = 0; c + dim <= tensor_n_cols(t); c += dim)
        job->vector->rotate(row + c, row + c + half, job->rope->cos + i * half,
                            job->rope->sin + i * half, half);
}

static void kv_write_row(const struct move_job *job, int64_t i)
{
    const struct paged_layout *layout = job->layout;
    const struct kv_pages *kv = job->kv;
    const int32_t s = sequence_of(layout, i);
    const int64_t position = layout->context_len[s] - layout->query_start[s + 1] + i;
    const int64_t index = layout->page_start[s] + position / kv->page_size;
    if (position < 0 || index >= layout->page_start[s + 1])
        BUG("position %lld of sequence %d has no page", (long long)position, s);
    const int32_t page = layout->pages[index];
    if (page < 0 || page >= kv->n_pages)
        BUG("page %d of %d", page, kv->n_pages);
    const int64_t slot = position % kv->page_size, dim = kv->head_dim;
    const size_t head_bytes = kv_head_bytes(kv->head_dim, kv->page_size, kv->dtype);
    if (job->rope) {
        rotate_heads(job, job->rope->q, i);
        rotate_heads(job, job->x, i);
    }
    for (int32_t h = 0; h < kv->n_kv_heads; h++) {
        const size_t at = ((size_t)page * (size_t)kv->n_kv_heads + (size_t)h) * head_bytes;
        void *keys = (char *)kv->k + at, *values = (char *)kv->v + at;
        const float *k = cpu_row(job->x, i) + h * dim, *v = cpu_row(job->x2, i) + h * dim;
        if (kv->dtype == DTYPE_F32)
            write_slot_f32(kv, keys, values, slot, k, v);
        else if (kv->dtype == DTYPE_BF16)
            write_slot_bf16(kv, keys, values, slot, k, v);
        else
            write_slot_i8(job->vector, kv, keys, values, slot, k, v);
    }
}

void cpu_kv_write(struct backend *b, struct kv_pages *kv, const struct paged_layout *layout,
                  struct tensor *k, const struct tensor *v, const struct rotation *rope)
{
    int64_t n_elements = tensor_n_elements(k) + (rope ? 2 * tensor_n_elements(rope->q) : 0);
    if (kv->dtype == DTYPE_BF16 && kv->head_dim % 2)
        BUG("%d dimensions of bfloat16, which lie in pairs", kv->head_dim);
    struct move_job job = {.row = kv_write_row, .x = k, .x2 = v, .kv = kv, .layout = layout};
    job.rope = rope;
    move_run(b, &job, tensor_n_rows(k), n_elements);
}

/* Row i of the patches: channel by channel, row by row of the patch. */
static void patchify_row(const struct move_job *job, int64_t i)
{
    const struct tensor *pixels = job->x;
    const int64_t channels = pixels->shape[1], height = pixels->shape[2], width = pixels->shape[3];
    const int64_t ph = job->a, pw = job->b, columns = width / pw, rows = height / ph;
    const int64_t tile = i / (rows * columns), at = i % (rows * columns);
    float *dst = cpu_row(job->y, i);
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t y = 0; y < ph; y++, dst += pw) {
            int64_t row = (tile * channels + c) * height + at / columns * ph + y;
            int64_t src = row * width + at % columns * pw;
            if (pixels->dtype == DTYPE_F32) {
                memcpy(dst, (const float *)pixels->data + src, (size_t)pw * sizeof(float));
                continue;
            }
            for (int64_t x = 0; x < pw; x++)
                dst[x] =
                    ((float)((const uint8_t *)pixels->data)[src + x] - job->mean[c]) / job->std[c];
        }
    }
}

void cpu_patchify(struct backend *b, struct tensor *patches, const struct tensor *pixels,
                  int32_t ph, int32_t pw, const float *mean, const float *std)
{
    struct move_job job = {.row = patchify_row, .y = patches, .x = pixels, .a = ph, .b = pw};
    job.mean = mean;
    job.std = std;
    move_run(b, &job, tensor_n_rows(patches), tensor_n_elements(patches));
}

static void pixel_shuffle_row(const struct move_job *job, int64_t i)
{
    const int64_t side = job->a, k = job->b, out_side = side / k, dim = tensor_n_cols(job->x);
    const int64_t tile = i / (out_side * out_side), at = i % (out_side * out_side);
    float *dst = cpu_row(job->y, i);
    for (int64_t a = 0; a < k; a++) {
        for (int64_t c = 0; c < k; c++, dst += dim) {
            int64_t row = k * (at / out_side) + a, column = k * (at % out_side) + c;
            memcpy(dst, cpu_row(job->x, (tile * side + row) * side + column),
                   (size_t)dim * sizeof(float));
        }
    }
}

void cpu_pixel_shuffle(struct backend *b, struct tensor *y, const struct tensor *x, int32_t side,
                       int32_t k)
{
    struct move_job job = {.row = pixel_shuffle_row, .y = y, .x = x, .a = side, .b = k};
    move_run(b, &job, tensor_n_rows(y), tensor_n_elements(y));
}

static void copy_row(const struct move_job *job, int64_t i)
{
    convert(job->vector, cpu_element(job->y, i, 0), job->y->dtype, cpu_element(job->x, i, 0),
            job->x->dtype, tensor_n_cols(job->x));
}

void cpu_copy(struct backend *b, struct tensor *y, const struct tensor *x)
{
    struct move_job job = {.row = copy_row, .y = y, .x = x};
    move_run(b, &job, tensor_n_rows(y), tensor_n_elements(y));
}

static void copy_page(const struct move_job *job, int64_t i)
{
    const struct kv_pages *kv = job->kv;
    const int32_t from = job->rows[i], to = job->rows2[i];
    if (from < 0 || from >= kv->n_pages || to < 0 || to >= kv->n_pages)
        BUG("page %d to %d of %d", from, to, kv->n_pages);
    const size_t n_bytes =
        (size_t)kv->n_kv_heads * kv_head_bytes(kv->head_dim, kv->page_size, kv->dtype);
    memmove((char *)kv->k + (size_t)to * n_bytes, (char *)kv->k + (size_t)from * n_bytes, n_bytes);
    memmove((char *)kv->v + (size_t)to * n_bytes, (char *)kv->v + (size_t)from * n_bytes, n_bytes);
}

/* In order and by one thread: a page may be copied from and then be written. */
void cpu_copy_pages(struct backend *b, struct kv_pages *kv, const int32_t *src, const int32_t *dst,
                    int32_t n)
{
    struct move_job job = {.row = copy_page, .kv = kv, .rows = src, .rows2 = dst};
    move_run(b, &job, n, 0);
}
