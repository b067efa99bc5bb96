/*
 * InternViT, feature choice, pixel shuffle and projector (vision.h).
 */
#include "daemon/model/vision.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"

#define QK_NORM_EPS 1e-6f   // InternVLVisionRMSNorm's default, not layer_norm_eps
#define PROJECTOR_EPS 1e-5f // nn.LayerNorm's default

/* ---- memory ---- */

/* More rows than this at once make no product faster; larger batches are cut. */
#define SCRATCH_TOKENS 8192

static int scratch_tiles(const struct vision_config *v, int max_tiles)
{
    int fit = SCRATCH_TOKENS / (v->n_patches + 1);
    fit = fit > 1 ? fit : 1;
    return fit < max_tiles ? fit : max_tiles;
}

/* What q, k, v and attention's rows are held in: what products are computed from, which norms of q
 * and k want more of. */
static enum dtype attention_dtype(const struct vision_config *v, enum dtype activation,
                                  enum dtype dtype)
{
    return v->use_qk_norm ? activation : dtype;
}

static void lay_out(struct vision_scratch *s, struct carve *c, const struct model_config *m,
                    int n_tiles, enum dtype activation, enum dtype dtype)
{
    size_t size = dtype_size(activation);
    const struct vision_config *v = &m->vision;
    int64_t dim = v->hidden_size, text = m->text.hidden_size;
    int64_t patch = (int64_t)v->n_channels * v->patch_height * v->patch_width;
    int64_t n = (int64_t)n_tiles * (v->n_patches + 1);
    int64_t largest = (int64_t)VISION_MAX_SCALE * v->n_patches + 1;
    int64_t pixels = (int64_t)v->n_channels * v->image_height * v->image_width;
    n = n > largest ? n : largest;
    /* A tile that is not the native size may have a ragged rest of up to one patch a side. */
    int64_t n_pixels = 2 * pixels * (n_tiles > VISION_MAX_SCALE ? n_tiles : VISION_MAX_SCALE);
    s->n_tokens = n;
    s->pixels = carve(c, n_pixels, sizeof(float));
    s->patches = carve(c, n * patch, size);
    s->x = carve(c, n * dim, sizeof(float));
    s->normed = carve(c, n * dim, size);
    s->qkv = carve(c, 3 * n * dim, dtype_size(attention_dtype(v, activation, dtype)));
    s->attention = carve(c, n * dim, size);
    s->hidden = carve(c, n * v->intermediate_size, dtype_size(dtype));
    s->selected = carve(c, n * dim, sizeof(float));
    s->block = carve(c, n * dim, sizeof(float));
    s->linear_1 = carve(c, n * text, size);
    s->features = carve(c, n * text, sizeof(float));
    s->position = carve(c, largest * dim, sizeof(float));
}

size_t vision_scratch_bytes(const struct model_config *c, int max_tiles, enum dtype activation,
                            enum dtype dtype)
{
    struct vision_scratch s;
    struct carve sum = {0};
    lay_out(&s, &sum, c, scratch_tiles(&c->vision, max_tiles), activation, dtype);
    return sum.used_bytes;
}

size_t vision_host_bytes(const struct model_config *c, int max_tiles)
{
    const struct vision_config *v = &c->vision;
    size_t tile = (size_t)v->n_channels * (size_t)v->image_height * (size_t)v->image_width;
    size_t features = (size_t)c->n_features_per_tile * (size_t)c->text.hidden_size;
    size_t table = (size_t)(1 + v->n_patches) * (size_t)v->hidden_size;
    return (table + (size_t)max_tiles * (tile + 2 * features)) * sizeof(float);
}

void vision_largest_input(const struct model_config *c, int max_tiles, int64_t *n_rows,
                          int64_t *n_columns)
{
    const struct vision_config *v = &c->vision;
    *n_rows = (int64_t)scratch_tiles(v, max_tiles) * (v->n_patches + 1);
    *n_columns = v->intermediate_size > v->hidden_size ? v->intermediate_size : v->hidden_size;
}

