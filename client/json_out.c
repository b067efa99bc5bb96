/* The JSON writer: one file, one line a top-level value. Owns nothing but its nesting. */
#include "client/json_out.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Length of the UTF-8 character at s [n], or 0 when it is broken. */
static size_t utf8_length(const uint8_t *s, size_t n)
{
    uint8_t c = s[0];
    if (c < 0x80)
        return 1;
    size_t length = c >= 0xc2 && c <= 0xdf   ? 2
                    : (c & 0xf0) == 0xe0     ? 3
                    : c >= 0xf0 && c <= 0xf4 ? 4
                                             : 0;
    if (length == 0 || length > n)
        return 0;
    for (size_t i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    int overlong = (c == 0xe0 && s[1] < 0xa0) || (c == 0xf0 && s[1] < 0x90);
    int surrogate = c == 0xed && s[1] >= 0xa0;
    int too_large = c == 0xf4 && s[1] >= 0x90;
    return overlong || surrogate || too_large ? 0 : length;
}

static void write_quoted(FILE *f, const uint8_t *s, size_t n)
{
    fputc('"', f);
    for (size_t i = 0; i < n;) {
        size_t length = utf8_length(s + i, n - i);
        if (length == 0) {
            fputs("\xef\xbf\xbd", f);
            i++;
        } else if (length > 1) {
            fwrite(s + i, 1, length, f);
            i += length;
        } else {
            uint8_t c = s[i++];
            if (c == '"' || c == '\\')
                fprintf(f, "\\%c", c);
            else if (c == '\n')
                fputs("\\n", f);
            else if (c == '\t')
                fputs("\\t", f);
            else if (c < 0x20 || c == 0x7f)
                fprintf(f, "\\u%04x", c);
            else
                fputc(c, f);
        }
    }
    fputc('"', f);
}

static void begin_member(struct json_out *j, const char *key)
{
    uint64_t level = 1ull << j->depth;
    if (j->depth > 0 && (j->has_members & level))
        fputs(", ", j->file);
    j->has_members |= level;
    if (key) {
        write_quoted(j->file, (const uint8_t *)key, strlen(key));
        fputs(": ", j->file);
    }
}

static void open_level(struct json_out *j, const char *key, char bracket)
{
    begin_member(j, key);
    fputc(bracket, j->file);
    j->depth++;
    j->has_members &= ~(1ull << j->depth);
}

void json_object_begin(struct json_out *j, const char *key)
{
    open_level(j, key, '{');
}

void json_object_end(struct json_out *j)
{
    j->depth--;
    fputc('}', j->file);
}

void json_array_begin(struct json_out *j, const char *key)
{
    open_level(j, key, '[');
}

void json_array_end(struct json_out *j)
{
    j->depth--;
    fputc(']', j->file);
}

void json_string(struct json_out *j, const char *key, const char *s)
{
    json_bytes(j, key, (const uint8_t *)s, strlen(s));
}

void json_bytes(struct json_out *j, const char *key, const uint8_t *s, size_t n_bytes)
{
    begin_member(j, key);
    write_quoted(j->file, s, n_bytes);
}

void json_uint(struct json_out *j, const char *key, uint64_t x)
{
    begin_member(j, key);
    fprintf(j->file, "%" PRIu64, x);
}

void json_int(struct json_out *j, const char *key, int64_t x)
{
    begin_member(j, key);
    fprintf(j->file, "%" PRId64, x);
}

void json_float(struct json_out *j, const char *key, float x)
{
    begin_member(j, key);
    if (isfinite(x))
        fprintf(j->file, "%.9g", (double)x);
    else
        fputs("null", j->file);
}

void json_double(struct json_out *j, const char *key, double x)
{
    begin_member(j, key);
    if (isfinite(x))
        fprintf(j->file, "%.17g", x);
    else
        fputs("null", j->file);
}

void json_bool(struct json_out *j, const char *key, int x)
{
    begin_member(j, key);
    fputs(x ? "true" : "false", j->file);
}

void json_null(struct json_out *j, const char *key)
{
    begin_member(j, key);
    fputs("null", j->file);
}

void json_end_line(struct json_out *j)
{
    fputc('\n', j->file);
    fflush(j->file);
}
