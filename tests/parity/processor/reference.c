/*
 * Reading the reference set. See reference.h.
 */
#include "tests/parity/processor/reference.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/log.h"

const char *reference_path(const char *name)
{
    static char paths[4][PATH_MAX];
    static int next;
    const char *dir = getenv("INTERNVLD_REFERENCE");
    char *path = paths[next++ % 4];

    if (!dir || !*dir)
        dir = INTERNVLD_REFERENCE_DIR;
    snprintf(path, PATH_MAX, "%s/%s", dir, name);
    if (access(path, R_OK))
        snprintf(path, PATH_MAX, "%s/%s", INTERNVLD_SHARED_REFERENCE_DIR, name);
    if (access(path, R_OK))
        snprintf(path, PATH_MAX, "%s/%s", dir, name);
    return path;
}

int reference_has(const char *name)
{
    if (access(reference_path(name), R_OK) == 0)
        return 1;
    printf("skipped: %s is not here\n", name);
    return 0;
}

char *file_read(const char *path, size_t *n_bytes)
{
    FILE *f = fopen(path, "rb");

    if (!f || fseek(f, 0, SEEK_END))
        die("%s: cannot be opened", path);
    long n = ftell(f);
    char *data = xcalloc((size_t)n + 1, 1);

    rewind(f);
    if (fread(data, 1, (size_t)n, f) != (size_t)n)
        die("%s: cannot be read", path);
    fclose(f);
    if (n_bytes)
        *n_bytes = (size_t)n;
    return data;
}

char *reference_read(const char *name, size_t *n_bytes)
{
    return file_read(reference_path(name), n_bytes);
}

cJSON *reference_json(const char *name)
{
    char *text = reference_read(name, NULL);
    cJSON *root = cJSON_Parse(text);

    if (!root)
        die("%s: not JSON", name);
    free(text);
    return root;
}

cJSON *reference_next_line(char **text)
{
    char *line = *text, *end = strchr(line, '\n');

    if (!*line)
        return NULL;
    *text = end ? end + 1 : line + strlen(line);
    cJSON *root = cJSON_ParseWithLength(line, (size_t)(*text - line));

    if (!root)
        die("a line is not JSON: %.60s", line);
    return root;
}

uint8_t *reference_tensor(const char *file, const char *tensor, int64_t *shape, size_t *n_bytes)
{
    size_t n_file;
    char *data = reference_read(file, &n_file);
    uint64_t n_header;
    uint8_t *out = NULL;

    memcpy(&n_header, data, sizeof(n_header));
    if (n_file < 8 || n_header > n_file - 8)
        die("%s: not a safetensors file", file);
    cJSON *header = cJSON_ParseWithLength(data + 8, n_header);
    const cJSON *entry = cJSON_GetObjectItemCaseSensitive(header, tensor), *item;

    if (entry) {
        const cJSON *offsets = json_item(entry, "data_offsets");
        size_t first = (size_t)cJSON_GetArrayItem(offsets, 0)->valuedouble;
        size_t end = (size_t)cJSON_GetArrayItem(offsets, 1)->valuedouble;
        int i = 0;

        cJSON_ArrayForEach(item, json_item(entry, "shape")) shape[i++] = (int64_t)item->valuedouble;
        *n_bytes = end - first;
        out = xcalloc(*n_bytes + 1, 1);
        memcpy(out, data + 8 + n_header + first, *n_bytes);
    }
    cJSON_Delete(header);
    free(data);
    return out;
}

static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha256_block(struct sha256 *s, const uint8_t *p)
{
    uint32_t w[64], v[8];

    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
               (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t b = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;

        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    memcpy(v, s->state, sizeof(v));
    for (int i = 0; i < 64; i++) {
        uint32_t e = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        uint32_t t1 = v[7] + e + ((v[4] & v[5]) ^ (~v[4] & v[6])) + round_constants[i] + w[i];
        uint32_t a = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        uint32_t t2 = a + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));

        memmove(v + 1, v, 7 * sizeof(*v));
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        s->state[i] += v[i];
}

void sha256_init(struct sha256 *s)
{
    *s = (struct sha256){.state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f,
                                   0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
}

void sha256_update(struct sha256 *s, const void *data, size_t n_bytes)
{
    const uint8_t *p = data;

    while (n_bytes > 0) {
        size_t at = s->n_bytes % 64, n = 64 - at < n_bytes ? 64 - at : n_bytes;

        memcpy(s->block + at, p, n);
        s->n_bytes += n;
        p += n;
        n_bytes -= n;
        if (s->n_bytes % 64 == 0)
            sha256_block(s, s->block);
    }
}

void sha256_hex(struct sha256 *s, char hex[65])
{
    uint64_t n_bits = 8 * s->n_bytes;
    uint8_t length[8];

    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)(n_bits >> (56 - 8 * i));
    sha256_update(s, "\x80", 1);
    while (s->n_bytes % 64 != 56)
        sha256_update(s, "", 1);
    sha256_update(s, length, 8);
    for (int i = 0; i < 8; i++)
        snprintf(hex + 8 * i, 9, "%08x", s->state[i]);
}

const cJSON *json_item(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);

    if (!item)
        die("the reference has no field \"%s\" here", name);
    return item;
}

const char *json_string(const cJSON *object, const char *name)
{
    const cJSON *item = json_item(object, name);

    if (!cJSON_IsString(item))
        die("the reference's \"%s\" is no string", name);
    return item->valuestring;
}

double json_number(const cJSON *object, const char *name)
{
    const cJSON *item = json_item(object, name);

    if (!cJSON_IsNumber(item))
        die("the reference's \"%s\" is no number", name);
    return item->valuedouble;
}