/* ---- weights ---- */

static float *vector(struct weights *w, struct backend *b, const char *prefix, const char *name)
{
    char full[160];
    snprintf(full, sizeof(full), "%s%s", prefix, name);
    return weights_vector(w, b, full);
}

static void linear(struct weights *w, struct backend *b, struct linear *l, enum dtype dtype,
                   const char *prefix, const char *name)
{
    struct weight_parts parts = {prefix, {name}, 1};
    weights_linear(w, b, l, dtype, &parts, NULL, NULL, NULL);
}

static void bind_layer(struct vision_layer *l, struct weights *w, struct backend *b,
                       enum dtype dtype, int i)
{
    char p[64];
    snprintf(p, sizeof(p), "vision_tower.encoder.layer.%d.", i);
    struct weight_parts qkv = {p, {"attention.q_proj", "attention.k_proj", "attention.v_proj"}, 1};
    l->norm_before = vector(w, b, p, "layernorm_before.weight");
    l->norm_before_bias = vector(w, b, p, "layernorm_before.bias");
    weights_linear(w, b, &l->qkv, dtype, &qkv, NULL, NULL, NULL);
    l->q_norm = vector(w, b, p, "attention.q_norm.weight");
    l->k_norm = vector(w, b, p, "attention.k_norm.weight");
    linear(w, b, &l->projection, dtype, p, "attention.projection_layer");
    l->lambda_1 = vector(w, b, p, "lambda_1");
    l->norm_after = vector(w, b, p, "layernorm_after.weight");
    l->norm_after_bias = vector(w, b, p, "layernorm_after.bias");
    linear(w, b, &l->fc1, dtype, p, "mlp.fc1");
    linear(w, b, &l->fc2, dtype, p, "mlp.fc2");
    l->lambda_2 = vector(w, b, p, "lambda_2");
}

void vision_init(struct vision_model *m, const struct model_config *c, struct weights *w,
                 struct backend *b, enum dtype dtype, int max_tiles, const float *pixel_mean,
                 const float *pixel_std)
{
    const struct vision_config *v = &c->vision;
    uint64_t before = w->n_bytes;
    *m = (struct vision_model){.config = c,
                               .backend = b,
                               .dtype = dtype,
                               .max_tiles = max_tiles,
                               .pixel_mean = pixel_mean,
                               .pixel_std = pixel_std};
    m->cls = weights_vector(w, b, "vision_tower.embeddings.cls_token");
    m->mask_token = weights_vector(w, b, "vision_tower.embeddings.mask_token");
    linear(w, b, &m->patch, dtype, "vision_tower.embeddings.patch_embeddings.", "projection");
    float *table = weights_vector(w, b, "vision_tower.embeddings.position_embeddings");
    if (table) {
        size_t n_bytes = (size_t)(1 + v->n_patches) * (size_t)v->hidden_size * sizeof(float);
        m->host_position = xcalloc(n_bytes, 1);
        op_download(b, m->host_position, table, n_bytes);
        op_free(b, table);
    }
    m->layers = xcalloc((size_t)v->n_layers, sizeof(*m->layers));
    for (int i = 0; i < v->n_layers; i++)
        bind_layer(&m->layers[i], w, b, dtype, i);
    m->final_norm = weights_vector(w, b, "vision_tower.layernorm.weight");
    m->final_bias = weights_vector(w, b, "vision_tower.layernorm.bias");
    m->block_norm = weights_vector(w, b, "multi_modal_projector.layer_norm.weight");
    m->block_bias = weights_vector(w, b, "multi_modal_projector.layer_norm.bias");
    linear(w, b, &m->linear_1, dtype, "multi_modal_projector.", "linear_1");
    linear(w, b, &m->linear_2, dtype, "multi_modal_projector.", "linear_2");
    m->weight_bytes = w->n_bytes - before;
    m->scratch_bytes = vision_scratch_bytes(c, max_tiles, b->activation_dtype, dtype);
    m->scratch_base = op_alloc_resident(b, m->scratch_bytes);
    struct carve carve = {.base = m->scratch_base};
    lay_out(&m->scratch, &carve, c, scratch_tiles(v, max_tiles), b->activation_dtype, dtype);
}

