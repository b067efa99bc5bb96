/*
 * From a checkpoint's files to the back end's memory (weights.h).
 */
#include "daemon/model/weights.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/weight_codes.h"
#include "kernels/log.h"

#define STAGING_BYTES (4 << 20)

static int ends_with(const char *s, const char *suffix)
{
    size_t n = strlen(s), m = strlen(suffix);
    return n >= m && strcmp(s + n - m, suffix) == 0;
}

/* The biases of zeros that GPTQ's writers give to linears that have none. */
static int is_zero_bias(const struct safetensors_tensor *t)
{
    int is_zero = ends_with(t->name, ".bias");
    for (uint64_t i = 0; i < t->n_bytes && is_zero; i++)
        is_zero = t->data[i] == 0;
    return is_zero;
}

/* Tensors that some files carry and nothing needs: scales of activations and of a KV cache in fewer
 * bits among them, for here both stay floats, or activations have scales of their own. */
static int is_inert(const struct safetensors_tensor *t, const struct quantization *q)
{
    static const char *const suffixes[] = {".input_scale", ".output_scale", ".input_zero_point",
                                           ".k_scale",     ".v_scale",      ".q_scale",
                                           ".kv_scale",    ".weight_format"};
    if (ends_with(t->name, ".rotary_emb.inv_freq"))
        return 1;
    if (!quantization_is_stored(q))
        return 0;
    for (size_t i = 0; i < sizeof(suffixes) / sizeof(suffixes[0]); i++)
        if (ends_with(t->name, suffixes[i]))
            return 1;
    return is_zero_bias(t);
}

/* A listed tensor of floats under one spelling: type and shape. */
static int check_floats(const struct safetensors_tensor *t, const struct weight_spec *s,
                        const int64_t *shape, struct error *err)
{
    if (safetensors_expect_shape(t, shape, s->n_dims, err) != 0)
        return -1;
    if (t->dtype != DTYPE_F32 && t->dtype != DTYPE_BF16 && t->dtype != DTYPE_F16)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor %s: float32, bfloat16 or float16 is expected, found %s",
                         t->file, t->name, dtype_name(t->dtype));
    return 0;
}

/* Finds a listed tensor under any spelling, as floats or codes, and checks type and shape. Absent:
 * source stays zero. */
static int find_source(const struct weights *w, const struct weight_spec *s,
                       const struct quantization *q, struct weight_source *source,
                       struct error *err)
{
    char name[160];
    int may_be_codes = quantization_is_stored(q) && s->kind != KIND_OTHER;
    for (int n = 0; n < NAMING_COUNT; n++) {
        int part = -1, found = 0;
        int64_t shape[4];
        weight_disk_name(s->name, (enum weight_naming)n, name, sizeof(name), &part);
        memcpy(shape, s->shape, sizeof(shape));
        shape[0] *= part >= 0 ? 3 : 1;
        source->first_row = part >= 0 ? part * s->shape[0] : 0;
        if (may_be_codes)
            found = stored_codes_find(&source->codes, &w->files, name, shape[0], shape[1], q, err);
        if (found < 0)
            return -1;
        source->tensor =
            found ? source->codes.parts[STORED_CODES] : safetensors_find(&w->files, name);
        if (source->tensor)
            return found ? 0 : check_floats(source->tensor, s, shape, err);
    }
    return 0;
}

/* Every tensor of the files must have been found by some listed weight. */
static int check_extra(const struct weights *w, const struct quantization *q, struct error *err)
{
    char *used = xcalloc((size_t)w->files.n_tensors + 1, 1);
    int rc = 0;
    for (int i = 0; i < w->list.n; i++) {
        const struct weight_source *source = &w->sources[i];
        if (source->tensor)
            used[source->tensor - w->files.tensors] = 1;
        for (int part = 0; part < STORED_PART_COUNT; part++)
            if (source->codes.parts[part])
                used[source->codes.parts[part] - w->files.tensors] = 1;
    }
    for (int64_t i = 0; i < w->files.n_tensors && rc == 0; i++)
        if (!used[i] && !is_inert(&w->files.tensors[i], q))
            rc = error_set(err, ERROR_INVALID_ARGUMENT,
                           "%s: tensor %s: not expected by config.json, found %lld tensors",
                           w->files.tensors[i].file, w->files.tensors[i].name,
                           (long long)w->files.n_tensors);
    free(used);
    return rc;
}

