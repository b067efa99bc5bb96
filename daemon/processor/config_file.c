/*
 * Reading and checking JSON files of a checkpoint. See config_file.h.
 */
#include "daemon/processor/config_file.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "kernels/log.h"

char *config_file_read(const char *dir, const char *name, size_t max_bytes, size_t *n_bytes,
                       struct error *err)
{
    char path[PATH_MAX];
    struct stat st;
    char *data = NULL;

    *err = (struct error){0};
    if (snprintf(path, sizeof(path), "%s/%s", dir, name) >= (int)sizeof(path)) {
        error_set(err, ERROR_FAILED_PRECONDITION, "%s: the path is too long", name);
        return NULL;
    }
    FILE *f = fopen(path, "rb");

    if (!f) {
        if (errno != ENOENT)
            error_set(err, ERROR_FAILED_PRECONDITION, "%s: %s", path, strerror(errno));
        return NULL;
    }
    if (fstat(fileno(f), &st) || !S_ISREG(st.st_mode)) {
        error_set(err, ERROR_FAILED_PRECONDITION, "%s: not a regular file", path);
        goto out;
    }
    if ((size_t)st.st_size > max_bytes) {
        error_set(err, ERROR_FAILED_PRECONDITION, "%s: %lld bytes, at most %zu are accepted", path,
                  (long long)st.st_size, max_bytes);
        goto out;
    }
    data = xcalloc((size_t)st.st_size + 1, 1);
    if (fread(data, 1, (size_t)st.st_size, f) != (size_t)st.st_size) {
        error_set(err, ERROR_FAILED_PRECONDITION, "%s: cannot be read", path);
        free(data);
        data = NULL;
    } else if (n_bytes) {
        *n_bytes = (size_t)st.st_size;
    }
out:
    fclose(f);
    return data;
}

cJSON *config_file_parse(const char *dir, const char *name, size_t max_bytes, struct error *err)
{
    size_t n_bytes;
    char *text = config_file_read(dir, name, max_bytes, &n_bytes, err);

    if (!text)
        return NULL;
    cJSON *root = cJSON_ParseWithLength(text, n_bytes);

    free(text);
    if (!cJSON_IsObject(root)) {
        error_set(err, ERROR_FAILED_PRECONDITION, "%s/%s: not a JSON object", dir, name);
        cJSON_Delete(root);
        return NULL;
    }
    return root;
}

static const cJSON *field(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);

    return cJSON_IsNull(item) ? NULL : item;
}

int config_int(const cJSON *object, const char *name, int min, int max, int *value,
               const char *file, struct error *err)
{
    const cJSON *item = field(object, name);

    if (!item)
        return 0;
    double v = item->valuedouble;

    if (!cJSON_IsNumber(item) || !(v >= min && v <= max) || v != floor(v))
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "%s: \"%s\" must be a whole number from %d to %d", file, name, min, max);
    *value = (int)v;
    return 0;
}

int config_bool(const cJSON *object, const char *name, int *value, const char *file,
                struct error *err)
{
    const cJSON *item = field(object, name);

    if (!item)
        return 0;
    if (!cJSON_IsBool(item))
        return error_set(err, ERROR_FAILED_PRECONDITION, "%s: \"%s\" must be true or false", file,
                         name);
    *value = cJSON_IsTrue(item);
    return 0;
}

int config_number(const cJSON *object, const char *name, double *value, const char *file,
                  struct error *err)
{
    const cJSON *item = field(object, name);

    if (!item)
        return 0;
    if (!cJSON_IsNumber(item) || !isfinite(item->valuedouble))
        return error_set(err, ERROR_FAILED_PRECONDITION, "%s: \"%s\" must be a number", file, name);
    *value = item->valuedouble;
    return 0;
}

const char *config_string(const cJSON *object, const char *name, const char *file,
                          struct error *err)
{
    const cJSON *item = field(object, name);

    if (!item)
        return NULL;
    if (!cJSON_IsString(item)) {
        error_set(err, ERROR_FAILED_PRECONDITION, "%s: \"%s\" must be a string", file, name);
        return NULL;
    }
    return item->valuestring;
}