static void forget_runs(struct vision_model *m)
{
    for (int i = 0; i < m->n_graphs; i++)
        op_graph_free(m->backend, m->graphs[i]);
    free(m->graphs);
    m->graphs = NULL;
    m->n_graphs = 0;
}

void vision_release(struct vision_model *m)
{
    struct backend *b = m->backend;
    if (!b)
        return;
    forget_runs(m);
    op_free(b, m->scratch_base);
    for (int i = 0; i < m->config->vision.n_layers; i++) {
        struct vision_layer *l = &m->layers[i];
        float *vectors[] = {l->norm_before, l->norm_before_bias, l->norm_after, l->norm_after_bias,
                            l->q_norm,      l->k_norm,           l->lambda_1,   l->lambda_2};
        struct linear *linears[] = {&l->qkv, &l->projection, &l->fc1, &l->fc2};
        for (size_t j = 0; j < sizeof(vectors) / sizeof(vectors[0]); j++)
            if (vectors[j])
                op_free(b, vectors[j]);
        for (size_t j = 0; j < sizeof(linears) / sizeof(linears[0]); j++)
            op_linear_free(b, linears[j]);
    }
    float *vectors[] = {m->cls,        m->mask_token, m->final_norm,
                        m->final_bias, m->block_norm, m->block_bias};
    struct linear *linears[] = {&m->patch, &m->linear_1, &m->linear_2};
    for (size_t j = 0; j < sizeof(vectors) / sizeof(vectors[0]); j++)
        if (vectors[j])
            op_free(b, vectors[j]);
    for (size_t j = 0; j < sizeof(linears) / sizeof(linears[0]); j++)
        op_linear_free(b, linears[j]);
    free(m->layers);
    free(m->host_position);
    *m = (struct vision_model){0};
}

/* ---- positions ---- */

/* Keys' cubic convolution with a = -0.75, as torch's bicubic: the four weights at fraction t. */
static void cubic_weights(float t, float w[4])
{
    const float a = -0.75f;
    float d[4] = {t + 1, t, 1 - t, 2 - t};
    for (int i = 0; i < 4; i++) {
        float x = d[i];
        w[i] = i == 0 || i == 3 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
                                : ((a + 2) * x - (a + 3)) * x * x + 1;
    }
}

static int clamp(int i, int n)
{
    return i < 0 ? 0 : i >= n ? n - 1 : i;
}

/* The patch rows of `table`, seen as side x side, resized to height x width (bicubic, align_corners
 * false, no antialias). InternVLVisionEmbeddings.interpolate_pos_encoding. */
static void interpolate(float *dst, const float *table, int side, int height, int width,
                        int64_t dim)
{
    float scale_y = (float)side / (float)height, scale_x = (float)side / (float)width;
    for (int i = 0; i < height; i++) {
        float y = scale_y * ((float)i + 0.5f) - 0.5f, wy[4];
        int y0 = (int)floorf(y);
        cubic_weights(y - (float)y0, wy);
        for (int j = 0; j < width; j++) {
            float x = scale_x * ((float)j + 0.5f) - 0.5f, wx[4];
            int x0 = (int)floorf(x);
            cubic_weights(x - (float)x0, wx);
            float *to = dst + ((int64_t)i * width + j) * dim;
            for (int64_t d = 0; d < dim; d++) {
                float sum = 0;
                for (int a = 0; a < 4; a++) {
                    const float *row = table + (int64_t)clamp(y0 - 1 + a, side) * side * dim + d;
                    float line = 0;
                    for (int b = 0; b < 4; b++)
                        line += wx[b] * row[(int64_t)clamp(x0 - 1 + b, side) * dim];
                    sum += wy[a] * line;
                }
                to[d] = sum;
            }
        }
    }
}

/* Makes scratch.position [1 + patches, dim] the table for tiles of height x width pixels. It is
 * used as it is only for the native patch count of a square tile. */