/* How the files hold a weight of a quantised checkpoint, whatever config.json let expect. */
static void correct_spec(struct weight_spec *s, const struct weight_source *source)
{
    const struct stored_codes *c = &source->codes;
    int has_codes = c->parts[STORED_CODES] != NULL;
    s->format = has_codes ? c->format : WEIGHT_FLOAT;
    s->group_size = has_codes ? stored_codes_group_size(c) : weight_spec_columns(s);
    s->has_zeros = has_codes && stored_codes_has_zeros(c);
    s->has_order = has_codes && c->has_order;
}

static int check_files(struct weights *w, const struct model_config *c, struct error *err)
{
    char shape[96];
    for (int i = 0; i < w->list.n; i++) {
        struct weight_spec *s = &w->list.specs[i];
        if (find_source(w, s, &c->quantization, &w->sources[i], err) != 0)
            return -1;
        if (quantization_is_stored(&c->quantization))
            correct_spec(s, &w->sources[i]);
        int absent = !w->sources[i].tensor;
        if (s->optional)
            w->has_lm_head = !absent;
        if (absent && s->optional && !c->tie_word_embeddings)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "tensor %s: missing, and tie_word_embeddings is false", s->name);
        if (absent && !s->optional)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "tensor %s: missing; shape %s is expected, found none", s->name,
                             safetensors_shape(s->shape, s->n_dims, shape, sizeof(shape)));
    }
    return check_extra(w, &c->quantization, err);
}

int weights_open(struct weights *w, const char *dir, const struct model_config *c, int dummy,
                 struct error *err)
{
    *w = (struct weights){.dummy = dummy,
                          .has_lm_head = !c->tie_word_embeddings,
                          .x_format = c->quantization.x_format};
    if (dummy && quantization_is_stored(&c->quantization))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "--load-format dummy makes floats: it takes no quantised checkpoint "
                         "(config.json: quantization_config)");
    weight_list_init(&w->list, c);
    w->sources = xcalloc((size_t)w->list.n, sizeof(*w->sources));
    if (dummy)
        return 0;
    if (safetensors_open(&w->files, dir, err) == 0 && check_files(w, c, err) == 0)
        return 0;
    weights_release(w);
    return -1;
}

void weights_release(struct weights *w)
{
    free(w->staging);
    safetensors_release(&w->files);
    free(w->sources);
    weight_list_release(&w->list);
    *w = (struct weights){0};
}

static void *staging(struct weights *w, size_t n_bytes)
{
    if (w->staging_bytes < n_bytes) {
        free(w->staging);
        w->staging = xcalloc(n_bytes, 1);
        w->staging_bytes = n_bytes;
    }
    return w->staging;
}

const struct stored_codes *weights_codes(const struct weights *w, const struct weight_spec *s)
{
    const struct stored_codes *c = &w->sources[s - w->list.specs].codes;
    return c->parts[STORED_CODES] ? c : NULL;
}

static enum dtype stored_dtype(const struct weights *w, const struct weight_spec *s)
{
    const struct safetensors_tensor *t = w->sources[s - w->list.specs].tensor;
    return t && !weights_codes(w, s) ? t->dtype : DTYPE_F32; // dummy weights are made in float32
}

