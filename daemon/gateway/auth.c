/*
 * Bearer token. See auth.h.
 */
#include "daemon/gateway/auth.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/log.h"

#define TOKEN_MIN 16

int auth_load(struct auth *a, const char *path, struct error *err)
{
    int result = -1;
    struct stat st;
    char text[AUTH_TOKEN_MAX + 2];
    ssize_t n_read = 0;
    size_t n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    *a = (struct auth){0};
    if (fd < 0 || fstat(fd, &st) || (n_read = read(fd, text, sizeof(text))) < 0) {
        error_set(err, ERROR_FAILED_PRECONDITION, "--auth-token-file %s: %s", path,
                  strerror(errno));
        goto out;
    }
    if (st.st_mode & (S_IRGRP | S_IROTH))
        log_warn("auth", "%s can be read by others than its owner", path);
    while (n < (size_t)n_read && isgraph((unsigned char)text[n]))
        n++;
    if (n < TOKEN_MIN || n >= AUTH_TOKEN_MAX || (n < (size_t)n_read && text[n] != '\n')) {
        error_set(err, ERROR_FAILED_PRECONDITION,
                  "--auth-token-file %s: the first line must be a token of %d to %d printable "
                  "characters without blanks",
                  path, TOKEN_MIN, AUTH_TOKEN_MAX - 1);
        goto out;
    }
    memcpy(a->token, text, n);
    a->n_bytes = n;
    result = 0;
out:
    explicit_bzero(text, sizeof(text));
    if (fd >= 0)
        close(fd);
    return result;
}

int auth_accepts(const struct auth *a, const char *header, size_t n_bytes)
{
    static const char scheme[] = "bearer ";
    size_t n_scheme = sizeof(scheme) - 1;
    unsigned difference = 0;

    if (n_bytes != n_scheme + a->n_bytes || strncasecmp(header, scheme, n_scheme) != 0)
        return 0;
    for (size_t i = 0; i < a->n_bytes; i++)
        difference |= (unsigned char)header[n_scheme + i] ^ (unsigned char)a->token[i];
    return difference == 0;
}