static void prepare_position(struct vision_model *m, int height, int width)
{
    const struct vision_config *v = &m->config->vision;
    if (!m->host_position || (m->position_height == height && m->position_width == width))
        return;
    int64_t dim = v->hidden_size;
    int n = vision_config_n_patches(v, height, width), side = (int)sqrt((double)v->n_patches);
    float *table = m->host_position, *resized = NULL;
    if (n != v->n_patches || height != width) {
        resized = xcalloc((size_t)(1 + n) * (size_t)dim, sizeof(float));
        memcpy(resized, table, (size_t)dim * sizeof(float));
        interpolate(resized + dim, table + dim, side, height / v->patch_height,
                    width / v->patch_width, dim);
        table = resized;
    }
    op_upload(m->backend, m->scratch.position, table,
              (size_t)(1 + n) * (size_t)dim * sizeof(float));
    free(resized);
    m->position_height = height;
    m->position_width = width;
}

int vision_check_size(const struct model_config *c, int channels, int height, int width,
                      struct error *err)
{
    const struct vision_config *v = &c->vision;
    if (channels != v->n_channels)
        return error_set(err, ERROR_INVALID_ARGUMENT, "tiles have %d channels, the model takes %d",
                         channels, v->n_channels);
    if (height < v->patch_height || width < v->patch_width)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "tiles of %d x %d pixels are smaller than a patch of %d x %d", height,
                         width, v->patch_height, v->patch_width);
    int64_t n = (int64_t)(height / v->patch_height) * (width / v->patch_width);
    int64_t pixels = (int64_t)height * width;
    if (n > (int64_t)VISION_MAX_SCALE * v->n_patches ||
        pixels > (int64_t)2 * VISION_MAX_SCALE * v->image_height * v->image_width)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "tiles of %d x %d pixels have more than %d patches", height, width,
                         VISION_MAX_SCALE * v->n_patches);
    int side = (int)sqrt((double)v->n_patches);
    int native = n == v->n_patches && height == width;
    if (v->use_absolute_position_embeddings && !native && side * side != v->n_patches)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "tiles of %d x %d pixels need a position table of a square count; the "
                         "model has %d",
                         height, width, v->n_patches);
    return 0;
}

/* ---- forward ---- */

/* One run over as many tiles as fit the scratch. */
struct vision_run {
    struct vision_model *m;
    struct capture_list *captures;
    uint32_t wanted;                  // of enum vision_capture
    int32_t first_tile, n_tiles;      // within the batch
    int n_patches, n_tokens;          // of one tile
    struct tensor x, normed, q, k, v; // [n_tiles * n_tokens, …]
};

/* Captures the rows of each tile of x [n_tiles * rows, …]. */
static void capture(const struct vision_run *r, uint32_t kind, const struct tensor *x,
                    const char *fmt, int i)
{
    char name[CAPTURE_NAME_MAX];
    if (!(r->wanted & kind))
        return;
    snprintf(name, sizeof(name), fmt, i);
    int64_t rows = tensor_n_rows(x) / r->n_tiles;
    for (int32_t t = 0; t < r->n_tiles; t++) {
        struct tensor tile = tensor_rows(x, t * rows, rows);
        capture_tensor(r->captures, r->m->backend, name, r->first_tile + t, 0, &tile);
    }
}

static void norm(struct vision_run *r, struct tensor *y, const struct tensor *x,
                 const float *weight, const float *bias)
{
    const struct vision_config *v = &r->m->config->vision;
    if (v->norm_type == NORM_RMS_NORM)
        op_rms_norm(r->m->backend, y, x, weight, v->layer_norm_eps);
    else
        op_layer_norm(r->m->backend, y, x, weight, bias, v->layer_norm_eps);
}

