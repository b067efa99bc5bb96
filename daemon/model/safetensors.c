/*
 * safetensors files, memory-mapped (safetensors.h).
 */
#include "daemon/model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/model/json.h"
#include "kernels/log.h"

#define MAX_FILES 4096
#define MAX_TENSORS (1 << 22)
#define MAX_INDEX_BYTES ((size_t)100000000)
#define HEADER_MAX_DEPTH 4
#define EXACT_IN_DOUBLE 9007199254740992.0 // 2^53: cJSON keeps numbers as doubles

struct safetensors_file {
    char *name;         // base name
    cJSON *header;      // owns the tensors' names
    const void *mapped; // NULL: the caller's bytes
    size_t n_bytes;
};

static int read_dtype(const char *name, enum dtype *out)
{
    static const struct {
        const char *name;
        enum dtype dtype;
    } known[] = {{"F32", DTYPE_F32}, {"BF16", DTYPE_BF16}, {"F16", DTYPE_F16},
                 {"I32", DTYPE_I32}, {"I64", DTYPE_I64},   {"U8", DTYPE_U8},
                 {"BOOL", DTYPE_U8}, {"I8", DTYPE_I8},     {"F8_E4M3", DTYPE_F8_E4M3}};
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (strcmp(name, known[i].name) == 0) {
            *out = known[i].dtype;
            return 0;
        }
    return -1;
}

static int read_count(const cJSON *v, uint64_t *out)
{
    double d = cJSON_IsNumber(v) ? v->valuedouble : -1;
    if (!(d >= 0 && d < EXACT_IN_DOUBLE && d == floor(d)))
        return -1;
    *out = (uint64_t)d;
    return 0;
}

static int name_is_plain(const char *name)
{
    size_t n = strlen(name);
    for (size_t i = 0; i < n; i++)
        if (name[i] <= 0x20 || name[i] >= 0x7f)
            return 0;
    return n > 0 && n < 256;
}

/* {"dtype": …, "shape": […], "data_offsets": [begin, end]}, each once and nothing else. `data`
 * [data_bytes] is what the offsets count from. */
static int read_entry(struct safetensors_tensor *t, const cJSON *entry, const uint8_t *data,
                      uint64_t data_bytes, struct error *err)
{
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets");
    char buf[64];
    if (!name_is_plain(t->name))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor name \"%s\" is empty, too long or not printable ASCII",
                         t->file, json_printable(t->name, buf, sizeof(buf)));
    if (!cJSON_IsObject(entry) || cJSON_GetArraySize(entry) != 3 || !cJSON_IsString(dtype) ||
        !cJSON_IsArray(shape) || !cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor %s: dtype, shape and two data_offsets are expected", t->file,
                         t->name);
    if (read_dtype(dtype->valuestring, &t->dtype) != 0)
        return error_set(
            err, ERROR_INVALID_ARGUMENT,
            "%s: tensor %s: dtype %s is not supported (F32, BF16, F16, I32, I64, U8, I8, F8_E4M3)",
            t->file, t->name, json_printable(dtype->valuestring, buf, sizeof(buf)));
    uint64_t begin = 0, end = 0, n_bytes = dtype_size(t->dtype);
    int n_dims = 0;
    const cJSON *v = NULL;
    cJSON_ArrayForEach(v, shape)
    {
        uint64_t dim = 0;
        if (n_dims == SAFETENSORS_MAX_DIMS || read_count(v, &dim) != 0 ||
            __builtin_mul_overflow(n_bytes, dim, &n_bytes))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "%s: tensor %s: shape is not up to %d sizes that fit in 64 bits",
                             t->file, t->name, SAFETENSORS_MAX_DIMS);
        t->shape[n_dims++] = (int64_t)dim;
    }
    t->n_dims = n_dims;
    if (read_count(cJSON_GetArrayItem(offsets, 0), &begin) != 0 ||
        read_count(cJSON_GetArrayItem(offsets, 1), &end) != 0 || begin > end || end > data_bytes)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor %s: data_offsets lie outside the file's %llu data bytes "
                         "(truncated file?)",
                         t->file, t->name, (unsigned long long)data_bytes);
    if (end - begin != n_bytes)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s: tensor %s: %s of shape %s needs %llu bytes, data_offsets span %llu",
                         t->file, t->name, dtype->valuestring,
                         safetensors_shape(t->shape, n_dims, buf, sizeof(buf)),
                         (unsigned long long)n_bytes, (unsigned long long)(end - begin));
    t->data = data + begin;
    t->n_bytes = n_bytes;
    return 0;
}

static int by_data(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    if (x->data != y->data)
        return x->data < y->data ? -1 : 1;
    return x->n_bytes < y->n_bytes ? -1 : x->n_bytes > y->n_bytes;
}