static uint64_t mix(uint64_t x) // splitmix64's finaliser
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Norm weights 1, biases small, matrices of unit gain: activations stay of order one. */
static void dummy_row(float *dst, const struct weight_spec *s, int64_t row, struct range columns)
{
    uint64_t key = 0xcbf29ce484222325u;
    for (const char *p = s->name; *p; p++)
        key = (key ^ (uint64_t)(unsigned char)*p) * 0x100000001b3u;
    int64_t n_columns = weight_spec_columns(s);
    int is_norm = s->n_dims == 1 && strstr(s->name, "norm") && strstr(s->name, ".weight");
    float scale = s->n_dims > 1 ? (float)sqrt(3.0 / (double)n_columns) : 0.01f;
    if (s->axis == AXIS_VOCAB && s->home == HOME_FIRST)
        scale = 1;
    for (int64_t i = 0; i < columns.n; i++) {
        uint64_t bits =
            mix(key + (uint64_t)(row * n_columns + columns.start + i + 1) * 0x9e3779b97f4a7c15u);
        float u = (float)(bits >> 40) * 0x1p-23f - 1; // [-1, 1)
        dst[i] = is_norm ? 1.0f : scale * u;
    }
}

/* Columns of one row of a listed tensor into dst [columns.n], whose type is the stored one, or F32:
 * then `aligned` has room for as many of the stored type. A row past the end is zeros. Returns the
 * bytes read of the file. */
static uint64_t read_row(const struct weights *w, const struct weight_spec *s, int64_t row,
                         struct range columns, void *dst, enum dtype dtype, void *aligned)
{
    const struct weight_source *source = &w->sources[s - w->list.specs];
    const enum dtype stored = stored_dtype(w, s);
    const size_t n_bytes = (size_t)columns.n * dtype_size(stored);
    if (row >= weight_spec_rows(s)) {
        memset(dst, 0, (size_t)columns.n * dtype_size(dtype));
        return 0;
    }
    if (!source->tensor) {
        dummy_row(dst, s, row, columns);
        return 0;
    }
    if (weights_codes(w, s))
        return weight_codes_values(w, s, row, columns, dst);
    int64_t first = (source->first_row + row) * weight_spec_columns(s) + columns.start;
    const uint8_t *from = source->tensor->data + (size_t)first * dtype_size(stored);
    if (stored == dtype) {
        memcpy(dst, from, n_bytes);
    } else {
        memcpy(aligned, from, n_bytes);
        tensor_widen(dst, aligned, stored, columns.n);
    }
    return n_bytes;
}

/* What the threads of a back end read together. */
struct slice {
    const struct weights *w;
    const struct weight_spec *s;
    struct range rows, columns;
    char *dst; // [rows.n, columns.n]
    enum dtype dtype;
    _Atomic uint64_t read_bytes;
};

static void read_rows(void *arg, int thread, int n_threads)
{
    struct slice *p = arg;
    const size_t n = (size_t)p->columns.n, row_bytes = n * dtype_size(p->dtype);
    const int64_t end = p->rows.n * (thread + 1) / n_threads;
    const enum dtype stored = stored_dtype(p->w, p->s);
    const int is_rounded = p->dtype == DTYPE_BF16 && stored != DTYPE_BF16;
    void *aligned = xcalloc(n, dtype_size(stored));
    float *wide = is_rounded ? xcalloc(n, sizeof(float)) : NULL;
    uint64_t read_bytes = 0;
    for (int64_t r = p->rows.n * thread / n_threads; r < end; r++) {
        char *row = p->dst + (size_t)r * row_bytes;
        read_bytes +=
            read_row(p->w, p->s, p->rows.start + r, p->columns, is_rounded ? (void *)wide : row,
                     is_rounded ? DTYPE_F32 : p->dtype, aligned);
        for (size_t i = 0; is_rounded && i < n; i++)
            ((uint16_t *)row)[i] = f32_to_bf16(wide[i]);
    }
    p->read_bytes += read_bytes;
    free(wide);
    free(aligned);
}

/* Rows and columns of a listed tensor into dst [rows.n, columns.n], whose type is the stored one,
 * F32 or BF16. */