/* bool_masked_pos of InternVLVisionEmbeddings: before the class token and the positions. */
static void mask_patches(struct vision_run *r, const struct tile_batch *t, struct tensor *embedded)
{
    struct tensor token = tensor_2d(r->m->mask_token, DTYPE_F32, 1, embedded->shape[1]);
    const uint8_t *mask = t->mask + (size_t)r->first_tile * (size_t)t->n_mask;
    if (!r->m->mask_token || t->n_mask != r->n_patches)
        die("tile batch %llu: a mask of %d patches", (unsigned long long)t->job_id, t->n_mask);
    for (int64_t i = 0; i < embedded->shape[0]; i++) {
        struct tensor row = tensor_rows(embedded, i, 1);
        if (mask[i])
            op_copy(r->m->backend, &row, &token);
    }
}

/* scratch.pixels as the run's tiles [n_tiles, channels, height, width]. */
static struct tensor pixels_of(const struct vision_run *r, const struct tile_batch *t)
{
    return (struct tensor){.data = r->m->scratch.pixels,
                           .dtype = t->dtype,
                           .n_dims = 4,
                           .shape = {r->n_tiles, t->channels, t->height, t->width},
                           .row_stride = t->width};
}

/* Conv with kernel = stride = patch, class token in front, plus positions. */
static void embed(struct vision_run *r, const struct tile_batch *t)
{
    struct vision_model *m = r->m;
    struct backend *b = m->backend;
    const struct vision_config *v = &m->config->vision;
    int64_t dim = v->hidden_size, n = (int64_t)r->n_tiles * r->n_patches;
    struct tensor pixels = pixels_of(r, t);
    struct tensor patches = tensor_2d(m->scratch.patches, b->activation_dtype, n, m->patch.in_dim);
    struct tensor embedded = tensor_2d(m->scratch.qkv, DTYPE_F32, n, dim);
    struct tensor cls = tensor_2d(m->cls, DTYPE_F32, 1, dim);
    op_patchify(b, &patches, &pixels, v->patch_height, v->patch_width, m->pixel_mean, m->pixel_std);
    op_matmul(b, &embedded, &patches, &m->patch, NULL);
    capture(r, VISION_CAPTURE_LAYER0, &embedded, "vision.embed.patches", 0);
    if (t->n_mask > 0)
        mask_patches(r, t, &embedded);
    struct tensor position = tensor_2d(m->scratch.position, DTYPE_F32, r->n_tokens, dim);
    for (int32_t i = 0; i < r->n_tiles; i++) {
        struct tensor tile = tensor_rows(&r->x, (int64_t)i * r->n_tokens, r->n_tokens);
        struct tensor first = tensor_rows(&tile, 0, 1), rest = tensor_rows(&tile, 1, r->n_patches);
        struct tensor from = tensor_rows(&embedded, (int64_t)i * r->n_patches, r->n_patches);
        op_copy(b, &first, &cls);
        op_copy(b, &rest, &from);
        if (m->host_position)
            op_add(b, &tile, &position);
    }
}

/* InternVLVisionAttention, up to but without the output projection. */
static void attention(struct vision_run *r, const struct vision_layer *l, int i, struct tensor *out,
                      float *probs)
{
    struct vision_model *m = r->m;
    struct backend *b = m->backend;
    const struct vision_config *v = &m->config->vision;
    int64_t dim = v->hidden_size;
    struct tensor qkv = tensor_2d(m->scratch.qkv, out->dtype, r->x.shape[0], 3 * dim);
    op_matmul(b, &qkv, &r->normed, &l->qkv, NULL);
    r->q = tensor_columns(&qkv, 0, dim);
    r->k = tensor_columns(&qkv, dim, dim);
    r->v = tensor_columns(&qkv, 2 * dim, dim);
    if (i == 0) {
        capture(r, VISION_CAPTURE_LAYER0, &r->normed, "vision.layer0.layernorm_before", 0);
        capture(r, VISION_CAPTURE_LAYER0, &r->q, "vision.layer0.q_proj", 0);
        capture(r, VISION_CAPTURE_LAYER0, &r->k, "vision.layer0.k_proj", 0);
        capture(r, VISION_CAPTURE_LAYER0, &r->v, "vision.layer0.v_proj", 0);
    }
    if (l->q_norm) { // over all heads together
        op_rms_norm(b, &r->q, &r->q, l->q_norm, QK_NORM_EPS);
        op_rms_norm(b, &r->k, &r->k, l->k_norm, QK_NORM_EPS);
    }
    if (i == 0 && l->q_norm) {
        capture(r, VISION_CAPTURE_LAYER0, &r->q, "vision.layer0.q_norm", 0);
        capture(r, VISION_CAPTURE_LAYER0, &r->k, "vision.layer0.k_norm", 0);
    }
    op_attention(b, out, &r->q, &r->k, &r->v, r->n_tiles, v->n_heads,
                 (float)(1.0 / sqrt((double)v->head_dim)), m->dtype, probs);
}

