/*
 * struct error: filled by whoever finds the mistake, read by whoever answers. See error.h.
 */
#include "kernels/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Drops an unfinished UTF-8 sequence that vsnprintf() may have left at the end of a full buffer. */
static void trim_to_code_point(char *s, size_t n)
{
    size_t end = n, back = 0;

    while (back < 4 && end > 0 && ((unsigned char)s[end - 1] & 0xc0) == 0x80) {
        end--;
        back++;
    }
    if (end == 0)
        return;
    unsigned char lead = (unsigned char)s[end - 1];
    size_t need = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;

    if (lead >= 0xc0 && back < need)
        s[end - 1] = '\0';
}

int error_set(struct error *e, enum error_code code, const char *fmt, ...)
{
    va_list ap;

    if (!e)
        return -1;
    e->code = code;
    va_start(ap, fmt);
    int n = vsnprintf(e->msg, sizeof(e->msg), fmt, ap);
    va_end(ap);
    if (n >= (int)sizeof(e->msg))
        trim_to_code_point(e->msg, sizeof(e->msg) - 1);
    return -1;
}

const char *error_code_name(enum error_code code)
{
    static const char *const names[] = {
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    };

    if ((unsigned)code >= sizeof(names) / sizeof(names[0]))
        return "UNKNOWN";
    return names[code];
}
