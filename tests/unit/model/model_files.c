/*
 * Small checkpoints made by the tests (model_files.h).
 */
#include "tests/unit/model/model_files.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/log.h"

const char tiny_config[] =
    "{\"architectures\": [\"InternVLForConditionalGeneration\"], \"model_type\": \"internvl\","
    " \"dtype\": \"float32\", \"downsample_ratio\": 0.5, \"image_seq_length\": 4,"
    " \"image_token_id\": 40, \"projector_hidden_act\": \"gelu\", \"tie_word_embeddings\": false,"
    " \"vision_feature_layer\": -1, \"vision_feature_select_strategy\": \"default\","
    " \"text_config\": {\"model_type\": \"qwen2\", \"hidden_size\": 32, \"num_hidden_layers\": 2,"
    "  \"num_attention_heads\": 8, \"num_key_value_heads\": 4, \"intermediate_size\": 48,"
    "  \"vocab_size\": 45, \"max_position_embeddings\": 256, \"hidden_act\": \"silu\","
    "  \"rms_norm_eps\": 1e-06, \"eos_token_id\": 2, \"bos_token_id\": 1, \"pad_token_id\": null,"
    "  \"rope_parameters\": {\"rope_theta\": 1000000.0, \"rope_type\": \"default\"}},"
    " \"vision_config\": {\"model_type\": \"internvl_vision\", \"hidden_size\": 16,"
    "  \"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"intermediate_size\": 24,"
    "  \"image_size\": [56, 56], \"patch_size\": [14, 14], \"num_channels\": 3,"
    "  \"norm_type\": \"layer_norm\", \"use_qk_norm\": true, \"attention_bias\": true}}";

void tiny_config_parse(struct model_config *c)
{
    struct error err;
    assert_int_equal(model_config_parse(c, tiny_config, strlen(tiny_config), NULL, 0, &err), 0);
}

char *config_with(const char *from, const char *to)
{
    const char *at = strstr(tiny_config, from);
    assert_non_null(at);
    size_t n = strlen(tiny_config) + strlen(to) + 1;
    char *text = xcalloc(n, 1);
    snprintf(text, n, "%.*s%s%s", (int)(at - tiny_config), tiny_config, to, at + strlen(from));
    return text;
}

void make_directory(char *path, size_t n_bytes)
{
    const char *base = getenv("TMPDIR");
    snprintf(path, n_bytes, "%s/internvld-model-XXXXXX", base ? base : "/tmp");
    assert_non_null(mkdtemp(path));
}

void remove_directory(const char *path)
{
    char file[4096];
    DIR *d = opendir(path);
    const struct dirent *e;
    while (d && (e = readdir(d)) != NULL) {
        snprintf(file, sizeof(file), "%s/%s", path, e->d_name);
        if (e->d_name[0] != '.')
            unlink(file);
    }
    closedir(d);
    rmdir(path);
}

void write_file(const char *dir, const char *name, const void *bytes, size_t n_bytes)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n_bytes, f), n_bytes);
    fclose(f);
}

float checkpoint_value(const char *name, int64_t i)
{
    unsigned hash = 5381;
    for (const char *p = name; *p; p++)
        hash = hash * 33 + (unsigned char)*p;
    return (float)((hash + (unsigned)i * 7) % 61) / 32 - 1; // steps of 1/32 within [-1, 1)
}

uint8_t *safetensors_bytes(const char *header, const void *data, size_t data_bytes, size_t *n_bytes)
{
    size_t n = strlen(header);
    uint8_t *bytes = xcalloc(8 + n + data_bytes, 1);
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)((uint64_t)n >> (8 * i));
    memcpy(bytes + 8, header, n);
    if (data_bytes)
        memcpy(bytes + 8 + n, data, data_bytes);
    *n_bytes = 8 + n + data_bytes;
    return bytes;
}

/* A file being put together. */
struct maker {
    char *header;
    size_t header_used;
    uint8_t *data;
    size_t data_used;
    const char *dtype;
};

