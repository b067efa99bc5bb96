/*
 * safetensors: valid files, every truncation of one, and each lie a header can tell.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/model/safetensors.h"
#include "tests/unit/model/model_files.h"

static const char good[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                           "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[12,20]},"
                           "\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]},"
                           "\"e\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[20,20]}}  ";
static const uint8_t data[20] = {0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64, 1, 2, 3, 4, 5, 6, 7, 8};

static void reads_tensors(void **state)
{
    (void)state;
    struct safetensors s;
    struct error err;
    size_t n = 0;
    uint8_t *bytes = safetensors_bytes(good, data, sizeof(data), &n);
    assert_int_equal(safetensors_parse(&s, bytes, n, "file", &err), 0);
    assert_int_equal(s.n_tensors, 3);
    const struct safetensors_tensor *a = safetensors_find(&s, "a");
    float third;
    memcpy(&third, a->data + 8, 4);
    assert_true(a->dtype == DTYPE_F32 && a->n_dims == 1 && a->shape[0] == 3 && third == 3);
    assert_int_equal(safetensors_find(&s, "b")->data[0], 1);
    assert_int_equal(safetensors_find(&s, "e")->n_bytes, 0);
    assert_null(safetensors_find(&s, "c"));
    safetensors_release(&s);
    free(bytes);
}

static void every_truncation_is_refused(void **state)
{
    (void)state;
    char dir[4096], path[4200];
    size_t n = 0;
    uint8_t *bytes = safetensors_bytes(good, data, sizeof(data), &n);
    make_directory(dir, sizeof(dir));
    snprintf(path, sizeof(path), "%s/model.safetensors", dir);
    for (size_t i = 0; i < n; i++) {
        struct safetensors s;
        struct error err = {0};
        uint8_t *cut = malloc(i + 1); // exact size, so that a sanitiser sees an overrun
        memcpy(cut, bytes, i);
        assert_int_equal(safetensors_parse(&s, cut, i, "file", &err), -1);
        assert_non_null(strstr(err.msg, "file"));
        free(cut);
        write_file(dir, "model.safetensors", bytes, i);
        assert_int_equal(safetensors_open(&s, dir, &err), -1);
        assert_non_null(strstr(err.msg, "model.safetensors"));
    }
    remove_directory(dir);
    free(bytes);
}

static const struct {
    const char *header, *expected;
} lies[] = {
    {"[]", "no JSON object"},
    {"{\"a\":3}", "data_offsets are expected"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5]}}", "data_offsets are expected"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20],\"x\":1}}", "are expected"},
    {"{\"a\":{\"dtype\":\"F64\",\"shape\":[5],\"data_offsets\":[0,20]}}", "F64 is not supported"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,20]}}", "needs 16 bytes"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,24]}}", "outside the file"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[20,0]}}", "outside the file"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[-1,19]}}", "outside the file"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0.5,20.5]}}", "outside the file"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}",
     "64 bits"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1e300],\"data_offsets\":[0,0]}}", "64 bits"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,20],\"data_offsets\":[0,20]}}",
     "up to 8"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":[0,16]}}", "the file holds 20"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":[4,20]}}", "hole"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[12],\"data_offsets\":[0,12]},"
     "\"b\":{\"dtype\":\"U8\",\"shape\":[12],\"data_offsets\":[8,20]}}",
     "overlap"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},"
     "\"a\":{\"dtype\":\"U8\",\"shape\":[12],\"data_offsets\":[8,20]}}",
     "occurs twice"},
    {"{\"\":{\"dtype\":\"U8\",\"shape\":[20],\"data_offsets\":[0,20]}}", "printable"},
    {"{\"a\\nb\":{\"dtype\":\"U8\",\"shape\":[20],\"data_offsets\":[0,20]}}", "printable"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[[[[20]]]],\"data_offsets\":[0,20]}}", "deep"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[20],\"data_offsets\":[0,20]}", "JSON"},
    {"{} {}", "behind"},
};

static void lies_are_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct safetensors s;
        struct error err = {0};
        size_t n = 0;
        uint8_t *bytes = safetensors_bytes(lies[i].header, data, sizeof(data), &n);
        int rc = safetensors_parse(&s, bytes, n, "file", &err);
        if (rc == 0 || !strstr(err.msg, lies[i].expected))
            fail_msg("%s: rc %d, message \"%s\" lacks \"%s\"", lies[i].header, rc, err.msg,
                     lies[i].expected);
        free(bytes);
    }
}

static void huge_header_length(void **state)
{
    (void)state;
    struct safetensors s;
    struct error err = {0};
    uint8_t bytes[16];
    memset(bytes, 0xff, sizeof(bytes));
    assert_int_equal(safetensors_parse(&s, bytes, sizeof(bytes), "file", &err), -1);
    assert_non_null(strstr(err.msg, "does not fit"));
}

static void write_part(const char *dir, const char *file, const char *tensor)
{
    char header[128];
    size_t n = 0;
    snprintf(header, sizeof(header),
             "{\"%s\":{\"dtype\":\"U8\",\"shape\":[20],\"data_offsets\":[0,20]}}", tensor);
    uint8_t *bytes = safetensors_bytes(header, data, sizeof(data), &n);
    write_file(dir, file, bytes, n);
    free(bytes);
}

static int open_with_index(const char *dir, const char *index, struct error *err)
{
    struct safetensors s;
    write_file(dir, "model.safetensors.index.json", index, strlen(index));
    int rc = safetensors_open(&s, dir, err);
    if (rc == 0) {
        assert_non_null(safetensors_find(&s, "a"));
        assert_string_equal(safetensors_find(&s, "b")->file, "y.safetensors");
        safetensors_release(&s);
    }
    return rc;
}

static void shards(void **state)
{
    (void)state;
    static const struct {
        const char *index, *expected;
    } bad[] = {
        {"{\"weight_map\":{\"a\":\"two.safetensors\"}}", "1 tensors named, the files hold 2"},
        {"{\"weight_map\":{\"a\":\"y.safetensors\",\"b\":\"x.safetensors\"}}",
         "tensor a is not in"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"y.safetensors\",\"c\":\"y.safetensors\"}"
         "}",
         "tensor c is not in"},
        {"{\"weight_map\":{\"a\":\"../x.safetensors\"}}", "no plain file name"},
        {"{\"weight_map\":{\"a\":7}}", "no plain file name"},
        {"{\"weight_map\":{\"a\":\"z.safetensors\"}}", "z.safetensors"},
        {"{\"weight_map\":3}", "no weight_map"},
        {"{", "JSON"},
    };
    char dir[4096];
    struct error err = {0};
    make_directory(dir, sizeof(dir));
    write_part(dir, "x.safetensors", "a");
    write_part(dir, "y.safetensors", "b");
    size_t n = 0;
    uint8_t *two =
        safetensors_bytes("{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},"
                          "\"d\":{\"dtype\":\"U8\",\"shape\":[12],\"data_offsets\":[8,20]}}",
                          data, sizeof(data), &n);
    write_file(dir, "two.safetensors", two, n);
    free(two);
    assert_int_equal(
        open_with_index(dir, "{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"y.safetensors\"}}",
                        &err),
        0);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        int rc = open_with_index(dir, bad[i].index, &err);
        if (rc == 0 || !strstr(err.msg, bad[i].expected))
            fail_msg("%s: rc %d, message \"%s\" lacks \"%s\"", bad[i].index, rc, err.msg,
                     bad[i].expected);
    }
    write_part(dir, "y.safetensors", "a"); // the same tensor in two files
    assert_int_equal(
        open_with_index(dir, "{\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"y.safetensors\"}}",
                        &err),
        -1);
    assert_non_null(strstr(err.msg, "occurs twice"));
    remove_directory(dir);
}

static void not_a_file(void **state)
{
    (void)state;
    struct safetensors s;
    struct error err = {0};
    char dir[4096];
    make_directory(dir, sizeof(dir));
    assert_int_equal(safetensors_open(&s, dir, &err), -1); // empty directory
    assert_non_null(strstr(err.msg, "model.safetensors.index.json"));
    assert_int_equal(safetensors_open(&s, "/dev/null", &err), -1);
    assert_non_null(strstr(err.msg, "not a regular file"));
    assert_int_equal(safetensors_open(&s, "/nonexistent", &err), -1);
    assert_int_equal(err.code, ERROR_NOT_FOUND);
    remove_directory(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_tensors),    cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(lies_are_refused), cmocka_unit_test(huge_header_length),
        cmocka_unit_test(shards),           cmocka_unit_test(not_a_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