static int by_name(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* The tensors of one file must cover its data exactly once. */
static int check_coverage(struct safetensors_tensor *t, int64_t n, const uint8_t *data,
                          uint64_t data_bytes, const char *file, struct error *err)
{
    const uint8_t *at = data;
    qsort(t, (size_t)n, sizeof(*t), by_data);
    for (int64_t i = 0; i < n; i++) {
        if (t[i].data != at)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "%s: tensor %s begins at data byte %llu, %llu is expected (a hole or "
                             "an overlap)",
                             file, t[i].name, (unsigned long long)(t[i].data - data),
                             (unsigned long long)(at - data));
        at += t[i].n_bytes;
    }
    if ((uint64_t)(at - data) != data_bytes)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s: the tensors cover %llu bytes, the file holds %llu", file,
                         (unsigned long long)(at - data), (unsigned long long)data_bytes);
    return 0;
}

/* Appends the tensors of one file to *s, whose files[] entry `f` owns the header. */
static int add_file(struct safetensors *s, struct safetensors_file *f, const uint8_t *bytes,
                    uint64_t n_bytes, struct error *err)
{
    uint64_t header_bytes = 0;
    if (n_bytes < 8)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%s: %llu bytes are no safetensors file",
                         f->name, (unsigned long long)n_bytes);
    for (int i = 7; i >= 0; i--)
        header_bytes = header_bytes << 8 | bytes[i];
    if (header_bytes > SAFETENSORS_MAX_HEADER_BYTES || header_bytes > n_bytes - 8)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%s: a header of %llu bytes does not fit (file %llu bytes, limit %u)",
                         f->name, (unsigned long long)header_bytes, (unsigned long long)n_bytes,
                         SAFETENSORS_MAX_HEADER_BYTES);
    f->header = json_parse((const char *)bytes + 8, header_bytes, HEADER_MAX_DEPTH, f->name, err);
    if (!f->header)
        return -1;
    if (!cJSON_IsObject(f->header))
        return error_set(err, ERROR_INVALID_ARGUMENT, "%s: the header is no JSON object", f->name);
    int64_t n = cJSON_GetArraySize(f->header), first = s->n_tensors;
    if (n > MAX_TENSORS - first)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%s: more than %d tensors", f->name,
                         MAX_TENSORS);
    s->tensors = xrealloc(s->tensors, (size_t)(first + n + 1), sizeof(*s->tensors));
    const uint8_t *data = bytes + 8 + header_bytes;
    uint64_t data_bytes = n_bytes - 8 - header_bytes;
    const cJSON *entry = NULL;
    cJSON_ArrayForEach(entry, f->header)
    {
        if (strcmp(entry->string, "__metadata__") == 0)
            continue;
        struct safetensors_tensor *t = &s->tensors[s->n_tensors];
        *t = (struct safetensors_tensor){.name = entry->string, .file = f->name};
        if (read_entry(t, entry, data, data_bytes, err) != 0)
            return -1;
        s->n_tensors++;
    }
    return check_coverage(s->tensors + first, s->n_tensors - first, data, data_bytes, f->name, err);
}

static int sort_names(struct safetensors *s, struct error *err)
{
    if (s->n_tensors)
        qsort(s->tensors, (size_t)s->n_tensors, sizeof(*s->tensors), by_name);
    for (int64_t i = 1; i < s->n_tensors; i++)
        if (strcmp(s->tensors[i - 1].name, s->tensors[i].name) == 0)
            return error_set(err, ERROR_INVALID_ARGUMENT, "%s: tensor %s occurs twice",
                             s->tensors[i].file, s->tensors[i].name);
    return 0;
}

static struct safetensors_file *new_file(struct safetensors *s, const char *name)
{
    s->files = xrealloc(s->files, (size_t)s->n_files + 1, sizeof(*s->files));
    struct safetensors_file *f = &s->files[s->n_files++];
    *f = (struct safetensors_file){.name = xstrdup(name)};
    return f;
}

static int map_file(struct safetensors *s, const char *path, struct error *err)
{
    const char *base = strrchr(path, '/');
    char buf[128];
    struct safetensors_file *f =
        new_file(s, json_printable(base ? base + 1 : path, buf, sizeof(buf)));
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_set(err, errno == ENOENT ? ERROR_NOT_FOUND : ERROR_FAILED_PRECONDITION,
                         "%s: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return error_set(err, ERROR_FAILED_PRECONDITION, "%s: not a regular file", path);
    }
    f->n_bytes = (size_t)st.st_size;
    void *p = f->n_bytes ? mmap(NULL, f->n_bytes, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    close(fd);
    if (p == MAP_FAILED)
        return error_set(err, ERROR_FAILED_PRECONDITION, "%s: mmap: %s", path, strerror(errno));
    f->mapped = p;
    return add_file(s, f, p, f->n_bytes, err);
}

/* Maps each file that weight_map names, once. A name with a slash could leave the directory. */
static int map_indexed(struct safetensors *s, const char *dir, const cJSON *map, struct error *err)
{
    const cJSON *v = NULL;
    char path[4096], buf[64];
    cJSON_ArrayForEach(v, map)
    {
        const char *file = cJSON_IsString(v) ? v->valuestring : "";
        int known = 0;
        if (!name_is_plain(file) || strchr(file, '/') || file[0] == '.')
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "model.safetensors.index.json: \"%s\" is no plain file name",
                             json_printable(file, buf, sizeof(buf)));
        for (int i = s->n_files; i-- > 0 && !known;)
            known = strcmp(s->files[i].name, file) == 0;
        if (known)
            continue;
        if (s->n_files == MAX_FILES)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "model.safetensors.index.json: more than %d files", MAX_FILES);
        snprintf(path, sizeof(path), "%s/%s", dir, file);
        if (map_file(s, path, err) != 0)
            return -1;
    }
    return sort_names(s, err);
}