/* InternVLVisionLayer. */
static void layer(struct vision_run *r, const struct vision_layer *l, int i)
{
    struct vision_model *m = r->m;
    struct backend *b = m->backend;
    const struct vision_config *v = &m->config->vision;
    int64_t n = r->x.shape[0], n_probs = (int64_t)r->n_tokens * r->n_tokens * v->n_heads;
    enum dtype type = attention_dtype(v, b->activation_dtype, m->dtype);
    struct tensor mixed = tensor_2d(m->scratch.attention, type, n, v->hidden_size);
    struct tensor hidden = tensor_2d(m->scratch.hidden, m->dtype, n, v->intermediate_size);
    int want_probs = (r->wanted & VISION_CAPTURE_ATTENTIONS) != 0;
    float *probs = want_probs ? op_alloc(b, (size_t)(r->n_tiles * n_probs) * sizeof(float)) : NULL;

    norm(r, &r->normed, &r->x, l->norm_before, l->norm_before_bias);
    attention(r, l, i, &mixed, probs);
    if (i == 0 && (r->wanted & VISION_CAPTURE_LAYER0)) { // the module's output, before lambda_1
        op_matmul(b, &r->normed, &mixed, &l->projection, NULL);
        capture(r, VISION_CAPTURE_LAYER0, &r->normed, "vision.layer0.attention_output", 0);
    }
    op_matmul(b, &r->x, &mixed, &l->projection,
              &(struct epilogue){.scale = l->lambda_1, .residual = &r->x});
    norm(r, &r->normed, &r->x, l->norm_after, l->norm_after_bias);
    op_matmul(b, &hidden, &r->normed, &l->fc1, &(struct epilogue){.act = v->hidden_act});
    op_matmul(b, &r->x, &hidden, &l->fc2,
              &(struct epilogue){.scale = l->lambda_2, .residual = &r->x});
    if (want_probs) {
        struct tensor p = tensor_2d(probs, DTYPE_F32,
                                    (int64_t)r->n_tiles * v->n_heads * r->n_tokens, r->n_tokens);
        capture(r, VISION_CAPTURE_ATTENTIONS, &p, "vision.attentions.%d", i);
        op_free(b, probs);
    }
}

/* Drops the class token, shuffles pixels, projects into scratch.features. hidden
 * [n_tiles * n_tokens, dim]. */
