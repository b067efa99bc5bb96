/* What client/command.c gives its subcommands, for tests that link a part of the command. */
#include <stdlib.h>
#include <string.h>

#include "client/command.h"

void *command_alloc(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (!p)
        abort();
    return p;
}

void *command_grow(void *array, size_t n, size_t size)
{
    void *more = command_alloc(n + 1, size);
    if (n)
        memcpy(more, array, n * size);
    free(array);
    return more;
}
