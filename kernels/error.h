/*
 * What a client can cause: a code and one sentence.
 *
 * `struct error` is the third kind of failure (see log.h for the other two): it travels up by
 * return value and is mapped to a gRPC status in one place of the gateway. The codes carry the
 * numbers of google.rpc.Code, so that the mapping is the identity; nothing here knows gRPC.
 */
#ifndef INTERNVLD_KERNELS_ERROR_H
#define INTERNVLD_KERNELS_ERROR_H

enum error_code {
    ERROR_OK = 0,
    ERROR_CANCELLED = 1,
    ERROR_INVALID_ARGUMENT = 3,
    ERROR_DEADLINE_EXCEEDED = 4,
    ERROR_NOT_FOUND = 5,
    ERROR_RESOURCE_EXHAUSTED = 8,
    ERROR_FAILED_PRECONDITION = 9,
    ERROR_OUT_OF_RANGE = 11,
    ERROR_UNIMPLEMENTED = 12,
    ERROR_INTERNAL = 13,
    ERROR_UNAVAILABLE = 14,
    ERROR_UNAUTHENTICATED = 16,
};

struct error {
    enum error_code code;
    char msg[256]; // one sentence, no trailing newline, valid UTF-8
};

/* Fills `e` (which may be NULL) and returns -1, so that a caller can write `return error_set(e,
 * …)`. A message cut at the buffer's end is cut on a UTF-8 boundary. */
int error_set(struct error *e, enum error_code code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* The upper-case name of a code as gRPC spells it, "UNKNOWN" for a number that is none. Borrowed.
 */
const char *error_code_name(enum error_code code);

#endif