static void project(struct vision_run *r, const struct tensor *hidden, int n_features)
{
    struct vision_model *m = r->m;
    struct backend *b = m->backend;
    const struct model_config *c = m->config;
    int64_t dim = c->vision.hidden_size, k = c->downsample_k, n = (int64_t)r->n_tiles * n_features;
    int drop = !c->feature_keeps_cls, kept = r->n_tokens - drop;
    int side = (int)sqrt((double)kept);
    struct tensor selected = tensor_3d(m->scratch.qkv, DTYPE_F32, r->n_tiles, kept, dim);
    struct tensor flat = tensor_2d(m->scratch.qkv, DTYPE_F32, (int64_t)r->n_tiles * kept, dim);
    struct tensor shuffled =
        tensor_3d(m->scratch.block, DTYPE_F32, r->n_tiles, n_features, k * k * dim);
    struct tensor block = tensor_2d(m->scratch.block, DTYPE_F32, n, k * k * dim);
    struct tensor normed = tensor_2d(m->scratch.attention, b->activation_dtype, n, k * k * dim);
    struct tensor inner =
        tensor_2d(m->scratch.linear_1, b->activation_dtype, n, c->text.hidden_size);
    struct tensor features = tensor_2d(m->scratch.features, DTYPE_F32, n, c->text.hidden_size);
    for (int32_t t = 0; t < r->n_tiles; t++) {
        struct tensor from = tensor_rows(hidden, (int64_t)t * r->n_tokens + drop, kept);
        struct tensor to = tensor_rows(&flat, (int64_t)t * kept, kept);
        op_copy(b, &to, &from);
    }
    capture(r, VISION_CAPTURE_PROJECTOR, &flat, "projector.selected", 0);
    op_pixel_shuffle(b, &shuffled, &selected, side, (int32_t)k);
    capture(r, VISION_CAPTURE_PROJECTOR, &block, "projector.pixel_shuffled", 0);
    op_layer_norm(b, &normed, &block, m->block_norm, m->block_bias, PROJECTOR_EPS);
    capture(r, VISION_CAPTURE_PROJECTOR, &normed, "projector.layer_norm", 0);
    if (r->wanted & VISION_CAPTURE_PROJECTOR) { // before the activation
        op_matmul(b, &inner, &normed, &m->linear_1, NULL);
        capture(r, VISION_CAPTURE_PROJECTOR, &inner, "projector.linear_1", 0);
    }
    op_matmul(b, &inner, &normed, &m->linear_1, &(struct epilogue){.act = c->projector_act});
    op_matmul(b, &features, &inner, &m->linear_2, NULL);
}

/* The tiles of one run, from scratch.pixels to scratch.features. */
static void run_tiles(struct vision_run *r, const struct tile_batch *t, int n_features)
{
    struct vision_model *m = r->m;
    struct backend *b = m->backend;
    const struct vision_config *v = &m->config->vision;
    int feature_layer = m->config->feature_layer;
    int64_t n = (int64_t)r->n_tiles * r->n_tokens;
    struct tensor chosen = tensor_2d(m->scratch.selected, DTYPE_F32, n, v->hidden_size);
    r->x = tensor_2d(m->scratch.x, DTYPE_F32, n, v->hidden_size);
    r->normed = tensor_2d(m->scratch.normed, b->activation_dtype, n, v->hidden_size);

    embed(r, t);
    capture(r, VISION_CAPTURE_HIDDEN_STATES, &r->x, "vision.hidden_states.%d", 0);
    if (feature_layer == 0)
        op_copy(b, &chosen, &r->x);
    for (int i = 0; i < v->n_layers; i++) {
        layer(r, &m->layers[i], i);
        capture(r, VISION_CAPTURE_HIDDEN_STATES, &r->x, "vision.hidden_states.%d", i + 1);
        if (feature_layer == i + 1)
            op_copy(b, &chosen, &r->x);
    }
    if (m->final_norm) // a LayerNorm also in towers of RMSNorm blocks
        op_layer_norm(b, &r->x, &r->x, m->final_norm, m->final_bias, v->layer_norm_eps);
    capture(r, VISION_CAPTURE_HIDDEN_STATES | VISION_CAPTURE_LAST, &r->x,
            "vision.last_hidden_state", 0);
    if (n_features)
        project(r, feature_layer == VISION_FEATURE_LAST ? &r->x : &chosen, n_features);
}

/* ---- recorded runs ---- */

/* 1 for tiles that the recorded runs are of: the processor's, with nothing captured. */
static int is_recorded(const struct vision_run *r, const struct tile_batch *t)
{
    const struct vision_config *v = &r->m->config->vision;
    return r->n_tiles <= r->m->n_graphs && t->dtype == DTYPE_U8 && !t->captures && t->n_mask == 0 &&
           t->height == v->image_height && t->width == v->image_width;
}

