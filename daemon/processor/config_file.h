/*
 * The processor's JSON files: read with a bound, parsed, fields taken with their type checked. A
 * file that is wrong is FAILED_PRECONDITION with its path and the field: the operator's to mend.
 */
#ifndef INTERNVLD_PROCESSOR_CONFIG_FILE_H
#define INTERNVLD_PROCESSOR_CONFIG_FILE_H

#include <cjson/cJSON.h>
#include <stddef.h>

#include "kernels/error.h"

/* DIR/NAME whole, NUL-terminated, caller frees; *n_bytes may be NULL. NULL: the file does not exist
 * (err->code stays ERROR_OK) or an error. */
char *config_file_read(const char *dir, const char *name, size_t max_bytes, size_t *n_bytes,
                       struct error *err);
/* As above, parsed: an object, freed with cJSON_Delete(). */
cJSON *config_file_parse(const char *dir, const char *name, size_t max_bytes, struct error *err);

/* Fields. A missing or null field leaves *value alone and is 0; a wrong type is -1 and an error
 * naming `file` and the field. */
int config_int(const cJSON *object, const char *name, int min, int max, int *value,
               const char *file, struct error *err);
int config_bool(const cJSON *object, const char *name, int *value, const char *file,
                struct error *err);
int config_number(const cJSON *object, const char *name, double *value, const char *file,
                  struct error *err);
/* A string or NULL (missing or null); *err is set when it is something else. Borrowed. */
const char *config_string(const cJSON *object, const char *name, const char *file,
                          struct error *err);

#endif
