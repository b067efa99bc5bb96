/*
 * One JSON object read field by field (config_reader.h).
 */
#include "daemon/model/config_reader.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void reader_refuse(const struct reader *r, const char *fmt, ...)
{
    if (*r->failed)
        return;
    *r->failed = 1;
    char text[224];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    error_set(r->err, ERROR_INVALID_ARGUMENT, "%s%s", r->where, text);
}

const cJSON *reader_get(const struct reader *r, const char *key)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(r->object, key);
    return cJSON_IsNull(v) ? NULL : v;
}

int reader_int(const struct reader *r, const char *key, int fallback, int min, int max)
{
    const cJSON *v = reader_get(r, key);
    char buf[48];
    if (!v && fallback == READER_REQUIRED)
        reader_refuse(r, "%s: missing; an integer from %d to %d is expected", key, min, max);
    if (!v)
        return fallback == READER_REQUIRED ? min : fallback;
    if (!json_is_integer(v, min, max)) {
        reader_refuse(r, "%s: found %s; an integer from %d to %d is expected", key,
                      json_shown(v, buf, sizeof(buf)), min, max);
        return min;
    }
    return (int)v->valuedouble;
}

float reader_float(const struct reader *r, const char *key, double fallback, double min, double max)
{
    const cJSON *v = reader_get(r, key);
    char buf[48];
    if (!v)
        return (float)fallback;
    double d = cJSON_IsNumber(v) ? v->valuedouble : NAN;
    if (!(d >= min && d <= max)) {
        reader_refuse(r, "%s: found %s; a number from %g to %g is expected", key,
                      json_shown(v, buf, sizeof(buf)), min, max);
        return (float)fallback;
    }
    return (float)d;
}

int reader_bool(const struct reader *r, const char *key, int fallback)
{
    const cJSON *v = reader_get(r, key);
    char buf[48];
    if (v && !cJSON_IsBool(v))
        reader_refuse(r, "%s: found %s; true or false is expected", key,
                      json_shown(v, buf, sizeof(buf)));
    return v ? cJSON_IsTrue(v) : fallback;
}

const char *reader_string(const struct reader *r, const char *key, const char *fallback)
{
    const cJSON *v = reader_get(r, key);
    char buf[48];
    if (v && !cJSON_IsString(v))
        reader_refuse(r, "%s: found %s; a string is expected", key,
                      json_shown(v, buf, sizeof(buf)));
    return cJSON_IsString(v) ? v->valuestring : fallback;
}

int reader_word(const struct reader *r, const char *key, const char *const *names,
                const char *fallback)
{
    const char *word = reader_string(r, key, fallback);
    char list[160] = "", buf[48];
    for (int i = 0; names[i]; i++) {
        if (strcmp(word, names[i]) == 0)
            return i;
        size_t n = strlen(list);
        snprintf(list + n, sizeof(list) - n, "%s%s", i ? ", " : "", names[i]);
    }
    reader_refuse(r, "%s: found \"%s\"; supported: %s", key, json_printable(word, buf, sizeof(buf)),
                  list);
    return 0;
}

struct reader reader_sub(const struct reader *r, const char *key, const char *where)
{
    struct reader s = *r;
    s.object = reader_get(r, key);
    s.where = where;
    if (s.object && !cJSON_IsObject(s.object))
        reader_refuse(r, "%s: an object is expected", key);
    return s;
}