/* Every tensor of the map is in the file it names, and the files hold no others. */
static int check_index(const struct safetensors *s, const cJSON *map, struct error *err)
{
    const cJSON *v = NULL;
    int64_t n = 0;
    char buf[96];
    cJSON_ArrayForEach(v, map)
    {
        const struct safetensors_tensor *t = safetensors_find(s, v->string);
        if (!t || strcmp(t->file, v->valuestring) != 0)
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "model.safetensors.index.json: tensor %s is not in %s",
                             json_printable(v->string, buf, sizeof(buf)), v->valuestring);
        n++;
    }
    if (n != s->n_tensors)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "model.safetensors.index.json: %lld tensors named, the files hold %lld",
                         (long long)n, (long long)s->n_tensors);
    return 0;
}

static int open_indexed(struct safetensors *s, const char *dir, struct error *err)
{
    char path[4096];
    size_t n = 0;
    snprintf(path, sizeof(path), "%s/model.safetensors.index.json", dir);
    char *text = json_read_file(path, MAX_INDEX_BYTES, &n, err);
    cJSON *root =
        text ? json_parse(text, n, HEADER_MAX_DEPTH, "model.safetensors.index.json", err) : NULL;
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(root, "weight_map");
    int rc = -1;
    if (root && !cJSON_IsObject(map))
        error_set(err, ERROR_INVALID_ARGUMENT, "model.safetensors.index.json: no weight_map");
    else if (root && map_indexed(s, dir, map, err) == 0)
        rc = check_index(s, map, err);
    cJSON_Delete(root);
    free(text);
    return rc;
}

int safetensors_open(struct safetensors *s, const char *path, struct error *err)
{
    struct stat st;
    char file[4096];
    int rc;
    *s = (struct safetensors){0};
    if (stat(path, &st) != 0)
        return error_set(err, ERROR_NOT_FOUND, "%s: %s", path, strerror(errno));
    snprintf(file, sizeof(file), "%s/model.safetensors", path);
    if (!S_ISDIR(st.st_mode))
        rc = map_file(s, path, err);
    else if (access(file, F_OK) == 0)
        rc = map_file(s, file, err);
    else
        rc = open_indexed(s, path, err);
    if (rc == 0)
        rc = sort_names(s, err);
    if (rc != 0)
        safetensors_release(s);
    return rc;
}

int safetensors_parse(struct safetensors *s, const uint8_t *bytes, uint64_t n_bytes,
                      const char *file, struct error *err)
{
    *s = (struct safetensors){0};
    if (add_file(s, new_file(s, file), bytes, n_bytes, err) == 0 && sort_names(s, err) == 0)
        return 0;
    safetensors_release(s);
    return -1;
}

void safetensors_forget(const struct safetensors *s)
{
    for (int i = 0; i < s->n_files; i++) {
        if (s->files[i].mapped)
            madvise((void *)(uintptr_t)s->files[i].mapped, s->files[i].n_bytes, MADV_DONTNEED);
    }
}

void safetensors_release(struct safetensors *s)
{
    for (int i = 0; i < s->n_files; i++) {
        if (s->files[i].mapped)
            munmap((void *)(uintptr_t)s->files[i].mapped, s->files[i].n_bytes);
        cJSON_Delete(s->files[i].header);
        free(s->files[i].name);
    }
    free(s->files);
    free(s->tensors);
    *s = (struct safetensors){0};
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct safetensors_tensor key = {.name = name};
    return s->n_tensors ? bsearch(&key, s->tensors, (size_t)s->n_tensors, sizeof(key), by_name)
                        : NULL;
}

const char *safetensors_shape(const int64_t *shape, int n_dims, char *buf, size_t n_bytes)
{
    size_t n = (size_t)snprintf(buf, n_bytes, "[");
    for (int i = 0; i < n_dims && n < n_bytes; i++)
        n += (size_t)snprintf(buf + n, n_bytes - n, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (n < n_bytes)
        snprintf(buf + n, n_bytes - n, "]");
    return buf;
}

int safetensors_expect_shape(const struct safetensors_tensor *t, const int64_t *shape, int n_dims,
                             struct error *err)
{
    char expected[96], found[96];
    if (t->n_dims == n_dims && memcmp(t->shape, shape, (size_t)n_dims * sizeof(*shape)) == 0)
        return 0;
    return error_set(err, ERROR_INVALID_ARGUMENT, "%s: tensor %s: shape %s is expected, found %s",
                     t->file, t->name, safetensors_shape(shape, n_dims, expected, sizeof(expected)),
                     safetensors_shape(t->shape, t->n_dims, found, sizeof(found)));
}