static void put_tensor(struct maker *m, const char *name, const int64_t *shape, int n_dims,
                       size_t n_bytes)
{
    size_t room = ((size_t)1 << 20) - m->header_used;
    char *to = m->header + m->header_used;
    int n = snprintf(to, room, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[",
                     m->header_used > 1 ? "," : "", name, m->dtype);
    for (int i = 0; i < n_dims; i++)
        n += snprintf(to + n, room - (size_t)n, "%s%lld", i ? "," : "", (long long)shape[i]);
    n += snprintf(to + n, room - (size_t)n, "],\"data_offsets\":[%zu,%zu]}", m->data_used,
                  m->data_used + n_bytes);
    m->header_used += (size_t)n;
    m->data_used += n_bytes;
}

static void put_values(struct maker *m, const char *name, int64_t n)
{
    uint8_t *to = m->data + m->data_used;
    for (int64_t i = 0; i < n; i++) {
        float f = checkpoint_value(name, i);
        uint16_t bf16 = f32_to_bf16(f);
        if (strcmp(m->dtype, "F32") == 0)
            memcpy(to + 4 * i, &f, 4);
        else if (strcmp(m->dtype, "BF16") == 0)
            memcpy(to + 2 * i, &bf16, 2);
    }
}

static void put_spec(struct maker *m, const struct weight_list *list, const struct weight_spec *s,
                     const struct checkpoint_options *o)
{
    char name[160];
    int part = -1;
    size_t element = strcmp(m->dtype, "F32") == 0 || strcmp(m->dtype, "I32") == 0 ? 4 : 2;
    int64_t shape[4], n = weight_spec_rows(s) * weight_spec_columns(s);
    memcpy(shape, s->shape, sizeof(shape));
    weight_disk_name(s->name, o->naming, name, sizeof(name), &part);
    if (part > 0) // k and v follow q in one tensor
        return;
    put_values(m, s->name, n);
    if (part == 0) {
        char other[96];
        size_t used = m->data_used;
        const char *const thirds[] = {"k_proj", "v_proj"};
        shape[0] *= 3;
        for (int i = 0; i < 2; i++) {
            snprintf(other, sizeof(other), "%s", s->name);
            memcpy(strstr(other, "q_proj"), thirds[i], 6);
            assert_non_null(weight_list_find(list, other));
            m->data_used += (size_t)n * element;
            put_values(m, other, n);
        }
        m->data_used = used;
        n *= 3;
    }
    if (o->reshape && strcmp(o->reshape, s->name) == 0) { // the same bytes under another shape
        shape[0] = n;
        put_tensor(m, name, shape, 1, (size_t)n * element);
    } else {
        put_tensor(m, name, shape, s->n_dims, (size_t)n * element);
    }
}

void write_checkpoint(const char *dir, const struct model_config *c,
                      const struct checkpoint_options *o)
{
    struct maker m = {.header = xcalloc((size_t)1 << 20, 1),
                      .data = xcalloc((size_t)4 << 20, 1),
                      .dtype = o->dtype ? o->dtype : "F32"};
    struct weight_list list;
    size_t n = 0;
    weight_list_init(&list, c);
    m.header[m.header_used++] = '{';
    for (int i = 0; i < list.n; i++)
        if (!o->leave_out || strcmp(o->leave_out, list.specs[i].name) != 0)
            put_spec(&m, &list, &list.specs[i], o);
    if (o->extra)
        put_tensor(&m, o->extra, (const int64_t[]){2}, 1, strcmp(m.dtype, "F32") == 0 ? 8 : 4);
    m.header[m.header_used++] = '}';
    uint8_t *bytes = safetensors_bytes(m.header, m.data, m.data_used, &n);
    write_file(dir, "model.safetensors", bytes, n);
    free(bytes);
    weight_list_release(&list);
    free(m.data);
    free(m.header);
}