static void read_slice(struct weights *w, struct backend *b, const struct weight_spec *s,
                       struct range rows, struct range columns, void *dst, enum dtype dtype)
{
    struct slice p = {.w = w, .s = s, .rows = rows, .columns = columns, .dst = dst, .dtype = dtype};
    op_parallel(b, read_rows, &p);
    w->read_bytes += p.read_bytes;
}

void weights_row(const struct weights *w, const struct weight_spec *s, int64_t row, float *dst)
{
    const struct range all = {0, weight_spec_columns(s)};
    void *aligned = xcalloc((size_t)all.n, dtype_size(stored_dtype(w, s)));
    read_row(w, s, row, all, dst, DTYPE_F32, aligned);
    free(aligned);
}

static const struct weight_spec *required(const struct weights *w, const char *name)
{
    const struct weight_spec *s = weight_list_find(&w->list, name);
    if (!s)
        BUG("no weight %s is listed", name);
    return s;
}

float *weights_vector(struct weights *w, struct backend *b, const char *name)
{
    const struct weight_spec *s = weight_list_find(&w->list, name);
    if (!s)
        return NULL;
    struct range rows = {0, weight_spec_rows(s)}, columns = {0, weight_spec_columns(s)};
    size_t n_bytes = (size_t)(rows.n * columns.n) * sizeof(float);
    float *host = staging(w, n_bytes), *p = op_alloc(b, n_bytes);
    read_slice(w, b, s, rows, columns, host, DTYPE_F32);
    op_upload(b, p, host, n_bytes);
    w->n_bytes += n_bytes;
    return p;
}

/* Large weights pass through the staging memory in parts of so many rows. */
static int64_t rows_at_once(int64_t n_columns)
{
    int64_t n = STAGING_BYTES / (n_columns * (int64_t)sizeof(float));
    return n < LINEAR_PACK_ROWS ? LINEAR_PACK_ROWS : n / LINEAR_PACK_ROWS * LINEAR_PACK_ROWS;
}

struct tensor weights_table(struct weights *w, struct backend *b, const char *name,
                            struct range rows, enum dtype dtype)
{
    const struct weight_spec *s = required(w, name);
    struct range columns = {0, weight_spec_columns(s)};
    size_t row_bytes = (size_t)columns.n * dtype_size(dtype);
    struct tensor t = tensor_2d(op_alloc(b, (size_t)rows.n * row_bytes), dtype, rows.n, columns.n);
    for (int64_t done = 0; done < rows.n; done += rows_at_once(columns.n)) {
        struct range part = {rows.start + done, rows_at_once(columns.n)};
        part.n = part.n < rows.n - done ? part.n : rows.n - done;
        void *host = staging(w, (size_t)part.n * row_bytes);
        read_slice(w, b, s, part, columns, host, dtype);
        op_upload(b, (char *)t.data + (size_t)done * row_bytes, host, (size_t)part.n * row_bytes);
        safetensors_forget(&w->files);
    }
    w->n_bytes += (uint64_t)rows.n * row_bytes;
    return t;
}

/* What a linear is made of. */
struct linear_parts {
    const struct weight_spec *specs[3], *biases[3]; // NULL: none
    struct range rows[3], columns[3];
    int n;
    int64_t out, in;
};

static void find_parts(struct linear_parts *p, const struct weights *w,
                       const struct weight_parts *parts, const struct weight_cut *cut,
                       const struct text_config *t)
{
    *p = (struct linear_parts){0};
    for (int i = 0; i < 3 && parts->names[i]; i++, p->n++) {
        char name[160];
        snprintf(name, sizeof(name), "%s%s.weight", parts->prefix, parts->names[i]);
        p->specs[i] = required(w, name);
        snprintf(name, sizeof(name), "%s%s.bias", parts->prefix, parts->names[i]);
        p->biases[i] = parts->with_bias ? weight_list_find(&w->list, name) : NULL;
        p->rows[i] = (struct range){0, weight_spec_rows(p->specs[i])};
        p->columns[i] = (struct range){0, weight_spec_columns(p->specs[i])};
        if (cut)
            weight_cut_ranges(cut, t, p->specs[i], &p->rows[i], &p->columns[i]);
        p->out += p->rows[i].n;
    }
    p->in = p->columns[0].n;
}

