/*
 * The reference data (reference.h).
 */
#include "tests/parity/model/reference.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "daemon/model/json.h"
#include "kernels/log.h"

const char *reference_find(const char *name, char *buf, size_t n_bytes)
{
    const char *dirs[] = {getenv("INTERNVLD_REFERENCE"),
                          INTERNVLD_SOURCE_DIR "/tests/data/reference",
                          INTERNVLD_SOURCE_DIR "/../shared/reference"};
    for (int i = 0; i < 3; i++) {
        char path[4096];
        if (!dirs[i])
            continue;
        snprintf(path, sizeof(path), "%s/checkpoints/%s/config.json", dirs[i], name);
        if (access(path, R_OK) != 0)
            continue;
        snprintf(buf, n_bytes, "%s", dirs[i]);
        return buf;
    }
    return NULL;
}

void golden_open(struct safetensors *s, const char *dir, const char *goldens, const char *file)
{
    char path[4096];
    struct error err;
    snprintf(path, sizeof(path), "%s/goldens/%s/%s.safetensors", dir, goldens, file);
    if (safetensors_open(s, path, &err) != 0)
        die("%s", err.msg);
}

float *golden_floats(const struct safetensors *s, const char *name, int64_t *n)
{
    const struct safetensors_tensor *t = safetensors_find(s, name);
    if (!t)
        return NULL;
    void *aligned = xcalloc(t->n_bytes + 1, 1);
    memcpy(aligned, t->data, t->n_bytes);
    *n = (int64_t)(t->n_bytes / dtype_size(t->dtype));
    float *x = xcalloc((size_t)*n + 1, sizeof(float));
    tensor_widen(x, aligned, t->dtype, *n);
    free(aligned);
    return x;
}

int64_t *golden_ints(const struct safetensors *s, const char *name, int64_t *n)
{
    const struct safetensors_tensor *t = safetensors_find(s, name);
    if (!t || t->dtype != DTYPE_I64)
        return NULL;
    int64_t *x = xcalloc(t->n_bytes + 1, 1);
    memcpy(x, t->data, t->n_bytes);
    *n = (int64_t)(t->n_bytes / sizeof(int64_t));
    return x;
}

double golden_scalar(const char *dir, const char *goldens, const char *key)
{
    char path[4096];
    size_t n = 0;
    struct error err;
    snprintf(path, sizeof(path), "%s/goldens/%s/scalars.json", dir, goldens);
    char *text = json_read_file(path, 1 << 20, &n, &err);
    cJSON *root = text ? json_parse(text, n, 8, path, &err) : NULL;
    if (!root)
        die("%s", err.msg);
    double value = cJSON_GetNumberValue(cJSON_GetObjectItemCaseSensitive(root, key));
    cJSON_Delete(root);
    free(text);
    return value;
}

double largest_difference(const float *a, const float *b, int64_t n)
{
    double largest = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= largest))
            largest = isnan(d) ? INFINITY : d;
    }
    return largest;
}

double largest_value(const float *a, int64_t n)
{
    double largest = 0;
    for (int64_t i = 0; i < n; i++)
        largest = fabs((double)a[i]) > largest ? fabs((double)a[i]) : largest;
    return largest;
}
