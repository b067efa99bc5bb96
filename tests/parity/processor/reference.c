/*
 * Reading the reference set. See reference.h.
 */
#include "tests/parity/processor/reference.h"

#include <limits.h>
#include <openssl/evp.h>
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

static void check(int status)
{
    if (status != 1)
        die("SHA-256: libcrypto failed");
}

void sha256_init(struct sha256 *s)
{
    s->context = EVP_MD_CTX_new();
    check(EVP_DigestInit_ex(s->context, EVP_sha256(), NULL));
}

void sha256_update(struct sha256 *s, const void *data, size_t n_bytes)
{
    check(EVP_DigestUpdate(s->context, data, n_bytes));
}

void sha256_hex(struct sha256 *s, char hex[65])
{
    uint8_t digest[32];

    check(EVP_DigestFinal_ex(s->context, digest, NULL));
    EVP_MD_CTX_free(s->context);
    for (int i = 0; i < 32; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
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