/* [out] as float32, zeros for a part that has none; NULL when none has. The caller frees. */
static float *read_bias(struct weights *w, struct backend *b, const struct linear_parts *p)
{
    float *bias = NULL;
    int64_t row = 0;
    for (int i = 0; i < p->n; row += p->rows[i++].n) {
        if (!p->biases[i])
            continue;
        if (!bias)
            bias = xcalloc((size_t)p->out, sizeof(float));
        read_slice(w, b, p->biases[i], p->rows[i], (struct range){0, 1}, bias + row, DTYPE_F32);
    }
    return bias;
}

/* The rows of part i, which is in the stack from `begin` on, that are among rows `of` of the stack;
 * none: n is 0 or less. */
static struct range rows_of_part(const struct linear_parts *p, int i, int64_t begin,
                                 struct range of)
{
    int64_t from = of.start > begin ? of.start : begin;
    int64_t end = of.start + of.n, part_end = begin + p->rows[i].n;
    return (struct range){p->rows[i].start + from - begin,
                          (end < part_end ? end : part_end) - from};
}

/* Rows of the stacked parts into host [n, in]. */
static void read_stacked(struct weights *w, struct backend *b, const struct linear_parts *p,
                         struct range of, char *host, enum dtype dtype)
{
    int64_t begin = 0, done = 0;
    for (int i = 0; i < p->n; begin += p->rows[i++].n) {
        struct range rows = rows_of_part(p, i, begin, of);
        if (rows.n <= 0)
            continue;
        read_slice(w, b, p->specs[i], rows, p->columns[i],
                   host + (size_t)(done * p->in) * dtype_size(dtype), dtype);
        done += rows.n;
    }
}

/* Of a weight, that pass through the staging memory together, from row `first` on. */
static struct range rows_from(const struct linear_parts *p, int64_t first)
{
    int64_t n = rows_at_once(p->in);
    return (struct range){first, n < p->out - first ? n : p->out - first};
}

static void pack_floats(struct weights *w, struct backend *b, struct linear *l,
                        const struct linear_parts *p, const struct tensor *bias)
{
    enum dtype dtype = stored_dtype(w, p->specs[0]);
    for (int i = 1; i < p->n; i++)
        if (stored_dtype(w, p->specs[i]) != dtype)
            dtype = DTYPE_F32;
    for (struct range of = rows_from(p, 0); of.n > 0; of = rows_from(p, of.start + of.n)) {
        char *host = staging(w, (size_t)(of.n * p->in) * dtype_size(dtype));
        read_stacked(w, b, p, of, host, dtype);
        struct tensor rows = tensor_2d(host, dtype, of.n, p->in);
        op_linear_pack_rows(b, l, of.start, &rows, of.start ? NULL : bias);
        safetensors_forget(&w->files);
    }
}

/* 1 when the parts' codes can stand in one weight. */
static int held_alike(const struct weights *w, const struct linear_parts *p)
{
    const struct weight_spec *a = p->specs[0];
    const struct stored_codes *x = weights_codes(w, a);
    int alike = 1;
    for (int i = 1; i < p->n && alike; i++) {
        const struct weight_spec *b = p->specs[i];
        const struct stored_codes *y = weights_codes(w, b);
        alike = weight_spec_is_like(a, b);
        if (alike && a->has_order)
            alike = memcmp(x->parts[STORED_ORDER]->data, y->parts[STORED_ORDER]->data,
                           x->parts[STORED_ORDER]->n_bytes) == 0;
    }
    return alike;
}

/* 0 of the embedding, but where it is the lm_head too: its rows are looked up. */
static int is_multiplied(const struct weights *w, const struct weight_spec *s)
{
    return s->kind != KIND_EMBEDDING || !w->has_lm_head;
}

