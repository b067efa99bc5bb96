/*
 * JSON files of a checkpoint, with limits (json.h).
 */
#include "daemon/model/json.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/log.h"

/* Deepest nesting of braces and brackets outside strings; stops counting past `limit`. */
static int nesting_depth(const char *text, size_t n_bytes, int limit)
{
    int depth = 0, deepest = 0, in_string = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = 0;
        } else if (c == '"') {
            in_string = 1;
        } else if (c == '{' || c == '[') {
            if (++depth > deepest)
                deepest = depth;
            if (deepest > limit)
                return deepest;
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return deepest;
}

cJSON *json_parse(const char *text, size_t n_bytes, int max_depth, const char *what,
                  struct error *err)
{
    if (nesting_depth(text, n_bytes, max_depth) > max_depth) {
        error_set(err, ERROR_INVALID_ARGUMENT, "%s: JSON nests more than %d deep", what, max_depth);
        return NULL;
    }
    const char *end = NULL;
    cJSON *root = n_bytes ? cJSON_ParseWithLengthOpts(text, n_bytes, &end, 0) : NULL;
    if (!root) {
        error_set(err, ERROR_INVALID_ARGUMENT, "%s: not valid JSON near byte %zu", what,
                  end && end >= text ? (size_t)(end - text) : (size_t)0);
        return NULL;
    }
    while (end < text + n_bytes && (*end == ' ' || *end == '\n' || *end == '\r' || *end == '\t'))
        end++;
    if (end != text + n_bytes) {
        error_set(err, ERROR_INVALID_ARGUMENT, "%s: bytes behind the JSON value at byte %zu", what,
                  (size_t)(end - text));
        cJSON_Delete(root);
        return NULL;
    }
    return root;
}

char *json_read_file(const char *path, size_t max_bytes, size_t *n_bytes, struct error *err)
{
    char *text = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        error_set(err, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_FAILED_PRECONDITION, "%s: %s",
                  path, strerror(errno));
        return NULL;
    }
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        error_set(err, ERROR_FAILED_PRECONDITION, "%s: not a regular file", path);
        goto out;
    }
    if ((uint64_t)st.st_size > max_bytes) {
        error_set(err, ERROR_INVALID_ARGUMENT, "%s: %lld bytes, at most %zu are accepted", path,
                  (long long)st.st_size, max_bytes);
        goto out;
    }
    size_t size = (size_t)st.st_size, done = 0;
    text = xcalloc(size + 1, 1);
    while (done < size) {
        ssize_t n = read(fd, text + done, size - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            error_set(err, ERROR_FAILED_PRECONDITION, "%s: read stopped at byte %zu of %zu", path,
                      done, size);
            free(text);
            text = NULL;
            goto out;
        }
        done += (size_t)n;
    }
    *n_bytes = size;
out:
    close(fd);
    return text;
}

const char *json_printable(const char *s, char *buf, size_t n_bytes)
{
    size_t i = 0;
    for (; s[i] && i + 1 < n_bytes; i++)
        buf[i] = (s[i] >= 0x20 && s[i] < 0x7f) ? s[i] : '?';
    buf[i] = 0;
    return buf;
}

const char *json_shown(const cJSON *v, char *buf, size_t n_bytes)
{
    char *text = cJSON_PrintUnformatted(v);
    json_printable(text ? text : "?", buf, n_bytes);
    cJSON_free(text);
    return buf;
}

int json_is_integer(const cJSON *v, int min, int max)
{
    double d = cJSON_IsNumber(v) ? v->valuedouble : NAN;
    return d >= min && d <= max && d == floor(d);
}