void vision_record(struct vision_model *m)
{
    const struct model_config *c = m->config;
    const struct vision_config *v = &c->vision;
    struct tile_batch t = {.channels = v->n_channels,
                           .height = v->image_height,
                           .width = v->image_width,
                           .dtype = DTYPE_U8};
    uint64_t start_ns = clock_now_ns();
    int n = (int)(m->scratch.n_tokens / (v->n_patches + 1)), n_features = c->n_features_per_tile;
    if (!m->backend->replays || !m->pixel_mean)
        return;
    forget_runs(m);
    n = n < m->max_tiles ? n : m->max_tiles;
    prepare_position(m, t.height, t.width);
    m->graphs = xcalloc((size_t)n, sizeof(*m->graphs));
    for (m->n_graphs = 0; m->n_graphs < n; m->n_graphs++) {
        struct vision_run r = {.m = m, .n_tiles = m->n_graphs + 1};
        r.n_patches = v->n_patches;
        r.n_tokens = r.n_patches + 1;
        run_tiles(&r, &t, n_features); // products choose their algorithms
        op_graph_begin(m->backend);
        run_tiles(&r, &t, n_features);
        m->graphs[m->n_graphs] = op_graph_end(m->backend);
    }
    op_sync(m->backend); /* ready means that nothing is left to run */
    log_info("vision", "runs of 1 to %d tiles recorded in %.1f s", n,
             (double)(clock_now_ns() - start_ns) / 1e9);
}

/* ---- a batch ---- */

static void run_to_features(struct vision_run *r, const struct tile_batch *t, int n_features,
                            float *features)
{
    struct vision_model *m = r->m;
    struct tensor pixels = pixels_of(r, t);
    size_t tile_bytes =
        (size_t)t->channels * (size_t)t->height * (size_t)t->width * dtype_size(t->dtype);
    size_t n = (size_t)n_features * (size_t)m->config->text.hidden_size;
    op_upload(m->backend, pixels.data, (const char *)t->pixels + (size_t)r->first_tile * tile_bytes,
              (size_t)r->n_tiles * tile_bytes);
    if (is_recorded(r, t)) {
        uint64_t begin_ns = trace_begin();
        op_graph_launch(m->backend, m->graphs[r->n_tiles - 1]);
        trace_end("replay", begin_ns, "tiles", r->n_tiles);
    } else {
        run_tiles(r, t, n_features);
    }
    op_download(m->backend, features + (size_t)r->first_tile * n, m->scratch.features,
                (size_t)r->n_tiles * n * sizeof(float));
}

void vision_forward(struct vision_model *m, const struct tile_batch *t, float *features,
                    struct capture_list *captures)
{
    const struct model_config *c = m->config;
    struct error err;
    if (vision_check_size(c, t->channels, t->height, t->width, &err) != 0)
        die("tile batch %llu: %s", (unsigned long long)t->job_id, err.msg);
    if (t->dtype == DTYPE_U8 && !m->pixel_mean)
        BUG("U8 tiles without a mean");
    int n_features = model_config_n_features(c, t->height, t->width);
    struct vision_run r = {.m = m, .captures = captures, .wanted = t->captures};
    r.n_patches = vision_config_n_patches(&c->vision, t->height, t->width);
    r.n_tokens = r.n_patches + 1;
    prepare_position(m, t->height, t->width);
    int64_t native = (int64_t)c->vision.image_height * c->vision.image_width;
    int32_t fit = (int32_t)(m->scratch.n_tokens / r.n_tokens);
    int32_t fit_pixels = (int32_t)(m->scratch.n_tokens / (c->vision.n_patches + 1) * native /
                                   ((int64_t)t->height * t->width));
    fit = fit_pixels >= 1 && fit_pixels < fit ? fit_pixels : fit;
    for (r.first_tile = 0; r.first_tile < t->n_tiles; r.first_tile += r.n_tiles) {
        r.n_tiles = t->n_tiles - r.first_tile < fit ? t->n_tiles - r.first_tile : fit;
        run_to_features(&r, t, n_features, features);
    }
}