/* What products with the weight round their input to, as struct linear's x_format. */
static enum weight_format x_format_of(const struct weights *w, const struct weight_spec *s)
{
    int fits = w->x_format == WEIGHT_INT8
                   ? weight_format_is_integer(s->format) && !s->has_order
                   /* Of the whole weight: a shard may have columns of one group, another of two. */
                   : s->format == w->x_format && s->group_size >= weight_spec_columns(s);
    return fits && is_multiplied(w, s) ? w->x_format : WEIGHT_FLOAT;
}

/* The same of codes, into q. */
static void read_codes(struct weights *w, struct backend *b, const struct linear_parts *p,
                       struct range of, struct quantized *q, enum dtype dtype)
{
    int64_t begin = 0, done = 0;
    for (int i = 0; i < p->n; begin += p->rows[i++].n) {
        struct range rows = rows_of_part(p, i, begin, of);
        if (rows.n <= 0)
            continue;
        w->read_bytes +=
            weight_codes_read(q, done, w, p->specs[i], p->specs[0], rows, p->columns[i], dtype, b);
        done += rows.n;
    }
}

static _Noreturn void die_of_int8(const struct linear *l, const struct weight_spec *s)
{
    die("--activation-quantization int8: tensor %s: groups and lanes of integers begin at "
        "multiples of %d columns, of %d at most; here are groups of %lld, %lld columns in %d lanes",
        s->name, 32 / weight_format_bits(s->format), INT8_COLUMNS_MAX, (long long)s->group_size,
        (long long)l->in_dim, l->n_lanes);
}

static void pack_codes(struct weights *w, struct backend *b, struct linear *l,
                       const struct linear_parts *p, const struct tensor *bias)
{
    const struct weight_spec *as = p->specs[0];
    l->x_format = x_format_of(w, as);
    for (struct range of = rows_from(p, 0); of.n > 0; of = rows_from(p, of.start + of.n)) {
        struct quantized q = {0};
        weight_codes_init(&q, w, as, of.n, p->columns[0], staging(w, (size_t)(of.n * p->in)));
        if (of.start == 0 && l->x_format == WEIGHT_INT8 && !linear_takes_int8(l, &q))
            die_of_int8(l, as);
        read_codes(w, b, p, of, &q, l->dtype);
        op_linear_pack_quantized_rows(b, l, of.start, &q, of.start ? NULL : bias);
        weight_codes_release(&q);
        /* A checkpoint's codes may lie column by column: each part reads all of their pages. */
        if (!weights_codes(w, as) || of.start + of.n == p->out)
            safetensors_forget(&w->files);
    }
}

void weights_linear(struct weights *w, struct backend *b, struct linear *l, enum dtype dtype,
                    const struct weight_parts *parts, const struct weight_cut *cut,
                    const struct text_config *t, const struct lanes *lanes)
{
    struct linear_parts p;
    find_parts(&p, w, parts, cut, t);
    *l = (struct linear){.out_dim = p.out, .in_dim = p.in, .dtype = dtype, .n_lanes = 1};
    l->lane_start[1] = p.in;
    if (lanes) {
        l->n_lanes = lanes->n;
        for (int i = 0; i <= lanes->n; i++)
            l->lane_start[i] = lanes->start[i];
    }
    float *bias = read_bias(w, b, &p);
    struct tensor bias_tensor = tensor_1d(bias, DTYPE_F32, p.out);
    if (p.specs[0]->format == WEIGHT_FLOAT || !held_alike(w, &p))
        pack_floats(w, b, l, &p, bias ? &bias_tensor : NULL);
    else
        pack_codes(w, b, l, &p, bias ? &bias_tensor : NULL);
    w->n_bytes += l->packed_bytes + (bias ? (uint64_t)p.out * sizeof(float) : 0);
    w->n_products += is_multiplied(w, p.specs[0]);
    w->n_x_rounded += l->x_format != WEIGHT_FLOAT;
    free(bias);
}
